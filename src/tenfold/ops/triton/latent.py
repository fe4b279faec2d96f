"""All that a layer of V3.2 does to single channels of one token each of many sessions, in one launch.

The latent row and the index key enter their streams, found by addresses; the queries of the indexer are rounded to
what keys hold, and the rope channels of attention's are rotated into the place where `grouped_linear_into` puts the
others. Knows the bytes of streams; nothing of layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.formats import RowLayout
from tenfold.ops import Weight
from tenfold.ops.triton.linear import address
from tenfold.ops.triton.lowp import pow2_ceil_scale, pow2_inverse, round_e4m3, to_bf16
from tenfold.ops.triton.rows import cos_sin, spread_rows, turned_apart, vector
from tenfold.ops.triton.sessions import keep_packed, sizes, spread_row, turned

__all__ = ["enter_latent"]

_INDEX_HEADS, _HEADS = 16, 32
"""Queries of a program: of the indexer, and of attention."""


def enter_latent(
    q: Tensor,
    q_index: Tensor,
    row: Tensor,
    key: Tensor,
    norm: Weight,
    key_norm: Weight,
    key_bias: Weight,
    eps: float,
    positions: Tensor,
    frequencies: Tensor,
    rows: Tensor,
    layout: RowLayout,
    keys: Tensor,
    key_layout: RowLayout,
    spread: bool,
) -> tuple[Tensor, Tensor]:
    """As in `FusedOps`."""
    (n, heads, width), (_, index_heads, dim), pairs = q.shape, q_index.shape, frequencies.shape[0]
    latent = layout.width - 2 * pairs
    if row.shape != (n, layout.width) or key.shape != (n, dim) or key_layout.width != dim or latent <= 0:
        raise ValueError(f"row, key: {tuple(row.shape)} and {tuple(key.shape)} do not fit {layout} and {key_layout}")
    if pairs & (pairs - 1) or width < 2 * pairs or dim < 2 * pairs or (spread and dim & (dim - 1)):
        raise ValueError(f"frequencies: expected a power of two of them for {width} and {dim} channels, got {pairs}")
    if spread and (key_layout.code_bits != 8 or key_layout.num_scales != 1):
        raise ValueError(f"keys: expected e4m3 with one scale a row, got {key_layout}")
    queries = torch.empty(n, heads, layout.width, device=q.device)
    met = torch.empty(q_index.shape, dtype=torch.bfloat16 if spread else torch.float32, device=q.device)
    if n == 0:
        return queries, met
    index_jobs, jobs = triton.cdiv(index_heads, _INDEX_HEADS), triton.cdiv(heads, _HEADS)
    _enter_latent[(n, 2 + index_jobs + jobs)](
        q.contiguous(), q_index.contiguous(), row.contiguous(), vector(norm, (latent,)), key.contiguous(),
        vector(key_norm, (dim,)), vector(key_bias, (dim,)), eps, positions, frequencies, rows, keys, queries, met,
        HEADS=heads, QUERY=width, LATENT=latent, INDEX_HEADS=index_heads, BI=_INDEX_HEADS, BH=_HEADS,
        **sizes(layout, False, pairs),
        **{f"KEY_{name}": size for name, size in sizes(key_layout, spread, pairs).items()}, num_warps=4,
    )  # fmt: skip
    return queries, met


@triton.jit
def _enter_latent(
    q, q_index, row, row_norm, key, key_norm, key_bias, eps, positions, frequencies, rows, keys, queries, met,
    HEADS: tl.constexpr, QUERY: tl.constexpr, LATENT: tl.constexpr, INDEX_HEADS: tl.constexpr,
    BI: tl.constexpr, BH: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr,
    PAIRS: tl.constexpr, SPREAD: tl.constexpr, CODE_BITS: tl.constexpr, CODED: tl.constexpr, PLAIN: tl.constexpr,
    ROW_BYTES: tl.constexpr, PLAIN_OFFSET: tl.constexpr, SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr,
    USED: tl.constexpr, BLOCK: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_WIDE: tl.constexpr,
    KEY_PAIRS: tl.constexpr, KEY_SPREAD: tl.constexpr, KEY_CODE_BITS: tl.constexpr, KEY_CODED: tl.constexpr,
    KEY_PLAIN: tl.constexpr, KEY_ROW_BYTES: tl.constexpr, KEY_PLAIN_OFFSET: tl.constexpr,
    KEY_SCALE_OFFSET: tl.constexpr, KEY_SCALE_BYTES: tl.constexpr, KEY_USED: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a session: its row (program 0), its key (1), BI of the indexer's queries each (then), BH of attention's."""
    i, job = tl.program_id(0), tl.program_id(1)
    position, token = tl.load(positions + i), i.to(tl.int64)
    INDEX_JOBS: tl.constexpr = (INDEX_HEADS + BI - 1) // BI
    if job == 0:
        d = tl.arange(0, WIDE)
        x = tl.load(row + token * DIM + d, mask=d < DIM, other=0.0)
        level = tl.rsqrt(tl.sum(tl.where(d < LATENT, x * x, 0.0), 0) / LATENT + eps)
        x = tl.where(d < LATENT, x * level * tl.load(row_norm + d, mask=d < LATENT, other=0.0), x)
        x = turned(tl.reshape(x, [1, WIDE]), position, frequencies, DIM, 1, WIDE, PAIRS)
        keep_packed(
            tl.reshape(x, [WIDE]), address(rows, i, tl.uint8) + position * ROW_BYTES, 1, 0,
            DIM, WIDE, CODE_BITS, CODED, PLAIN, ROW_BYTES, PLAIN_OFFSET, SCALE_OFFSET, SCALE_BYTES, USED, BLOCK,
        )  # fmt: skip
    if job == 1:
        d = tl.arange(0, KEY_WIDE)
        ok = d < KEY_DIM
        x = tl.load(key + token * KEY_DIM + d, mask=ok, other=0.0)
        x = tl.where(ok, x - tl.sum(x, 0) / KEY_DIM, 0.0)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / KEY_DIM + eps)
        x = x * tl.load(key_norm + d, mask=ok, other=0.0) + tl.load(key_bias + d, mask=ok, other=0.0)
        x = turned_apart(tl.reshape(x, [1, KEY_WIDE]), position, frequencies, 1, KEY_WIDE, PAIRS)
        x = tl.reshape(x, [KEY_WIDE])
        if KEY_SPREAD:
            x = spread_row(x, KEY_DIM, KEY_WIDE)
        keep_packed(
            x, address(keys, i, tl.uint8) + position * KEY_ROW_BYTES, 1, 0,
            KEY_DIM, KEY_WIDE, KEY_CODE_BITS, KEY_CODED, KEY_PLAIN, KEY_ROW_BYTES, KEY_PLAIN_OFFSET, KEY_SCALE_OFFSET,
            KEY_SCALE_BYTES, KEY_USED, KEY_BLOCK,
        )  # fmt: skip
    if (job > 1) & (job < 2 + INDEX_JOBS):
        h, d = (job - 2) * BI + tl.arange(0, BI), tl.arange(0, KEY_WIDE)
        ok = (h < INDEX_HEADS)[:, None] & (d < KEY_DIM)[None, :]
        place = ((token * INDEX_HEADS + h) * KEY_DIM)[:, None] + d[None, :]
        x = tl.load(q_index + place, mask=ok, other=0.0)
        x = turned_apart(x, position, frequencies, BI, KEY_WIDE, PAIRS)
        if KEY_SPREAD:
            x = spread_rows(x, BI, KEY_DIM, KEY_WIDE)
            scale, _ = pow2_ceil_scale(tl.maximum(tl.max(tl.abs(x), 1), 1e-4), 1.0 / 448.0)
            x = round_e4m3(x * pow2_inverse(scale)[:, None]) * scale[:, None]
            tl.store(met + place, to_bf16(x), mask=ok)
        else:
            tl.store(met + place, x, mask=ok)
    if job >= 2 + INDEX_JOBS:
        h, p = (job - 2 - INDEX_JOBS) * BH + tl.arange(0, BH), tl.arange(0, PAIRS)
        cos, sin = cos_sin(position.to(tl.float32) * tl.load(frequencies + p))
        cos, sin = cos[None, :], sin[None, :]
        ok = (h < HEADS)[:, None] & (p >= 0)[None, :]
        line = token * HEADS + h
        place = q + (line * QUERY + QUERY - 2 * PAIRS)[:, None] + 2 * p[None, :]
        even, odd = tl.load(place, mask=ok, other=0.0), tl.load(place + 1, mask=ok, other=0.0)
        to = queries + (line * DIM + LATENT)[:, None] + 2 * p[None, :]
        tl.store(to, even * cos - odd * sin, mask=ok)
        tl.store(to + 1, even * sin + odd * cos, mask=ok)
