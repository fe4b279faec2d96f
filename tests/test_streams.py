"""A session's memory by itself: rings, compressor state, growing rows, what they take. Knows no model."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tenfold.config import PRESETS, preset
from tenfold.formats import RowLayout, exact_layout, kv_row_v4
from tenfold.streams import ALIGNMENT_BYTES, CompressorState, GrowingRows, Streams, WindowRing

BYTE_ROW = RowLayout("one-float", 1, code_bits=32)


def numbered(first: int, count: int) -> Tensor:
    """Packed rows that hold their own position, float32 in 4 bytes."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].view(torch.uint8)


def positions(rows: Tensor) -> list[int]:
    return [int(number) for number in rows.contiguous().view(torch.float32).flatten()]


def cuts(total: int, pattern: list[int]) -> list[tuple[int, int]]:
    """Spans (position, count) that cover `total` tokens in the lengths of `pattern`, over and over."""
    spans, place, turn = [], 0, 0
    while place < total:
        count = min(pattern[turn % len(pattern)], total - place)
        spans.append((place, count))
        place, turn = place + count, turn + 1
    return spans


CHUNKINGS = [[1], [2, 3], [7], [64, 1, 1], [3, 129, 5], [1000]]

# ---------------------------------------------------------------------------------------------- rings


@pytest.mark.parametrize("window", [1, 2, 5, 128])
@pytest.mark.parametrize("pattern", CHUNKINGS, ids=str)
def test_a_ring_gives_the_rows_before_and_the_new_ones(window: int, pattern: list[int]) -> None:
    ring = WindowRing(BYTE_ROW, window)
    for position, count in cuts(400, pattern):
        pool = ring.extend(numbered(position, count), position)
        first = max(0, position - window + 1)
        assert positions(pool) == list(range(first, position + count))


@pytest.mark.parametrize("pattern", CHUNKINGS, ids=str)
def test_a_ring_keeps_position_p_in_slot_p_mod_window(pattern: list[int]) -> None:
    ring = WindowRing(BYTE_ROW, 6)
    for position, count in cuts(100, pattern):
        ring.extend(numbered(position, count), position)
        stop = position + count
        for place in range(max(0, stop - 6), stop):
            assert positions(ring.data[place % 6]) == [place]


@pytest.mark.parametrize("pattern", CHUNKINGS, ids=str)
def test_a_restored_ring_goes_on_as_before(pattern: list[int]) -> None:
    ring = WindowRing(BYTE_ROW, 6)
    ring.extend(numbered(0, 11), 0)
    kept = ring.data.clone()
    ring.extend(numbered(11, 5), 11)
    ring.restore(kept)
    for position, count in cuts(40, pattern):
        pool = ring.extend(numbered(11 + position, count), 11 + position)
        assert positions(pool) == list(range(6 + position, 11 + position + count))


def test_a_pool_that_fits_the_ring_is_a_view_of_it() -> None:
    ring = WindowRing(BYTE_ROW, 4)
    ring.extend(numbered(0, 6), 0)
    for position in range(6, 12):
        pool = ring.extend(numbered(position, 1), position)
        assert pool.data_ptr() == ring.data.data_ptr() + (position - 3) % 4 * BYTE_ROW.row_bytes


# ---------------------------------------------------------------------------------------------- compressor state


def tokens(position: int, count: int, width: int = 2) -> tuple[Tensor, Tensor]:
    """Values that hold the position, gates that hold its negative."""
    values = torch.arange(position, position + count, dtype=torch.float32)[:, None].expand(count, width)
    return values, -values


def groups_of(values: Tensor) -> list[list[int]]:
    return [[int(number) for number in group[:, 0]] for group in values]


