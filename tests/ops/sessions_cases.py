"""A token of each of several sessions into their memory, for any backend: the bytes that streams and reference make."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from tenfold.formats import F32, RowLayout, exact_layout, index_key_fp4, kv_row_v4, kv_row_v32
from tenfold.ops import Weight, reference
from tenfold.streams import CompressorState, WindowRing

LAYOUTS = [
    (kv_row_v4(24, 8), 4, True, False),
    (kv_row_v4(24, 8), 16, False, False),
    (kv_row_v4(512, 64), 4, True, False),
    (index_key_fp4(32), 4, True, True),
    (index_key_fp4(128), 4, True, True),
    (exact_layout(kv_row_v4(24, 8)), 4, True, False),
    (exact_layout(index_key_fp4(32)), 4, True, False),
]
IDS = ["csa", "hca", "csa-wide", "keys", "keys-wide", "exact", "exact-keys"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def rows_and_rings(ops: ModuleType, device: torch.device) -> None:
    layout, positions = kv_row_v32(32, 8), [0, 7, 13]
    rows = reference.pack_rows(random(3, 40), layout)
    rings = [WindowRing(layout, 8, device) for _ in positions]
    addresses = torch.tensor([ring.copies.data_ptr() for ring in rings]).to(device)
    ops.store_rows(rows.to(device), addresses, torch.tensor(positions).to(device), ring=8)
    for ring, row, position in zip(rings, rows, positions, strict=True):
        expected = WindowRing(layout, 8)
        expected.extend(row[None], position)
        assert torch.equal(ring.copies.cpu(), expected.copies)
    grown = torch.zeros(3, 20, layout.row_bytes, dtype=torch.uint8, device=device)
    own = torch.tensor([one.data_ptr() for one in grown]).to(device)
    ops.store_rows(rows.to(device), own, torch.tensor(positions).to(device))
    for one, row, position in zip(grown.cpu(), rows, positions, strict=True):
        assert torch.equal(one[position], row)
        assert not one[torch.arange(20) != position].any()


def groups_are_compressed_as_by_the_reference(
    ops: ModuleType, device: torch.device, layout: RowLayout, ratio: int, overlap: bool, spread: bool
) -> None:
    """Three sessions, each at another place of its group, token by token."""
    dim, starts, tokens = layout.width, (0, 1, 2), 2 * ratio + 1
    width = 2 * dim if overlap else dim
    norm, turns = Weight("norm", (dim,), F32, random(dim)), 0.3 ** torch.arange(4).float()
    states = [CompressorState(width, ratio, overlap, device) for _ in starts]
    rows = torch.zeros(3, 4, layout.row_bytes, dtype=torch.uint8, device=device)
    expected = [CompressorState(width, ratio, overlap) for _ in starts]
    own_rows: list[list[Tensor]] = [[] for _ in starts]
    state_addresses = torch.tensor([state.data.data_ptr() for state in states]).to(device)
    row_addresses = torch.tensor([one.data_ptr() for one in rows]).to(device)
    given = Weight("norm", (dim,), F32, norm.data.to(device))
    ape = Weight("ape", (ratio, width), F32, random(ratio, width))
    given_ape = Weight("ape", (ratio, width), F32, ape.data.to(device))
    for i, start in enumerate(starts):  # what each has read before
        values, gates = random(start, width, seed=i), random(start, width, seed=i + 50)
        if start:
            states[i].extend(values.to(device), gates.to(device), 0)
            expected[i].extend(values, gates, 0)
    for step in range(tokens):
        values, gates = random(3, width, seed=step), random(3, width, seed=step + 100)
        positions = torch.tensor([start + step for start in starts])
        ops.compress_step(
            values.to(device), gates.to(device), given_ape, state_addresses, row_addresses, positions.to(device),
            ratio, overlap, given, 1e-6, turns.to(device), layout, spread,
        )  # fmt: skip
        for i, start in enumerate(starts):
            own = gates[i : i + 1] + ape.data[(start + step) % ratio]
            groups = expected[i].extend(values[i : i + 1], own, start + step)
            if groups is not None:
                entries = reference.compress(*groups, overlap)
                first = torch.tensor([len(own_rows[i]) * ratio])
                packed = reference.norm_rope_pack(entries, norm, 1e-6, first, turns, layout, spread)
                own_rows[i].append(packed[0])
    for i, start in enumerate(starts):
        assert len(own_rows[i]) == (start + tokens) // ratio
        live = expected[i].live_slots(start + tokens)
        assert torch.equal(states[i].data[:live].cpu(), expected[i].data[:live])
        found = reference.unpack_rows(rows[i, : len(own_rows[i])].cpu(), layout)
        wanted = reference.unpack_rows(torch.stack(own_rows[i]), layout)
        if layout.code_bits == 32:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            continue
        # Sums in another order may round a number to the neighbouring code, seldom.
        assert float((found != wanted).float().mean()) < 0.02
        step_size = 2.0**-3 if layout.code_bits == 8 else 0.5
        assert bool(((found - wanted).abs() <= step_size * wanted.abs().amax(-1, keepdim=True)).all())
