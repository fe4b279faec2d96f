"""The memory of one session: rings, growing rows, pending compressor state. Knows nothing of layers' mathematics.

Rows are stored packed, as bytes, in the layout of their `StreamSpec`, on any device alike. In host memory a growing
stream reserves address space for the whole context; memory pages are taken by the system as rows are written, so what
is resident is what is used. A GPU knows no such thing: there a stream starts small and moves when it is full.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.config import ModelConfig, StreamSpec
from tenfold.formats import RowLayout, exact_layout

__all__ = ["ALIGNMENT_BYTES", "CompressorState", "GrowingRows", "RestorePoint", "Streams", "WindowRing"]

ALIGNMENT_BYTES = 4096
"""A growing stream's memory is rounded up to pages of this size."""

_CPU = torch.device("cpu")
_FIRST_ROWS = 1024
"""Rows a growing stream has room for at first where memory is not taken as it is written; then twice as many."""


class GrowingRows:
    """Rows appended for ever: compressed entries, index keys, V3.2's latents."""

    most: int | None = None
    """As `Rows.most`: these are no table."""

    def __init__(self, layout: RowLayout, capacity: int, device: torch.device = _CPU) -> None:
        self.layout = layout
        self.capacity = capacity
        at_first = capacity if device.type == "cpu" else min(capacity, _FIRST_ROWS)
        self.data = torch.empty(at_first, layout.row_bytes, dtype=torch.uint8, device=device)
        self.count = 0

    @property
    def packed(self) -> Tensor:
        """The rows so far: uint8 [count, row_bytes], a view."""
        return self.data[: self.count]

    def append(self, rows: Tensor) -> None:
        stop = self.count + rows.shape[0]
        self.make_room(stop)
        self.data[self.count : stop] = rows
        self.count = stop

    def make_room(self, count: int) -> None:
        """Memory for `count` rows, those there are kept."""
        assert count <= self.capacity, f"{count} rows, room for {self.capacity}"  # one row would vanish
        if count > self.data.shape[0]:
            larger = self.data.new_empty(min(self.capacity, max(count, 2 * self.data.shape[0])), self.layout.row_bytes)
            larger[: self.count] = self.packed
            self.data = larger


class WindowRing:
    """The last `window` rows; the row of position p lies in slot p mod window (spec 2.11), in `data`.

    The slots are there twice, one copy behind the other in `copies`, so that any rows in a line are a view.
    """

    most: int | None = None
    """As `Rows.most`: this is no table."""

    def __init__(self, layout: RowLayout, window: int, device: torch.device = _CPU) -> None:
        self.layout = layout
        self.window = window
        self.copies = torch.zeros(2, window, layout.row_bytes, dtype=torch.uint8, device=device)
        self._line = self.copies.flatten(0, 1)
        self.data = self.copies[0]

    def extend(self, rows: Tensor, position: int) -> Tensor:
        """Adds the rows of positions from `position`; returns them behind the up to window - 1 rows before them.

        What is returned may be a view, good until the next rows are added.
        """
        before, num_rows = min(position, self.window - 1), rows.shape[0]
        if before + num_rows <= self.window:  # no row is overwritten that is still to be seen
            self._write(rows, position)
            return self._row_line(position - before, before + num_rows)
        pool = torch.cat([self._row_line(position - before, before), rows])
        last = min(num_rows, self.window)
        self._write(rows[num_rows - last :], position + num_rows - last)
        return pool

    def live_slots(self, length: int) -> int:
        """How many slots, from the first, hold a row after `length` tokens."""
        return min(length, self.window)

    def restore(self, data: Tensor) -> None:
        """Replaces the first slots by a copy of `data` made earlier."""
        self.copies[:, : data.shape[0]] = data

    def _row_line(self, position: int, count: int) -> Tensor:
        first = position % self.window
        return self._line[first : first + count]

    def _write(self, rows: Tensor, position: int) -> None:
        """Rows [count, row_bytes], at most `window`, into their slots: up to the ring's end, then from its start."""
        first = position % self.window
        until_end = min(rows.shape[0], self.window - first)
        self.copies[:, first : first + until_end] = rows[:until_end]
        if until_end < rows.shape[0]:
            self.copies[:, : rows.shape[0] - until_end] = rows[until_end:]


