"""Hyper-connections: the learned mapping with Sinkhorn in two launches, the merge in one, or within the next mapping.

The mapping's logits are a product of few outputs with a long sum, so the sum is split over programs; the second launch
adds the parts, makes the mapping of them, and the sub-layer's normed input. Knows nothing of sub-layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.ops import Weight
from tenfold.ops.triton.lowp import INTERPRET, mm_f32
from tenfold.ops.triton.rows import vector

__all__ = ["hc_collapse", "hc_merge", "hc_merge_mix", "hc_mix"]

_MOST_SPLITS = 64


@triton.jit(do_not_specialize=["n"])
def project_kernel(
    streams, y, post, combination, merged, fn, logits, squares, n,
    TILES: tl.constexpr, M: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, OUTPUTS: tl.constexpr,
    BO: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A split's part of streams [n, M * D] fn^T to logits [splits, n, OUTPUTS], and of the sums of squares [splits, n].

    With PARTS the streams are first merged with y [n, PARTS, D] as by `merge_kernel`, and kept in `merged`.
    """
    split = tl.program_id(1)
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    o = tl.arange(0, BO)
    acc = tl.zeros([BM, BO], tl.float32)
    square = tl.zeros([BM], tl.float32)
    here = m < n
    EACH: tl.constexpr = (D + BK - 1) // BK  # tiles of a stream
    for tile in range(split * TILES, tl.minimum((split + 1) * TILES, M * EACH)):
        s = tile // EACH
        d = tile % EACH * BK + tl.arange(0, BK)
        inside = here[:, None] & (d < D)[None, :]
        if PARTS > 0:
            x = _merged(streams, y, post, combination, m, s, d, here, inside, M, D, PARTS)
            tl.store(merged + ((m * M + s) * D)[:, None] + d[None, :], x, mask=inside)
        else:
            x = tl.load(streams + ((m * M + s) * D)[:, None] + d[None, :], mask=inside, other=0.0)
        known = (o < OUTPUTS)[:, None] & (d < D)[None, :]
        w = tl.load(fn + o[:, None] * (M * D) + s * D + d[None, :], mask=known, other=0.0)
        acc = mm_f32(x, tl.trans(w), acc)
        square += tl.sum(x * x, 1)
    to = logits + ((split * n + m) * OUTPUTS)[:, None] + o[None, :]
    tl.store(to, acc, mask=(m < n)[:, None] & (o < OUTPUTS)[None, :])
    tl.store(squares + split * n + m, square, mask=m < n)


@triton.jit
def _added(y, token, d, inside, D: tl.constexpr, PARTS: tl.constexpr):
    """The sum over y [n, PARTS, D]."""
    total = tl.load(y + (token * PARTS * D)[:, None] + d[None, :], mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(y + ((token * PARTS + part) * D)[:, None] + d[None, :], mask=inside, other=0.0)
    return total


@triton.jit
def _merged(
    streams, y, post, combination, token, k, d, here, inside, M: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr
):
    """Channels of stream k: post_k y + sum over j of combination[j, k] streams_j: the sum runs over the FIRST index."""
    total = tl.load(post + token * M + k, mask=here, other=0.0)[:, None] * _added(y, token, d, inside, D, PARTS)
    for j in tl.static_range(M):
        share = tl.load(combination + (token * M + j) * M + k, mask=here, other=0.0)
        one = tl.load(streams + ((token * M + j) * D)[:, None] + d[None, :], mask=inside, other=0.0)
        total += share[:, None] * one
    return total


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
    M: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Streams as `_merged` makes them of y [n, PARTS, D]."""
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    here = token < n
    inside = here[:, None] & (d < D)[None, :]
    for k in tl.static_range(M):
        total = _merged(streams, y, post, combination, token, k, d, here, inside, M, D, PARTS)
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


def hc_merge_mix(
    streams: Tensor,
    y: Tensor,
    post: Tensor,
    combination: Tensor,
    fn: Weight,
    base: Weight,
    scale: Weight,
    norm: Weight,
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`hc_merge`, then `hc_mix` of what it made: the streams, and what `hc_mix` gives."""
    last = _Last(*_checked(streams, y, post, combination))
    post, combination = torch.empty_like(last.post), torch.empty_like(last.combination)
    x = _mapped(last.streams, fn, base, scale, norm, norm_eps, eps, iterations, post, combination, last)
    return last.merged, x, post, combination


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
    last: _Last | None = None,
) -> Tensor:
    """The sub-layer's input; with iterations, post and combination are filled, else they are not touched.

    With `last` the streams are merged with a sub-layer's output first.
    """
    streams, (n, m, d) = streams.contiguous(), streams.shape
    outputs, num_scales = ((2 + m) * m, 3) if iterations else (m, 1)
    x = torch.empty(n, d, device=streams.device)
    if n == 0:
        return x
    tall = min(triton.next_power_of_2(n), 256) if INTERPRET.value else 16
    deepest = 512 if INTERPRET.value else 128 if last is None else 64  # what is merged takes registers
    depth = min(max(triton.next_power_of_2(d), 16), deepest)
    groups, tiles = triton.cdiv(n, max(tall, 16)), m * triton.cdiv(d, depth)
    splits = 2 if INTERPRET.value else _splits(groups, triton.cdiv(tiles, 2))
    logits = torch.empty(splits, n, outputs, device=streams.device)
    squares = torch.empty(splits, n, device=streams.device)
    given = (streams,) * 5 if last is None else (streams, last.y, last.post, last.combination, last.merged)
    parts, each = 0 if last is None else last.parts, triton.cdiv(tiles, splits)
    project_kernel[groups, splits](
        *given, vector(fn, (outputs, m * d)), logits, squares, n,
        each, m, d, parts, outputs, max(triton.next_power_of_2(outputs), 16), max(tall, 16), depth,
        num_warps=8 if parts else 4,
        num_stages=1 if parts else 3,  # all that is merged, fetched ahead, would fill shared memory
    )  # fmt: skip
    if last is not None:
        streams = last.merged
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
    """y [n, d], or [n, parts, d], which are added up."""
    last = _Last(*_checked(streams, y, post, combination))
    (n, m, d), out = last.streams.shape, last.merged
    if n:
        tokens = min(triton.next_power_of_2(n), 64) if INTERPRET.value else 1
        wide = triton.next_power_of_2(d) if INTERPRET.value else min(triton.next_power_of_2(d), 1024)
        merge_kernel[triton.cdiv(n, tokens), triton.cdiv(d, wide)](
            last.streams, last.y, last.post, last.combination, out, n, m, d, last.parts, wide, tokens
        )
    return out


class _Last:
    """A sub-layer's output that is to be merged, and where to."""

    def __init__(self, streams: Tensor, y: Tensor, post: Tensor, combination: Tensor) -> None:
        self.streams, self.y, self.post, self.combination = streams, y, post, combination
        self.parts = y.shape[1] if y.dim() == 3 else 1
        self.merged = torch.empty_like(streams)


def _checked(streams: Tensor, y: Tensor, post: Tensor, combination: Tensor) -> tuple[Tensor, ...]:
    n, m, d = streams.shape
    fits = y.shape in ((n, d), (n, y.shape[1], d))
    if not fits or post.shape != (n, m) or combination.shape != (n, m, m):
        raise ValueError(f"streams {tuple(streams.shape)}: y, post or combination has another shape")
    return tuple(tensor.contiguous() for tensor in (streams, y, post, combination))