@pytest.mark.parametrize("ratio", [4, 5, 128])
@pytest.mark.parametrize("pattern", CHUNKINGS, ids=str)
def test_complete_groups_come_out_once_and_in_order(ratio: int, pattern: list[int]) -> None:
    state = CompressorState(2, ratio, overlap=False)
    found: list[list[int]] = []
    for position, count in cuts(5 * ratio + 3, pattern):
        completed = state.extend(*tokens(position, count), position)
        assert (completed is None) == (position // ratio == (position + count) // ratio)
        if completed is not None:
            values, gates = completed
            assert torch.equal(gates, -values)
            found += groups_of(values)
        pending = (position + count) % ratio
        assert [int(number) for number in state.data[:pending, 0]] == list(
            range(position + count - pending, position + count)
        )
    assert found == [list(range(i * ratio, (i + 1) * ratio)) for i in range(5)]


@pytest.mark.parametrize("pattern", CHUNKINGS, ids=str)
def test_with_overlap_the_predecessor_comes_first(pattern: list[int]) -> None:
    ratio = 4
    state = CompressorState(2, ratio, overlap=True)
    entries: list[tuple[list[int], list[int]]] = []
    for position, count in cuts(203, pattern):
        completed = state.extend(*tokens(position, count), position)
        if completed is not None:
            values, gates = completed
            if position < ratio:
                assert (gates[0] == -torch.inf).all()  # an absent predecessor has no share
                assert (values[0] == 0).all()
            entries += list(pairwise(groups_of(values)))
        check_official_slots(state, position + count)
    assert [current for _, current in entries] == [list(range(4 * i, 4 * i + 4)) for i in range(50)]
    assert [before for before, _ in entries[1:]] == [current for _, current in entries[:-1]]


def check_official_slots(state: CompressorState, length: int) -> None:
    """Slots 0..3 hold the last complete group, token p of the pending one lies in slot 4 + p mod 4 (spec 2.11)."""
    complete = length // 4 * 4
    held = [int(number) for number in state.data[:, 0]]
    if complete:
        assert held[:4] == list(range(complete - 4, complete))
    assert held[4 : 4 + length % 4] == list(range(complete, length))


def test_a_cleared_state_has_no_predecessor() -> None:
    state = CompressorState(2, 4, overlap=True)
    state.extend(*tokens(0, 11), 0)
    state.clear()
    completed = state.extend(*tokens(0, 4), 0)
    assert completed is not None
    values, gates = completed
    assert (gates[0] == -torch.inf).all()
    assert groups_of(values[1:]) == [[0, 1, 2, 3]]


def test_groups_do_not_change_when_the_state_goes_on() -> None:
    state = CompressorState(2, 4, overlap=True)
    completed = state.extend(*tokens(0, 8), 0)
    assert completed is not None
    values, _ = completed
    before = values.clone()
    state.extend(*tokens(8, 9), 8)
    assert torch.equal(values, before)


# ---------------------------------------------------------------------------------------------- growing rows


def test_growing_rows_append_and_stop_at_their_capacity() -> None:
    rows = GrowingRows(BYTE_ROW, 10)
    assert rows.packed.shape == (0, 4)
    for first, count in ((0, 3), (3, 0), (3, 7)):
        rows.append(numbered(first, count))
        assert positions(rows.packed) == list(range(first + count))
    with pytest.raises(AssertionError):
        rows.append(numbered(10, 1))
    assert positions(rows.packed) == list(range(10))


# ---------------------------------------------------------------------------------------------- a whole session


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("exact", [False, True])
def test_streams_hold_what_the_config_says(name: str, exact: bool) -> None:
    config = preset(name)
    streams = Streams(config, 1000, exact)
    for length in (0, 1, 3, 4, 127, 128, 129, 1000):
        for spec in config.streams:
            if spec.ratio:
                rows = streams.rows(spec.layer, spec.name)
                rows.count = 0
                layout = exact_layout(spec.layout) if exact else spec.layout
                rows.append(torch.zeros(spec.rows_at(length), layout.row_bytes, dtype=torch.uint8))
        if not exact:
            assert streams.kv_bytes() == config.kv_bytes(length)
        else:
            assert streams.kv_bytes().keys() == config.kv_bytes(length).keys()


@pytest.mark.parametrize(
    ("name", "marginal", "total"),
    [("v4-flash", 3_514, 3.530e9), ("v4-pro", 5_031, 5.055e9), ("v3.2", 48_068, 48.068e9)],
)
def test_kv_bytes_of_the_published_models(name: str, marginal: int, total: float) -> None:
    config = preset(name)
    assert round(config.kv_bytes_per_token) == marginal
    assert sum(config.kv_bytes(1_000_000).values()) == pytest.approx(total, abs=0.0006e9)


def touched_at_once() -> int:
    """Bytes that become resident by writing one: a huge page where the system hands them out unasked."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return 2 << 20 if huge.exists() and "[always]" in huge.read_text() else ALIGNMENT_BYTES


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(("name", "context", "promised"), [("v4-flash", 1 << 20, 3.4e9), ("v3.2", 160 << 10, 7.5e9)])
def test_a_long_context_is_reserved_and_not_touched(name: str, context: int, promised: float) -> None:
    config = preset(name)
    before = resident_bytes()
    streams = Streams(config, context, exact=False)
    growing = [streams.rows(spec.layer, spec.name) for spec in config.streams if spec.ratio]
    assert sum(rows.data.nbytes for rows in growing) > promised
    fixed = sum(streams.kv_bytes().values())
    slack = 2 * len(growing) * touched_at_once() + (16 << 20)
    assert resident_bytes() - before < fixed + slack
    for rows in growing:  # a thousand tokens take what a thousand tokens need
        rows.append(torch.ones(100, rows.layout.row_bytes, dtype=torch.uint8))
    assert resident_bytes() - before < sum(streams.kv_bytes().values()) + slack


def test_restoring_leaves_the_rows_before_the_point() -> None:
    config = preset("v4-flash")
    streams = Streams(config, 64, exact=False)
    spec = next(spec for spec in config.streams if spec.name == "rows" and spec.ratio == 4)
    rows, ring = streams.rows(spec.layer), streams.window(spec.layer)
    layout = kv_row_v4(512, 64)
    rows.append(torch.full((4, layout.row_bytes), 7, dtype=torch.uint8))
    ring.data.fill_(3)
    point = streams.restore_point(16)
    rows.append(torch.full((3, layout.row_bytes), 9, dtype=torch.uint8))
    ring.data.fill_(5)
    streams.state(spec.layer).data.fill_(1.0)
    streams.restore(point)
    assert rows.count == 4
    assert (rows.packed == 7).all()
    assert (ring.data == 3).all()
    fresh = Streams(config, 64, exact=False)
    assert torch.equal(streams.state(spec.layer).data, fresh.state(spec.layer).data)
    streams.clear()
    assert streams.kv_bytes() == config.kv_bytes(0)
    assert (ring.data == 0).all()
