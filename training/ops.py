"""Operations for training: what `ops/reference.py` computes, differentiable and fast in bfloat16 on a CPU.

Weights arrive dense (format F32), the experts of a layer stacked in one tensor. Knows nothing of layers and of
how weights are quantised. Under float32 every result equals the reference up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tenfold.formats import RowLayout
from tenfold.ops import Experts, Weight, reference

__all__ = ["TILE", "TrainingOps", "attend", "head_loss", "rope_tables", "stored_rows"]

TILE = 128  # queries of an attention tile; also the width of the sliding window


class TrainingOps:
    """The operations `Block` and `MoE` call, on activations of `dtype`; `compiled` fuses the element-wise ones."""

    def __init__(self, dtype: torch.dtype, compiled: bool) -> None:
        self.dtype = dtype
        self._norm = _maybe_compiled(_rms_norm, compiled)
        self._mix = _maybe_compiled(_hc_mix, compiled)
        self._merge = _maybe_compiled(_hc_merge, compiled)
        self._gate = _maybe_compiled(_gated, compiled)
        self.norm_rope = _maybe_compiled(_norm_rope, compiled)
        self.rotate = _maybe_compiled(_rotate_tail, compiled)
        self.pool = _maybe_compiled(_pool, compiled)

    def dequantize(self, weight: Weight) -> Tensor:
        return weight.data

    def prepare(self, weight: Weight, resident: bool) -> Weight:
        return weight

    def embed(self, ids: Tensor, weight: Weight) -> Tensor:
        return functional.embedding(ids, weight.data).float()

    def look_up(self, ids: Tensor, table: Weight) -> Tensor:
        return functional.embedding(ids, table.data)

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        return functional.linear(x.to(self.dtype), weight.data.to(self.dtype))

    def grouped_linear(self, x: Tensor, weight: Weight) -> Tensor:
        groups, width = x.shape[1:]
        dense = weight.data.to(self.dtype).view(groups, -1, width)
        return torch.bmm(x.to(self.dtype).transpose(0, 1), dense.mT).transpose(0, 1).flatten(1)

    def rms_norm(self, x: Tensor, weight: Weight | None, eps: float) -> Tensor:
        scale = x.new_ones(x.shape[-1]) if weight is None else weight.data
        normed: Tensor = self._norm(x, scale, eps, self.dtype)
        return normed

    def hc_mix(
        self,
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
        x, post, raw = self._mix(streams, fn.data, base.data, scale.data, norm_eps, eps)
        # not compiled: twenty rounds on few numbers, quick as they are and slow to compile
        combination = _sinkhorn(raw, eps, iterations).flatten(0, 1).t().reshape(-1, *raw.shape[:2])
        return self.rms_norm(x, norm, norm_eps), post, combination

    def hc_merge(self, streams: Tensor, y: Tensor, post: Tensor, combination: Tensor) -> Tensor:
        merged: Tensor = self._merge(streams, y, post, combination)
        return merged

    def hc_collapse(
        self, streams: Tensor, fn: Weight, base: Weight, scale: Weight, norm: Weight, *, norm_eps: float, eps: float
    ) -> Tensor:
        return reference.hc_collapse(streams.float(), fn, base, scale, norm, norm_eps=norm_eps, eps=eps).to(self.dtype)

    def route(self, x: Tensor, gate: Weight, **options: Any) -> tuple[Tensor, Tensor]:
        return reference.route(x.float(), gate, **options)

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        bank: Experts,
        *,
        limit: float | None,
        weigh_first: bool,
        shared: Experts | None = None,
    ) -> Tensor:
        """Every pair of token and expert once, in the order of the experts.

        Weighing before the last projection, as V4 does, or behind it, as V3.2 does, is the same without rounding.
        """
        w1, w2, w3 = (stack[0].data.to(self.dtype) for stack in (bank.w1, bank.w2, bank.w3))
        pairs = ids.flatten()
        order = pairs.argsort()
        places = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0]))
        stops = torch.bincount(pairs, minlength=w1.shape[0]).cumsum(0).tolist()
        mine = _Dispatch.apply(x, order, places)  # type: ignore[no-untyped-call]
        gate, up = (_GroupedLinear.apply(mine, w, stops) for w in (w1, w3))  # type: ignore[no-untyped-call]
        inner = self._gate(gate, up, weights.flatten()[order], limit)
        y = _GroupedLinear.apply(inner, w2, stops)  # type: ignore[no-untyped-call]
        combined: Tensor = _Combine.apply(y, order, places, ids.shape[1])  # type: ignore[no-untyped-call]
        if shared is None:
            return combined
        return combined + self.feed_forward(x, shared.w1[0], shared.w2[0], shared.w3[0], limit)

    def feed_forward(self, x: Tensor, w1: Weight, w2: Weight, w3: Weight, limit: float | None) -> Tensor:
        ones = torch.ones(x.shape[0])
        return self.linear(self._gate(self.linear(x, w1), self.linear(x, w3), ones, limit), w2)


def _maybe_compiled(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False) if compiled else function


# ------------------------------------------------------------------------------------------ element-wise parts


def _rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)


def rope_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [...]: [..., dim / 2] each."""
    angles = positions.float()[..., None] * frequencies
    return angles.cos(), angles.sin()


