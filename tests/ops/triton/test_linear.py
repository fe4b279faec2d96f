"""Products with stored weights against float64: every format, every code, odd sizes."""

from __future__ import annotations

import pytest
import torch
from tests.ops.test_cpu_linear import FORMATS, columns_of, rows, weight
from tests.ops.triton.card import DEVICE, on_card, to_card
from torch import Tensor

from tenfold.formats import BF16, F32, FP8_BLOCK, FP8_BLOCK_F32, I64, MXFP4, WeightFormat
from tenfold.ops import Stack, Weight, reference
from tenfold.ops.triton import linear

product = on_card(linear, "linear", "linear_each", "linear_onto", "norm_linear", "norm_linear_each", "grouped_linear")
pytestmark = pytest.mark.usefixtures("poisoned")
format_cases = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
part_cases = pytest.mark.parametrize("parts", [1, 3])


def assert_product(found: Tensor, x: Tensor, w: Weight, parts: int) -> None:
    """Within the rounding of float32 sums; with one part those of activations rounded to bf16, unless w is f32."""
    dense = reference.dequantize(w).double().t()
    seen = (x if parts == 3 or w.format is F32 else x.bfloat16()).double()
    assert found.dtype == torch.float32
    assert found.shape == (x.shape[0], w.shape[0])
    error, sizes = (found.double() - seen @ dense).abs(), seen.abs() @ dense.abs()
    assert (error <= 5e-7 * sizes).all(), float((error / sizes).max())


@format_cases
@part_cases
def test_any_size(form: WeightFormat, parts: int) -> None:
    for n, out, columns in zip((0, 1, 3, 63, 129), (7, 130, 1, 257, 33), (*columns_of(form), 544, 128), strict=False):
        w, x = weight(form, out, columns, seed=n), rows(n, columns)
        assert_product(product.linear(x, w, parts=parts), x, w, parts)


def test_every_code() -> None:
    x = rows(5, 512)
    for form in (FP8_BLOCK, MXFP4):
        w = weight(form, 2, 512)
        w.data.copy_(torch.arange(w.data.numel()).view(w.data.shape) % 256)
        if form is FP8_BLOCK:
            w.data[(w.data & 0x7F) == 0x7F] = 0
        assert_product(product.linear(x, w, parts=3), x, w, 3)


@pytest.mark.parametrize("n", [1, 33])
def test_every_weight_of_a_stack(n: int) -> None:
    stack = Stack(
        tuple(weight(form, out, 544, seed=out) for form, out in zip(FORMATS, (5, 60, 33, 1, 20), strict=True))
    )
    x = rows(n, 544)
    for parts in (1, 3):
        found = product.linear_each(x, stack, parts=parts)
        # Beside an f32 weight activations stay as they are until each tile rounds them.
        for y, w in zip(found, stack.weights, strict=True):
            assert_product(y, x, w, parts)
    empty = product.linear_each(x[:0], stack, parts=1)
    assert [y.shape for y in empty] == [(0, w.shape[0]) for w in stack.weights]


@pytest.mark.parametrize("n", [0, 1, 3, 33])
def test_a_norm_before_a_stack(n: int) -> None:
    stack = Stack(tuple(weight(form, out, 160, seed=out) for form, out in ((FP8_BLOCK, 60), (BF16, 5), (MXFP4, 33))))
    x, norm = 3 * rows(n, 160), Weight("norm", (160,), F32, rows(1, 160)[0] + 1)
    for y, w in zip(product.norm_linear_each(x, norm, 1e-6, stack, parts=3), stack.weights, strict=True):
        assert_product(y, reference.rms_norm(x, norm, 1e-6), w, 3)


@pytest.mark.parametrize("n", [0, 1, 3, 17])
@part_cases
def test_a_norm_before_and_a_sum_after(n: int, parts: int) -> None:
    x, before = 3 * rows(n, 160), rows(n, 33, seed=5)
    norm = Weight("norm", (160,), F32, rows(1, 160)[0] + 1)
    normed = reference.rms_norm(x, norm, 1e-6)
    for form in (BF16, F32, FP8_BLOCK_F32):
        w = weight(form, 33, 160)
        found = product.norm_linear(x, norm, 1e-6, w, parts=parts)
        if parts == 3:
            assert_product(found, normed, w, 3)
        elif n:  # what is rounded to bf16 is not yet multiplied with the row's level
            expected = reference.linear(normed, w)
            assert (found - expected).norm() <= 5e-3 * expected.norm()
        assert_product(product.linear_onto(before, x, w, parts=parts) - before, x, w, parts)


@format_cases
def test_groups_use_their_own_rows(form: WeightFormat) -> None:
    w, x = weight(form, 3 * 130, 160), rows(7, 3, 160)
    found = product.grouped_linear(x, w, parts=3)
    dense = reference.dequantize(w).double().view(3, 130, 160)
    expected = torch.einsum("ngk,gok->ngo", x.double(), dense).flatten(1)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_groups_of_wider_rows_fill_the_first_channels_of_others() -> None:
    w, x = weight(BF16, 3 * 35, 48), rows(5, 3, 60)
    out = torch.full((5, 3, 41), 7.0, device=DEVICE)
    linear.grouped_linear_into(to_card(x), to_card(w), out, parts=3)
    expected = reference.grouped_linear(x[..., :48], w).view(5, 3, 35)
    torch.testing.assert_close(out[..., :35].cpu(), expected, rtol=1e-5, atol=1e-4)
    assert bool((out[..., 35:] == 7).all())
    for given, wrong in ((x[..., :40], out), (x, out[..., :30]), (x[:, :2], out), (x, out.transpose(0, 1))):
        with pytest.raises(ValueError, match="out"):
            linear.grouped_linear_into(to_card(given), to_card(w), wrong, parts=3)


def test_what_no_kernel_reads_is_refused() -> None:
    whole = Weight("w", (4, 32), I64, torch.zeros(4, 32, dtype=torch.int64))
    for x, w in ((rows(2, 31), weight(BF16, 4, 32)), (rows(2, 32), whole)):
        with pytest.raises(ValueError, match="w"):
            product.linear(x, w, parts=1)
    with pytest.raises(ValueError, match="one width"):
        product.linear_each(rows(1, 32), Stack((weight(F32, 4, 32), weight(F32, 4, 33))), parts=1)
    without = weight(FP8_BLOCK_F32, 4, 32)
    with pytest.raises(ValueError, match="scales"):
        product.linear(rows(1, 32), Weight("w", without.shape, without.format, without.data), parts=1)
