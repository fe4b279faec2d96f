"""What one token each of many sessions changes in their memory, found by addresses: rings, rows, compressor states.

Nothing is asked of the device: a program whose token completes no group does nothing more. All that a layer of V4
changes, and all that its queries go through, is one launch (`enter`). Knows the bytes of streams; nothing of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.formats import RowLayout
from tenfold.ops import Group, Weight
from tenfold.ops.triton.linear import address
from tenfold.ops.triton.lowp import e2m1, e2m1_code, e4m3_code, pow2_ceil_scale, pow2_inverse, round_e4m3, to_bf16
from tenfold.ops.triton.rows import cos_sin, spread_rows

__all__ = ["compress_step", "enter", "keep_packed", "sizes", "spread_row", "store_rows", "turned"]

_HEADS, _INDEX_HEADS = 4, 16
"""Queries of a program: of attention, and of the indexer."""


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
    group = Group(values, gates, ape, states, rows, norm, layout, spread)
    _check(group, overlap)
    if values.shape[0]:
        _compress[(values.shape[0],)](
            *_given(group), positions, frequencies, eps,
            RATIO=ratio, OVERLAP=overlap, **sizes(layout, spread, frequencies.shape[0]), num_warps=4,
        )  # fmt: skip


def enter(
    row: Tensor,
    norm: Weight,
    eps: float,
    positions: Tensor,
    frequencies: Tensor,
    rings: Tensor,
    ring: int,
    layout: RowLayout,
    groups: Sequence[Group],
    ratio: int,
    overlap: bool,
    q: Tensor,
    q_index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As in `FusedOps`."""
    for group in groups:
        _check(group, overlap)
    if len(groups) > 2 or row.shape[1] != layout.width or any(group.layout != layout for group in groups[:1]):
        raise ValueError(f"row, groups: expected rows of {layout}, and no more than one group of other rows")
    (n, heads, width), pairs = q.shape, frequencies.shape[0]
    if row.shape != (n, width) or (q_index is None) == (len(groups) > 1):
        raise ValueError(f"q: expected {row.shape[0]} of {row.shape[1]} channels, of the indexer where keys grow")
    queries = torch.empty(q.shape, device=q.device)
    met, index_heads = queries, 0
    if q_index is not None:
        index_heads, rounds = q_index.shape[1], groups[1].spread
        if q_index.shape != (n, index_heads, groups[1].layout.width) or (rounds and groups[1].layout.code_bits != 4):
            raise ValueError(f"q_index: {tuple(q_index.shape)} do not fit {groups[1].layout}")
        met = torch.empty(q_index.shape, dtype=torch.bfloat16 if rounds else torch.float32, device=q.device)
    if n == 0:
        return queries, met
    rows = _given(groups[0]) if groups else (row,) * 6
    keys = _given(groups[1]) if len(groups) > 1 else rows
    jobs = 1 + len(groups) + triton.cdiv(heads, _HEADS) + triton.cdiv(index_heads, _INDEX_HEADS)
    row_sizes = sizes(layout, False, pairs)
    key_sizes = sizes(groups[1].layout, groups[1].spread, pairs) if len(groups) > 1 else row_sizes
    _enter[(n, jobs)](
        row.contiguous(), norm.data, rings, *rows, *keys, positions, frequencies, eps,
        q.contiguous(), queries, q if q_index is None else q_index.contiguous(), met,
        RING=ring, GROUPS=len(groups), RATIO=ratio, OVERLAP=overlap, HEADS=heads, BH=_HEADS,
        INDEX_HEADS=index_heads, BI=_INDEX_HEADS, **row_sizes,
        **{f"KEY_{name}": size for name, size in key_sizes.items()}, num_warps=4,
    )  # fmt: skip
    return queries, met


def _check(group: Group, overlap: bool) -> None:
    width, dim, layout = group.values.shape[1], group.layout.width, group.layout
    if width != (2 * dim if overlap else dim):
        raise ValueError(f"values: expected {2 * dim if overlap else dim} channels for rows of {dim}, got {width}")
    if group.spread and dim & (dim - 1):
        raise ValueError(f"values: expected a power of two of channels to spread, got {dim}")
    if layout.code_bits == 4 and layout.plain:
        raise ValueError(f"rows: no 4-bit layout has plain channels, got {layout}")


def _given(group: Group) -> tuple[Tensor, ...]:
    """A group as kernels take it."""
    values, gates = group.values.contiguous(), group.gates.contiguous()
    return values, gates, group.ape.data, group.states, group.rows, group.norm.data


