"""A frozen description of one forward pass over several sessions. Knows nothing of models or scheduling."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """All tokens of a pass in one row: ids and positions int64 [n], the spans, and the rows whose logits are wanted."""

    ids: Tensor
    positions: Tensor
    spans: tuple[Span, ...]
    wanted: Tensor
