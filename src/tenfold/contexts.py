"""A session that looks as if it had read `length` tokens: its streams hold random rows in the layouts they have.

For timing at depths that would take hours to read. Rows are normal with unit variance, so what the index chooses
is scattered over the whole context, the worst case for gathering. Knows nothing of what is timed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.engine import Session, Snapshot
from tenfold.formats import RowLayout, exact_layout
from tenfold.ops import reference
from tenfold.streams import RestorePoint

__all__ = ["pretend"]

_TILE_ROWS = 8192


def pretend(session: Session, length: int, seed: int = 0) -> None:
    """Replaces the timeline by `length` tokens of id 0 with random streams."""
    generator = torch.Generator().manual_seed(seed)
    exact = session.engine.exact
    empty = session.streams.restore_point(0).fixed
    fixed = {}
    for spec in session.streams.specs:
        layout = exact_layout(spec.layout) if exact else spec.layout
        key = spec.layer, spec.name
        if spec.component == "state":
            fixed[key] = _state(empty[key], generator)
        elif spec.fixed_rows:
            fixed[key] = _rows(layout, spec.fixed_rows, generator)
        else:
            stream = session.streams.rows(*key)
            stream.make_room(spec.rows_at(length))
            _fill(stream.data[: spec.rows_at(length)], layout, generator)
    logits = torch.zeros(session.engine.config.vocab_size)
    session.restore(Snapshot(session.engine, (0,) * length, RestorePoint(length, fixed), {}, logits))


def _state(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random values with equal gates."""
    state = torch.zeros_like(like)
    width = like.shape[1] // 2
    state[:, :width] = torch.randn(like.shape[0], width, generator=generator)
    return state


def _rows(layout: RowLayout, count: int, generator: torch.Generator) -> Tensor:
    return reference.pack_rows(torch.randn(count, layout.width, generator=generator), layout)


def _fill(rows: Tensor, layout: RowLayout, generator: torch.Generator) -> None:
    """Random rows in place; beyond a tile the same ones again, since packing takes longer than timing."""
    tile = _rows(layout, min(len(rows), _TILE_ROWS), generator)
    for start in range(0, len(rows), _TILE_ROWS):
        rows[start : start + _TILE_ROWS] = tile[: len(rows) - start]
