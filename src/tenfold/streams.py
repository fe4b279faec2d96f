"""The memory of one session: rings, growing rows, pending compressor state. Knows nothing of layers' mathematics.

Rows are stored packed, as bytes, in the layout of their `StreamSpec`. A growing stream reserves address space for
the whole context; memory pages are taken by the system as rows are written, so what is resident is what is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.config import ModelConfig, StreamSpec
from tenfold.formats import RowLayout, exact_layout

__all__ = ["ALIGNMENT_BYTES", "CompressorState", "GrowingRows", "RestorePoint", "Streams", "WindowRing"]

ALIGNMENT_BYTES = 4096
"""A growing stream's memory is rounded up to pages of this size."""


class GrowingRows:
    """Rows appended for ever: compressed entries, index keys, V3.2's latents."""

    def __init__(self, layout: RowLayout, capacity: int) -> None:
        self.layout = layout
        self.data = torch.empty(capacity, layout.row_bytes, dtype=torch.uint8)
        self.count = 0

    @property
    def packed(self) -> Tensor:
        """The rows so far: uint8 [count, row_bytes], a view."""
        return self.data[: self.count]

    def append(self, rows: Tensor) -> None:
        stop = self.count + rows.shape[0]
        assert stop <= self.data.shape[0], f"{stop} rows, room for {self.data.shape[0]}"  # one row would vanish
        self.data[self.count : stop] = rows
        self.count = stop


class WindowRing:
    """The last `window` rows; the row of position p lies in slot p mod window (spec 2.11), in `data`.

    The slots are there twice, one copy behind the other, so that any rows in a line are a view.
    """

    def __init__(self, layout: RowLayout, window: int) -> None:
        self.layout = layout
        self.window = window
        self._copies = torch.zeros(2, window, layout.row_bytes, dtype=torch.uint8)
        self._line = self._copies.flatten(0, 1)
        self.data = self._copies[0]

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
        self._copies[:, : data.shape[0]] = data

    def _row_line(self, position: int, count: int) -> Tensor:
        first = position % self.window
        return self._line[first : first + count]

    def _write(self, rows: Tensor, position: int) -> None:
        """Rows [count, row_bytes], at most `window`, into their slots: up to the ring's end, then from its start."""
        first = position % self.window
        until_end = min(rows.shape[0], self.window - first)
        self._copies[:, first : first + until_end] = rows[:until_end]
        if until_end < rows.shape[0]:
            self._copies[:, : rows.shape[0] - until_end] = rows[until_end:]


class CompressorState:
    """Values and gates of the tokens that no entry holds yet, and with overlap those of the last complete group.

    Official layout (spec 2.11): with overlap slots 0..ratio-1 are the last complete group and the pending tokens
    follow; without, token p lies in slot p mod ratio. A slot holds the values, then the gates.
    """

    def __init__(self, width: int, ratio: int, overlap: bool) -> None:
        self.ratio, self.overlap = ratio, overlap
        self.data = torch.zeros((2 if overlap else 1) * ratio, 2 * width)
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

    def __init__(self, config: ModelConfig, capacity: int, exact: bool) -> None:
        self.specs = config.streams
        self.capacity = capacity
        self._streams = {(spec.layer, spec.name): _allocate(spec, capacity, exact) for spec in config.streams}
        self._components = {(spec.layer, spec.name): spec.component for spec in config.streams}

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

    def restore_point(self, length: int) -> RestorePoint:
        """A restore point: copies of rings and state, a few MiB whatever the length."""
        return RestorePoint(length, {key: data.clone() for key, data in self._fixed()})

    def restore(self, point: RestorePoint) -> None:
        """Back to a restore point of this timeline."""
        self._restore_fixed(point.fixed)
        self._cut(point.length)

    def live_state(self, length: int) -> dict[tuple[int, str], Tensor]:
        """What a restore point at `length` tokens has to hold, as views: filled slots of rings, pending tokens."""
        return {
            key: s.data[: s.live_slots(length)] for key, s in self._streams.items() if not isinstance(s, GrowingRows)
        }

    def restore_live(self, length: int, state: Mapping[tuple[int, str], Tensor]) -> None:
        """Rings and compressor state of a stored restore point; the growing rows are there already."""
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
        for spec in self.specs:
            stream = self._streams[spec.layer, spec.name]
            if isinstance(stream, GrowingRows):
                stream.count = spec.rows_at(length)


def _used(stream: Stream) -> Tensor:
    return stream.packed if isinstance(stream, GrowingRows) else stream.data


def _allocate(spec: StreamSpec, capacity: int, exact: bool) -> Stream:
    if spec.component == "state":
        ratio = spec.fixed_rows // 2 if spec.overlap else spec.fixed_rows
        return CompressorState(spec.layout.width // 2, ratio, spec.overlap)
    layout = exact_layout(spec.layout) if exact else spec.layout
    if spec.fixed_rows:
        return WindowRing(layout, spec.fixed_rows)
    return GrowingRows(layout, spec.rows_at(capacity))