def _rotate_tail(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [sequences, length, heads, width], the last channels turned in pairs; cos and sin [.., length, 1, dim / 2]."""
    plain = x.shape[-1] - 2 * cos.shape[-1]
    even, odd = x[..., plain::2].float(), x[..., plain + 1 :: 2].float()
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([x[..., :plain], turned.to(x.dtype)], -1)


def _norm_rope(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotate_tail(_rms_norm(x, weight, eps, x.dtype), cos, sin)


def _pool(values: Tensor, gates: Tensor, ape: Tensor, overlap: bool) -> Tensor:
    """Entries [sequences, groups, dim] of values and gates [sequences, groups, ratio, width] (spec 2.4)."""
    dtype = values.dtype
    values, gates = values.float(), gates.float() + ape
    if overlap:
        values, gates = _with_predecessor(values, 0.0), _with_predecessor(gates, -torch.inf)
    return (gates.softmax(2) * values).sum(2).to(dtype)


def _with_predecessor(groups: Tensor, absent: float) -> Tensor:
    """Each group's second half of channels behind its predecessor's first half."""
    dim = groups.shape[3] // 2
    before = functional.pad(groups[:, :-1, :, :dim], (0, 0, 0, 0, 1, 0), value=absent)
    return torch.cat([before, groups[..., dim:]], 2)


def _hc_mix(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sub-layer's input, `post`, and what Sinkhorn makes the combination of: [m, m, n]."""
    m = streams.shape[1]
    flat = streams.flatten(1)
    factor = torch.rsqrt(flat.float().square().mean(-1, keepdim=True) + norm_eps)
    mixed = (flat @ fn.to(flat.dtype).t()).float() * factor
    pre = torch.sigmoid(mixed[:, :m] * scale[0] + base[:m]) + eps
    post = 2.0 * torch.sigmoid(mixed[:, m : 2 * m] * scale[1] + base[m : 2 * m])
    raw = (mixed[:, 2 * m :] * scale[2] + base[2 * m :]).t().reshape(m, m, -1)
    x = pre[:, 0, None] * streams[:, 0]
    for j in range(1, m):
        x = x + pre[:, j, None] * streams[:, j]
    return x, post, raw


def _sinkhorn(raw: Tensor, eps: float, iterations: int) -> Tensor:
    """`reference`'s, with the tokens in the last dimension, where they fill vector registers: [m, m, n]."""
    matrix = raw.softmax(1) + eps
    matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
    return matrix


def _hc_merge(streams: Tensor, y: Tensor, post: Tensor, combination: Tensor) -> Tensor:
    m = streams.shape[1]
    rows = [post[:, k, None] * y + sum(combination[:, j, k, None] * streams[:, j] for j in range(m)) for k in range(m)]
    return torch.stack(rows, 1).to(streams.dtype)


def _gated(gate: Tensor, up: Tensor, weight: Tensor, limit: float | None) -> Tensor:
    gate, up, dtype = gate.float(), up.float(), gate.dtype
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    wide = functional.silu(gate) * up
    return (wide * weight[:, None]).to(dtype)


# ------------------------------------------------------------------------------------------------ experts


class _Dispatch(torch.autograd.Function):
    """Rows of tokens -> rows of (token, expert) pairs in the order of the experts, and back as a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.num_tokens = x.shape[0]
        ctx.save_for_backward(places)
        return x[order // (order.shape[0] // x.shape[0])]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grad[places].view(ctx.num_tokens, -1, grad.shape[1]).sum(1), None, None


class _Combine(torch.autograd.Function):
    """The reverse of `_Dispatch`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, places: Tensor, topk: int) -> Tensor:
        ctx.topk = topk
        ctx.save_for_backward(order)
        return y[places].view(-1, topk, y.shape[1]).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grad[order // ctx.topk], None, None, None


class _GroupedLinear(torch.autograd.Function):
    """Rows up to stops[e] times the transpose of weight[e]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stops: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stops = stops
        out = x.new_empty(x.shape[0], weight.shape[1])
        for expert, rows in _groups(stops):
            torch.mm(x[rows], weight[expert].t(), out=out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        for expert, rows in _groups(ctx.stops):
            torch.mm(grad[rows], weight[expert], out=grad_x[rows])
            torch.mm(grad[rows].t(), x[rows], out=grad_weight[expert])
        return grad_x, grad_weight, None


def _groups(stops: list[int]) -> list[tuple[int, slice]]:
    starts = [0, *stops[:-1]]
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(starts, stops, strict=True)) if b > a]


# ------------------------------------------------------------------------------------------------ attention


def stored_rows(x: Tensor, layout: RowLayout) -> Tensor:
    """x as the streams would keep it; the gradient passes as if nothing had been rounded."""
    with torch.no_grad():
        kept = reference.unpack_rows(reference.pack_rows(x.float(), layout), layout).to(x.dtype)
    return x + (kept - x).detach()


class _Attend(torch.autograd.Function):
    """One softmax over window, entries and sink, a tile of queries at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        rows: Tensor,
        entries: Tensor,
        sink: Tensor,
        chosen: Tensor | None,
        ratio: int,
        scale: float,
        with_shares: bool,
        leaps: Tensor | None,
        copies: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, kept = torch.empty_like(q), []
        shares = q.new_zeros(q.shape[0], q.shape[1], entries.shape[1] if with_shares else 0)
        for first in range(0, q.shape[1], TILE):
            keys, split, count = _tile_keys(rows, entries, first, ratio)
            bias = _tile_bias(sink.to(q.dtype), first, split, count, ratio, chosen, leaps, copies, q.shape[0])
            tile = q[:, first : first + TILE].flatten(1, 2) * scale
            p = torch.baddbmm(bias, tile, keys.mT).softmax(-1)
            out[:, first : first + TILE] = torch.bmm(p, keys).view(q.shape[0], TILE, *q.shape[2:])
            if with_shares:
                among = p[:, :, split : split + count].view(q.shape[0], TILE, q.shape[2], count)
                shares[:, first : first + TILE, :count] = among.sum(2)
            kept.append(p)
        ctx.save_for_backward(q, rows, entries, *kept)
        ctx.ratio, ctx.scale = ratio, scale
        ctx.mark_non_differentiable(shares)
        return out, shares

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, rows, entries, *kept = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        grad_rows = torch.zeros_like(rows, dtype=torch.float32)
        grad_entries = torch.zeros_like(entries, dtype=torch.float32)
        grad_sink = torch.zeros(q.shape[2])
        for p, first in zip(kept, range(0, q.shape[1], TILE), strict=True):
            keys, split, count = _tile_keys(rows, entries, first, ctx.ratio)
            mine = grad[:, first : first + TILE].flatten(1, 2)
            raw = torch._softmax_backward_data(torch.bmm(mine, keys.mT), p, -1, q.dtype)
            tile = q[:, first : first + TILE].flatten(1, 2) * ctx.scale
            grad_q[:, first : first + TILE] = torch.bmm(raw, keys).view_as(q[:, :TILE]) * ctx.scale
            grad_keys = torch.bmm(raw.mT, tile) + torch.bmm(p.mT, mine)
            grad_rows[:, first + TILE - split : first + TILE] += grad_keys[:, :split]
            grad_entries[:, :count] += grad_keys[:, split : split + count]
            grad_sink += raw[:, :, -1].float().view(-1, q.shape[2]).sum(0)
        return grad_q, grad_rows.to(q.dtype), grad_entries.to(q.dtype), grad_sink, None, None, None, None, None, None


def attend(
    q: Tensor,
    rows: Tensor,
    entries: Tensor,
    sink: Tensor,
    chosen: Tensor | None,
    ratio: int,
    scale: float,
    with_shares: bool,
    leaps: Tensor | None = None,
    copies: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, S, heads, width] over the window of rows [B, S, width] and the visible entries [B, E, width].

    `chosen` bool [B, S, E] restricts the entries. Also returns each entry's share of the attention summed over
    the heads [B, S, E] if asked, without gradient. S is a multiple of `TILE`, which is the window. `leaps` bool
    [B, S / TILE]: the positions of this tile do not follow those of the one before, which is out of its window.
    `copies` [B]: each entry counts as so many.
    """
    result: tuple[Tensor, Tensor] = _Attend.apply(  # type: ignore[no-untyped-call]
        q, rows, entries, sink, chosen, ratio, scale, with_shares, leaps, copies
    )
    return result


def _tile_keys(rows: Tensor, entries: Tensor, first: int, ratio: int) -> tuple[Tensor, int, int]:
    """Window rows, visible entries and a row of zeros for the sink; how many of the first two."""
    window = rows[:, max(first - TILE, 0) : first + TILE]
    count = min((first + TILE) // ratio, entries.shape[1]) if ratio else 0
    keys = torch.cat([window, entries[:, :count], torch.zeros_like(window[:, :1])], 1)
    return keys, window.shape[1], count


def _tile_bias(
    sink: Tensor,
    first: int,
    split: int,
    count: int,
    ratio: int,
    chosen: Tensor | None,
    leaps: Tensor | None,
    copies: Tensor | None,
    sequences: int,
) -> Tensor:
    """0 where a query sees a row, -inf where not, the sink's own score in the last column."""
    heads = sink.shape[0]
    window = _window_bias(split, sink.dtype).expand(sequences, -1, -1)
    if leaps is not None and split > TILE and leaps[:, first // TILE].any():
        window = window.clone()
        window[leaps[:, first // TILE], :, : split - TILE] = -torch.inf
    seen = [window]
    if count:
        if chosen is None:
            visible = (torch.arange(first, first + TILE) + 1) // ratio
            hidden = (torch.arange(count) >= visible[:, None]).expand(sequences, -1, -1)
        else:
            hidden = ~chosen[:, first : first + TILE, :count]
        weight = torch.zeros(hidden.shape, dtype=sink.dtype)
        if copies is not None:
            weight += copies.log()[:, None, None]
        seen.append(weight.masked_fill_(hidden, -torch.inf))
    shared = torch.cat(seen, -1)[:, :, None].expand(-1, -1, heads, -1)
    own = sink[None, None, :, None].expand(sequences, TILE, -1, -1)
    return torch.cat([shared, own], -1).flatten(1, 2)


@cache
def _window_bias(split: int, dtype: torch.dtype) -> Tensor:
    query = torch.arange(TILE)[:, None] + split - TILE
    row = torch.arange(split)
    seen = (row <= query) & (row > query - TILE)
    return torch.zeros(TILE, split, dtype=dtype).masked_fill_(~seen, -torch.inf)


# ------------------------------------------------------------------------------------------------ loss


class _HeadLoss(torch.autograd.Function):
    """Cross entropy of the head's logits, its gradients computed at once in blocks that stay in the cache."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        grad_x, grad_head = torch.empty_like(x), torch.zeros(head.shape)
        losses = torch.empty(x.shape[0])
        for rows in torch.arange(x.shape[0]).split(512):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            logits = (x[part] @ head.t()).float()
            picked = targets[part, None]
            total = logits.logsumexp(-1, keepdim=True)
            losses[part] = (total - logits.gather(1, picked))[:, 0]
            share = logits.sub_(total).exp_()
            share.scatter_add_(1, picked, torch.full(picked.shape, -1.0))
            share = (share * weights[part, None]).to(x.dtype)
            grad_x[part] = share @ head
            grad_head += share.t() @ x[part]
        ctx.save_for_backward(grad_x, grad_head.to(head.dtype))
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_head = ctx.saved_tensors
        return grad_x * grad, grad_head * grad, None, None


def head_loss(x: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats of x [n, hidden] against token ids [n], and the loss of each, without gradient.

    The former is the mean, or the sum under `weights` [n].
    """
    if weights is None:
        weights = torch.full(targets.shape, 1.0 / x.shape[0])
    result: tuple[Tensor, Tensor] = _HeadLoss.apply(x, head, targets, weights)  # type: ignore[no-untyped-call]
    return result
