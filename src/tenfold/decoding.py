"""Writing on a GPU: one token each of several sessions, the whole pass captured once as a graph and then replayed.

Sizes are those of a few buckets, so a pass may hold places where nobody stands: these write into the memory of a
session that nobody reads. Where there is no GPU the same pass runs uncaptured. Knows models and tables, no sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tenfold.config import ModelConfig
from tenfold.models import Model
from tenfold.ops import BatchOps, Ops
from tenfold.step import BatchSpan, Step
from tenfold.streams import Streams
from tenfold.tables import Tables

__all__ = ["Decoder", "Place", "can_decode"]

_SIZES = (1, 2, 4, 8, 16, 32, 64)
_CONTEXTS = (1 << 15, 1 << 18, 1 << 20)
_NOBODYS_TOKENS = 128
_WARM_UP_PASSES = 2  # the first compiles kernels and fills tables, which a capture must not


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A session's memory, and the token that comes next at a position."""

    streams: Streams
    token: int
    position: int


@dataclass(slots=True, eq=False)
class _Pass:
    """A pass of fixed size: its tables, and where the logits are after a replay."""

    tables: Tables
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor | None = None


def can_decode(ops: Ops) -> bool:
    """Whether a backend takes tables of sessions."""
    return hasattr(ops, "compress_step")


class Decoder:
    """Passes of one model, by the number of places and the longest context."""

    def __init__(self, config: ModelConfig, model: Model, ops: Ops, exact: bool, device: torch.device) -> None:
        self.config, self.model, self.exact, self.device = config, model, exact, device
        self.ops = cast(BatchOps, ops)
        self._nobody = Streams(config, _NOBODYS_TOKENS, exact, device)
        self._passes: dict[tuple[int, int], _Pass] = {}
        self._pool: Any = None

    def run(self, places: Sequence[Place]) -> Tensor:
        """Logits, float32 [len(places), vocab], in host memory; the rows of each token have entered its streams."""
        parts = [self._run(places[i : i + _SIZES[-1]]) for i in range(0, len(places), _SIZES[-1])]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, places: Sequence[Place]) -> Tensor:
        for place in places:
            place.streams.make_room(place.position + 1)
        logits = self._logits(places)[: len(places)].cpu()
        for place in places:
            place.streams.advance(place.position + 1)
        self.ops.rest()
        return logits

    def _logits(self, places: Sequence[Place]) -> Tensor:
        size = next(size for size in _SIZES if size >= len(places))
        context = _tier(max(place.position for place in places) + 1, self.config)
        ready = self._passes.get((size, context))
        if ready is None:
            ready = self._passes[size, context] = self._pass(size, context)
        self._put(ready.tables, places)
        if ready.graph is None:
            return self._forward(ready.tables)
        ready.graph.replay()
        assert ready.logits is not None
        return ready.logits

    def _put(self, tables: Tables, places: Sequence[Place]) -> None:
        """Nobody stands where there is no session."""
        filled = [*places, *[Place(self._nobody, 0, 0)] * (tables.size - len(places))]
        tables.put(
            [place.streams for place in filled],
            [place.token for place in filled],
            [place.position for place in filled],
        )

    def _forward(self, tables: Tables) -> Tensor:
        wanted = torch.arange(tables.size, device=self.device)
        step = Step(tables.ids, tables.positions, (BatchSpan(tables),), wanted, tile_tokens=tables.size)
        with torch.no_grad():
            return self.model.forward(step)

    def _pass(self, size: int, context: int) -> _Pass:
        """Captured while nobody stands in any place: what the passes write meanwhile is nobody's."""
        ready = _Pass(Tables(self.config, self.ops, size, context, self.exact, self.device))
        if self.device.type != "cuda":
            return ready
        self._put(ready.tables, [])
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP_PASSES):
                self._forward(ready.tables)
        torch.cuda.current_stream(self.device).wait_stream(aside)
        ready.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(ready.graph, pool=self._pool, capture_error_mode="thread_local"):
            ready.logits = self._forward(ready.tables)
        self._pool = self._pool or ready.graph.pool()
        return ready


def _tier(tokens: int, config: ModelConfig) -> int:
    """The context that sizes are made for."""
    most = config.max_position_embeddings
    return min(next((tier for tier in _CONTEXTS if tier >= tokens), most), most)
