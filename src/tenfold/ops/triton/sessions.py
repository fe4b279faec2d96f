"""What one token each of many sessions changes in their memory, found by addresses: rings, rows, compressor states.

Nothing is asked of the device: a program whose token completes no group ends where it stands. Knows the bytes of
streams; nothing of layers.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tenfold.formats import RowLayout
from tenfold.ops import Weight
from tenfold.ops.triton.linear import address
from tenfold.ops.triton.lowp import e2m1_code, e4m3_code, pow2_ceil_scale, pow2_inverse, round_e4m3, to_bf16
from tenfold.ops.triton.rows import cos_sin

__all__ = ["compress_step", "store_rows"]

_SLOTS = 8
"""Tokens of a group that are pooled at once."""


def store_rows(rows: Tensor, addresses: Tensor, places: Tensor, ring: int | None = None) -> None:
    n, row_bytes = rows.shape
    if n:
        wide = triton.next_power_of_2(row_bytes)
        _store[(n,)](rows.contiguous(), addresses, places, ROW_BYTES=row_bytes, RING=ring or 0, WIDE=wide, num_warps=1)


@triton.jit
def _store(rows, addresses, places, ROW_BYTES: tl.constexpr, RING: tl.constexpr, WIDE: tl.constexpr):
    i, b = tl.program_id(0), tl.arange(0, WIDE)
    place = tl.load(places + i)
    base = address(addresses, i, tl.uint8)
    row = tl.load(rows + i.to(tl.int64) * ROW_BYTES + b, mask=b < ROW_BYTES, other=0)
    if RING:
        place = place % RING
        tl.store(base + (place + RING) * ROW_BYTES + b, row, mask=b < ROW_BYTES)
    tl.store(base + place * ROW_BYTES + b, row, mask=b < ROW_BYTES)


def compress_step(
    values: Tensor,
    gates: Tensor,
    ape: Weight,
    states: Tensor,
    rows: Tensor,
    positions: Tensor,
    ratio: int,
    overlap: bool,
    norm: Weight,
    eps: float,
    frequencies: Tensor,
    layout: RowLayout,
    spread: bool,
) -> None:
    (n, width), dim = values.shape, layout.width
    if width != (2 * dim if overlap else dim):
        raise ValueError(f"values: expected {2 * dim if overlap else dim} channels for rows of {dim}, got {width}")
    if spread and dim & (dim - 1):
        raise ValueError(f"values: expected a power of two of channels to spread, got {dim}")
    if layout.code_bits == 4 and layout.plain:
        raise ValueError(f"rows: no 4-bit layout has plain channels, got {layout}")
    if n:
        sizes = _sizes(layout, ratio, overlap, spread, frequencies.shape[0])
        _compress[(n,)](
            values.contiguous(), gates.contiguous(), ape.data, states, rows, positions, norm.data, frequencies, eps,
            **sizes, num_warps=4,
        )  # fmt: skip


def _sizes(layout: RowLayout, ratio: int, overlap: bool, spread: bool, pairs: int) -> dict[str, Any]:
    """What is fixed for the sessions of a model."""
    dim = layout.width
    wide = max(16, triton.next_power_of_2(dim))
    return {
        "RATIO": ratio,
        "OVERLAP": overlap,
        "WIDTH": 2 * dim if overlap else dim,
        "DIM": dim,
        "WIDE": wide,
        "PAIRS": pairs,
        "SPREAD": spread,
        "CODE_BITS": layout.code_bits,
        "CODED": layout.coded,
        "PLAIN": layout.plain,
        "ROW_BYTES": layout.row_bytes,
        "PLAIN_OFFSET": layout.plain_offset,
        "SCALE_OFFSET": layout.scale_offset,
        "SCALE_BYTES": layout.scale_bytes,
        "USED": layout.code_bytes + 2 * layout.plain + layout.num_scales * layout.scale_bytes,
        "BLOCK": min(layout.block, wide),
    }


@triton.jit
def _compress(
    values, gates, ape, states, rows, positions, norm, frequencies, eps,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    PAIRS: tl.constexpr, SPREAD: tl.constexpr, CODE_BITS: tl.constexpr, CODED: tl.constexpr, PLAIN: tl.constexpr,
    ROW_BYTES: tl.constexpr, PLAIN_OFFSET: tl.constexpr, SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr,
    USED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One session: a slot of its state holds WIDTH values, then WIDTH gates; with OVERLAP the last group's first."""
    i, d = tl.program_id(0), tl.arange(0, WIDE)
    position = tl.load(positions + i)
    place = position % RATIO
    state = address(states, i, tl.float32)
    HALVES: tl.constexpr = 2 if OVERLAP else 1
    FIRST: tl.constexpr = RATIO if OVERLAP else 0
    own, ok = i.to(tl.int64) * WIDTH, d < DIM
    ape += place * WIDTH
    if place < RATIO - 1:
        slot = state + (FIRST + place) * 2 * WIDTH
        for half in tl.static_range(HALVES):
            channel = half * DIM + d
            tl.store(slot + channel, tl.load(values + own + channel, mask=ok, other=0.0), mask=ok)
            gate = tl.load(gates + own + channel, mask=ok, other=0.0)
            gate += tl.load(ape + channel, mask=ok, other=0.0).to(tl.float32)
            tl.store(slot + WIDTH + channel, gate, mask=ok)
        return
    # share = (gates - gates.amax(1)).exp(); entry = (share * values).sum(1) / share.sum(1), a few slots at a time;
    # the token at hand is in no slot yet.
    CHANNEL: tl.constexpr = DIM if OVERLAP else 0
    value = tl.load(values + own + CHANNEL + d, mask=ok, other=0.0)
    top = tl.load(gates + own + CHANNEL + d, mask=ok, other=0.0)
    top += tl.load(ape + CHANNEL + d, mask=ok, other=0.0).to(tl.float32)
    total, pooled = tl.full([WIDE], 1.0, tl.float32), value
    for first in range(0, FIRST + RATIO - 1, 8):
        s = first + tl.arange(0, 8)
        live = (s < FIRST + RATIO - 1)[:, None] & ok[None, :]
        channel = d[None, :] + tl.where(s >= FIRST, CHANNEL, 0)[:, None]
        at = state + s[:, None] * (2 * WIDTH) + channel
        gate = tl.load(at + WIDTH, mask=live, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(gate, 0))
        share, keep = tl.exp(gate - new_top[None, :]), tl.exp(top - new_top)
        pooled = pooled * keep + tl.sum(share * tl.load(at, mask=live, other=0.0), 0)
        total = total * keep + tl.sum(share, 0)
        top = new_top
    if OVERLAP:  # the group at hand is the last complete one from now on
        tl.debug_barrier()
        for s in range(0, RATIO - 1):
            for half in tl.static_range(2 * HALVES):
                channel = half * DIM + d
                moved = tl.load(state + (RATIO + s) * 2 * WIDTH + channel, mask=ok, other=0.0)
                tl.store(state + s * 2 * WIDTH + channel, moved, mask=ok)
        slot = state + (RATIO - 1) * 2 * WIDTH
        for half in tl.static_range(HALVES):
            channel = half * DIM + d
            tl.store(slot + channel, tl.load(values + own + channel, mask=ok, other=0.0), mask=ok)
            gate = tl.load(gates + own + channel, mask=ok, other=0.0)
            gate += tl.load(ape + channel, mask=ok, other=0.0).to(tl.float32)
            tl.store(slot + WIDTH + channel, gate, mask=ok)
    x = tl.where(ok, pooled / total, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / DIM + eps) * tl.load(norm + d, mask=ok, other=0.0).to(tl.float32)
    entry = position // RATIO
    pair = tl.arange(0, WIDE // 2) - (DIM // 2 - PAIRS)
    turned = (pair >= 0) & (pair < PAIRS)
    angle = (entry * RATIO).to(tl.float32) * tl.load(frequencies + pair, mask=turned, other=0.0)
    cos, sin = cos_sin(angle)
    even, odd = tl.split(tl.reshape(x, [WIDE // 2, 2]))
    x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [WIDE])
    if SPREAD:  # channel j of the transform: the sum of all, with the sign of the parity of i & j
        bits = tl.arange(0, WIDE)[:, None] & tl.arange(0, WIDE)[None, :]
        bits = bits ^ (bits >> 8)
        bits = bits ^ (bits >> 4)
        bits = bits ^ (bits >> 2)
        bits = bits ^ (bits >> 1)
        x = tl.sum(tl.where((bits & 1) == 0, x[:, None], -x[:, None]), 0) * DIM**-0.5
    row = address(rows, i, tl.uint8) + entry * ROW_BYTES
    if CODE_BITS == 32:
        tl.store(row.to(tl.pointer_type(tl.float32)) + d, x, mask=ok)
    else:
        coded = tl.where(d < CODED, x, 0.0)
        block = tl.reshape(coded, [WIDE // BLOCK, BLOCK])
        amax = tl.max(tl.abs(block), 1)
        if CODE_BITS == 8:
            scale, exponent = pow2_ceil_scale(tl.maximum(amax, 1e-4), 1.0 / 448.0)
            scaled = tl.minimum(tl.maximum(block * pow2_inverse(scale)[:, None], -448.0), 448.0)
            code = tl.reshape(e4m3_code(scaled, round_e4m3(scaled)), [WIDE])
            tl.store(row + d, code, mask=d < CODED)
        else:
            scale, exponent = pow2_ceil_scale(tl.maximum(amax, 6.0 * 1.1754943508222875e-38), 1.0 / 6.0)
            scaled = tl.minimum(tl.maximum(block * pow2_inverse(scale)[:, None], -6.0), 6.0)
            low, high = tl.split(tl.reshape(e2m1_code(scaled), [WIDE // 2, 2]))
            half_d = tl.arange(0, WIDE // 2)
            tl.store(row + half_d, low | (high << 4), mask=half_d < CODED // 2)
        b = tl.arange(0, WIDE // BLOCK)
        if SCALE_BYTES == 1:
            tl.store(row + SCALE_OFFSET + b, exponent, mask=b * BLOCK < CODED)
        else:
            tl.store((row + SCALE_OFFSET).to(tl.pointer_type(tl.float32)) + b, scale, mask=b * BLOCK < CODED)
        if PLAIN:
            plain = (row + PLAIN_OFFSET).to(tl.pointer_type(tl.bfloat16)) + (d - CODED)
            tl.store(plain, to_bf16(x), mask=(d >= CODED) & (d < CODED + PLAIN))
        for hole in tl.static_range(ROW_BYTES - USED):
            tl.store(row + USED + hole, tl.zeros([], tl.uint8))