class CompressorState:
    """Values and gates of the tokens that no entry holds yet, and with overlap those of the last complete group.

    Official layout (spec 2.11): with overlap slots 0..ratio-1 are the last complete group and the pending tokens
    follow; without, token p lies in slot p mod ratio. A slot holds the values, then the gates.
    """

    def __init__(self, width: int, ratio: int, overlap: bool, device: torch.device = _CPU) -> None:
        self.ratio, self.overlap = ratio, overlap
        self.data = torch.zeros((2 if overlap else 1) * ratio, 2 * width, device=device)
        self._values, self._gates = self.data.split(width, 1)
        self.clear()

    def clear(self) -> None:
        """As before the first token: gates of -inf give an absent predecessor no share."""
        self._values.fill_(0.0)
        self._gates.fill_(-torch.inf)

    def live_slots(self, length: int) -> int:
        """How many slots, from the first, count after `length` tokens."""
        return (self.ratio if self.overlap else 0) + length % self.ratio

    def restore(self, data: Tensor) -> None:
        """Replaces the first slots by a copy of `data` made earlier."""
        self.data[: data.shape[0]] = data

    def extend(self, values: Tensor, gates: Tensor, position: int) -> tuple[Tensor, Tensor] | None:
        """Adds tokens from `position`; returns the groups completed, [groups, ratio, width] of values and gates.

        With overlap the predecessor of the first completed group comes first. None where no group was completed.
        """
        pending = position % self.ratio
        current = self.ratio if self.overlap else 0
        if pending + values.shape[0] < self.ratio:
            slots = slice(current + pending, current + pending + values.shape[0])
            self._values[slots], self._gates[slots] = values, gates
            return None
        tokens = torch.cat([self.data[: current + pending], torch.cat([values, gates], 1)])
        complete = (pending + values.shape[0]) // self.ratio
        groups = complete + 1 if self.overlap else complete
        used = groups * self.ratio
        rest = tokens[used - current :] if self.overlap else tokens[used:]
        self.data[: rest.shape[0]] = rest
        grouped = tokens[:used].view(groups, self.ratio, self.data.shape[1])
        width = values.shape[1]
        return grouped[:, :, :width], grouped[:, :, width:]


Stream = GrowingRows | WindowRing | CompressorState


@dataclass(frozen=True, slots=True, eq=False)
class RestorePoint:
    """What is overwritten as a session goes on, copied at `length` tokens; growing rows are cut, not copied."""

    length: int
    fixed: Mapping[tuple[int, str], Tensor]


