"""A token of each of several sessions into their memory: the bytes that streams and the reference would have made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.ops import sessions_cases
from tests.ops.cases import randint, randn

from tenfold.formats import RowLayout, index_key_fp4, kv_row_v4
from tenfold.ops import Rows, cpu

DEVICE = torch.device("cpu")


def test_rows_and_rings() -> None:
    sessions_cases.rows_and_rings(cpu, DEVICE)


@pytest.mark.parametrize(("layout", "ratio", "overlap", "spread"), sessions_cases.LAYOUTS, ids=sessions_cases.IDS)
def test_groups_are_compressed_as_by_the_reference(layout: RowLayout, ratio: int, overlap: bool, spread: bool) -> None:
    sessions_cases.groups_are_compressed_as_by_the_reference(cpu, DEVICE, layout, ratio, overlap, spread)


@pytest.fixture(params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("n", [1, 3, 4, 33])
def test_each_session_gets_what_it_gets_alone(n: int) -> None:
    """Selection, then attention to what was selected and to a range of a ring, over memory of its own; of few sessions
    each is all threads' work, of many one's."""
    heads, keys_layout, layout = 4, index_key_fp4(64), kv_row_v4(96, 32)
    visible, positions = randint(1, 300, (n,)), randint(0, 1000, (n,))
    keys = [cpu.pack_rows(randn(300, 64, seed=i), keys_layout) for i in range(n)]
    rows = [cpu.pack_rows(randn(300, 96, seed=i), layout) for i in range(n)]
    rings = [cpu.pack_rows(randn(64, 96, seed=i), layout) for i in range(n)]
    tables = [torch.tensor([one.data_ptr() for one in each]) for each in (keys, rows, rings)]
    index_q, weights, q = randn(n, heads, 64), randn(n, heads), randn(n, heads, 96)
    start, stop = randint(0, 20, (n,)), randint(20, 64, (n,))
    turns = 0.3 ** torch.arange(16).float()
    chosen = cpu.select_rows(index_q, weights, tables[0], keys_layout, visible, 128, most=300, factor=0.3)
    assert chosen.shape == (n, 128)
    sources = [
        Rows(tables[2], layout, start, stop, most=32),
        Rows(tables[1], layout, index=chosen, most=300),
    ]
    together = cpu.sparse_attention(q, sources, None, 0.1, 96, positions, turns)
    for i in range(n):
        one = slice(i, i + 1)
        alone = cpu.select_rows(index_q[one], weights[one] * 0.3, keys[i], keys_layout, visible[one], 128)
        count = alone.shape[1]
        assert torch.equal(chosen[one, :count], alone)
        assert bool((chosen[one, count:] == -1).all())
        mine = [Rows(rings[i], layout, start[one], stop[one]), Rows(rows[i], layout, index=alone)]
        attended = cpu.sparse_attention(q[one], mine, None, 0.1, 96, int(positions[i]), turns)
        assert torch.equal(together[one], attended)
