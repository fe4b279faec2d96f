"""Every operation row by row: what a row gives depends on no other row, to the bit, and no number of rows is special.

Any chunking, any batch and any rewind give the same logits because of this. The cases stand in cases.py; values
themselves are the matter of test_reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest
import torch
from tests.ops.cases import EXACT_KEY, FP4_KEYS, every_case, f32, randn

from tenfold.formats import RowLayout, kv_row_v4, kv_row_v32
from tenfold.ops import Ops, reference

T = 141
SIZES = (0, 1, 63, 127, 128, 129)
CASES = every_case(cast(Ops, reference), T)


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("threads")
def test_a_slice_of_the_rows_gives_a_slice_of_the_result(name: str) -> None:
    whole = CASES[name](slice(0, T))
    for n in (1, 2, 3, 7, 8, 9, 16, 17, 31, 64, 65, 127, 128):
        for start in (0, 5, T - n):
            span = slice(start, min(start + n, T))
            for part, full in zip(CASES[name](span), whole, strict=True):
                assert torch.equal(part, full[span]), (n, start)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("poisoned")
def test_every_number_of_rows_is_computed_whole(name: str) -> None:
    for n in SIZES:
        for part in CASES[name](slice(0, n)):
            assert part.shape[0] == n
            assert not part.is_floating_point() or part.isfinite().all()


@pytest.mark.parametrize("heads", [1, 16, 17, 64])
@pytest.mark.usefixtures("threads")
def test_equal_keys_are_ties_wherever_they_lie(heads: int) -> None:
    """A key's score must not depend on its place in the tile or on how many keys are scored with it."""
    q, weights = randn(6, heads, 32), randn(6, heads, seed=1).abs()
    for count in (*range(2, 40), 63, 64, 65, 127, 129, 700):
        keys = reference.pack_rows(randn(1, 32, seed=2).expand(count, 32), EXACT_KEY)
        found = reference.select_rows(q, weights, keys, EXACT_KEY, torch.full((6,), count), count // 2)
        assert torch.equal(found, torch.arange(count // 2, dtype=torch.int32).expand(6, -1)), count


def test_scores_of_extreme_logits_stay_finite() -> None:
    gate = f32(torch.tensor([[1.0], [-1.0], [0.0]]))
    x = torch.tensor([[0.0], [80.0], [1000.0], [-20.0]])
    for scoring in ("sqrtsoftplus", "sigmoid"):
        _, weights = reference.route(x, gate, scoring=scoring, topk=3, scaling=1.0)
        assert weights.isfinite().all()
        assert weights.sum(1).tolist() == pytest.approx([1.0] * 4, rel=1e-6)


@pytest.mark.parametrize("layout", [kv_row_v4(512, 64), kv_row_v32(512, 64), *FP4_KEYS], ids=lambda layout: layout.name)
@pytest.mark.parametrize("number", [float("nan"), -float("nan"), float("inf")])
def test_a_number_that_is_none_stays_visible(layout: RowLayout, number: float) -> None:
    """The sampler then says so; a crash here, or a finite row, would hide which network diverged."""
    x = randn(3, layout.width)
    x[1, 5] = number
    found = reference.unpack_rows(reference.pack_rows(x, layout), layout)
    assert found[1, : layout.block].isnan().all()
    assert found[[0, 2]].isfinite().all()
