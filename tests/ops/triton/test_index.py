"""Selection of the GPU backend: exactly the best rows, of equal ones the first, whatever the scores look like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tenfold.formats import RowLayout, exact_layout, index_key_fp4, index_key_fp8
from tenfold.ops import reference
from tenfold.ops.triton import Triton, index, topk

DEVICE = Triton(exact=False).device
LAYOUTS = {
    "fp4": index_key_fp4(32),
    "fp8": index_key_fp8(32),
    "exact": exact_layout(index_key_fp4(32)),
    "fp4-wide": index_key_fp4(128),
    "fp8-wide": index_key_fp8(128),
}
Draw = Callable[[torch.Generator, tuple[int, int]], Tensor]
SCORES: dict[str, Draw] = {
    "normal": lambda dice, shape: torch.randn(shape, generator=dice),
    "narrow": lambda dice, shape: 1 + torch.rand(shape, generator=dice) * 1e-3,
    "all equal": lambda dice, shape: torch.zeros(shape),
    "zeros of both signs": lambda dice, shape: (
        torch.relu(torch.randn(shape, generator=dice) - 1) * torch.randn(shape, generator=dice).sign()
    ),
    "tiny": lambda dice, shape: torch.randn(shape, generator=dice) * 1e-30,
    "few values": lambda dice, shape: torch.randint(-3, 4, shape, generator=dice).float(),
}

pytestmark = pytest.mark.usefixtures("poisoned")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def best(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """The law: a stable sort."""
    columns = scores.shape[1]
    hidden = torch.arange(columns) >= visible[:, None]
    order = scores.masked_fill(hidden, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :k]
    rows = torch.where(order < visible[:, None], order, columns).int().sort(1).values
    return torch.where(rows == columns, -1, rows)


@pytest.mark.parametrize("at_once", [8192, 16], ids=["search", "histograms"])
@pytest.mark.parametrize("name", SCORES)
def test_the_best_of_each_row(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "_AT_ONCE", at_once)
    monkeypatch.setattr(topk, "_BLOCK", 256)
    for n, columns, k in ((3, 1000, 64), (2, 70, 300), (9, 33, 4), (1, 17, 17)):
        dice = torch.Generator().manual_seed(columns)
        scores, visible = SCORES[name](dice, (n, columns)), torch.randint(0, columns + 1, (n,), generator=dice)
        visible[0] = columns
        found = topk.top_rows(scores.to(DEVICE), visible.to(DEVICE), k)
        assert torch.equal(found.cpu(), best(scores, visible, k)), (n, columns, k)


def test_no_rows_and_no_queries() -> None:
    nothing = torch.empty(0, 5, device=DEVICE)
    assert topk.top_rows(nothing, torch.empty(0, dtype=torch.int64, device=DEVICE), 3).shape == (0, 3)
    assert topk.top_rows(torch.empty(2, 0, device=DEVICE), torch.zeros(2, dtype=torch.int64), 3).shape == (2, 0)


def case(layout: RowLayout, n: int, rows: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = random(n, heads, layout.width)
    if layout.code_bits != 32:
        q = reference.unpack_rows(reference.pack_rows(q, layout), layout)
    keys = reference.pack_rows(random(rows, layout.width, seed=3), layout)
    return q, random(n, heads), keys, torch.arange(rows - n + 1, rows + 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores(name: str) -> None:
    layout, heads = LAYOUTS[name], 64 if name.endswith("wide") else 3
    q, weights, keys, visible = case(layout, 3, 150, heads)
    found = index.index_scores(q.to(DEVICE), weights.to(DEVICE), keys.to(DEVICE), layout, visible.to(DEVICE), 150).cpu()
    dense = reference.unpack_rows(keys, layout).double()
    expected = (torch.einsum("thd,jd->thj", q.double(), dense).relu() * weights.double()[:, :, None]).sum(1)
    for i in range(3):
        torch.testing.assert_close(found[i, : visible[i]].double(), expected[i, : visible[i]], rtol=1e-5, atol=1e-4)
        assert found[i, visible[i] :].isnan().all(), "a score beyond what is visible was written"


@pytest.mark.parametrize("name", ["fp4", "fp8", "exact"])
@pytest.mark.parametrize("strip", [1 << 25, 300], ids=["at once", "in strips"])
def test_selection_is_that_of_the_reference(name: str, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_STRIP_SCORES", strip)
    layout = LAYOUTS[name]
    q, weights, keys, visible = case(layout, 17, 140, 16)
    expected = reference.select_rows(q, weights, keys, layout, visible, 9)
    on_device = q.to(DEVICE), weights.to(DEVICE), keys.to(DEVICE), layout, visible.to(DEVICE)
    assert torch.equal(index.select_rows(*on_device, 9).cpu(), expected)
    expected = reference.select_rows(q, weights, keys, layout, visible, 200)
    assert torch.equal(index.select_rows(*on_device, 200).cpu(), expected)


def test_each_query_its_own_keys() -> None:
    layout, n = LAYOUTS["fp4"], 3
    q, weights, _, _ = case(layout, n, 60, 16)
    keys = [reference.pack_rows(random(60, layout.width, seed=i), layout).to(DEVICE) for i in range(n)]
    visible = torch.tensor([60, 5, 33])
    addresses = torch.tensor([one.data_ptr() for one in keys]).to(DEVICE)
    found = index.select_rows(q.to(DEVICE), weights.to(DEVICE), addresses, layout, visible.to(DEVICE), 9, most=60).cpu()
    met = index._as_met(q.to(DEVICE), layout).flatten(2)
    halved = index.select_rows(met, weights.to(DEVICE) * 2, addresses, layout, visible.to(DEVICE), 9, 60, factor=0.5)
    assert torch.equal(halved.cpu(), found)
    for i in range(n):
        own = slice(i, i + 1)
        expected = reference.select_rows(q[own], weights[own], keys[i].cpu(), layout, visible[own], 9)
        count = expected.shape[1]
        assert torch.equal(found[own, :count], expected)
        assert (found[own, count:] == -1).all()


def test_scores_take_a_fixed_amount_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many queries and rows there are."""
    sizes: list[int] = []
    real = index.index_scores

    def seen(*arguments: Tensor | RowLayout | int) -> Tensor:
        scores = real(*arguments)  # type: ignore[arg-type]
        sizes.append(scores.numel())
        return scores

    monkeypatch.setattr(index, "index_scores", seen)
    monkeypatch.setattr(index, "_STRIP_SCORES", 1000)
    q, weights, keys, visible = case(LAYOUTS["fp8"], 20, 200, 2)
    index.select_rows(q.to(DEVICE), weights.to(DEVICE), keys.to(DEVICE), LAYOUTS["fp8"], visible.to(DEVICE), 4)
    assert sizes == [1000] * 4