class Streams:
    """All streams of one session, by layer and name, for up to `capacity` tokens."""

    def __init__(self, config: ModelConfig, capacity: int, exact: bool, device: torch.device = _CPU) -> None:
        self.specs = config.streams
        self.capacity = capacity
        self.device = device
        self._to_fill: dict[tuple[int, str], Tensor] = {}
        self._streams = {(spec.layer, spec.name): _allocate(spec, capacity, exact, device) for spec in config.streams}
        self._components = {(spec.layer, spec.name): spec.component for spec in config.streams}
        growing = [(spec, self._streams[spec.layer, spec.name]) for spec in config.streams]
        self._growing = [(spec, stream) for spec, stream in growing if isinstance(stream, GrowingRows)]
        self._addresses: NDArray[np.int64] | None = None

    def window(self, layer: int) -> WindowRing:
        stream = self._streams[layer, "window"]
        assert isinstance(stream, WindowRing)
        return stream

    def rows(self, layer: int, name: str = "rows") -> GrowingRows:
        stream = self._streams[layer, name]
        assert isinstance(stream, GrowingRows)
        return stream

    def state(self, layer: int, name: str = "state") -> CompressorState:
        stream = self._streams[layer, name]
        assert isinstance(stream, CompressorState)
        return stream

    def kv_bytes(self) -> dict[str, int]:
        """Bytes in use by component; alignment (`ALIGNMENT_BYTES` a growing stream) comes on top."""
        total: dict[str, int] = {}
        for key, stream in self._streams.items():
            component = self._components[key]
            total[component] = total.get(component, 0) + _used(stream).nbytes
        return total

    def addresses(self) -> NDArray[np.int64]:
        """Where each stream's memory begins now, in the order of the specs; a ring's both copies lie there."""
        if self._addresses is None or self.device.type != "cpu":  # in host memory nothing ever moves
            self._addresses = np.array([_whole(stream).data_ptr() for stream in self._streams.values()], np.int64)
        return self._addresses

    def make_room(self, length: int) -> None:
        """Memory for the rows of `length` tokens, before they are there."""
        for spec, stream in self._growing:
            stream.make_room(spec.rows_at(length))

    def advance(self, length: int) -> None:
        """Counts the rows of `length` tokens, which a kernel wrote."""
        self._cut(length)

    def restore_point(self, length: int) -> RestorePoint:
        """A restore point: copies of rings and state, a few MiB whatever the length."""
        return RestorePoint(length, {key: data.clone() for key, data in self._fixed()})

    def restore(self, point: RestorePoint) -> None:
        """Back to a restore point of this timeline."""
        self._restore_fixed(point.fixed)
        self._cut(point.length)

    def live_state(self, length: int) -> dict[tuple[int, str], Tensor]:
        """What a restore point at `length` tokens has to hold, in host memory, views where the streams are there:
        filled slots of rings, pending tokens."""
        return {
            key: s.data[: s.live_slots(length)].cpu()
            for key, s in self._streams.items()
            if not isinstance(s, GrowingRows)
        }

    def host_rows(self, layer: int, name: str, start: int, stop: int) -> Tensor:
        """Rows of a growing stream in host memory, a view where the stream is there."""
        return self.rows(layer, name).data[start:stop].cpu()

    def to_fill(self, layer: int, name: str, count: int) -> Tensor:
        """Host memory for the first `count` rows of a growing stream; `filled` takes them over."""
        stream = self.rows(layer, name)
        if self.device.type == "cpu":
            return stream.data[:count]
        return self._to_fill.setdefault((layer, name), torch.empty(count, stream.layout.row_bytes, dtype=torch.uint8))

    def filled(self) -> None:
        """Takes over what was put into the memory of `to_fill`."""
        for key, rows in self._to_fill.items():
            stream = self.rows(*key)
            stream.make_room(rows.shape[0])
            stream.data[: rows.shape[0]] = rows
        self._to_fill.clear()

    def restore_live(self, length: int, state: Mapping[tuple[int, str], Tensor]) -> None:
        """Rings and compressor state of a stored restore point; the growing rows are there already."""
        self.filled()
        self.clear()
        self._restore_fixed(state)
        self._cut(length)

    def _restore_fixed(self, state: Mapping[tuple[int, str], Tensor]) -> None:
        for key, data in state.items():
            stream = self._streams[key]
            assert not isinstance(stream, GrowingRows)
            stream.restore(data)

    def clear(self) -> None:
        """Back to no tokens at all."""
        self._to_fill.clear()
        for stream in self._streams.values():
            if isinstance(stream, CompressorState):
                stream.clear()
            elif isinstance(stream, WindowRing):
                stream.restore(torch.zeros_like(stream.data))
        self._cut(0)

    def copy_rows(self) -> dict[tuple[int, str], Tensor]:
        """Copies of all growing rows, for a snapshot."""
        return {key: s.packed.clone() for key, s in self._streams.items() if isinstance(s, GrowingRows)}

    def restore_rows(self, rows: Mapping[tuple[int, str], Tensor]) -> None:
        for key, packed in rows.items():
            stream = self._streams[key]
            assert isinstance(stream, GrowingRows)
            stream.count = 0
            stream.append(packed)

    def _fixed(self) -> Iterable[tuple[tuple[int, str], Tensor]]:
        return ((key, s.data) for key, s in self._streams.items() if not isinstance(s, GrowingRows))

    def _cut(self, length: int) -> None:
        for spec, stream in self._growing:
            stream.count = spec.rows_at(length)


def _whole(stream: Stream) -> Tensor:
    return stream.copies if isinstance(stream, WindowRing) else stream.data


def _used(stream: Stream) -> Tensor:
    return stream.packed if isinstance(stream, GrowingRows) else stream.data


def _allocate(spec: StreamSpec, capacity: int, exact: bool, device: torch.device) -> Stream:
    if spec.component == "state":
        ratio = spec.fixed_rows // 2 if spec.overlap else spec.fixed_rows
        return CompressorState(spec.layout.width // 2, ratio, spec.overlap, device)
    layout = exact_layout(spec.layout) if exact else spec.layout
    if spec.fixed_rows:
        return WindowRing(layout, spec.fixed_rows, device)
    return GrowingRows(layout, spec.rows_at(capacity), device)
