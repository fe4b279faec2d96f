"""Products with stored weights on the CPU: every build against float64 and the reference, alone and together."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from tenfold import _native
from tenfold.formats import BF16, F32, FP8_BLOCK, FP8_BLOCK_F32, I64, MXFP4, WeightFormat
from tenfold.ops import Experts, Stack, Weight, cpu_linear, reference

FORMATS = (F32, BF16, FP8_BLOCK, FP8_BLOCK_F32, MXFP4)
ROWS = (0, 1, 2, 3, 4, 5, 12, 13, 31, 33, 127, 129, 1000)
ISAS = _native.available_isas()

format_cases = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
isa_cases = pytest.mark.parametrize("isa", ISAS)
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(form: WeightFormat, out: int, columns: int, seed: int = 0) -> Weight:
    """Random codes, none of them NaN, and scales around one hundredth."""
    generator, shape = seeded(seed), (out, columns)
    if form in (F32, BF16):
        data = torch.randn(shape, generator=generator)
        return Weight("w", shape, form, data.bfloat16() if form is BF16 else data)
    data = torch.randint(0, 256, form.stored_shape(shape), generator=generator, dtype=torch.uint8)
    if form is not MXFP4:
        data[(data & 0x7F) == 0x7F] = 0
    scale_shape = form.scale_shape(shape)
    assert scale_shape is not None
    if form is FP8_BLOCK_F32:
        return Weight("w", shape, form, data, torch.rand(scale_shape, generator=generator) / 100)
    scale = torch.randint(117, 124, scale_shape, generator=generator, dtype=torch.uint8)
    return Weight("w", shape, form, data, scale)


def rows(n: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(n, *shape, generator=seeded(seed))


def law(x: Tensor, w: Weight) -> Tensor:
    return x.double() @ reference.dequantize(w).double().t()


def sizes_of(x: Tensor, w: Weight) -> Tensor:
    """What the terms of each product add up to without their signs: what a rounding error is measured by."""
    return x.double().abs() @ reference.dequantize(w).double().abs().t()


def assert_near(found: Tensor, expected: Tensor, sizes: Tensor | None = None) -> None:
    """Float32 sums, however ordered: within 5e-7 of the terms' size, or 5e-6 of the largest number."""
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    error = (found.double() - expected).abs()
    if expected.numel() and sizes is not None:
        assert (error <= 5e-7 * sizes).all(), float((error / sizes).max())
    elif expected.numel():
        assert error.max() <= 5e-6 * expected.abs().max(), float(error.max() / expected.abs().max())


def columns_of(form: WeightFormat) -> tuple[int, ...]:
    return (32, 544, 1056) if form is MXFP4 else (1, 31, 33, 129, 513, 1000)


@isa_cases
@format_cases
@pytest.mark.parametrize("out", [1, 3, 4, 33, 131])
def test_linear_agrees_with_float64(form: WeightFormat, isa: str, out: int) -> None:
    for columns in columns_of(form):
        w, x = weight(form, out, columns), rows(max(ROWS), columns)
        expected, sizes = law(x, w), sizes_of(x, w)
        for n in ROWS:
            assert_near(cpu_linear.linear(x[:n], w, isa=isa), expected[:n], sizes[:n])


@isa_cases
@format_cases
def test_a_row_is_the_same_alone_and_in_any_company(form: WeightFormat, isa: str) -> None:
    columns = 1056 if form is MXFP4 else 1061
    w, x = weight(form, 67, columns), rows(41, columns)
    alone = torch.cat([cpu_linear.linear(row[None], w, isa=isa) for row in x])
    for n in (2, 3, 4, 5, 13, 41):
        assert torch.equal(cpu_linear.linear(x[-n:], w, isa=isa), alone[-n:])


