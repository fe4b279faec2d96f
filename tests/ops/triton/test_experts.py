"""Experts against float64: the plan, every format, the shared expert, clamps."""

from __future__ import annotations

import pytest
import torch
from tests.ops.test_cpu_linear import rows, seeded, weight
from tests.ops.triton.card import on_card
from torch import Tensor

from tenfold.formats import BF16, F32, FP8_BLOCK, FP8_BLOCK_F32, MXFP4, WeightFormat
from tenfold.ops import Experts, Weight, reference
from tenfold.ops.triton import experts

grouped = on_card(experts, "experts", "experts_onto", "feed_forward", "feed_forward_onto", "_plan")
pytestmark = pytest.mark.usefixtures("poisoned")


def bank_of(form: WeightFormat, count: int, hidden: int, inner: int, seed: int = 0) -> Experts:
    def some(out: int, columns: int, first: int) -> tuple[Weight, ...]:
        return tuple(weight(form, out, columns, seed=seed + first + 3 * e) for e in range(count))

    return Experts(some(inner, hidden, 0), some(hidden, inner, 1), some(inner, hidden, 2))


def law(x: Tensor, w1: Weight, w2: Weight, w3: Weight, limit: float | None, factor: Tensor, rounds: bool) -> Tensor:
    """One expert on rows of x in float64; with `rounds` activations are rounded to bf16, unless they meet float32."""
    rounds = rounds and w1.format is not F32
    seen = (x.bfloat16() if rounds else x).double()
    gate, up = (seen @ reference.dequantize(w).double().t() for w in (w1, w3))
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    inner = gate * gate.sigmoid() * up * factor[:, None]
    if rounds:
        inner = inner.float().bfloat16().double()
    return inner @ reference.dequantize(w2).double().t()


