"""What both architectures share: binding weights, rotary tables, attention in parts. Knows nothing of either."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from tenfold.budget import SLACK_BYTES
from tenfold.config import LayerSpec, RopeSpec
from tenfold.formats import RowLayout, exact_layout
from tenfold.machine import anonymous_bytes, shrink_heap
from tenfold.ops import BatchOps, Experts, FusedOps, Ops, Rows, Weight, cpu_pool
from tenfold.step import BatchSpan, Span, Step
from tenfold.streams import GrowingRows
from tenfold.tables import TableRows

__all__ = [
    "Binder",
    "Layer",
    "add_shared",
    "attend",
    "fused",
    "rope_frequencies",
    "select",
    "select_fused",
    "through_layers",
]


_CPU = torch.device("cpu")
_HEAVY_ROWS = 256
"""Fewer rows than these of a pass leave too little behind to be looked for."""
_BETWEEN_S = 0.2
"""To give it back costs some ten milliseconds with the pages that are taken anew: a twentieth of the time at most."""


@dataclass(frozen=True, slots=True)
class Binder:
    """How a model gets its weights: `take` by name, made ready by the backend. `exact` stores rows unquantised.

    `device` is where the backend computes; routed experts are made ready by `expert` where they lie elsewhere.
    """

    take: Callable[[str], Weight]
    ops: Ops
    resident: bool
    exact: bool
    device: torch.device = _CPU
    expert: Callable[[Weight], Weight] | None = None

    def __call__(self, name: str) -> Weight:
        return self.ops.prepare(self.take(name), self.resident)

    def experts(self, prefix: str, count: int, names: tuple[str, str, str]) -> Experts:
        """The routed experts below `prefix`; `names` are the gate, down and up projection."""
        ready: Callable[[str], Weight] = self if self.expert is None else self._expert
        gate, down, up = (tuple(ready(f"{prefix}{expert}.{name}.weight") for expert in range(count)) for name in names)
        return Experts(gate, down, up)

    def _expert(self, name: str) -> Weight:
        assert self.expert is not None
        return self.expert(self.take(name))

    def shared_expert(self, prefix: str, names: tuple[str, str, str]) -> Experts:
        """The one expert that every token goes through, as a bank of its own."""
        gate, down, up = ((self(f"{prefix}{name}.weight"),) for name in names)
        return Experts(gate, down, up)

    def frequencies(self, spec: RopeSpec) -> Tensor:
        """`rope_frequencies` where they are needed."""
        return rope_frequencies(spec).to(self.device)

    def layout(self, deployed: RowLayout) -> RowLayout:
        """The layout rows are stored in under the numerics chosen."""
        return exact_layout(deployed) if self.exact else deployed


class Layer(Protocol):
    """A layer of either architecture: the residual of some tokens before and after it."""

    def forward(self, h: Tensor, step: Step) -> Tensor:
        """All of it: `attend`, then `feed`."""

    def attend(self, h: Tensor, step: Step) -> Tensor:
        """The first half; `h` stays as it is."""

    def feed(self, h: Tensor, step: Step) -> None:
        """The second half, to `h` itself: tile by tile of the step, but what is multiplied gets all at once."""


def through_layers(layers: Sequence[Layer], h: Tensor, step: Step) -> Tensor:
    """The residual h [n, ...] of all tokens through one layer before the next, tile by tile.

    So each layer's weights are read, from memory or disk, once per chunk. h may be overwritten.
    """
    tiles, wide = step.tiles(), step.wide_tiles()
    heap = _Heap() if h.device == _CPU and h.shape[0] >= _HEAVY_ROWS else None

    def ended(layer: int, place: int, of: int) -> None:
        if step.pace is not None:
            step.pace.reached((layer + place / of) / len(layers))
        if heap is not None:
            heap.tidy(place, of)

    for index, layer in enumerate(layers):
        if len(tiles) == 1:
            h = layer.forward(h, step)
            ended(index, 1, 1)
        elif len(wide) == len(tiles):
            for place, (rows, tile) in enumerate(tiles):
                h[rows] = layer.forward(h[rows], tile)
                ended(index, place + 1, len(tiles))
        else:
            parts = len(tiles) + len(wide)
            for place, (rows, tile) in enumerate(tiles):
                h[rows] = layer.attend(h[rows], tile)
                ended(index, place + 1, parts)
            cpu_pool.release()  # experts begin when attention has given its memory back: the plan counts on it
            for place, (rows, tile) in enumerate(wide):
                layer.feed(h[rows], tile)
                ended(index, len(tiles) + place + 1, parts)
    return h


def add_shared(ops: Ops, y: Tensor, x: Tensor, shared: Experts, limit: float | None, step: Step) -> Tensor:
    """y [n, d] and what the one expert of `shared` makes of x [n, d], tile by tile; y is overwritten."""
    for rows, _ in step.tiles():
        y[rows] += ops.feed_forward(x[rows], shared.w1[0], shared.w2[0], shared.w3[0], limit)
        step.breathe()
    return y


class _Heap:
    """Gives back what tiles leave between small blocks: that adds up, in some processes and not in others."""

    def __init__(self) -> None:
        self._tidied_s, self._most_bytes = time.monotonic(), self._most()

    def tidy(self, tiles_done: int, tiles: int) -> None:
        """Behind a tile of a layer: always where many end, else if half the slack more is held than before."""
        ended = tiles_done == tiles
        if (ended and tiles > 1) or ((ended or time.monotonic() - self._tidied_s > _BETWEEN_S) and self._grown()):
            shrink_heap()
            self._tidied_s = time.monotonic()
            if ended:
                self._most_bytes = self._most()

    def _most(self) -> int:
        return anonymous_bytes() + SLACK_BYTES // 2

    def _grown(self) -> bool:
        return anonymous_bytes() > self._most_bytes


def fused(ops: Ops, step: Step) -> FusedOps | None:
    """What does in one launch what others do in several, where the step is one over tables and the backend has it."""
    batch = any(isinstance(span, BatchSpan) for span in step.spans)
    return cast(FusedOps, ops) if batch and hasattr(ops, "hc_merge_mix") else None


def attend(
    ops: Ops,
    step: Step,
    span: Span | BatchSpan,
    q: Tensor,
    sources: Sequence[Rows],
    sink: Weight | None,
    scale: float,
    value_dim: int,
    frequencies: Tensor | None = None,
) -> Tensor:
    """`sparse_attention` of a span's queries, in parts where the context is long; what each gets is the same."""
    if isinstance(span, BatchSpan):
        batch = cast(BatchOps, ops)
        return batch.sparse_attention(q, sources, sink, scale, value_dim, span.position, frequencies)
    n, heads, width = q.shape
    first, seen = span.position, sum(source.columns for source in sources)

    def run(part: slice) -> Tensor:
        if part.stop - part.start == n:
            return ops.sparse_attention(q, sources, sink, scale, value_dim, first, frequencies)
        some = [source.part(part) for source in sources]
        return ops.sparse_attention(q[part], some, sink, scale, value_dim, first + part.start, frequencies)

    return step.in_parts(n, 2 * seen * heads * (width + value_dim), run)