@isa_cases
def test_slices_of_many_rows_change_nothing(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(MXFP4, 10, 64), rows(50, 64)
    together = cpu_linear.linear(x, w, isa=isa)
    monkeypatch.setattr(cpu_linear, "_SLICE_NUMBERS", 7 * 64)
    assert torch.equal(cpu_linear.linear(x, w, isa=isa), together)


@isa_cases
@format_cases
@pytest.mark.usefixtures("two_threads")
def test_two_threads_give_the_bits_of_one(form: WeightFormat, isa: str) -> None:
    w = weight(form, 259, 544)
    for n in (1, 2, 37):
        x = rows(n, 544)
        shared = cpu_linear.linear(x, w, isa=isa)
        torch.set_num_threads(1)
        assert torch.equal(cpu_linear.linear(x, w, isa=isa), shared)
        torch.set_num_threads(2)


@isa_cases
def test_every_fp4_code_and_scale(isa: str) -> None:
    """The products of one weight alone with one are the reference's numbers, NaN and subnormal ones among them."""
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    for scale in (0, 1, 2, 3, 100, 127, 252, 253, 254, 255):
        w = Weight("w", (256, 32), MXFP4, codes, torch.full((256, 1), scale, dtype=torch.uint8))
        expected = reference.dequantize(w)
        for column in range(32):
            one = torch.zeros(2, 32)
            one[:, column] = 1.0
            for n in (1, 2):
                finite = expected.isfinite().all(1)
                found = cpu_linear.linear(one[:n], w, isa=isa)
                assert torch.equal(found[:, finite], expected[finite, column].expand(n, -1))
                if scale == 255:
                    assert found.isnan().all()


@isa_cases
@pytest.mark.parametrize("scale", [0, 1, 9, 127, 200])
def test_every_fp8_code(isa: str, scale: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 40).contiguous()
    w = Weight("w", (256, 40), FP8_BLOCK, codes, torch.full((2, 1), scale, dtype=torch.uint8))
    expected = reference.dequantize(w)
    for column in (0, 1, 15, 16, 31, 32, 39):
        one = torch.zeros(2, 40)
        one[:, column] = 1.0
        for n in (1, 2):
            found = cpu_linear.linear(one[:n], w, isa=isa)
            torch.testing.assert_close(found, expected[:, column].expand(n, -1), rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def subnormals_flushed() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


@isa_cases
def test_subnormal_codes_and_scales_count_even_where_torch_drops_such_numbers(
    isa: str, subnormals_flushed: None
) -> None:
    tiny = weight(FP8_BLOCK, 40, 160)
    tiny.data[:] = tiny.data & 0x87  # e4m3's own subnormal numbers and zeros
    smallest = weight(MXFP4, 40, 160)
    assert smallest.scale is not None
    smallest.scale[:] = 0  # 2^-127
    for w, size in ((tiny, 1.0), (smallest, 2.0**60)):
        x = rows(5, 160) * size
        flushed = [cpu_linear.linear(x[:n], w, isa=isa) for n in (1, 2, 5)]
        torch.set_flush_denormal(False)
        for n, found in zip((1, 2, 5), flushed, strict=True):
            assert torch.equal(found, cpu_linear.linear(x[:n], w, isa=isa))
        assert all(bool((found != 0).all()) for found in flushed)
        torch.set_flush_denormal(True)


@isa_cases
def test_float_scales_that_are_powers_of_two_are_as_good_as_bytes(isa: str) -> None:
    w = weight(FP8_BLOCK, 140, 640)
    assert w.scale is not None
    as_floats = Weight("w", w.shape, FP8_BLOCK_F32, w.data, torch.exp2(w.scale.float() - 127))
    for n in (1, 2, 3, 4, 7):
        assert torch.equal(
            cpu_linear.linear(rows(n, 640), as_floats, isa=isa), cpu_linear.linear(rows(n, 640), w, isa=isa)
        )


@isa_cases
def test_fp8_activations_and_scales_as_large_as_float32_holds(isa: str) -> None:
    """Few rows take the scales on, 2^120 times; what that makes infinite is computed the long way."""
    w, x = weight(FP8_BLOCK, 140, 640), rows(9, 640)
    assert w.scale is not None
    w.scale[0, 1], w.scale[1, 4] = 133, 200
    x[0, ::3] *= 2.0**100
    x[1, 130] = float("inf")
    together, expected, sizes = cpu_linear.linear(x, w, isa=isa), law(x, w), sizes_of(x, w)
    for n in (1, 2, 3, 4):
        alone = torch.cat([cpu_linear.linear(x[i : i + n], w, isa=isa) for i in range(0, 9, n)])
        assert torch.equal(alone.nan_to_num(), together.nan_to_num())
        assert torch.equal(alone.isnan(), together.isnan())
    sound = sizes < 1e38
    assert sound.any(1).tolist() == [True, False, *[True] * 7]
    assert ((together - expected).abs()[sound] <= 5e-7 * sizes[sound]).all()


@isa_cases
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_among_fp8_codes_makes_its_row_nan(isa: str, code: int) -> None:
    for column in (0, 31, 70, 600, 640):
        w = weight(FP8_BLOCK, 9, 641)
        w.data[5, column] = code
        for n in (1, 2, 7):
            found = cpu_linear.linear(rows(n, 641), w, isa=isa)
            assert found[:, 5].isnan().all()
            assert found[:, [0, 1, 2, 3, 4, 6, 7, 8]].isfinite().all()


@isa_cases
def test_infinite_activations_reach_their_own_row_alone(isa: str) -> None:
    x, w = rows(5, 64), weight(MXFP4, 20, 64)
    x[2, 40] = float("inf")
    found = cpu_linear.linear(x, w, isa=isa)
    torch.testing.assert_close(found, law(x, w).float(), rtol=1e-4, atol=1e-4, equal_nan=True)
    assert found[[0, 1, 3, 4]].isfinite().all()


@isa_cases
def test_weights_at_odd_addresses(isa: str) -> None:
    """A mapped file aligns codes to one byte and numbers to their own size."""
    w = weight(FP8_BLOCK, 7, 200)
    moved = torch.empty(1 + w.data.numel(), dtype=torch.uint8)[1:].view(7, 200).copy_(w.data)
    x = rows(3, 200)
    odd = Weight("w", w.shape, w.format, moved, w.scale)
    assert torch.equal(cpu_linear.linear(x, odd, isa=isa), cpu_linear.linear(x, w, isa=isa))


@isa_cases
@format_cases
@pytest.mark.parametrize("groups", [1, 3, 8])
def test_grouped_linear_agrees_with_float64(form: WeightFormat, isa: str, groups: int) -> None:
    out, columns = 35, 96 if form is MXFP4 else 101
    w = weight(form, groups * out, columns)
    dense = reference.dequantize(w).double().view(groups, out, columns)
    for n in (0, 1, 2, 14, 33):
        x = rows(n, groups, columns)
        expected = torch.einsum("ngi,goi->ngo", x.double(), dense).flatten(1)
        found = cpu_linear.grouped_linear(x, w, isa=isa)
        assert_near(found, expected)
        if n:
            assert torch.equal(found[-1:], cpu_linear.grouped_linear(x[-1:].contiguous(), w, isa=isa))


@isa_cases
@pytest.mark.usefixtures("two_threads")
def test_matrices_of_a_stack_give_the_bits_of_each(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((FP8_BLOCK, 70), (FP8_BLOCK, 1), (BF16, 33), (F32, 6), (BF16, 300), (MXFP4, 9))
    stack = Stack(tuple(weight(form, out, 160, seed=place) for place, (form, out) in enumerate(shapes)))
    for n, rounded in ((0, False), (1, False), (1, True), (29, True)):
        x = rows(n, 160)
        apart = [cpu_linear.linear(x, each, rounded=rounded, isa=isa) for each in stack.weights]
        for slice_numbers in (1 << 24, 8 * 800):
            monkeypatch.setattr(cpu_linear, "_SLICE_NUMBERS", slice_numbers)
            found = cpu_linear.linear_each(x, stack, rounded=rounded, isa=isa)
            assert all(torch.equal(one, other) for one, other in zip(found, apart, strict=True))


def test_stacks_that_do_not_fit_are_refused() -> None:
    wide, narrow = weight(F32, 4, 64), weight(F32, 4, 32)
    with pytest.raises(ValueError, match=r"one width, got \[32, 64\]"):
        cpu_linear.linear_each(rows(1, 64), Stack((wide, narrow)))
    with pytest.raises(ValueError, match="rows of 64"):
        cpu_linear.linear_each(rows(1, 32), Stack((wide,)))


@isa_cases
def test_strided_arguments_are_what_they_say(isa: str) -> None:
    w, x = weight(MXFP4, 12, 64), rows(5, 128)[:, 32:96]
    dense = x.contiguous()
    assert torch.equal(cpu_linear.linear(x, w, isa=isa), cpu_linear.linear(dense, w, isa=isa))
    grouped = dense.view(5, 2, 32).transpose(0, 1)  # [2, 5, 32]
    w5 = weight(MXFP4, 10, 32)
    expected = cpu_linear.grouped_linear(grouped.contiguous(), w5, isa=isa)
    assert torch.equal(cpu_linear.grouped_linear(grouped, w5, isa=isa), expected)
    bank, (ids, weights) = bank_of(MXFP4, MXFP4, 3, 64, 32), routed(5, 2, 3)
    strided = ids.t().contiguous().t(), weights.t().contiguous().t()
    expected = cpu_linear.experts(dense, ids, weights, bank, limit=None, weigh_first=True, isa=isa)
    found = cpu_linear.experts(x, *strided, bank, limit=None, weigh_first=True, isa=isa)
    assert torch.equal(found, expected)
    expected = cpu_linear.feed_forward(dense, bank.w1[0], bank.w2[0], bank.w3[0], None, isa=isa)
    assert torch.equal(cpu_linear.feed_forward(x, bank.w1[0], bank.w2[0], bank.w3[0], None, isa=isa), expected)


def bank_of(form: WeightFormat, down: WeightFormat, count: int, hidden: int, inner: int) -> Experts:
    gates = tuple(weight(form, inner, hidden, seed=3 * e) for e in range(count))
    downs = tuple(weight(down, hidden, inner, seed=3 * e + 1) for e in range(count))
    return Experts(gates, downs, tuple(weight(form, inner, hidden, seed=3 * e + 2) for e in range(count)))


def routed(n: int, topk: int, count: int) -> tuple[Tensor, Tensor]:
    generator = seeded(n)
    ids = torch.stack([torch.randperm(count, generator=generator)[:topk] for _ in range(n)]) if n else None
    weights = torch.rand(n, topk, generator=generator)
    return torch.empty(0, topk, dtype=torch.int64) if ids is None else ids, weights


def experts_law(x: Tensor, ids: Tensor, weights: Tensor, bank: Experts, limit: float | None) -> Tensor:
    total = torch.zeros_like(x, dtype=torch.float64)
    for expert in range(len(bank.w1)):
        share = (weights.double() * (ids == expert)).sum(1, keepdim=True)
        total += share * feed_forward_law(x, bank.w1[expert], bank.w2[expert], bank.w3[expert], limit)
    return total


def feed_forward_law(x: Tensor, w1: Weight, w2: Weight, w3: Weight, limit: float | None) -> Tensor:
    gate, up = law(x, w1), law(x, w3)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * gate.sigmoid() * up) @ reference.dequantize(w2).double().t()


@isa_cases
@pytest.mark.parametrize("limit", [None, 10.0, 0.5])
@pytest.mark.parametrize("weigh_first", [True, False])
@pytest.mark.parametrize(
    ("form", "down", "hidden", "inner"), [(MXFP4, MXFP4, 96, 544), (FP8_BLOCK_F32, BF16, 131, 77), (F32, F32, 9, 1)]
)
def test_experts_agree_with_float64_and_the_reference(
    isa: str, limit: float | None, weigh_first: bool, form: WeightFormat, down: WeightFormat, hidden: int, inner: int
) -> None:
    bank = bank_of(form, down, 7, hidden, inner)
    for n in (0, 1, 2, 13, 40):
        x, (ids, weights) = rows(n, hidden), routed(n, 3, 7)
        found = cpu_linear.experts(x, ids, weights, bank, limit=limit, weigh_first=weigh_first, isa=isa)
        assert_near(found, experts_law(x, ids, weights, bank, limit))
        plain = reference.experts(x, ids, weights, bank, limit=limit, weigh_first=weigh_first)
        assert_near(found, plain.double())


def part_of_experts(
    bank: Experts, x: Tensor, ids: Tensor, weights: Tensor, isa: str, part: slice, rounded: bool = False
) -> Tensor:
    """Some of the tokens through the experts that each has chosen."""
    chosen = (x[part], ids[part], weights[part])
    return cpu_linear.experts(*chosen, bank, limit=10.0, weigh_first=True, rounded=rounded, isa=isa)


@isa_cases
def test_tokens_do_not_influence_each_other_in_experts(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_of(MXFP4, MXFP4, 5, 64, 544)
    x, (ids, weights) = rows(30, 64), routed(30, 3, 5)
    run = partial(part_of_experts, bank, x, ids, weights, isa)
    together = run(slice(None))
    assert torch.equal(torch.cat([run(slice(i, i + 1)) for i in range(30)]), together)
    assert torch.equal(torch.cat([run(slice(0, 11)), run(slice(11, 30))]), together)
    monkeypatch.setattr(cpu_linear, "_SLICE_NUMBERS", 13 * (64 + 3 * 544))  # some expert's tokens are split
    assert torch.equal(run(slice(None)), together)


@isa_cases
@pytest.mark.usefixtures("two_threads")
def test_a_shared_expert_beside_the_others_is_what_it_is_alone(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, shared = bank_of(MXFP4, MXFP4, 5, 128, 544), bank_of(FP8_BLOCK, FP8_BLOCK, 1, 128, 600)

    def beside(x: Tensor, ids: Tensor, weights: Tensor, rounded: bool) -> Tensor:
        return cpu_linear.experts(
            x, ids, weights, bank, limit=10.0, weigh_first=True, shared=shared, rounded=rounded, isa=isa
        )

    for n, topk, rounded in ((0, 3, False), (1, 3, False), (1, 3, True), (30, 3, False), (9, 0, False)):
        x, (ids, weights) = rows(n, 128), routed(n, topk, 5)
        apart = cpu_linear.experts(x, ids, weights, bank, limit=10.0, weigh_first=True, rounded=rounded, isa=isa)
        apart = apart + cpu_linear.feed_forward(
            x, shared.w1[0], shared.w2[0], shared.w3[0], 10.0, rounded=rounded, isa=isa
        )
        assert torch.equal(beside(x, ids, weights, rounded), apart)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_linear, "_SLICE_NUMBERS", 13 * (128 + 3 * 544 + 1000))
            assert torch.equal(beside(x, ids, weights, rounded), apart)


@isa_cases
def test_a_shared_expert_that_does_not_fit_is_refused(isa: str) -> None:
    bank, x, (ids, weights) = bank_of(F32, F32, 5, 64, 32), rows(2, 64), routed(2, 3, 5)
    for wrong in (bank_of(F32, F32, 2, 64, 32), bank_of(F32, F32, 1, 32, 32)):
        with pytest.raises(ValueError, match="shared"):
            cpu_linear.experts(x, ids, weights, bank, limit=None, weigh_first=True, shared=wrong, isa=isa)


@isa_cases
@pytest.mark.usefixtures("two_threads")
def test_two_threads_give_the_experts_of_one(isa: str) -> None:
    bank = bank_of(MXFP4, MXFP4, 5, 320, 224)
    for n in (1, 9):
        x, (ids, weights) = rows(n, 320), routed(n, 3, 5)
        shared = cpu_linear.experts(x, ids, weights, bank, limit=10.0, weigh_first=True, isa=isa)
        torch.set_num_threads(1)
        alone = cpu_linear.experts(x, ids, weights, bank, limit=10.0, weigh_first=True, isa=isa)
        torch.set_num_threads(2)
        assert torch.equal(shared, alone)


@isa_cases
@format_cases
def test_feed_forward_agrees_with_float64(form: WeightFormat, isa: str) -> None:
    hidden, inner = (64, 96) if form is MXFP4 else (70, 101)
    w1, w3 = weight(form, inner, hidden, seed=1), weight(form, inner, hidden, seed=2)
    w2, other = weight(form, hidden, inner, seed=3), weight(form, hidden, inner, seed=4)
    for n in (0, 1, 5, 40):
        x = rows(n, hidden)
        assert_near(cpu_linear.feed_forward(x, w1, w2, w3, 7.0, isa=isa), feed_forward_law(x, w1, w2, w3, 7.0))
        found = cpu_linear.feed_forward(x, w1, other, w3, None, isa=isa)
        assert_near(found, feed_forward_law(x, w1, other, w3, None))


@isa_cases
def test_gates_far_out_and_not_finite(isa: str) -> None:
    """The gate itself, through weights that are the unit matrix."""
    unit = Weight("unit", (1, 1), F32, torch.ones(1, 1))
    x = torch.tensor([[-1e30], [-200.0], [-89.0], [-87.0], [-1e-30], [0.0], [1e-30], [50.0], [1e10]])
    found = cpu_linear.feed_forward(x, unit, unit, unit, None, isa=isa)
    torch.testing.assert_close(found, reference.feed_forward(x, unit, unit, unit, None), rtol=1e-6, atol=1e-30)
    nan = torch.tensor([[float("nan")], [3.0]])
    for limit in (None, 10.0):
        found = cpu_linear.feed_forward(nan, unit, unit, unit, limit, isa=isa)
        assert found.isnan().tolist() == [[True], [False]]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def rounded_to_e4m3(x: Tensor) -> Tensor:
    """What the official inference does to activations: e4m3 with one power of two per 128."""
    blocks = x.view(x.shape[0], -1, 128)
    scale = 2.0 ** (blocks.abs().amax(-1, keepdim=True) / 448).log2().ceil()
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).view_as(x)


@isa_cases
def test_rounded_activations_are_nearer_than_the_official_rounding(isa: str) -> None:
    """Relative errors 5.4e-3 (int8), 1.7e-3 (bf16, with AMX) and 2.6e-2 on normal numbers."""
    w, x = weight(MXFP4, 99, 2048), rows(33, 2048)
    expected = law(x, w)
    official = relative_error(law(rounded_to_e4m3(x), w), expected)
    for n in (1, 2, 3, 12, 33):
        error = relative_error(cpu_linear.linear(x[:n], w, rounded=True, isa=isa), expected[:n])
        assert error < (2e-3 if isa == "amx" else 7e-3)
        assert error < official / 3


def rounded_for(x: Tensor, isa: str) -> Tensor:
    """What activations become that meet MXFP4 weights: int8 of their block of 32, with AMX the nearest bf16 number."""
    if isa == "amx":
        return x.to(torch.bfloat16).float()
    blocks = x.view(x.shape[0], -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.tensor(127.0) / largest  # `127.0 / largest` would round twice
    return ((blocks * inverse).round() * (largest / 127)).view_as(x)


@isa_cases
@pytest.mark.parametrize("columns", [32, 64, 96, 224, 256, 288, 1024, 1056, 2080])
@pytest.mark.usefixtures("two_threads")
def test_rounded_products_are_those_of_the_rounded_activations(isa: str, columns: int) -> None:
    """Alone and in any company, which with AMX fills one to six tiles at a time."""
    w, x = weight(MXFP4, 37, columns), rows(200, columns)
    rounded = rounded_for(x, isa)
    found = cpu_linear.linear(x, w, rounded=True, isa=isa)
    assert_near(found, law(rounded, w), sizes_of(rounded, w))
    for n in (0, 1, 2, 3, 13, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65, 80, 95, 96, 97, 193):
        assert torch.equal(cpu_linear.linear(x[200 - n :], w, rounded=True, isa=isa), found[200 - n :])
    torch.set_num_threads(1)
    assert torch.equal(cpu_linear.linear(x, w, rounded=True, isa=isa), found)


@isa_cases
@pytest.mark.parametrize("n", [1, 3, 40])
def test_every_mxfp4_code_and_scale_meets_rounded_activations(isa: str, n: int) -> None:
    """One of each code alone with one: the reference's numbers, with AMX from 2^-126 on, infinite and NaN too."""
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    one = torch.zeros(n, 32)
    one[:, 4:6] = torch.tensor([1.0, 0.0])
    for scale in range(256):
        w = Weight("w", (256, 32), MXFP4, codes, torch.full((256, 1), scale, dtype=torch.uint8))
        numbers = reference.dequantize(w)
        found = cpu_linear.linear(one, w, rounded=True, isa=isa)
        if scale < 253:  # the numbers of all codes are finite
            expected = numbers[:, 4]
            if isa == "amx":
                expected = torch.where(expected.abs() < 2.0**-126, 0.0, expected)
            assert_near(found[:1], expected.double()[None])
            assert torch.equal(found, found[:1].expand(n, -1))
        elif scale == 255:
            assert found.isnan().all()
        else:
            assert not found[:, ~numbers[:, 4].isfinite()].isfinite().any()


@isa_cases
@pytest.mark.parametrize("row", [0, 15, 16, 36])
def test_a_scale_out_of_the_usual_range_leaves_other_rows_as_they_are(isa: str, row: int) -> None:
    w, x = weight(MXFP4, 37, 544), rows(35, 544)
    before = cpu_linear.linear(x, w, rounded=True, isa=isa)
    assert w.scale is not None
    for scale in (0, 255):
        w.scale[row, 9] = scale
        found = cpu_linear.linear(x, w, rounded=True, isa=isa)
        others = torch.arange(37) != row
        assert torch.equal(found[:, others], before[:, others])
        assert found[:, row].isnan().all() == (scale == 255)
        alone = cpu_linear.linear(x[-1:], w, rounded=True, isa=isa)
        torch.testing.assert_close(alone, found[-1:], rtol=0, atol=0, equal_nan=True)


@isa_cases
def test_rounded_rows_that_are_tiny_or_not_finite(isa: str) -> None:
    w, x = weight(MXFP4, 9, 96), rows(6, 96)
    x[0], x[1] = 0.0, 1e-38
    x[2, 50], x[3, 50] = float("nan"), float("-inf")
    for part in (x, x[:1], x[1:2]):
        found = cpu_linear.linear(part, w, rounded=True, isa=isa)
        assert (found[0] == 0).all()
    found = cpu_linear.linear(x, w, rounded=True, isa=isa)
    if isa == "amx":  # an infinite activation stays one
        assert not found[3].isfinite().any()
        found[3] = float("nan")
    assert found.isnan().all(1).tolist() == [False, False, True, True, False, False]
    assert found[[0, 1, 4, 5]].isfinite().all()


def is_fp8(form: WeightFormat) -> bool:
    return form in (FP8_BLOCK, FP8_BLOCK_F32)


@isa_cases
def test_rounding_changes_the_products_that_gain_by_it_alone(isa: str) -> None:
    """All but float32, with AMX; else those with MXFP4 and FP8 weights."""
    for form in FORMATS:
        w, x = weight(form, 9, 64), rows(3, 64)
        for run in (cpu_linear.linear, cpu_linear.grouped_linear):
            given = x if run is cpu_linear.linear else x.view(1, 3, 64)
            plain, found = (run(given, w, rounded=rounded, isa=isa) for rounded in (False, True))
            assert torch.equal(plain, found) == (form is F32 or (form is BF16 and isa != "amx"))


@isa_cases
def test_a_head_is_not_rounded(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "_HEAD_NUMBERS", 40 * 64)
    w, x = weight(BF16, 40, 64), rows(3, 64)
    found = cpu_linear.linear(x, w, rounded=True, isa=isa)
    assert torch.equal(found, cpu_linear.linear(x, w, isa=isa))
    stack = Stack((w, weight(BF16, 39, 64)))
    assert torch.equal(cpu_linear.linear_each(x, stack, rounded=True, isa=isa)[0], found)


def multiplied(w: Weight, isa: str) -> Tensor:
    """The numbers that rounded activations meet: without AMX FP8 codes are whole 32nds, and subnormal ones zero."""
    if isa == "amx" or not is_fp8(w.format):
        return reference.dequantize(w)
    codes = w.data.view(torch.float8_e4m3fn).float()
    whole = torch.where(codes.abs() < 2.0**-6, 0.0, (32 * codes + 0.5).floor() / 32)
    assert w.scale is not None
    scale = w.scale if w.scale.dtype == torch.float32 else 2.0 ** (w.scale.double() - 127)
    blocks = scale.repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[:, : w.shape[1]]
    return (whole.double() * blocks).float()


def largest_error(x: Tensor, form: WeightFormat, isa: str) -> Tensor:
    """What rounding may change of each activation: what two bf16 numbers leave, or half a whole number of its block."""
    if isa == "amx":
        return 2**-17 * x.double().abs()
    if form is BF16:
        return torch.zeros_like(x, dtype=torch.float64)
    blocks = torch.nn.functional.pad(x.double().abs(), (0, -x.shape[1] % 128)).view(x.shape[0], -1, 128)
    step = torch.maximum(blocks.sum(-1, keepdim=True) / 149600, blocks.amax(-1, keepdim=True) / 32766)
    return (0.5 * step).expand_as(blocks).reshape(x.shape[0], -1)[:, : x.shape[1]]


@isa_cases
@pytest.mark.parametrize("form", [BF16, FP8_BLOCK, FP8_BLOCK_F32], ids=lambda form: form.name)
@pytest.mark.parametrize("out", [1, 3, 17, 33, 67, 128, 131, 224, 260])
@pytest.mark.usefixtures("two_threads")
def test_rounded_activations_stay_near(form: WeightFormat, isa: str, out: int) -> None:
    """Within what rounding may change and a float32 sum's error, alone and in any company, from any address."""
    for columns in (1, 31, 32, 33, 64, 95, 97, 127, 129, 513, 1000, 1061):
        w, x = weight(form, out, columns, seed=columns), rows(101, columns, seed=out)
        numbers = multiplied(w, isa).double()
        allowed = largest_error(x, form, isa) @ numbers.abs().t() + 5e-7 * sizes_of(x, w)
        found = cpu_linear.linear(x, w, rounded=True, isa=isa)
        assert ((found.double() - x.double() @ numbers.t()).abs() <= allowed).all()
        for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65):
            assert torch.equal(cpu_linear.linear(x[-n:] if n else x[:0], w, rounded=True, isa=isa), found[101 - n :])
        torch.set_num_threads(1)
        assert torch.equal(cpu_linear.linear(x, w, rounded=True, isa=isa), found)
        torch.set_num_threads(2)


@isa_cases
@pytest.mark.parametrize("n", [1, 33])
def test_activations_that_meet_fp8_are_nearer_than_the_official_rounding(isa: str, n: int) -> None:
    """Relative errors 2e-4 (whole numbers), 7e-6 (two bf16 numbers, with AMX) and 2.6e-2, with outliers too."""
    w, x = weight(FP8_BLOCK, 99, 2048), rows(n, 2048)
    for given in (x, x**3, torch.where(torch.rand(n, 2048, generator=seeded(2)) < 0.01, 100 * x, x)):
        expected = law(given, w)
        error = relative_error(cpu_linear.linear(given, w, rounded=True, isa=isa), expected)
        assert error < (1e-5 if isa == "amx" else 4e-4)
        assert error < relative_error(law(rounded_to_e4m3(given), w), expected) / 50


@isa_cases
@pytest.mark.parametrize("n", [1, 3, 32])
@pytest.mark.parametrize("scale", [0, 1, 126, 127, 135, 246, 250])
def test_every_fp8_code_meets_rounded_activations(isa: str, scale: int, n: int) -> None:
    """One of each code alone with one: its number, where the largest is no infinity."""
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 256).contiguous()
    w = Weight("w", (256, 256), FP8_BLOCK, codes, torch.full((2, 2), scale, dtype=torch.uint8))
    expected = multiplied(w, isa)
    for column in (0, 1, 2, 3, 62, 127, 128, 255):
        one = torch.zeros(n, 256)
        one[:, column] = 1.0
        found = cpu_linear.linear(one, w, rounded=True, isa=isa)
        numbers = expected[:, column].isfinite()
        rtol, atol = (0.0, 0.0) if isa == "amx" else (2e-7, 2.0**-149)
        torch.testing.assert_close(found[:, numbers], expected[numbers, column].expand(n, -1), rtol=rtol, atol=atol)
        assert torch.equal(found[:, numbers], found[:1, numbers].expand(n, -1))
        assert found[:, [0x7F, 0xFF]].isnan().all()


@isa_cases
@pytest.mark.parametrize("row", [0, 7, 8, 15, 16, 36])
def test_a_code_that_is_no_number_leaves_other_rows_as_they_are(isa: str, row: int) -> None:
    w, x = weight(FP8_BLOCK, 37, 545), rows(35, 545)
    for column in (0, 300, 544):
        before = cpu_linear.linear(x, w, rounded=True, isa=isa)
        kept = w.data[row, column].clone()
        w.data[row, column] = 0xFF
        for n in (1, 4, 35):
            found = cpu_linear.linear(x[:n], w, rounded=True, isa=isa)
            others = torch.arange(37) != row
            assert torch.equal(found[:, others], before[:n, others])
            assert found[:, row].isnan().all()
        w.data[row, column] = kept


@isa_cases
@pytest.mark.parametrize("n", [1, 4, 40])
def test_activations_that_are_large_tiny_or_not_finite_meet_fp8(isa: str, n: int) -> None:
    w, x = weight(FP8_BLOCK, 50, 320), rows(n, 320)
    whole = cpu_linear.linear(x, w, rounded=True, isa=isa)
    for wrong in (float("inf"), float("-inf"), float("nan")):
        x[n - 1] = 1.0
        x[n - 1, 7] = wrong
        found = cpu_linear.linear(x, w, rounded=True, isa=isa)
        assert torch.equal(found[: n - 1], whole[: n - 1])
        assert not found[n - 1].isfinite().any()
    x[n - 1] = 0.0
    assert (cpu_linear.linear(x, w, rounded=True, isa=isa)[n - 1] == 0).all()
    small = Weight("w", w.shape, FP8_BLOCK, w.data, torch.full((1, 3), 110, dtype=torch.uint8))
    for size in (7e35, 1e-30):  # 448 times the first is about the largest that a tile's sums hold
        x[n - 1, 7] = size
        found = cpu_linear.linear(x, small, rounded=True, isa=isa)[n - 1 :]
        assert_near(found / size, x[n - 1 :].double() @ multiplied(small, isa).double().t() / size)


@isa_cases
@pytest.mark.parametrize("n", [1, 4, 40])
def test_no_block_of_activations_overflows(isa: str, n: int) -> None:
    """Sums of the largest codes and of activations as they come nearest to 31 bits: all equal, one alone, two."""
    codes = torch.full((16, 384), 0x7E, dtype=torch.uint8)
    codes[8:] |= 0x80
    w = Weight("w", (16, 384), FP8_BLOCK, codes, torch.full((1, 3), 127, dtype=torch.uint8))
    x = torch.zeros(n, 384)
    x[:, :128], x[:, 200], x[:, 256:258], x[:, 300] = 0.7, -3.0, 5.0, 1e-3
    for given in (x, -x, x.abs(), torch.full((n, 384), 1.0 / 3)):
        found = cpu_linear.linear(given, w, rounded=True, isa=isa)
        torch.testing.assert_close(found.double(), law(given, w), rtol=5e-4, atol=0.0)


@isa_cases
@pytest.mark.usefixtures("two_threads")
def test_rounded_experts(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_of(MXFP4, MXFP4, 5, 160, 544)
    x, (ids, weights) = rows(30, 160), routed(30, 3, 5)
    run = partial(part_of_experts, bank, x, ids, weights, isa, rounded=True)
    together = run(slice(None))
    assert relative_error(together, experts_law(x, ids, weights, bank, 10.0)) < 2e-2
    torch.set_num_threads(1)
    assert torch.equal(run(slice(None)), together)
    assert torch.equal(torch.cat([run(slice(i, i + 1)) for i in range(30)]), together)
    monkeypatch.setattr(cpu_linear, "_SLICE_NUMBERS", 13 * (160 + 3 * 544))
    assert torch.equal(run(slice(None)), together)


@isa_cases
@format_cases
@pytest.mark.usefixtures("two_threads")
def test_many_tokens_of_an_expert_do_not_influence_each_other(form: WeightFormat, isa: str) -> None:
    """Packed rows of an expert begin anywhere, also in the middle of what tiles multiply at once."""
    bank = bank_of(form, form, 3, 160, 288)
    x, (ids, weights) = rows(171, 160), routed(171, 2, 3)
    run = partial(part_of_experts, bank, x, ids, weights, isa, rounded=True)
    together = run(slice(None))
    assert relative_error(together, experts_law(x, ids, weights, bank, 10.0)) < 2e-2
    assert torch.equal(torch.cat([run(slice(i, i + 1)) for i in range(171)]), together)
    assert torch.equal(torch.cat([run(slice(0, 33)), run(slice(33, 171))]), together)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "scalar"])
