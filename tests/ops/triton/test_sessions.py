"""A token of each of several sessions into their memory: the bytes that streams and the reference would have made."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch
from tests.ops import sessions_cases

from tenfold.formats import F32, RowLayout, exact_layout, index_key_fp4, kv_row_v4
from tenfold.ops import Group, Weight, reference
from tenfold.ops.triton import Triton, sessions
from tenfold.streams import CompressorState, WindowRing

DEVICE = Triton(exact=False).device


def test_rows_and_rings() -> None:
    sessions_cases.rows_and_rings(sessions, DEVICE)


@pytest.mark.parametrize(("layout", "ratio", "overlap", "spread"), sessions_cases.LAYOUTS, ids=sessions_cases.IDS)
def test_groups_are_compressed_as_by_the_reference(layout: RowLayout, ratio: int, overlap: bool, spread: bool) -> None:
    sessions_cases.groups_are_compressed_as_by_the_reference(sessions, DEVICE, layout, ratio, overlap, spread)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kinds", [0, 1, 2], ids=["window", "rows", "rows and keys"])
def test_all_of_a_layer_enters_at_once(kinds: int, exact: bool) -> None:
    """As row by row and group by group."""
    n, ratio, overlap, own, turns = 3, 4, kinds == 2, kv_row_v4(24, 8), 0.3 ** torch.arange(4).float().to(DEVICE)
    layouts = [exact_layout(layout) if exact else layout for layout in (own, index_key_fp4(32))]
    positions = torch.tensor([3, 1, 11]).to(DEVICE)

    def weight(*shape: int, seed: int) -> Weight:
        return Weight("w", shape, F32, sessions_cases.random(*shape, seed=seed).to(DEVICE))

    def memory() -> tuple[list[WindowRing], list[list[CompressorState]], list[torch.Tensor]]:
        states = [[CompressorState((1 + overlap) * layout.width, ratio, overlap, DEVICE) for _ in range(n)]
                  for layout in layouts]  # fmt: skip
        for some in states:
            for i, state in enumerate(some):
                state._values.copy_(sessions_cases.random(*state._values.shape, seed=i))
                state._gates.copy_(sessions_cases.random(*state._gates.shape, seed=i + 5))
        grown = [torch.zeros(n, 16, layout.row_bytes, dtype=torch.uint8, device=DEVICE) for layout in layouts]
        return [WindowRing(layouts[0], 8, DEVICE) for _ in range(n)], states, grown

    def groups(states: list[list[CompressorState]], grown: list[torch.Tensor]) -> list[Group]:
        found = []
        for k, layout in enumerate(layouts[:kinds]):
            width = (1 + overlap) * layout.width
            values, gates = (sessions_cases.random(n, width, seed=k + j).to(DEVICE) for j in (20, 30))
            state_at, row_at = (torch.tensor([one.data_ptr() for one in some]).to(DEVICE)
                                for some in ([state.data for state in states[k]], grown[k]))  # fmt: skip
            spread = k == 1 and not exact
            ape, norm = weight(ratio, width, seed=k), weight(layout.width, seed=k + 9)
            found.append(Group(values, gates, ape, state_at, row_at, norm, layout, spread))
        return found

    row, norm = sessions_cases.random(n, 24).to(DEVICE), weight(24, seed=4)
    rings, states, grown = memory()
    addresses = torch.tensor([ring.copies.data_ptr() for ring in rings]).to(DEVICE)
    words = groups(states, grown), ratio, overlap
    q, q_index = sessions_cases.random(n, 5, 24, seed=7), sessions_cases.random(n, 17, 32, seed=8)
    asked = q.to(DEVICE), q_index.to(DEVICE) if kinds == 2 else None
    queries, met = sessions.enter(row, norm, 1e-6, positions, turns, addresses, 8, layouts[0], *words, *asked)
    torch.testing.assert_close(
        queries.cpu(), reference.norm_rope(q, None, 1e-6, positions.cpu(), turns.cpu()), rtol=1e-5, atol=1e-5
    )
    if kinds == 2:
        wanted = reference.rope_round(q_index, positions.cpu(), turns.cpu(), layouts[1], not exact)
        if not exact:  # the even channels come first; a number next to a tie may be rounded to the other side
            wanted = wanted.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
            assert (met.float().cpu() != wanted).float().mean() < 0.01
        torch.testing.assert_close(met.float().cpu(), wanted, rtol=1e-5 if exact else 0.5, atol=1e-5)
    other_rings, other_states, other_grown = memory()
    for group in groups(other_states, other_grown):
        sessions.compress_step(
            group.values, group.gates, group.ape, group.states, group.rows, positions, ratio, overlap, group.norm,
            1e-6, turns, group.layout, group.spread,
        )  # fmt: skip
    packed = reference.norm_rope_pack(
        row.cpu(), Weight("w", (24,), F32, norm.data.cpu()), 1e-6, positions.cpu(), turns.cpu(), layouts[0], False
    )
    for i, ring in enumerate(other_rings):
        ring.extend(packed[i : i + 1].to(DEVICE), int(positions[i]))
        found, expected = (reference.unpack_rows(one.copies.cpu(), layouts[0]) for one in (rings[i], ring))
        torch.testing.assert_close(found, expected, rtol=0.07, atol=1e-6)
    for some, others in zip(states, other_states, strict=True):
        assert all(torch.equal(one.data, other.data) for one, other in zip(some, others, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(grown, other_grown, strict=True))
    with pytest.raises(ValueError, match="q: expected 3 of 24"):
        sessions.enter(row, norm, 1e-6, positions, turns, addresses, 8, layouts[0], *words, asked[0][:2], asked[1])
