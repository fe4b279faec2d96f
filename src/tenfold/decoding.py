"""Writing: one token each of several sessions, the whole pass captured once as a graph and then replayed.

On a GPU sizes are those of a few buckets, so a pass may hold places where nobody stands: these write into the memory
of a session that nobody reads. On the CPU such a place would cost as much as a session, so that each number of sessions
has a recording of its own. Knows models and tables, no sessions.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from tenfold.config import ModelConfig
from tenfold.models import Model
from tenfold.ops import BatchOps, Ops, Recording, RecordingOps, Tick
from tenfold.step import BatchSpan, Pace, Step
from tenfold.streams import Streams
from tenfold.tables import Tables

__all__ = ["Decoder", "Place", "can_decode"]

_SIZES = (1, 2, 4, 8, 16, 32, 64)
_RECORDED_SIZES = tuple(range(1, 33))
"""Of more each layer would take longer than a pass may go without a tick, and weights are not what takes the time."""
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
    graph: torch.cuda.CUDAGraph | Recording | None = None
    logits: Tensor | None = None
    has_run: bool = False


def can_decode(ops: Ops) -> bool:
    """Whether a backend takes tables of sessions."""
    return hasattr(ops, "compress_step")


class Decoder:
    """Passes of one model, by the number of places and the longest context."""

    def __init__(self, config: ModelConfig, model: Model, ops: Ops, exact: bool, device: torch.device) -> None:
        self.config, self.model, self.exact, self.device = config, model, exact, device
        self.ops = cast(BatchOps, ops)
        self._recordings = cast(RecordingOps, ops).recordings() if hasattr(ops, "recordings") else None
        self._sizes = _SIZES if self._recordings is None else _RECORDED_SIZES
        self._passes: dict[tuple[int, int, int], _Pass] = {}
        self._pool: Any = None
        self._alone = threading.Lock()  # passes of one size share their memory

    @cached_property
    def _nobody(self) -> Streams:
        """Who stands where there is no session; on the CPU every place is taken."""
        return Streams(self.config, _NOBODYS_TOKENS, self.exact, self.device)

    def run(self, places: Sequence[Place], tick: Tick | None = None) -> Tensor:
        """Logits, float32 [len(places), vocab], in host memory; the rows of each token have entered its streams.

        On the CPU `tick` is told the share that is done, as by `Engine.step`; on a GPU a pass takes no time.
        """
        most = self._sizes[-1]
        with self._alone:
            parts = [self._run(places[i : i + most], tick) for i in range(0, len(places), most)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, places: Sequence[Place], tick: Tick | None) -> Tensor:
        for place in places:
            place.streams.make_room(place.position + 1)
        logits = self._logits(places, tick)[: len(places)]
        logits = logits.clone() if self.device.type == "cpu" else logits.cpu()
        for place in places:
            place.streams.advance(place.position + 1)
        if self._recordings is None:
            self.ops.rest()
        return logits

    def _logits(self, places: Sequence[Place], tick: Tick | None) -> Tensor:
        size = next(size for size in self._sizes if size >= len(places))
        context = self.config.max_position_embeddings
        if self._recordings is None:
            context = _tier(max(place.position for place in places) + 1, self.config)
        key = size, context, torch.get_num_threads()
        ready = self._passes.get(key)
        if ready is None:
            ready = self._passes[key] = self._pass(size, context)
        self._put(ready.tables, places)
        if ready.graph is None:
            return self._forward(ready.tables, tick) if self._recordings is None else self._run_or_record(ready, tick)
        if not isinstance(ready.graph, torch.cuda.CUDAGraph):
            return ready.graph.replay(tick)
        ready.graph.replay()
        assert ready.logits is not None
        return ready.logits

    def _put(self, tables: Tables, places: Sequence[Place]) -> None:
        """Nobody stands where there is no session."""
        empty = tables.size - len(places)
        filled = [*places, *([Place(self._nobody, 0, 0)] * empty if empty else ())]
        tables.put(
            [place.streams for place in filled],
            [place.token for place in filled],
            [place.position for place in filled],
        )

    def _forward(self, tables: Tables, tick: Tick | None = None) -> Tensor:
        pace = None if tick is None else Pace(tick)
        step = Step(tables.ids, tables.positions, (BatchSpan(tables),), None, tile_tokens=tables.size, pace=pace)
        with torch.no_grad():
            return self.model.forward(step)

    def _run_or_record(self, ready: _Pass, tick: Tick | None) -> Tensor:
        """The first pass of a size is not recorded, the second is: both are real ones."""
        if not ready.has_run:
            logits = self._forward(ready.tables, tick)
            ready.has_run = True
            return logits

        def run(mark: Tick) -> Tensor:
            def reached(share: float) -> None:
                mark(share)
                if tick is not None:
                    tick(share)

            return self._forward(ready.tables, reached)

        assert self._recordings is not None
        ready.graph = self._recordings.record(run)
        return ready.graph.out

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