@format_cases
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("rounded", [False, True])
def test_more_rows_than_stay_near_do_not_influence_each_other(form: WeightFormat, isa: str, rounded: bool) -> None:
    """Both ways: 401 activations are taken in blocks, and so are the 550 weight rows of either thread."""
    columns = 1056 if form is MXFP4 else 1061
    w, x = weight(form, 1100, columns), rows(401, columns)
    together = cpu_linear.linear(x, w, rounded=rounded, isa=isa)
    assert relative_error(together, law(x, w)) < (2e-2 if rounded else 1e-5)
    for part in (slice(0, 5), slice(185, 203), slice(190, 390), slice(400, 401)):
        assert torch.equal(cpu_linear.linear(x[part], w, rounded=rounded, isa=isa), together[part])


@pytest.mark.skipif("avx512" not in ISAS, reason="this CPU has no AVX-512 with VNNI")
def test_two_rows_side_by_side_have_the_bits_of_one() -> None:
    for form in FORMATS:
        for out, columns in ((1, 32), (5, 96), (139, 1056)):
            w = weight(form, out, columns)
            for n in (1, 2, 3, 4, 5, 13, 40):
                x = rows(n, columns)
                for rounded in (False, True):
                    wide, narrow = (cpu_linear.linear(x, w, rounded=rounded, isa=isa) for isa in ("avx512", "avx2"))
                    assert torch.equal(wide, narrow)