def routed_law(
    x: Tensor, ids: Tensor, factors: Tensor, bank: Experts, shared: Experts | None, limit: float | None, rounds: bool
) -> Tensor:
    total = torch.zeros(x.shape, dtype=torch.float64)
    for expert in ids.unique().tolist():
        token, place = (ids == expert).nonzero(as_tuple=True)
        triple = bank.w1[expert], bank.w2[expert], bank.w3[expert]
        total.index_add_(0, token, law(x[token], *triple, limit, factors[token, place].double(), rounds))
    if shared is not None:
        triple = shared.w1[0], shared.w2[0], shared.w3[0]
        total += law(x, *triple, limit, torch.ones(x.shape[0], dtype=torch.float64), rounds)
    return total


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def choice(n: int, count: int, topk: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    order = torch.rand(n, count, generator=seeded(seed)).argsort(1)[:, :topk].contiguous()
    return order, torch.rand(n, topk, generator=seeded(seed + 1))


@pytest.mark.parametrize(("n", "count", "topk"), [(1, 6, 6), (3, 256, 8), (65, 7, 6), (200, 9, 3)])
@pytest.mark.parametrize("block_rows", [16, 64])
def test_a_plan_puts_every_pair_in_one_block_of_its_expert(n: int, count: int, topk: int, block_rows: int) -> None:
    ids, _ = choice(n, count, topk)
    order, blocks = grouped._plan(ids, count, block_rows)
    flat, seen = ids.flatten(), []
    for expert, first, rows_in_it in blocks.tolist():
        if expert >= 0:
            assert 0 < rows_in_it <= block_rows
            pairs = order[first : first + rows_in_it].long()
            assert (flat[pairs] == expert).all()
            seen += pairs.tolist()
    assert sorted(seen) == list(range(n * topk))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    ("form", "shared_form", "n"),
    [(MXFP4, FP8_BLOCK, 1), (MXFP4, FP8_BLOCK, 37), (FP8_BLOCK_F32, FP8_BLOCK_F32, 5), (BF16, F32, 3), (F32, None, 18)],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_sum_over_chosen_experts_and_the_shared_one(
    form: WeightFormat, shared_form: WeightFormat | None, n: int, parts: int
) -> None:
    hidden, inner = 160, 96
    bank, x = bank_of(form, 5, hidden, inner), rows(n, hidden)
    shared = None if shared_form is None else bank_of(shared_form, 1, hidden, 128, seed=90)
    ids, factors = choice(n, 5, 3)
    found = grouped.experts(x, ids, factors, bank, limit=0.5, weigh_first=True, shared=shared, parts=parts)
    words = {"limit": 0.5, "weigh_first": True, "shared": shared, "parts": parts}
    apart = grouped.experts(x, ids, factors, bank, summed=False, **words)
    assert apart.shape == (n, 3 + (shared is not None), hidden)
    torch.testing.assert_close(apart.sum(1), found, rtol=1e-5, atol=1e-5 * float(found.abs().max()))
    expected = routed_law(x, ids, factors, bank, shared, 0.5, parts == 1)
    # A number next to a rounding boundary may fall on the other side in float32: one of bf16's steps in some rows.
    assert relative(found, expected) < (2e-4 if parts == 1 else 1e-6)
    if parts == 1:  # what official inference rounds to e4m3 costs 4.7e-2
        assert relative(found, routed_law(x, ids, factors, bank, shared, 0.5, False)) < 2e-2


def test_one_expert_alone_and_no_rows() -> None:
    bank, x = bank_of(MXFP4, 2, 64, 32), rows(3, 64)
    found = grouped.feed_forward(x, bank.w1[1], bank.w2[1], bank.w3[1], None, parts=3)
    expected = law(x, bank.w1[1], bank.w2[1], bank.w3[1], None, torch.ones(3, dtype=torch.float64), False)
    assert relative(found, expected) < 1e-6
    assert grouped.feed_forward(x[:0], bank.w1[1], bank.w2[1], bank.w3[1], None, parts=3).shape == (0, 64)
    ids, factors = choice(0, 2, 1)
    assert grouped.experts(x[:0], ids, factors, bank, limit=None, weigh_first=True, parts=1).shape == (0, 64)


@pytest.mark.parametrize("n", [0, 1, 3, 17])
def test_of_normed_rows_onto_what_was_there(n: int) -> None:
    """As the norm, the experts and the sum one after the other."""
    bank, shared, x = bank_of(FP8_BLOCK_F32, 5, 160, 96), bank_of(BF16, 1, 160, 128, seed=90), 5 * rows(n, 160)
    norm = Weight("norm", (160,), F32, rows(1, 160)[0] + 1)
    normed, (ids, factors) = reference.rms_norm(x, norm, 1e-6), choice(n, 5, 3)
    words = {"limit": None, "weigh_first": False, "shared": shared, "parts": 3}
    found = grouped.experts_onto(x, norm, 1e-6, ids, factors, bank, **words)
    alone = grouped.feed_forward_onto(x, norm, 1e-6, bank.w1[0], bank.w2[0], bank.w3[0], None, parts=3)
    assert found.shape == alone.shape == x.shape
    if n:
        expected = routed_law(normed, ids, factors, bank, shared, None, False)
        assert relative(found - x, expected) < 2e-6
        ones = torch.ones(n, dtype=torch.float64)
        triple = bank.w1[0], bank.w2[0], bank.w3[0]
        assert relative(alone - x, law(normed, *triple, None, ones, False)) < 2e-6
        near = grouped.experts_onto(x, norm, 1e-6, ids, factors, bank, **(words | {"parts": 1}))
        assert relative(near - x, expected) < 2e-2


def test_banks_of_unlike_experts_are_refused() -> None:
    bank = bank_of(MXFP4, 2, 64, 32)
    other = Experts(bank.w1, bank.w2, (bank.w3[0], weight(BF16, 32, 64)))
    ids, factors = choice(1, 2, 1)
    with pytest.raises(ValueError, match="w3 of expert 1"):
        grouped.experts(rows(1, 64), ids, factors, other, limit=None, weigh_first=True, parts=1)
    with pytest.raises(ValueError, match="rows of 64"):
        grouped.experts(rows(1, 32), ids, factors, bank, limit=None, weigh_first=True, parts=1)
