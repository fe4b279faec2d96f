"""What holds of every native operation alike: threads, company, odd numbers of rows, memory anywhere, no garbage.

The cases are those of the reference (cases.py) and one for each stored format of weights. A few operations are not
native and pass through here all the same. Extreme numbers are the matter of the tests of each operation.
"""

from __future__ import annotations

from typing import cast

import pytest
import torch
from tests.ops.cases import Call, Cases, Move, each, every_case, randint, randn
from torch import Tensor

from tenfold import _native
from tenfold.formats import BF16, FP8_BLOCK, FP8_BLOCK_F32, MXFP4
from tenfold.ops import Experts, Ops, Stack, cpu, cpu_linear, reference
from tenfold.quantise import quantize

T = 1000
SIZES = (0, 1, 3, 31, 33, 127, 129, 1000)
TIES = {"route": 1, "select_rows": 1, "norm_rope_pack": 20, "rope_round": 20}
# See also test_cpu_sessions.py.
NOT_OF_ROWS = {"compress_step", "dequantize", "prepare", "record", "recordings", "store_rows"}

pytestmark = pytest.mark.usefixtures("poisoned")


def stored_cases(ops: Ops) -> Cases:
    """Products with codes; 160 channels are a block and a quarter of the FP8 formats."""
    x, heads = randn(T, 160), randn(T, 3, 160, seed=1)
    ids, weights = randint(0, 5, (T, 1)), randn(T, 1).sigmoid()
    ids = torch.cat([ids, (ids + 2) % 5], 1)  # no expert twice
    stack = tuple(quantize("w", randn(rows, 160) / 9, form) for rows, form in ((96, FP8_BLOCK), (7, BF16), (33, MXFP4)))
    yield "linear_each-mixed", each(ops.linear_each, x, stack=Stack((stack[0], *stack)))
    for form in (BF16, FP8_BLOCK, FP8_BLOCK_F32, MXFP4):
        w1, w3, w2 = (quantize("w", randn(*shape) / 9, form) for shape in ((96, 160), (96, 160), (160, 96)))
        yield f"linear-{form.name}", each(ops.linear, x, weight=w1)
        yield f"grouped_linear-{form.name}", each(ops.grouped_linear, heads, weight=w1)
        yield f"feed_forward-{form.name}", each(ops.feed_forward, x, w1=w1, w2=w2, w3=w3, limit=10.0)
        bank = Experts((w1,) * 5, (w2,) * 5, (w3,) * 5)
        words = {"bank": bank, "limit": 1.0, "weigh_first": True}
        yield f"experts-{form.name}", each(ops.experts, x, ids, torch.cat([weights, 1 - weights], 1), **words)


def rounded_cases() -> Cases:
    """Activations rounded for MXFP4 weights, for which the reference has no twin."""
    x, heads = randn(T, 160), randn(T, 3, 160, seed=1)
    w1, w3, w2 = (quantize("w", randn(*shape) / 9, MXFP4) for shape in ((96, 160), (96, 160), (160, 96)))
    yield "linear-rounded", each(cpu_linear.linear, x, weight=w1, rounded=True)
    yield "linear_each-rounded", each(cpu_linear.linear_each, x, stack=Stack((w3, w1)), rounded=True)
    yield "grouped_linear-rounded", each(cpu_linear.grouped_linear, heads, weight=w1, rounded=True)
    yield "feed_forward-rounded", each(cpu_linear.feed_forward, x, w1=w1, w2=w2, w3=w3, limit=10.0, rounded=True)


def both(ops: object) -> dict[str, Call]:
    return every_case(cast(Ops, ops), T) | dict(stored_cases(cast(Ops, ops)))


LAWS = both(reference)
KERNELS = both(cpu) | dict(rounded_cases())


@pytest.fixture(params=_native.available_isas(), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = _native._kernel
    monkeypatch.setattr(_native, "_kernel", lambda name, _: kernel(name, request.param))


def test_every_operation_has_a_case() -> None:
    assert {name.split("-")[0] for name in KERNELS} == set(cpu.__all__) - NOT_OF_ROWS


@pytest.mark.parametrize("name", KERNELS)
def test_two_threads_give_the_bits_of_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in SIZES:
        results = []
        for count in (1, 2):
            monkeypatch.setattr(_native, "num_threads", lambda count=count: count)
            results.append(KERNELS[name](slice(0, n)))
        for one, two in zip(*results, strict=True):
            assert torch.equal(one, two), n


@pytest.mark.parametrize("name", KERNELS)
def test_a_slice_of_the_rows_gives_a_slice_of_the_result(name: str) -> None:
    whole = KERNELS[name](slice(0, T))
    for n in SIZES[1:-1]:
        for start in (0, 7, T - n):
            span = slice(start, start + n)
            for part, full in zip(KERNELS[name](span), whole, strict=True):
                assert torch.equal(part, full[span]), (n, start)


@pytest.mark.parametrize("name", KERNELS)
def test_every_number_of_rows_is_computed_whole(name: str) -> None:
    """The memory of results is full of NaN beforehand."""
    for n in SIZES:
        for part in KERNELS[name](slice(0, n)):
            assert part.shape[0] == n
            assert not part.is_floating_point() or part.isfinite().all()


@pytest.mark.parametrize("name", LAWS)
def test_every_operation_agrees_with_the_reference(name: str) -> None:
    """Within 1e-5 of the largest number; of chosen rows and experts, of which a tie may swap two, all but 1 in 500.

    Where numbers are rounded to codes, one that lies between two may go either way: in 1 row of 25.
    """
    for found, law in zip(KERNELS[name](slice(0, T)), LAWS[name](slice(0, T)), strict=True):
        assert found.dtype == law.dtype
        assert found.shape == law.shape
        allowed = 1e-5 * float(law.abs().max()) if law.is_floating_point() else 0
        apart = ((found - law).abs() > allowed).flatten(1).any(1)
        assert apart.sum() <= T // 500 * TIES.get(name.split("-")[0], 0)


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers one element further on: aligned to their own size and to nothing else."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return memory.view(tensor.shape).copy_(tensor)


def scattered(tensor: Tensor) -> Tensor:
    """The same numbers, every other one of memory."""
    return torch.empty(*tensor.shape, 2, dtype=tensor.dtype)[..., 0].copy_(tensor)


def spread_out(tensor: Tensor) -> Tensor:
    """The same rows with a gap after each."""
    return torch.empty(tensor.shape[0], 2, *tensor.shape[1:], dtype=tensor.dtype)[:, 0].copy_(tensor)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("move", [shifted, scattered, spread_out])
def test_memory_may_lie_anywhere(name: str, move: Move) -> None:
    for n in (1, 33):
        for dense, moved in zip(KERNELS[name](slice(0, n)), KERNELS[name](slice(0, n), move), strict=True):
            assert torch.equal(dense, moved)


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers at an address that is no multiple of their size."""
    memory = bytearray(tensor.numel() * tensor.itemsize + 1)
    moved = torch.frombuffer(memory, dtype=tensor.dtype, offset=1, count=tensor.numel())
    return moved.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("name", KERNELS)
def test_numbers_across_two_words_are_refused_or_right(name: str) -> None:
    if name.split("-")[0] not in ("unpack_rows", "layer_norm"):
        with pytest.raises(ValueError, match="is not aligned to"):
            KERNELS[name](slice(0, 3), misaligned)
        return
    # Bytes, which are aligned anywhere, and what torch does itself.
    for part, whole in zip(KERNELS[name](slice(0, 3), misaligned), KERNELS[name](slice(0, 3)), strict=True):
        assert torch.equal(part, whole)