def test_the_builds_agree() -> None:
    for form in FORMATS:
        w, x = weight(form, 65, 544), rows(9, 544)
        results = [cpu_linear.linear(x, w, isa=isa) for isa in ISAS]
        for result in results[1:]:
            assert_near(result, results[0].double())


def test_prepare_keeps_the_weight() -> None:
    w = weight(MXFP4, 4, 32)
    assert cpu_linear.prepare(w, True) is w
    assert cpu_linear.prepare(w, False) is w


def test_nothing_keeps_a_weight_alive() -> None:
    bank = bank_of(MXFP4, MXFP4, 2, 32, 32)
    x, (ids, weights) = rows(2, 32), routed(2, 1, 2)
    kept = len(cpu_linear._matrices), len(cpu_linear._banks), len(cpu_linear._blocks)
    cpu_linear.experts(x, ids, weights, bank, limit=None, weigh_first=True)
    cpu_linear.feed_forward(x, bank.w1[0], bank.w2[0], bank.w3[0], None)
    assert len(cpu_linear._matrices) >= kept[0] + 6
    del bank
    gc.collect()
    assert (len(cpu_linear._matrices), len(cpu_linear._banks), len(cpu_linear._blocks)) <= kept


def test_activations_that_do_not_fit_are_refused() -> None:
    w = weight(MXFP4, 4, 32)
    with pytest.raises(ValueError, match=r"x: expected shape for w \(4, 32\), got \(2, 64\)"):
        cpu_linear.linear(rows(2, 64), w)
    with pytest.raises(TypeError, match=r"x: expected a tensor of torch\.float32, got torch\.float64"):
        cpu_linear.linear(rows(2, 32).double(), w)
    with pytest.raises(ValueError, match=r"x: expected shape for w \(4, 32\), got \(2, 3, 32\)"):
        cpu_linear.grouped_linear(rows(2, 3, 32), w)