def select(
    ops: Ops,
    step: Step,
    q: Tensor,
    weights: Tensor,
    keys: GrowingRows | TableRows,
    visible: Tensor,
    topk: int,
    factor: float,
) -> Tensor:
    """`select_rows` of a span's queries by weights that count `factor` times, in parts where there are many keys; the
    last query sees all."""
    n, heads, dim = q.shape
    if isinstance(keys, TableRows):
        batch = cast(BatchOps, ops)
        return batch.select_rows(q, weights, keys.packed, keys.layout, visible, topk, most=keys.most, factor=factor)
    weights = weights * factor

    def run(part: slice) -> Tensor:
        if part.stop - part.start == n:
            return ops.select_rows(q, weights, keys.packed, keys.layout, visible, topk)
        rows = ops.select_rows(q[part], weights[part], keys.packed, keys.layout, visible[part], topk)
        return pad(rows, (0, min(topk, keys.count) - rows.shape[1]), value=-1)

    return step.in_parts(n, 2 * keys.count * heads * dim, run)


def select_fused(
    one: FusedOps, q: Tensor, weights: Tensor, batch: BatchSpan, layer: LayerSpec, topk: int, factor: float
) -> Tensor:
    """The rows a batch attends to, whose keys are in the streams, of queries as they meet keys (spec 2.5)."""
    keys = batch.streams.rows(layer.index, "index_keys")
    _, visible = batch.entries(layer.ratio)
    return one.select_rows(q, weights, keys.packed, keys.layout, visible, topk, most=keys.most, factor=factor)


def rope_frequencies(spec: RopeSpec) -> Tensor:
    """Angle per position of each channel pair, float32 [dim / 2], with YaRN's blend (spec 2.3, 5.3).

    Computed in float32 in the official order: at a million tokens another rounding is another angle.
    """
    frequencies = 1.0 / (spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim))
    if spec.factor <= 1.0:
        return frequencies
    low = max(math.floor(_correction_channel(spec, spec.beta_fast)), 0)
    high = min(math.ceil(_correction_channel(spec, spec.beta_slow)), spec.dim - 1)
    span = max(high - low, 0.001)
    ramp = ((torch.arange(spec.dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    keep = 1 - ramp
    return frequencies / spec.factor * (1 - keep) + frequencies * keep


def _correction_channel(spec: RopeSpec, rotations: float) -> float:
    """The channel pair that turns `rotations` times over the original context."""
    turns = spec.original_max_position_embeddings / (rotations * 2 * math.pi)
    return spec.dim * math.log(turns) / (2 * math.log(spec.theta))
