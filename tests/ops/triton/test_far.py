"""Experts in host memory: the same sums wherever an expert lies, and the busiest come to the card."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tenfold.formats import MXFP4
from tenfold.ops import Experts, Weight, reference
from tenfold.ops.triton import Triton

HIDDEN, INNER, COUNT = 64, 32, 6


def weight(name: str, rows: int, columns: int, seed: int) -> Weight:
    dice = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=dice)
    scales = torch.randint(120, 126, (rows, columns // 32), dtype=torch.uint8, generator=dice)
    return Weight(name, (rows, columns), MXFP4, codes, scales)


def bank() -> Experts:
    def some(name: str, rows: int, columns: int) -> tuple[Weight, ...]:
        return tuple(weight(f"{e}.{name}", rows, columns, 100 * e + int(name[1])) for e in range(COUNT))

    return Experts(some("w1", INNER, HIDDEN), some("w2", HIDDEN, INNER), some("w3", INNER, HIDDEN))


def kept(ops: Triton, one: Experts) -> Experts:
    assert ops.far is not None
    w1, w2, w3 = (tuple(ops.far.keep(w) for w in weights) for weights in (one.w1, one.w2, one.w3))
    return Experts(w1, w2, w3)


def test_the_busiest_come_to_the_card_and_nothing_changes() -> None:
    ops = Triton(exact=True)
    ops.keep_experts_far(hot=2)
    assert ops.far is not None
    law = bank()
    far = kept(ops, law)
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))

    def run(chosen: list[list[int]]) -> None:
        ids, weights = torch.tensor(chosen), torch.rand(3, 2, generator=torch.Generator().manual_seed(2))
        expected = reference.experts(x, ids, weights, law, limit=10.0, weigh_first=True)
        given: list[Tensor] = [tensor.to(ops.device) for tensor in (x, ids, weights)]
        found = ops.experts(given[0], given[1], given[2], far, limit=10.0, weigh_first=True)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)

    def there() -> set[int]:
        """Experts whose line of the table names memory on the card."""
        assert ops.far is not None
        (found,) = ops.far._banks.values()
        return {e for e in range(COUNT) if not torch.equal(found.table[e].cpu(), found.home[e])}

    run([[0, 1], [0, 1], [0, 2]])
    assert there() == set()
    ops.far.look()  # 0 and 1 set out
    assert there() == set()
    ops.far.look()  # and have come
    assert there() == {0, 1}
    run([[0, 1], [1, 2], [3, 0]])
    for _ in range(2):
        run([[4, 5], [4, 5], [4, 5]])
        run([[4, 5], [4, 5], [4, 5]])
        ops.far.look()
    ops.far.look()
    assert there() == {4, 5}
    run([[4, 0], [1, 5], [3, 2]])


def test_no_slots_no_copies() -> None:
    ops = Triton(exact=False)
    ops.keep_experts_far(hot=0)
    assert ops.far is not None
    for _ in range(40):
        ops.rest()