def test_weights_that_do_not_fit_are_refused() -> None:
    x, w = rows(2, 32), weight(MXFP4, 4, 32)
    with pytest.raises(ValueError, match=r"w: codes: expected shape"):
        cpu_linear.linear(x, Weight("w", (4, 32), MXFP4, w.data[:3], w.scale))
    with pytest.raises(ValueError, match=r"w: scales: expected shape"):
        cpu_linear.linear(x, Weight("w", (4, 32), MXFP4, w.data, w.data))
    with pytest.raises(ValueError, match="w: expected scales beside codes of mxfp4"):
        cpu_linear.linear(x, Weight("w", (4, 32), MXFP4, w.data))
    with pytest.raises(ValueError, match="w: expected a multiple of 32 columns"):
        cpu_linear.linear(x, Weight("w", (4, 33), MXFP4, w.data, w.scale))
    with pytest.raises(ValueError, match="w: expected a matrix of"):
        cpu_linear.linear(x, Weight("w", (4, 32), I64, torch.zeros(4, 32, dtype=torch.int64)))
    with pytest.raises(TypeError, match=r"w: codes: expected a tensor of torch\.bfloat16, got torch\.float32"):
        cpu_linear.linear(x, Weight("w", (4, 32), BF16, torch.zeros(4, 32)))


def test_experts_that_do_not_fit_are_refused() -> None:
    bank = bank_of(MXFP4, MXFP4, 2, 32, 64)
    x, ids, weights = rows(1, 32), torch.tensor([[2]]), torch.ones(1, 1)
    with pytest.raises(ValueError, match="ids: expected 0 to 1, got 2"):
        cpu_linear.experts(x, ids, weights, bank, limit=None, weigh_first=True)
    with pytest.raises(ValueError, match="ids: expected 0 to 1, got -1"):
        cpu_linear.experts(x, ids - 3, weights, bank, limit=None, weigh_first=True)
    with pytest.raises(ValueError, match="x: expected rows of 32"):
        cpu_linear.experts(rows(1, 64), ids - 1, weights, bank, limit=None, weigh_first=True)
    mixed = Experts(bank.w1, bank.w2, (bank.w3[0], weight(BF16, 64, 32)))
    with pytest.raises(ValueError, match="w3 of expert 1 has another format or shape"):
        cpu_linear.experts(x, ids - 1, weights, mixed, limit=None, weigh_first=True)
    with pytest.raises(ValueError, match="at least one expert"):
        cpu_linear.experts(x, ids, weights, Experts((), (), ()), limit=None, weigh_first=True)
