"""The exact choice of each row's largest scores, any length, in a fixed number of launches and without a host read.

A score becomes an unsigned number in the same order. Rows of up to `_AT_ONCE` are searched by one program, bit by bit;
longer ones by blocks in three passes of histograms, 11, 11 and 10 bits. Then all that lies above the threshold is
taken, and of equals the first, so that the choice comes out ascending and is the same every time. Knows nothing of
what is scored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["bins_for", "top_rows"]

_AT_ONCE = 8192
_BLOCK = 2048
_BINS = 2048 + 2048 + 1024
_TILE_SCORES = 1 << 14
"""Scores one program of the short search holds, at most, unless a row alone is longer."""


def bins_for(n: int, columns: int, device: torch.device) -> Tensor | None:
    """Room for the histograms of n rows, not empty yet; None where rows are short enough to need none."""
    return torch.empty(n, _BINS, dtype=torch.int32, device=device) if columns > _AT_ONCE else None


def top_rows(scores: Tensor, visible: Tensor, topk: int, bins: Tensor | None = None) -> Tensor:
    """The `topk` largest of the first `visible[i]` numbers of each row i of scores, float32 [n, columns].

    int32 [n, min(topk, columns)], ascending, -1 at the end; of equal scores the smaller column wins. `bins`: those of
    `bins_for`, empty.
    """
    n, columns = scores.shape
    width = min(topk, columns)
    out = torch.empty(n, width, dtype=torch.int32, device=scores.device)
    if n * width == 0:
        return out
    if columns <= _AT_ONCE:
        block = max(16, triton.next_power_of_2(columns))
        rows = min(triton.next_power_of_2(n), max(1, _TILE_SCORES // block))
        warps = 8 if block > 1024 else 4
        _search[(triton.cdiv(n, rows),)](scores, visible, out, n, scores.stride(0), width, rows, block, num_warps=warps)
        return out
    blocks = triton.cdiv(columns, _BLOCK)
    if bins is None:
        bins = torch.zeros(n, _BINS, dtype=torch.int32, device=scores.device)
    counts = torch.empty(n, blocks, 2, dtype=torch.int32, device=scores.device)
    stride, grid = scores.stride(0), (n, blocks)
    for level in range(3):
        _count_bins[grid](scores, visible, bins, stride, width, level, _BINS, _BLOCK)
    _count_taken[grid](scores, visible, bins, counts, stride, width, _BINS, _BLOCK)
    most = triton.next_power_of_2(blocks)
    _write_taken[grid](scores, visible, bins, counts, out, stride, width, most, _BINS, _BLOCK)
    return out


@triton.jit
def _ordered(x):
    """uint32 that compare as the float32 do; -0 is 0."""
    u = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where((u >> 31) != 0, u ^ 0xFFFFFFFF, u | 0x80000000)


@triton.jit(do_not_specialize=["n", "width"])
def _search(scores, visible, out, n, stride, width, BR: tl.constexpr, BN: tl.constexpr):
    """Rows of at most BN scores, BR of them: the threshold is found from its highest bit to its lowest."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, BN)[None, :]
    seen = tl.load(visible + r, mask=r < n, other=0).to(tl.int32)
    live = c < seen[:, None]
    key = _ordered(tl.load(scores + r.to(tl.int64)[:, None] * stride + c, mask=live, other=0.0))
    want = tl.minimum(seen, width)
    least = tl.zeros([BR], tl.uint32)
    for bit in range(32):
        trial = least | (tl.full([BR], 0x80000000, tl.uint32) >> bit)
        enough = tl.sum((live & (key >= trial[:, None])).to(tl.int32), 1) >= want
        least = tl.where(enough, trial, least)
    above = live & (key > least[:, None])
    equal = live & (key == least[:, None])
    ties = want - tl.sum(above.to(tl.int32), 1)
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= ties[:, None]))
    place = r.to(tl.int64)[:, None] * width
    tl.store(out + place + tl.cumsum(taken.to(tl.int32), 1) - 1, tl.broadcast_to(c, [BR, BN]), mask=taken)
    tl.store(out + place + c, -1, mask=(r < n)[:, None] & (c >= want[:, None]) & (c < width))