def sizes(layout: RowLayout, spread: bool, pairs: int) -> dict[str, Any]:
    """What is fixed for rows of a layout, as kernels take it."""
    dim = layout.width
    wide = max(16, triton.next_power_of_2(dim))
    return {
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
        "BLOCK": wide if layout.num_scales == 1 else min(layout.block, wide),
    }


@triton.jit
def _compress(
    values, gates, ape, states, rows, norm, positions, frequencies, eps,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    PAIRS: tl.constexpr, SPREAD: tl.constexpr, CODE_BITS: tl.constexpr, CODED: tl.constexpr, PLAIN: tl.constexpr,
    ROW_BYTES: tl.constexpr, PLAIN_OFFSET: tl.constexpr, SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr,
    USED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _grow(
        tl.program_id(0), values, gates, ape, states, rows, norm, positions, frequencies, eps, RATIO, OVERLAP,
        DIM, WIDE, PAIRS, SPREAD, CODE_BITS, CODED, PLAIN, ROW_BYTES, PLAIN_OFFSET, SCALE_OFFSET, SCALE_BYTES, USED,
        BLOCK,
    )  # fmt: skip


@triton.jit
def _enter(
    row, row_norm, rings, values, gates, ape, states, rows, norm,
    key_values, key_gates, key_ape, key_states, keys, key_norm, positions, frequencies, eps,
    q, queries, q_index, met,
    RING: tl.constexpr, GROUPS: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
    HEADS: tl.constexpr, BH: tl.constexpr, INDEX_HEADS: tl.constexpr, BI: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr,
    PAIRS: tl.constexpr, SPREAD: tl.constexpr, CODE_BITS: tl.constexpr, CODED: tl.constexpr, PLAIN: tl.constexpr,
    ROW_BYTES: tl.constexpr, PLAIN_OFFSET: tl.constexpr, SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr,
    USED: tl.constexpr, BLOCK: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_WIDE: tl.constexpr,
    KEY_PAIRS: tl.constexpr, KEY_SPREAD: tl.constexpr, KEY_CODE_BITS: tl.constexpr, KEY_CODED: tl.constexpr,
    KEY_PLAIN: tl.constexpr, KEY_ROW_BYTES: tl.constexpr, KEY_PLAIN_OFFSET: tl.constexpr,
    KEY_SCALE_OFFSET: tl.constexpr, KEY_SCALE_BYTES: tl.constexpr, KEY_USED: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """A session's row enters its ring (program 0 of it), its groups grow (then), its queries turn, BH of attention's
    and BI of the indexer's in a program."""
    i, job = tl.program_id(0), tl.program_id(1)
    TURNING: tl.constexpr = (HEADS + BH - 1) // BH
    if job == 0:
        position, d = tl.load(positions + i), tl.arange(0, WIDE)
        x = tl.load(row + i.to(tl.int64) * DIM + d, mask=d < DIM, other=0.0)
        line = address(rings, i, tl.uint8) + position % RING * ROW_BYTES
        _finish(
            x, position, row_norm, frequencies, eps, line, 2, RING, DIM, WIDE, PAIRS, False, CODE_BITS, CODED, PLAIN,
            ROW_BYTES, PLAIN_OFFSET, SCALE_OFFSET, SCALE_BYTES, USED, BLOCK,
        )  # fmt: skip
    if GROUPS > 0:
        if job == 1:
            _grow(
                i, values, gates, ape, states, rows, norm, positions, frequencies, eps, RATIO, OVERLAP,
                DIM, WIDE, PAIRS, SPREAD, CODE_BITS, CODED, PLAIN, ROW_BYTES, PLAIN_OFFSET, SCALE_OFFSET, SCALE_BYTES,
                USED, BLOCK,
            )  # fmt: skip
    if GROUPS > 1:
        if job == 2:
            _grow(
                i, key_values, key_gates, key_ape, key_states, keys, key_norm, positions, frequencies, eps, RATIO,
                OVERLAP, KEY_DIM, KEY_WIDE, KEY_PAIRS, KEY_SPREAD, KEY_CODE_BITS, KEY_CODED, KEY_PLAIN, KEY_ROW_BYTES,
                KEY_PLAIN_OFFSET, KEY_SCALE_OFFSET, KEY_SCALE_BYTES, KEY_USED, KEY_BLOCK,
            )  # fmt: skip
    if job > GROUPS:
        if job <= GROUPS + TURNING:
            h, d = (job - 1 - GROUPS) * BH + tl.arange(0, BH), tl.arange(0, WIDE)
            place = ((i.to(tl.int64) * HEADS + h) * DIM)[:, None] + d[None, :]
            ok = (h < HEADS)[:, None] & (d < DIM)[None, :]
            x = tl.load(q + place, mask=ok, other=0.0)
            x = x * tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
            x = turned(x, tl.load(positions + i), frequencies, DIM, BH, WIDE, PAIRS)
            tl.store(queries + place, x, mask=ok)
    if INDEX_HEADS > 0:
        if job > GROUPS + TURNING:
            h, d = (job - 1 - GROUPS - TURNING) * BI + tl.arange(0, BI), tl.arange(0, KEY_WIDE)
            line = ((i.to(tl.int64) * INDEX_HEADS + h) * KEY_DIM)[:, None]
            ok = (h < INDEX_HEADS)[:, None] & (d < KEY_DIM)[None, :]
            x = tl.load(q_index + line + d[None, :], mask=ok, other=0.0)
            x = turned(x, tl.load(positions + i), frequencies, KEY_DIM, BI, KEY_WIDE, PAIRS)
            if KEY_SPREAD:  # and rounded, the even channels before the odd ones, as packed keys meet them
                x = tl.reshape(spread_rows(x, BI, KEY_DIM, KEY_WIDE), [BI, KEY_WIDE // KEY_BLOCK, KEY_BLOCK])
                amax = tl.maximum(tl.max(tl.abs(x), 2), 6.0 * 1.1754943508222875e-38)
                scale, _ = pow2_ceil_scale(amax, 1.0 / 6.0)
                x = tl.minimum(tl.maximum(x * pow2_inverse(scale)[:, :, None], -6.0), 6.0)
                x = tl.reshape(e2m1(e2m1_code(x)) * scale[:, :, None], [BI, KEY_WIDE])
                tl.store(met + line + (d // 2 + d % 2 * (KEY_DIM // 2))[None, :], to_bf16(x), mask=ok)
            else:
                tl.store(met + line + d[None, :], x, mask=ok)


@triton.jit
def _grow(
    i, values, gates, ape, states, rows, norm, positions, frequencies, eps,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    PAIRS: tl.constexpr, SPREAD: tl.constexpr, CODE_BITS: tl.constexpr, CODED: tl.constexpr, PLAIN: tl.constexpr,
    ROW_BYTES: tl.constexpr, PLAIN_OFFSET: tl.constexpr, SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr,
    USED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One session: a slot of its state holds WIDTH values, then WIDTH gates; with OVERLAP the last group's first."""
    d = tl.arange(0, WIDE)
    position = tl.load(positions + i)
    place = position % RATIO
    state = address(states, i, tl.float32)
    HALVES: tl.constexpr = 2 if OVERLAP else 1
    WIDTH: tl.constexpr = 2 * DIM if OVERLAP else DIM
    FIRST: tl.constexpr = RATIO if OVERLAP else 0
    own, ok = i.to(tl.int64) * WIDTH, d < DIM
    ape += place * WIDTH
    if place < RATIO - 1:
        _keep(state + (FIRST + place) * 2 * WIDTH, values + own, gates + own, ape, d, ok, HALVES, DIM)
    else:
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
            _keep(state + (RATIO - 1) * 2 * WIDTH, values + own, gates + own, ape, d, ok, HALVES, DIM)
        entry = position // RATIO
        _finish(
            tl.where(ok, pooled / total, 0.0), entry * RATIO, norm, frequencies, eps,
            address(rows, i, tl.uint8) + entry * ROW_BYTES, 1, 0, DIM, WIDE, PAIRS, SPREAD, CODE_BITS, CODED, PLAIN,
            ROW_BYTES, PLAIN_OFFSET, SCALE_OFFSET, SCALE_BYTES, USED, BLOCK,
        )  # fmt: skip


@triton.jit
def _keep(slot, values, gates, ape, d, ok, HALVES: tl.constexpr, DIM: tl.constexpr):
    """A token's values, and its gates with what its place adds, into a slot."""
    for half in tl.static_range(HALVES):
        channel = half * DIM + d
        tl.store(slot + channel, tl.load(values + channel, mask=ok, other=0.0), mask=ok)
        gate = tl.load(gates + channel, mask=ok, other=0.0)
        gate += tl.load(ape + channel, mask=ok, other=0.0).to(tl.float32)
        tl.store(slot + HALVES * DIM + channel, gate, mask=ok)


@triton.jit
def _finish(
    x, position, norm, frequencies, eps, row, COPIES: tl.constexpr, APART: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr,
    PAIRS: tl.constexpr, SPREAD: tl.constexpr, CODE_BITS: tl.constexpr, CODED: tl.constexpr, PLAIN: tl.constexpr,
    ROW_BYTES: tl.constexpr, PLAIN_OFFSET: tl.constexpr, SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr,
    USED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [WIDE] normed, rotated, spread and packed to `row`, and to as many COPIES of it, APART rows from each other."""
    d = tl.arange(0, WIDE)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / DIM + eps) * tl.load(norm + d, mask=d < DIM, other=0.0).to(tl.float32)
    x = tl.reshape(turned(tl.reshape(x, [1, WIDE]), position, frequencies, DIM, 1, WIDE, PAIRS), [WIDE])
    if SPREAD:
        x = spread_row(x, DIM, WIDE)
    keep_packed(
        x, row, COPIES, APART, DIM, WIDE, CODE_BITS, CODED, PLAIN, ROW_BYTES, PLAIN_OFFSET, SCALE_OFFSET, SCALE_BYTES,
        USED, BLOCK,
    )  # fmt: skip


@triton.jit
def turned(x, position, frequencies, DIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr):
    """The last 2 * PAIRS of DIM channels of x [ROWS, WIDE] rotated."""
    pair = tl.arange(0, WIDE // 2) - (DIM // 2 - PAIRS)
    angle = position.to(tl.float32) * tl.load(frequencies + pair, mask=(pair >= 0) & (pair < PAIRS), other=0.0)
    cos, sin = cos_sin(angle)
    cos, sin = cos[None, :], sin[None, :]
    even, odd = tl.split(tl.reshape(x, [ROWS, WIDE // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [ROWS, WIDE])


@triton.jit
def spread_row(x, DIM: tl.constexpr, WIDE: tl.constexpr):
    """x [WIDE] times Hadamard's matrix: channel j the sum of all, with the sign of the parity of i & j."""
    bits = tl.arange(0, WIDE)[:, None] & tl.arange(0, WIDE)[None, :]
    bits = bits ^ (bits >> 8)
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    bits = bits ^ (bits >> 1)
    return tl.sum(tl.where((bits & 1) == 0, x[:, None], -x[:, None]), 0) * DIM**-0.5


@triton.jit
def keep_packed(
    x, row, COPIES: tl.constexpr, APART: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    CODE_BITS: tl.constexpr, CODED: tl.constexpr, PLAIN: tl.constexpr,
    ROW_BYTES: tl.constexpr, PLAIN_OFFSET: tl.constexpr, SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr,
    USED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [WIDE] packed to `row`, and to as many COPIES of it, APART rows from each other."""
    d = tl.arange(0, WIDE)
    ok = d < DIM
    if CODE_BITS == 32:
        for copy in tl.static_range(COPIES):
            line = row + copy * APART * ROW_BYTES
            tl.store(line.to(tl.pointer_type(tl.float32)) + d, x, mask=ok)
    else:
        coded = tl.where(d < CODED, x, 0.0)
        block = tl.reshape(coded, [WIDE // BLOCK, BLOCK])
        amax = tl.max(tl.abs(block), 1)
        b = tl.arange(0, WIDE // BLOCK)
        if CODE_BITS == 8:
            scale, exponent = pow2_ceil_scale(tl.maximum(amax, 1e-4), 1.0 / 448.0)
            scaled = tl.minimum(tl.maximum(block * pow2_inverse(scale)[:, None], -448.0), 448.0)
            code, at, end = tl.reshape(e4m3_code(scaled, round_e4m3(scaled)), [WIDE]), d, CODED
        else:
            scale, exponent = pow2_ceil_scale(tl.maximum(amax, 6.0 * 1.1754943508222875e-38), 1.0 / 6.0)
            scaled = tl.minimum(tl.maximum(block * pow2_inverse(scale)[:, None], -6.0), 6.0)
            low, high = tl.split(tl.reshape(e2m1_code(scaled), [WIDE // 2, 2]))
            code, at, end = low | (high << 4), tl.arange(0, WIDE // 2), CODED // 2
        for copy in tl.static_range(COPIES):
            line = row + copy * APART * ROW_BYTES
            tl.store(line + at, code, mask=at < end)
            if SCALE_BYTES == 1:
                tl.store(line + SCALE_OFFSET + b, exponent, mask=b * BLOCK < CODED)
            else:
                tl.store((line + SCALE_OFFSET).to(tl.pointer_type(tl.float32)) + b, scale, mask=b * BLOCK < CODED)
            if PLAIN:
                plain = (line + PLAIN_OFFSET).to(tl.pointer_type(tl.bfloat16)) + (d - CODED)
                tl.store(plain, to_bf16(x), mask=(d >= CODED) & (d < CODED + PLAIN))
            for hole in tl.static_range(ROW_BYTES - USED):
                tl.store(line + USED + hole, tl.zeros([], tl.uint8))
