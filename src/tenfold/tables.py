"""The memory of several sessions as tables of addresses: what one token of each needs, with nothing asked of a device.

All sizes are fixed beforehand and all else lies in device memory, so that a pass over tables can be captured in a
graph and replayed for other sessions at other positions. Knows streams and the operations on tables; no layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import cast

import numpy as np
import torch
from torch import Tensor

from tenfold.config import ModelConfig
from tenfold.formats import RowLayout, exact_layout
from tenfold.ops import BatchOps, Group, Ops, Weight
from tenfold.streams import Streams

__all__ = ["TableRows", "TableState", "TableWindow", "Tables"]


@dataclass(frozen=True, slots=True, eq=False)
class TableRows:
    """A growing stream of each session: `packed` are int64 [size] addresses, `most` the rows of any."""

    packed: Tensor
    layout: RowLayout
    most: int
    tables: Tables

    @property
    def count(self) -> int:
        """As many as any may have: sizes of work must not depend on what the device knows."""
        return self.most

    def append(self, rows: Tensor) -> None:
        """The row of each session's token, in streams that have a row for every token."""
        self.tables.ops.store_rows(rows, self.packed, self.tables.positions)


@dataclass(frozen=True, slots=True, eq=False)
class TableWindow:
    """A ring of each session."""

    packed: Tensor
    layout: RowLayout
    most: int
    tables: Tables

    def extend(self, rows: Tensor) -> Tensor:
        """As `WindowRing.extend`; what comes back are the lines of both copies."""
        self.tables.ops.store_rows(rows, self.packed, self.tables.positions, ring=self.most)
        return self.packed


@dataclass(frozen=True, slots=True, eq=False)
class TableState:
    """A compressor's state of each session."""

    addresses: Tensor
    ratio: int
    overlap: bool
    tables: Tables

    def group(self, values: Tensor, gates: Tensor, ape: Weight, rows: TableRows, norm: Weight, spread: bool) -> Group:
        """A token of each as `FusedOps.enter` takes it."""
        return Group(values, gates, ape, self.addresses, rows.packed, norm, rows.layout, spread)

    def extend(
        self,
        values: Tensor,
        gates: Tensor,
        ape: Weight,
        rows: TableRows,
        norm: Weight,
        eps: float,
        frequencies: Tensor,
        spread: bool,
    ) -> None:
        """Adds a token to each; where it completes a group, the group's row enters `rows`."""
        self.tables.ops.compress_step(
            values, gates, ape, self.addresses, rows.packed, self.tables.positions, self.ratio, self.overlap, norm,
            eps, frequencies, rows.layout, spread,
        )  # fmt: skip


class Tables:
    """A place for `size` sessions of up to `context` tokens; `put` says which stand there now."""

    def __init__(
        self, config: ModelConfig, ops: Ops, size: int, context: int, exact: bool, device: torch.device
    ) -> None:
        self.ops = cast(BatchOps, ops)
        self.size, self.context, self.exact, self.device = size, context, exact, device
        ratios = sorted({spec.ratio for spec in config.streams if spec.ratio})
        widths = sorted({spec.fixed_rows for spec in config.streams if spec.name == "window"})
        line = count(3)  # behind token ids, positions and a line of zeros
        self._entries = {ratio: next(line) for ratio in ratios}
        self._windows = {width: (next(line), next(line)) for width in widths}
        self._first_stream = next(line)
        self._places = {
            (spec.layer, spec.name): (self._first_stream + i, spec) for i, spec in enumerate(config.streams)
        }
        # Lines begin at multiples of 16 bytes: a kernel is compiled for aligned memory or for any.
        shape = self._first_stream + len(config.streams), -(-size // 2) * 2
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._on_device = self._host if device.type == "cpu" else self._host.to(device, copy=True)
        self._numbers = self._host.numpy()[:, :size]
        self._table = self._on_device[:, :size]
        self.ids, self.positions, self._nothing = self._table[0], self._table[1], self._table[2]

    def put(self, streams: Sequence[Streams], ids: Sequence[int], positions: Sequence[int]) -> None:
        """Who stands in which place, with which token at which position, in one copy to the device."""
        assert len(streams) == len(ids) == len(positions) == self.size, "every place takes a session"
        numbers = self._numbers
        numbers[0], numbers[1] = ids, positions
        length = numbers[1] + 1
        for ratio, line in self._entries.items():
            numbers[line] = length // ratio
        for width, (start, stop) in self._windows.items():
            numbers[stop] = width + numbers[1] % width + 1
            numbers[start] = numbers[stop] - np.minimum(length, width)
        for place, one in enumerate(streams):
            numbers[self._first_stream :, place] = one.addresses()
        if self._on_device is not self._host:
            self._on_device.copy_(self._host, non_blocking=True)

    def entries(self, ratio: int) -> tuple[Tensor, Tensor]:
        """Start and stop, int64 [size], of the entries visible to each token: 0 and floor((t + 1) / ratio)."""
        return self._nothing, self._table[self._entries[ratio]]

    def window_bounds(self, width: int) -> tuple[Tensor, Tensor]:
        """Start and stop, int64 [size], of the last `width` rows, counted in a ring's two copies, one behind the
        other."""
        start, stop = self._windows[width]
        return self._table[start], self._table[stop]

    def window(self, layer: int) -> TableWindow:
        place, spec = self._places[layer, "window"]
        return TableWindow(self._table[place], self._layout(spec.layout), spec.fixed_rows, self)

    def rows(self, layer: int, name: str = "rows") -> TableRows:
        place, spec = self._places[layer, name]
        return TableRows(self._table[place], self._layout(spec.layout), spec.rows_at(self.context), self)

    def state(self, layer: int, name: str = "state") -> TableState:
        place, spec = self._places[layer, name]
        ratio = spec.fixed_rows // 2 if spec.overlap else spec.fixed_rows
        return TableState(self._table[place], ratio, spec.overlap, self)

    def _layout(self, deployed: RowLayout) -> RowLayout:
        return exact_layout(deployed) if self.exact else deployed