@triton.jit
def _cut(bins, want, BINS: tl.constexpr):
    """The bin that holds the `want`-th largest, and how many are still wanted of it."""
    i = tl.arange(0, BINS)
    count = tl.load(bins + i)
    above = tl.sum(count, 0) - tl.cumsum(count, 0)
    found = tl.max(tl.where(above + count >= want, i, 0), 0)
    return found.to(tl.uint32), want - tl.sum(tl.where(i == found, above, 0), 0)


@triton.jit(do_not_specialize=["width"])
def _count_bins(scores, visible, bins, stride, width, LEVEL: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr):
    """Adds a block to the histogram of a level: of those whose higher bits are the threshold's."""
    r = tl.program_id(0).to(tl.int64)
    seen = tl.load(visible + r).to(tl.int32)
    if (tl.program_id(1) * BLOCK >= seen) | (seen <= width):
        return
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = c < seen
    key = _ordered(tl.load(scores + r * stride + c, mask=live, other=0.0))
    base = bins + r * ALL
    if LEVEL == 0:
        part, mine, place = key >> 21, live, base
    else:
        high, want = _cut(base, width, 2048)
        if LEVEL == 1:
            part, mine, place = (key >> 10) & 2047, live & ((key >> 21) == high), base + 2048
        else:
            low, _ = _cut(base + 2048, want, 2048)
            part, mine, place = key & 1023, live & ((key >> 10) == ((high << 11) | low)), base + 4096
    SIZE: tl.constexpr = 1024 if LEVEL == 2 else 2048
    count = tl.histogram(part.to(tl.int32), SIZE, mask=mine)
    tl.atomic_add(place + tl.arange(0, SIZE), count, mask=count > 0)


@triton.jit
def _threshold(bins, seen, width):
    """The smallest key taken, and how many equal to it; all where no more are visible than wanted."""
    high, want = _cut(bins, width, 2048)
    middle, want = _cut(bins + 2048, want, 2048)
    low, want = _cut(bins + 4096, want, 1024)
    key = (high << 21) | (middle << 10) | low
    return tl.where(seen <= width, tl.zeros_like(key), key), tl.where(seen <= width, seen, want)


@triton.jit(do_not_specialize=["width"])
def _count_taken(scores, visible, bins, counts, stride, width, ALL: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a block lie above the threshold and on it."""
    r = tl.program_id(0).to(tl.int64)
    seen = tl.load(visible + r).to(tl.int32)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    least, _ = _threshold(bins + r * ALL, seen, width)
    live = c < seen
    key = _ordered(tl.load(scores + r * stride + c, mask=live, other=0.0))
    place = counts + (r * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(place, tl.sum((live & (key > least)).to(tl.int32), 0))
    tl.store(place + 1, tl.sum((live & (key == least)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["width"])
def _write_taken(
    scores, visible, bins, counts, out, stride, width, BLOCKS: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes what a block gives behind what the blocks before it give."""
    r = tl.program_id(0).to(tl.int64)
    block, num_blocks = tl.program_id(1), tl.num_programs(1)
    seen = tl.load(visible + r).to(tl.int32)
    c = block * BLOCK + tl.arange(0, BLOCK)
    if block == 0:
        for first in range(0, width, BLOCK):
            hole = first + tl.arange(0, BLOCK)
            tl.store(out + r * width + hole, -1, mask=(hole >= seen) & (hole < width))
    if block * BLOCK >= seen:
        return
    least, ties = _threshold(bins + r * ALL, seen, width)
    b = tl.arange(0, BLOCKS)
    place = counts + (r * num_blocks + b) * 2
    above = tl.sum(tl.load(place, mask=b < block, other=0), 0)
    equal = tl.sum(tl.load(place + 1, mask=b < block, other=0), 0)
    live = c < seen
    key = _ordered(tl.load(scores + r * stride + c, mask=live, other=0.0))
    on = live & (key == least)
    taken = (live & (key > least)) | (on & (equal + tl.cumsum(on.to(tl.int32), 0) <= ties))
    at = above + tl.minimum(equal, ties) + tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(out + r * width + at, c, mask=taken)
