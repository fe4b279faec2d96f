"""The compressor's pooling, and rows looked up by id. Knows nothing of which tokens make a group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.ops import Weight
from tenfold.ops.triton.lowp import INTERPRET

__all__ = ["compress", "embed", "hc_embed"]


@triton.jit(do_not_specialize=["entries", "stride_group", "stride_token"])
def compress_kernel(
    values, gates, out, entries, stride_group, stride_token,
    RATIO: tl.constexpr, DIM: tl.constexpr, OVERLAP: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """out [entries, DIM]: values pooled by the softmax of their gates over the tokens of a group.

    With OVERLAP entry i pools the first half of the channels of group i and the second half of group i + 1.
    """
    entry = (tl.program_id(0) * BE + tl.arange(0, BE)).to(tl.int64)[:, None, None]
    channel = (tl.program_id(1) * BD + tl.arange(0, BD))[None, None, :]
    token = tl.arange(0, BR)[None, :, None]
    if OVERLAP:
        later = token >= RATIO
        place = (entry + later.to(tl.int64)) * stride_group + tl.where(later, token - RATIO, token) * stride_token
        place += tl.where(later, channel + DIM, channel)
        there = (entry < entries) & (token < 2 * RATIO) & (channel < DIM)
    else:
        place = entry * stride_group + token * stride_token + channel
        there = (entry < entries) & (token < RATIO) & (channel < DIM)
    gate = tl.load(gates + place, mask=there, other=float("-inf"))
    most = tl.max(gate, 1)
    share = tl.exp(gate - tl.where(most == float("-inf"), 0.0, most)[:, None, :])
    pooled = tl.sum(share * tl.load(values + place, mask=there, other=0.0), 1)
    total = tl.sum(share, 1)
    pooled = pooled / tl.where(total == 0.0, 1.0, total)
    e = (tl.program_id(0) * BE + tl.arange(0, BE)).to(tl.int64)[:, None]
    d = (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]
    tl.store(out + e * DIM + d, pooled, mask=(e < entries) & (d < DIM))


@triton.jit(do_not_specialize=["n", "lines"])
def embed_kernel(ids, table, out, n, lines, WIDTH: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr):
    """out [n, WIDTH] f32: lines of the table by id; an id that is not there, which would read any memory, is moved."""
    i = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    line = tl.minimum(tl.maximum(tl.load(ids + i, mask=i < n, other=0), 0), lines - 1).to(tl.int64)
    d = tl.program_id(1) * BW + tl.arange(0, BW)
    inside = (i < n)[:, None] & (d < WIDTH)[None, :]
    found = tl.load(table + (line * WIDTH)[:, None] + d[None, :], mask=inside, other=0.0)
    tl.store(out + (i * WIDTH)[:, None] + d[None, :], found.to(tl.float32), mask=inside)


def compress(values: Tensor, gates: Tensor, overlap: bool) -> Tensor:
    groups, ratio, width = values.shape
    if gates.shape != values.shape or (overlap and (width % 2 or not groups)) or not ratio:
        raise ValueError(f"values, gates: cannot pool {tuple(values.shape)} by {tuple(gates.shape)}")
    if values.stride() != gates.stride() or values.stride(-1) != 1:
        values, gates = values.contiguous(), gates.contiguous()
    entries, dim = (groups - 1, width // 2) if overlap else (groups, width)
    out = torch.empty(entries, dim, device=values.device)
    if entries:
        tall = triton.next_power_of_2(2 * ratio if overlap else ratio)
        wide = min(triton.next_power_of_2(dim), 512 if INTERPRET.value else max(2048 // tall, 32))
        each = min(triton.next_power_of_2(entries), max(1, (1 << 18) // (tall * wide))) if INTERPRET.value else 1
        compress_kernel[triton.cdiv(entries, each), triton.cdiv(dim, wide)](
            values, gates, out, entries, values.stride(0), values.stride(1), ratio, dim, overlap, tall, wide, each
        )
    return out


def embed(ids: Tensor, weight: Weight) -> Tensor:
    n, width = ids.shape[0], weight.shape[1]
    out = torch.empty(n, width, device=ids.device)
    if n:
        wide = min(triton.next_power_of_2(width), 4096 if INTERPRET.value else 1024)
        each = min(triton.next_power_of_2(n), 64) if INTERPRET.value else 1
        embed_kernel[triton.cdiv(n, each), triton.cdiv(width, wide)](
            ids.contiguous(), weight.data, out, n, weight.shape[0], width, wide, each
        )
    return out


def hc_embed(ids: Tensor, weight: Weight, copies: int) -> Tensor:
    return embed(ids, weight)[:, None, :].repeat(1, copies, 1)
