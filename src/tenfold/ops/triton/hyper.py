"""Hyper-connections: the learned mapping with Sinkhorn in two launches, the merge in one. Knows nothing of sub-layers.

The mapping's logits are a product of few outputs with a long sum, so the sum is split over programs; the second launch
adds the parts, makes the mapping of them, and the sub-layer's normed input.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.ops import Weight
from tenfold.ops.triton.lowp import INTERPRET, mm_f32
from tenfold.ops.triton.rows import vector

__all__ = ["hc_collapse", "hc_merge", "hc_mix"]

_MOST_SPLITS = 64


@triton.jit(do_not_specialize=["n"])
def project_kernel(
    flat, fn, logits, squares, n,
    PER_SPLIT: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr,
    BO: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A split's part of flat [n, K] fn^T to logits [splits, n, OUTPUTS], and of the sums of squares [splits, n]."""
    split = tl.program_id(1)
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    o = tl.arange(0, BO)
    acc = tl.zeros([BM, BO], tl.float32)
    square = tl.zeros([BM], tl.float32)
    for first in range(split * PER_SPLIT, tl.minimum((split + 1) * PER_SPLIT, K), BK):
        k = first + tl.arange(0, BK)
        seen = k < K
        x = tl.load(flat + (m * K)[:, None] + k[None, :], mask=(m < n)[:, None] & seen[None, :], other=0.0)
        w = tl.load(fn + o[:, None] * K + k[None, :], mask=(o < OUTPUTS)[:, None] & seen[None, :], other=0.0)
        acc = mm_f32(x, tl.trans(w), acc)
        square += tl.sum(x * x, 1)
    to = logits + ((split * n + m) * OUTPUTS)[:, None] + o[None, :]
    tl.store(to, acc, mask=(m < n)[:, None] & (o < OUTPUTS)[None, :])
    tl.store(squares + split * n + m, square, mask=m < n)


@triton.jit
def _logit(logits, token, place, n, splits, OUTPUTS: tl.constexpr, SPLITS: tl.constexpr):
    """Logits of some tokens at `place` [tokens, m], the splits added up."""
    s = tl.arange(0, SPLITS)
    at = logits + ((s * n)[None, :] + token[:, None])[:, :, None] * OUTPUTS + place[:, None, :]
    here = ((s < splits)[None, :] & (token < n)[:, None])[:, :, None] & (place < OUTPUTS)[:, None, :]
    return tl.sum(tl.load(at, mask=here, other=0.0), 1)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["n", "splits"])
