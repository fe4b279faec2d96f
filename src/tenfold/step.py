"""A frozen description of one forward pass over several sessions. Knows nothing of models or scheduling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tenfold.ops import Rows
from tenfold.streams import Streams
from tenfold.tables import Tables

__all__ = ["BatchSpan", "Pace", "Span", "Step"]

_PART_FLOPS = 80 * 10**9
"""Of attention and selection in one go: a third of a second on two cores, however deep the context."""


@dataclass(slots=True)
class Pace:
    """How far a pass is. `tick` is told the share that is done, more than once a second; what it raises ends it."""

    tick: Callable[[float], None]
    share: float = 0.0

    def reached(self, share: float) -> None:
        self.share = share
        self.tick(share)

    def breathe(self) -> None:
        """In the middle of something: no further than before."""
        self.tick(self.share)


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """The tokens of one session in a step: rows [start, stop) of the step, the first at `position`.

    What all layers ask of it is computed for the first.
    """

    streams: Streams
    start: int
    stop: int
    position: int
    _bounds: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def entries(self, ratio: int) -> tuple[Tensor, Tensor]:
        """Start and stop, int64 [tokens], of the entries visible to each token: 0 and floor((t + 1) / ratio).

        An entry is visible once the `ratio` tokens it stands for have all been read.
        """
        found = self._bounds.get(("entries", ratio))
        if found is None:
            first = self.position + 1
            stop = torch.arange(first, first + self.num_tokens, device=self.streams.device) // ratio
            found = self._bounds["entries", ratio] = (torch.zeros_like(stop), stop)
        return found

    def window(self, width: int) -> tuple[Tensor, Tensor]:
        """Start and stop, int64 [tokens], of the last `width` rows up to each token's own.

        Counted in a pool of the span's rows behind the up to width - 1 before them.
        """
        found = self._bounds.get(("window", width))
        if found is None:
            before = min(self.position, width - 1)
            stop = torch.arange(before + 1, before + self.num_tokens + 1, device=self.streams.device)
            found = self._bounds["window", width] = ((stop - width).clamp(min=0), stop)
        return found

    def seen_window(self, layer: int, rows: Tensor | None) -> Rows:
        """The tokens' rows enter the layer's ring; what each token sees of it."""
        assert rows is not None, "only of a batch are they there already"
        ring = self.streams.window(layer)
        return Rows(ring.extend(rows, self.position), ring.layout, *self.window(ring.window))

    def within(self, start: int, stop: int) -> Span:
        """The part of this span in rows [start, stop) of the step, counted from `start`."""
        first, last = max(self.start, start), min(self.stop, stop)
        return replace(self, start=first - start, stop=last - start, position=self.position + first - self.start)


@dataclass(frozen=True, slots=True, eq=False)
class BatchSpan:
    """One token each of several sessions, as a single span over tables of their memory."""

    streams: Tables

    @property
    def start(self) -> int:
        return 0

    @property
    def stop(self) -> int:
        return self.streams.size

    @property
    def num_tokens(self) -> int:
        return self.streams.size

    @property
    def rows(self) -> slice:
        return slice(0, self.streams.size)

    @property
    def position(self) -> Tensor:
        """int64 [tokens]: each has its own."""
        return self.streams.positions

    def entries(self, ratio: int) -> tuple[Tensor, Tensor]:
        """As `Span.entries`."""
        return self.streams.entries(ratio)

    def seen_window(self, layer: int, rows: Tensor | None) -> Rows:
        """As `Span.seen_window`; None: the rows are there already."""
        ring = self.streams.window(layer)
        start, stop = self.streams.window_bounds(ring.most)
        return Rows(ring.packed if rows is None else ring.extend(rows), ring.layout, start, stop, most=ring.most)

    def within(self, start: int, stop: int) -> BatchSpan:
        """All of it: a batch is one tile."""
        assert (start, stop) == (0, self.stop), "a batch cannot be divided"
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """All tokens of a pass in one row: ids and positions int64 [n], the spans, and the rows whose logits are wanted;
    None are all.

    A layer takes `tile_tokens` of them at a time, so that what it computes on the way fits the memory planned; its
    experts, which need less for each and are better off with many, `wide_tokens` where those are more. `pace` hears of
    it after each, and within a layer wherever a second might pass; `swiftness` is how many times as much as two cores
    the device does in that time.
    """

    ids: Tensor
    positions: Tensor
    spans: tuple[Span | BatchSpan, ...]
    wanted: Tensor | None
    tile_tokens: int
    pace: Pace | None = None
    swiftness: int = 1
    wide_tokens: int = 0
    _places: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def places(self, ratio: int) -> Tensor:
        """int64 [n], each token's place in its group of `ratio`; computed for the first layer that asks."""
        if ratio not in self._places:
            self._places[ratio] = self.positions % ratio
        return self._places[ratio]

    def of_wanted(self, h: Tensor) -> Tensor:
        """The rows of h [n, ...] whose logits are wanted."""
        return h if self.wanted is None else h[self.wanted]

    def breathe(self) -> None:
        if self.pace is not None:
            self.pace.breathe()

    def in_parts(self, num_tokens: int, flops_each: int, run: Callable[[slice], Tensor]) -> Tensor:
        """What `run` makes of tokens 0 to `num_tokens` - 1, in parts none of which takes longer than a pass may go
        without a tick."""
        most = max(1, self.swiftness * _PART_FLOPS // max(1, flops_each))
        if num_tokens <= most:
            return run(slice(0, num_tokens))
        found = []
        for start in range(0, num_tokens, most):
            self.breathe()
            found.append(run(slice(start, min(start + most, num_tokens))))
        return torch.cat(found)

    def tiles(self) -> list[tuple[slice, Step]]:
        """The rows of each tile and the step that computes them; one after the other they are this step."""
        return self._cut(self.tile_tokens)

    def wide_tiles(self) -> list[tuple[slice, Step]]:
        """The same for experts."""
        return self._cut(max(self.wide_tokens, self.tile_tokens))

    def _cut(self, most: int) -> list[tuple[slice, Step]]:
        n = self.ids.shape[0]
        if n <= most:
            return [(slice(0, n), self)]
        starts = range(0, n, most)
        return [(slice(s, min(s + most, n)), self._tile(s, min(s + most, n))) for s in starts]

    def _tile(self, start: int, stop: int) -> Step:
        spans = tuple(span.within(start, stop) for span in self.spans if span.start < stop and start < span.stop)
        return replace(
            self,
            ids=self.ids[start:stop],
            positions=self.positions[start:stop],
            spans=spans,
            wanted=torch.empty(0, dtype=torch.int64),
        )
