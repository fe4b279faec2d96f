"""Attention of the GPU backend against the reference: every kind of source, layout and place of the queries."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tenfold.formats import F32, RowLayout, exact_layout, kv_row_v4, kv_row_v32
from tenfold.ops import Rows, Weight, reference
from tenfold.ops.triton import Triton, attention

DEVICE = Triton(exact=False).device
TINY, TINY_V32 = kv_row_v4(24, 8), kv_row_v32(32, 8)
WIDE, WIDE_V32 = kv_row_v4(512, 64), kv_row_v32(512, 64)

pytestmark = pytest.mark.usefixtures("poisoned")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weight(data: Tensor) -> Weight:
    return Weight("w", tuple(data.shape), F32, data)


def packed(rows: int, layout: RowLayout, seed: int = 0) -> Tensor:
    return reference.pack_rows(random(rows, layout.width, seed=seed), layout)


def window(layout: RowLayout, n: int, width: int = 40) -> Rows:
    stop = torch.arange(51, 51 + n)
    return Rows(packed(n + 50, layout), layout, start=stop - width, stop=stop)


def prefix(layout: RowLayout, n: int) -> Rows:
    """The first query sees nothing."""
    return Rows(packed(201, layout, seed=1), layout, start=torch.zeros(n, dtype=torch.int64), stop=torch.arange(n) * 6)


def listed(layout: RowLayout, n: int, columns: int = 70, least: int = 0) -> Rows:
    """Rows of varying number, the least for the last query."""
    dice = torch.Generator().manual_seed(n)
    index = torch.full((n, columns), -1, dtype=torch.int32)
    for i in range(n):
        count = least if i == n - 1 else int(torch.randint(least, columns + 1, (), generator=dice))
        index[i, :count] = torch.randperm(201, generator=dice)[:count].sort().values.int()
    return Rows(packed(201, layout, seed=1), layout, index=index)


def on_device(source: Rows) -> Rows:
    start, stop, index = (None if t is None else t.to(DEVICE) for t in (source.start, source.stop, source.index))
    return Rows(source.packed.to(DEVICE), source.layout, start, stop, index)


def error(q: Tensor, sources: Sequence[Rows], sink: Weight | None, value_dim: int, turns: Tensor | None) -> float:
    """Norm of the difference from the reference, relative."""
    width = q.shape[2]
    expected = reference.sparse_attention(q, sources, sink, width**-0.5, value_dim, 7, turns)
    given = None if sink is None else weight(sink.data.to(DEVICE))
    turned = None if turns is None else turns.to(DEVICE)
    found = attention.sparse_attention(
        q.to(DEVICE), [on_device(source) for source in sources], given, width**-0.5, value_dim, 7, turned
    ).cpu()
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def bound(layout: RowLayout) -> float:
    """Queries and shares meet quantised rows as bf16."""
    return 1e-5 if layout.code_bits == 32 else 4e-3


@pytest.mark.parametrize("kind", ["window", "hca", "csa", "list"])
@pytest.mark.parametrize("layout", [TINY, exact_layout(TINY)], ids=["deployed", "exact"])
def test_layers_of_v4(layout: RowLayout, kind: str) -> None:
    n, heads = 3, 2
    sources = {
        "window": [window(layout, n)],
        "hca": [window(layout, n), prefix(layout, n)],
        "csa": [window(layout, n), listed(layout, n)],
        "list": [listed(layout, n)],
    }[kind]
    turns = 0.3 ** torch.arange(4).float()
    q = random(n, heads, 24)
    assert error(q, sources, weight(random(heads)), 24, turns) < bound(layout)


@pytest.mark.parametrize("layout", [TINY_V32, exact_layout(TINY_V32)], ids=["deployed", "exact"])
@pytest.mark.parametrize("splits", [1, 3])
def test_latent_rows(layout: RowLayout, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row has beyond the value is key alone."""
    monkeypatch.setattr(attention, "_splits", lambda *_: splits)
    q = random(3, 20, 40)
    assert error(q, [listed(layout, 3, least=1)], None, 32, None) < bound(layout)


@pytest.mark.parametrize("splits", [1, 2, 9])
def test_parts_are_merged(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where parts are empty, and where all a query sees is the sink."""
    monkeypatch.setattr(attention, "_splits", lambda *_: splits)
    q, turns = random(2, 3, 24), 0.3 ** torch.arange(4).float()
    sink = weight(random(3))
    assert error(q, [window(TINY, 2), listed(TINY, 2)], sink, 24, turns) < 4e-3
    nothing = [on_device(prefix(TINY, 1)), on_device(listed(TINY, 1))]
    given = weight(sink.data.to(DEVICE))
    assert not attention.sparse_attention(q[:1].to(DEVICE), nothing, given, 0.2, 24, 7, turns.to(DEVICE)).any()


def test_the_widths_of_v4_flash() -> None:
    q, turns = random(2, 64, 512), 160000.0 ** (-torch.arange(32) / 32)
    assert error(q, [window(WIDE, 2), listed(WIDE, 2)], weight(random(64)), 512, turns) < 4e-3


def test_the_widths_of_v32() -> None:
    assert error(random(1, 16, 576), [window(WIDE_V32, 1)], None, 512, None) < 4e-3


def test_each_query_its_own_rows_at_its_own_position() -> None:
    n, layout = 3, TINY
    turns, sink, q = (0.3 ** torch.arange(4).float()).to(DEVICE), weight(random(2).to(DEVICE)), random(n, 2, 24)
    pools = [packed(60, layout, seed=i).to(DEVICE) for i in range(n)]
    lists = listed(layout, n, 30).index
    assert lists is not None
    lists = torch.where(lists > 59, 59, lists).to(DEVICE)
    addresses = torch.tensor([pool.data_ptr() for pool in pools]).to(DEVICE)
    stop, positions = torch.tensor([40, 1, 17]).to(DEVICE), torch.tensor([5, 100000, 0]).to(DEVICE)
    tables = [
        Rows(addresses, layout, start=torch.zeros_like(stop), stop=stop, most=60),
        Rows(addresses, layout, index=lists, most=60),
    ]
    found = attention.sparse_attention(q.to(DEVICE), tables, sink, 0.2, 24, positions, turns)
    for i, pool in enumerate(pools):
        alone = [
            Rows(pool.cpu(), layout, start=torch.zeros(1, dtype=torch.int64), stop=stop[i : i + 1].cpu()),
            Rows(pool.cpu(), layout, index=lists[i : i + 1].cpu()),
        ]
        expected = reference.sparse_attention(
            q[i : i + 1], alone, weight(sink.data.cpu()), 0.2, 24, int(positions[i]), turns.cpu()
        )
        torch.testing.assert_close(found[i : i + 1].cpu(), expected, rtol=0, atol=2e-2)


def test_what_it_cannot_do_is_refused() -> None:
    q = random(1, 2, 24).to(DEVICE)
    with pytest.raises(ValueError, match="same layout"):
        attention.sparse_attention(q, [], None, 1.0, 24, 0)
    with pytest.raises(ValueError, match="24 channels"):
        attention.sparse_attention(q, [on_device(window(TINY_V32, 1))], None, 1.0, 24, 0)
    with pytest.raises(ValueError, match="value_dim"):
        attention.sparse_attention(q, [on_device(window(TINY, 1))], None, 1.0, 25, 0)