def finish_kernel(
    streams, logits, squares, scale, base, norm, x, post, combination, n, splits, norm_eps, eps,
    M: tl.constexpr, BS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    OUTPUTS: tl.constexpr, SPLITS: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    """x [n, D], and with ITERATIONS also post [n, M] and combination [n, M, M]; BS is M up to a power of two."""
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    here = token < n
    s = tl.arange(0, SPLITS)
    known = here[:, None] & (s < splits)[None, :]
    square = tl.sum(tl.load(squares + (s * n)[None, :] + token[:, None], mask=known, other=0.0), 1)
    factor = tl.rsqrt(square / (M * D) + norm_eps)
    if ITERATIONS > 0:
        k = tl.arange(0, BS)
        wanted = here[:, None] & (k < M)[None, :]
        place = tl.zeros([BT, BS], tl.int32) + (M + k)[None, :]
        raw = _logit(logits, token, place, n, splits, OUTPUTS, SPLITS) * factor[:, None]
        offset = tl.load(base + M + k, mask=k < M, other=0.0)
        made = 2.0 * _sigmoid(raw * tl.load(scale + 1) + offset[None, :])
        tl.store(post + (token * M)[:, None] + k[None, :], made, mask=wanted)
        jk = tl.arange(0, BS * BS)
        j, k = jk // BS, jk % BS
        cell = 2 * M + tl.where((j < M) & (k < M), j * M + k, OUTPUTS)
        place = tl.zeros([BT, BS * BS], tl.int32) + cell[None, :]
        raw = _logit(logits, token, place, n, splits, OUTPUTS, SPLITS) * factor[:, None]
        raw = raw * tl.load(scale + 2) + tl.load(base + cell, mask=cell < OUTPUTS, other=0.0)[None, :]
        raw = tl.reshape(tl.where((cell < OUTPUTS)[None, :], raw, float("-inf")), [BT, BS, BS])
        present = tl.reshape(tl.zeros([BT, BS * BS], tl.int32) + (cell < OUTPUTS).to(tl.int32)[None, :], [BT, BS, BS])
        # softmax over k, then columns, then rows and columns in turn
        most = tl.max(raw, 2)
        share = tl.exp(raw - tl.where(most == float("-inf"), 0.0, most)[:, :, None])
        total = tl.sum(share, 2)
        matrix = share / tl.where(total == 0.0, 1.0, total)[:, :, None] + eps
        matrix = tl.where(present == 1, matrix, 0.0)
        matrix = matrix / (tl.sum(matrix, 1) + eps)[:, None, :]
        for _ in range(ITERATIONS - 1):
            matrix = matrix / (tl.sum(matrix, 2) + eps)[:, :, None]
            matrix = matrix / (tl.sum(matrix, 1) + eps)[:, None, :]
        to = combination + (token * (M * M))[:, None] + (j * M + k)[None, :]
        tl.store(to, tl.reshape(matrix, [BT, BS * BS]), mask=here[:, None] & (cell < OUTPUTS)[None, :])
    d = tl.arange(0, BD)
    inside = here[:, None] & (d < D)[None, :]
    y = tl.zeros([BT, BD], tl.float32)
    for i in tl.static_range(M):
        at = logits + ((s * n)[None, :] + token[:, None]) * OUTPUTS + i
        raw = tl.sum(tl.load(at, mask=known, other=0.0), 1) * factor
        pre = _sigmoid(raw * tl.load(scale) + tl.load(base + i)) + eps
        y += pre[:, None] * tl.load(streams + ((token * M + i) * D)[:, None] + d[None, :], mask=inside, other=0.0)
    y = y * tl.rsqrt(tl.sum(y * y, 1) / D + norm_eps)[:, None] * tl.load(norm + d, mask=d < D, other=0.0)[None, :]
    tl.store(x + (token * D)[:, None] + d[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["n"])
def merge_kernel(
    streams, y, post, combination, out, n,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """out_k = post_k y + sum over j of combination[j, k] streams_j: the sum runs over the FIRST index."""
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    here = token < n
    inside = here[:, None] & (d < D)[None, :]
    added = tl.load(y + (token * D)[:, None] + d[None, :], mask=inside, other=0.0)
    for k in tl.static_range(M):
        total = tl.load(post + token * M + k, mask=here, other=0.0)[:, None] * added
        for j in tl.static_range(M):
            share = tl.load(combination + (token * M + j) * M + k, mask=here, other=0.0)
            total += share[:, None] * tl.load(
                streams + ((token * M + j) * D)[:, None] + d[None, :], mask=inside, other=0.0
            )
        tl.store(out + ((token * M + k) * D)[:, None] + d[None, :], total, mask=inside)


def hc_mix(
    streams: Tensor,
    fn: Weight,
    base: Weight,
    scale: Weight,
    norm: Weight,
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    n, m, _ = streams.shape
    post, combination = torch.empty(n, m, device=streams.device), torch.empty(n, m, m, device=streams.device)
    x = _mapped(streams, fn, base, scale, norm, norm_eps, eps, iterations, post, combination)
    return x, post, combination


def hc_collapse(
    streams: Tensor, fn: Weight, base: Weight, scale: Weight, norm: Weight, *, norm_eps: float, eps: float
) -> Tensor:
    return _mapped(streams, fn, base, scale, norm, norm_eps, eps, 0, streams, streams)


def _mapped(
    streams: Tensor,
    fn: Weight,
    base: Weight,
    scale: Weight,
    norm: Weight,
    norm_eps: float,
    eps: float,
    iterations: int,
    post: Tensor,
    combination: Tensor,
) -> Tensor:
    """The sub-layer's input; with iterations, post and combination are filled, else they are not touched."""
    streams, (n, m, d) = streams.contiguous(), streams.shape
    outputs, num_scales = ((2 + m) * m, 3) if iterations else (m, 1)
    x = torch.empty(n, d, device=streams.device)
    if n == 0:
        return x
    tall = min(triton.next_power_of_2(n), 256) if INTERPRET.value else 16
    depth = 512 if INTERPRET.value else 128
    groups = triton.cdiv(n, max(tall, 16))
    splits = 2 if INTERPRET.value else _splits(groups, triton.cdiv(m * d, 2 * depth))
    per_split = triton.cdiv(triton.cdiv(m * d, splits), depth) * depth
    logits = torch.empty(splits, n, outputs, device=streams.device)
    squares = torch.empty(splits, n, device=streams.device)
    project_kernel[groups, splits](
        streams, vector(fn, (outputs, m * d)), logits, squares, n,
        per_split, m * d, outputs, max(triton.next_power_of_2(outputs), 16), max(tall, 16), depth,
    )  # fmt: skip
    tokens = min(triton.next_power_of_2(n), 64) if INTERPRET.value else 1
    wide = triton.next_power_of_2(d)
    finish_kernel[(triton.cdiv(n, tokens),)](
        streams, logits, squares, vector(scale, (num_scales,)), vector(base, (outputs,)), vector(norm, (d,)),
        x, post, combination, n, splits, norm_eps, eps,
        m, triton.next_power_of_2(m), d, wide, tokens, outputs, triton.next_power_of_2(splits), iterations,
        num_warps=8 if wide > 2048 else 4,
    )  # fmt: skip
    return x


def _splits(groups: int, most: int) -> int:
    """Parts of the sum, a power of two: their size is compiled in, and chunks come in all lengths."""
    wanted = max(1, min(_MOST_SPLITS // groups, most))
    return 1 << (wanted.bit_length() - 1)


def hc_merge(streams: Tensor, y: Tensor, post: Tensor, combination: Tensor) -> Tensor:
    n, m, d = streams.shape
    if y.shape != (n, d) or post.shape != (n, m) or combination.shape != (n, m, m):
        raise ValueError(f"streams {tuple(streams.shape)}: y, post or combination has another shape")
    streams, y, post, combination = (t.contiguous() for t in (streams, y, post, combination))
    out = torch.empty_like(streams)
    if n:
        tokens = min(triton.next_power_of_2(n), 64) if INTERPRET.value else 1
        wide = triton.next_power_of_2(d) if INTERPRET.value else min(triton.next_power_of_2(d), 1024)
        merge_kernel[triton.cdiv(n, tokens), triton.cdiv(d, wide)](
            streams, y, post, combination, out, n, m, d, wide, tokens
        )
    return out
