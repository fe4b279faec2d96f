"""A frozen description of one forward pass over several sessions. Knows nothing of models or scheduling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tenfold.streams import Streams

__all__ = ["Span", "Step"]


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """The tokens of one session in a step: rows [start, stop) of the step, the first at `position`."""

    streams: Streams
    start: int
    stop: int
    position: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def within(self, start: int, stop: int) -> Span:
        """The part of this span in rows [start, stop) of the step, counted from `start`."""
        first, last = max(self.start, start), min(self.stop, stop)
        return replace(self, start=first - start, stop=last - start, position=self.position + first - self.start)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """All tokens of a pass in one row: ids and positions int64 [n], the spans, and the rows whose logits are wanted.

    A layer takes `tile_tokens` of them at a time, so that what it computes on the way fits the memory planned. `tick`
    is called as often with the share of the pass that is done; what it raises ends the pass.
    """

    ids: Tensor
    positions: Tensor
    spans: tuple[Span, ...]
    wanted: Tensor
    tile_tokens: int
    tick: Callable[[float], None] | None = None

    def tiles(self) -> list[tuple[slice, Step]]:
        """The rows of each tile and the step that computes them; one after the other they are this step."""
        n = self.ids.shape[0]
        if n <= self.tile_tokens:
            return [(slice(0, n), self)]
        starts = range(0, n, self.tile_tokens)
        return [(slice(s, min(s + self.tile_tokens, n)), self._tile(s, min(s + self.tile_tokens, n))) for s in starts]

    def _tile(self, start: int, stop: int) -> Step:
        spans = tuple(span.within(start, stop) for span in self.spans if span.start < stop and start < span.stop)
        nothing = torch.empty(0, dtype=torch.int64)
        return Step(self.ids[start:stop], self.positions[start:stop], spans, nothing, self.tile_tokens)
