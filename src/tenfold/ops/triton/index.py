"""`select_rows` on the GPU: index scores in strips of a fixed size, and the exact choice of the best.

A program scores one tile of keys for some queries: the keys are unpacked once, then every query's heads meet them in
one matrix product, whose columns are clipped at 0, weighed and summed. Scores of some queries over all keys are kept
at once, as many as `_STRIP_SCORES` allow. Knows nothing of what is done with the rows chosen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.formats import RowLayout
from tenfold.ops.triton.linear import address
from tenfold.ops.triton.lowp import e2m1, e4m3, e8m0, mm, mm_f32
from tenfold.ops.triton.topk import bins_for, top_rows

__all__ = ["index_scores", "select_rows"]

_STRIP_SCORES = 1 << 25
"""Scores kept at once, float32: 128 MiB, or a single query's where one alone has more."""
_PITCH = 16
"""Lines of scores begin at multiples of so many."""
_KEYS, _QUERIES = 128, 16
"""Keys of a tile, and queries that meet it one after the other."""


def select_rows(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    layout: RowLayout,
    visible: Tensor,
    topk: int,
    most: int | None = None,
    factor: float = 1.0,
) -> Tensor:
    """As in `BatchOps`, without asking the device how many rows are visible: the width is min(topk, rows there are)."""
    n, most = q.shape[0], keys.shape[0] if most is None else most
    width = min(topk, most)
    if most <= width:  # all that is visible is selected: no scores are needed
        rows = torch.arange(width, dtype=torch.int32, device=q.device)
        return torch.where(rows < visible[:, None], rows, -1)
    strip = max(1, _STRIP_SCORES // most)
    if n <= strip:
        return _best(q, weights, keys, layout, visible, most, factor, topk)
    out = torch.empty(n, width, dtype=torch.int32, device=q.device)
    for first in range(0, n, strip):
        some = slice(first, min(first + strip, n))
        mine = keys[some] if keys.dtype is torch.int64 else keys
        out[some] = _best(q[some], weights[some], mine, layout, visible[some], most, factor, topk)
    return out


def _best(
    q: Tensor, weights: Tensor, keys: Tensor, layout: RowLayout, visible: Tensor, most: int, factor: float, topk: int
) -> Tensor:
    bins = bins_for(q.shape[0], most, q.device)
    return top_rows(index_scores(q, weights, keys, layout, visible, most, factor, bins), visible, topk, bins)


def index_scores(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    layout: RowLayout,
    visible: Tensor,
    most: int,
    factor: float = 1.0,
    bins: Tensor | None = None,
) -> Tensor:
    """float32 [n, most]; what lies beyond a query's visible rows is left as it was. Weights count `factor` times.

    `bins`, if any, are emptied on the way. Queries hold what packed rows of the layout hold, so products of codes are
    exact in bf16.
    """
    n, heads, dim = q.shape
    if layout.plain or layout.width != dim or layout.block % 2:
        raise ValueError(f"keys: expected rows of {dim} coded channels, got {layout}")
    pitch = -(-most // _PITCH) * _PITCH
    out = torch.empty(n, pitch, dtype=torch.float32, device=q.device)[:, :most]
    if n * most == 0:
        return out
    each = keys.dtype is torch.int64
    queries = 1 if each else _QUERIES
    block = min(_KEYS, max(16, triton.next_power_of_2(most)))
    grid = (triton.cdiv(most, block), triton.cdiv(n, queries))
    _scores[grid](
        _as_met(q, layout),
        weights.contiguous(),
        keys,
        visible,
        out,
        out if bins is None else bins,
        n,
        pitch,
        factor,
        EMPTIED=0 if bins is None else bins.shape[1],
        EACH=each,
        CODE_BITS=layout.code_bits,
        ROW_BYTES=layout.row_bytes,
        SCALE_OFFSET=layout.scale_offset,
        SCALE_BYTES=layout.scale_bytes,
        BLOCK=layout.block,
        QUERIES=queries,
        H=heads,
        HP=max(16, triton.next_power_of_2(heads)),
        D=dim,
        DP=max(32, triton.next_power_of_2(dim)),
        BN=block,
        num_warps=4,
    )
    return out


def _as_met(q: Tensor, layout: RowLayout) -> Tensor:
    """The queries as kernels read them; for e2m1 the even channels, then the odd: nibbles meet them unshuffled."""
    if layout.code_bits == 32 or q.dtype is torch.bfloat16:  # `enter` made them so
        return q.contiguous()
    if layout.code_bits == 8:
        return q.to(torch.bfloat16).contiguous()
    pairs: Tensor = q.unflatten(-1, (-1, 2))
    return pairs.transpose(-1, -2).to(torch.bfloat16).contiguous()


@triton.jit(do_not_specialize=["n"])
def _scores(
    q,
    weights,
    keys,
    visible,
    out,
    bins,
    n,
    pitch,
    factor,
    EMPTIED: tl.constexpr,
    EACH: tl.constexpr,
    CODE_BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BN: tl.constexpr,
):
    """Keys [first, first + BN) for QUERIES queries; with EACH, of a query's own, whose address `keys` gives."""
    first, t0 = tl.program_id(0) * BN, tl.program_id(1) * QUERIES
    t = t0 + tl.arange(0, QUERIES)
    if EMPTIED > 0:
        if first == 0:
            for i in range(0, QUERIES):
                for bin in range(0, EMPTIED, 1024):
                    place = bins + (t0 + i).to(tl.int64) * EMPTIED + bin + tl.arange(0, 1024)
                    tl.store(place, tl.zeros([1024], tl.int32), mask=tl.arange(0, 1024) < tl.where(t0 + i < n, 1024, 0))
    last = tl.max(tl.load(visible + t, mask=t < n, other=0), 0)
    if first >= last:
        return
    j = first + tl.arange(0, BN)
    ok = j < last
    base = address(keys, t0, tl.uint8) if EACH else keys
    rows = base + j.to(tl.int64) * ROW_BYTES
    h = tl.arange(0, HP)
    if CODE_BITS == 4:
        c = tl.arange(0, DP // 2)
        live = ok[:, None] & (c < D // 2)[None, :]
        pair = tl.load(rows[:, None] + c[None, :], mask=live, other=0)
        scale = tl.load(rows[:, None] + SCALE_OFFSET + (c // (BLOCK // 2))[None, :], mask=live, other=127)
        low, high = e2m1(pair & 15) * e8m0(scale), e2m1(pair >> 4) * e8m0(scale)
    else:
        c = tl.arange(0, DP)
        live = ok[:, None] & (c < D)[None, :]
        if CODE_BITS == 8:
            key = e4m3(tl.load(rows[:, None] + c[None, :], mask=live, other=0))
            if SCALE_BYTES == 4:
                place = (rows + SCALE_OFFSET).to(tl.pointer_type(tl.float32))
                if BLOCK >= D:
                    key *= tl.load(place, mask=ok, other=0.0)[:, None]
                else:
                    key *= tl.load(place[:, None] + (c // BLOCK)[None, :], mask=live, other=0.0)
            else:
                key *= e8m0(tl.load(rows[:, None] + SCALE_OFFSET + (c // BLOCK)[None, :], mask=live, other=127))
        else:
            key = tl.load(rows.to(tl.pointer_type(tl.float32))[:, None] + c[None, :], mask=live, other=0.0)
    for i in range(0, QUERIES):
        if t0 + i < n:
            seen = tl.load(visible + t0 + i)
            if first < seen:
                row = (t0 + i).to(tl.int64) * H + h
                weight = tl.load(weights + row, mask=h < H, other=0.0) * factor
                score = tl.zeros([HP, BN], tl.float32)
                if CODE_BITS == 4:
                    place = q + row[:, None] * D + c[None, :]
                    mine = (h < H)[:, None] & (c < D // 2)[None, :]
                    score = mm(tl.load(place, mask=mine, other=0.0), tl.trans(low), score)
                    score = mm(tl.load(place + D // 2, mask=mine, other=0.0), tl.trans(high), score)
                else:
                    mine = (h < H)[:, None] & (c < D)[None, :]
                    query = tl.load(q + row[:, None] * D + c[None, :], mask=mine, other=0.0)
                    score = mm(query, tl.trans(key), score) if CODE_BITS == 8 else mm_f32(query, tl.trans(key), score)
                total = tl.sum(tl.maximum(score, 0.0) * weight[:, None], 0)
                tl.store(out + (t0 + i).to(tl.int64) * pitch + j, total, mask=j < seen)
