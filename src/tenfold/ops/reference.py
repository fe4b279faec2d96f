"""The law: every operation in plain torch, float32, readable. Knows nothing of layers, sessions or speed.

Other backends are compared with these functions. A row's result does not depend on the rows computed with it, to
the last bit, so any chunking of a prompt gives the same result. Three habits see to that: matrix products run on
tiles of `_TILE_ROWS` rows (how libraries split the product of all rows depends on their number), sums over gathered
rows go in blocks of `_BLOCK_ROWS`, and sigmoid, SiLU and softplus are spelt out, since torch's own round differently
at the end of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tenfold.formats import BF16, E2M1_VALUES, F32, FP8_BLOCK, FP8_BLOCK_F32, I64, MXFP4, RowLayout
from tenfold.ops import Experts, Rows, Stack, Weight

_TILE_ROWS = 16  # fewer, and MKL's order of summation depends on where in the tile a row lies
_KEY_ALIGN = 16  # a score must not depend on how many keys are scored with it
_TILE_NUMBERS = 1 << 24  # float32 numbers of scratch a tile may take: 64 MiB
_BLOCK_ROWS = 64
_E4M3_MAX = 448.0
_E2M1_MAX = 6.0
_E4M3_FLOOR = 1e-4
_E2M1_FLOOR = 6.0 * 2.0**-126


# ---------------------------------------------------------------------------------------------- weights


def prepare(weight: Weight, resident: bool) -> Weight:
    """Unpacked to float32 once if it may stay in memory, else as it is stored."""
    if not resident or weight.format in (F32, I64):
        return weight
    return Weight(weight.name, weight.shape, F32, dequantize(weight))


def dequantize(weight: Weight) -> Tensor:
    """The weight as float32 of its logical shape (spec 3.1)."""
    if weight.format in (F32, BF16):
        return weight.data.float()
    if weight.format is MXFP4:
        return _dequantize_mxfp4(weight)
    assert weight.format in (FP8_BLOCK, FP8_BLOCK_F32), weight.format
    values = weight.data.view(torch.float8_e4m3fn).float()
    rows, columns = weight.shape
    scale = _scales(weight).repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return values * scale


def _dequantize_mxfp4(weight: Weight) -> Tensor:
    rows, columns = weight.shape
    values = _e2m1_pairs()[weight.data.view(torch.uint8).long()].view(rows, columns // 32, 32)
    return (values * _scales(weight)[:, :, None]).view(rows, columns)


def _scales(weight: Weight) -> Tensor:
    assert weight.scale is not None, weight.name
    return weight.scale if weight.scale.dtype == torch.float32 else _e8m0_values()[weight.scale.long()]


@cache
def _e8m0_values() -> Tensor:
    """Byte b means 2^(b - 127); 255 is NaN."""
    return torch.tensor([2.0 ** (b - 127) for b in range(255)] + [float("nan")])


@cache
def _e2m1_values() -> Tensor:
    return torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])


@cache
def _e2m1_pairs() -> Tensor:
    """The two numbers of each byte, low nibble first: [256, 2]."""
    codes = torch.arange(256)
    return torch.stack([_e2m1_values()[codes & 15], _e2m1_values()[codes >> 4]], dim=1)


def _matmul(x: Tensor, dense: Tensor) -> Tensor:
    """x [n, in] times dense [out, in] transposed -> [n, out]."""
    n = x.shape[0]
    tiles = functional.pad(x, (0, 0, 0, -n % _TILE_ROWS)).view(-1, _TILE_ROWS, x.shape[1])
    return _batched_matmul(tiles, dense.t().expand(len(tiles), -1, -1)).flatten(0, 1)[:n]


def _batched_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [n, i, j] times b [n, j, k]; a batch of one would take another path, with another order of summation."""
    return torch.bmm(a.expand(2, -1, -1), b.expand(2, -1, -1))[:1] if a.shape[0] == 1 else torch.bmm(a, b)


def _sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + (-x).exp())


def _silu(x: Tensor) -> Tensor:
    return x / (1.0 + (-x).exp())


def _softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0.0) + (-x.abs()).exp().log1p()


# ---------------------------------------------------------------------------------------------- linear parts


def embed(ids: Tensor, weight: Weight) -> Tensor:
    return weight.data[ids].float()


def look_up(ids: Tensor, table: Weight) -> Tensor:
    return table.data[ids]


def linear(x: Tensor, weight: Weight) -> Tensor:
    return _matmul(x, dequantize(weight))


def linear_each(x: Tensor, stack: Stack) -> tuple[Tensor, ...]:
    return tuple(linear(x, weight) for weight in stack.weights)


def grouped_linear(x: Tensor, weight: Weight) -> Tensor:
    dense = dequantize(weight).view(x.shape[1], -1, x.shape[2])
    return torch.cat([_matmul(x[:, group], dense[group]) for group in range(x.shape[1])], dim=1)


def rms_norm(x: Tensor, weight: Weight | None, eps: float) -> Tensor:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * dequantize(weight)


def layer_norm(x: Tensor, weight: Weight, bias: Weight, eps: float) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], dequantize(weight), dequantize(bias), eps)


def rope(
    x: Tensor, positions: Tensor, frequencies: Tensor, *, inverse: bool = False, interleaved: bool = True
) -> Tensor:
    angles = positions.float()[:, None] * frequencies  # [n, dim / 2]
    angles = angles.view(x.shape[0], *[1] * (x.dim() - 2), frequencies.shape[0])
    cos, sin = angles.cos(), angles.sin() * (-1.0 if inverse else 1.0)
    if interleaved:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def norm_rope(x: Tensor, weight: Weight | None, eps: float, positions: Tensor, frequencies: Tensor) -> Tensor:
    return _tail_rotated(rms_norm(x, weight, eps), positions, frequencies)


def norm_rope_pack(
    x: Tensor,
    weight: Weight,
    eps: float,
    positions: Tensor,
    frequencies: Tensor,
    layout: RowLayout,
    spread: bool,
) -> Tensor:
    rows = norm_rope(x, weight, eps, positions, frequencies)
    return pack_rows(hadamard(rows) if spread else rows, layout)


def rope_round(x: Tensor, positions: Tensor, frequencies: Tensor, layout: RowLayout, spread: bool) -> Tensor:
    x = _tail_rotated(x, positions, frequencies)
    return unpack_rows(pack_rows(hadamard(x), layout), layout) if spread else x


def _tail_rotated(x: Tensor, positions: Tensor, frequencies: Tensor, inverse: bool = False) -> Tensor:
    """The last channels rotated, the others as they are."""
    head, tail = x.split([x.shape[-1] - 2 * frequencies.shape[0], 2 * frequencies.shape[0]], dim=-1)
    return torch.cat([head, rope(tail, positions, frequencies, inverse=inverse)], dim=-1)


def hadamard(x: Tensor) -> Tensor:
    width = x.shape[-1]
    return _matmul(x.reshape(-1, width), _hadamard_matrix(width)).view(x.shape)


@cache
def _hadamard_matrix(width: int) -> Tensor:
    """Sylvester's (natural) order, orthonormal; symmetric."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / math.sqrt(width)


# ---------------------------------------------------------------------------------------------- hyper-connections


def hc_embed(ids: Tensor, weight: Weight, copies: int) -> Tensor:
    return embed(ids, weight)[:, None, :].repeat(1, copies, 1)


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
    m = streams.shape[1]
    mixed, sigma, offset = _hc_project(streams, fn, norm_eps), dequantize(scale), dequantize(base)
    pre = _sigmoid(mixed[:, :m] * sigma[0] + offset[:m]) + eps
    post = 2.0 * _sigmoid(mixed[:, m : 2 * m] * sigma[1] + offset[m : 2 * m])
    raw = (mixed[:, 2 * m :] * sigma[2] + offset[2 * m :]).view(-1, m, m)
    x = rms_norm(_weighted_streams(pre, streams), norm, norm_eps)
    return x, post, _sinkhorn(raw, eps, iterations)


def _hc_project(streams: Tensor, fn: Weight, norm_eps: float) -> Tensor:
    """The dynamic part: flattened streams (stream-major) times fn, the norm's factor applied afterwards."""
    flat = streams.flatten(1)  # [n, m * d]
    return _matmul(flat, dequantize(fn)) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)


def _sinkhorn(raw: Tensor, eps: float, iterations: int) -> Tensor:
    """Alternating normalisation towards a doubly stochastic [n, m, m]: softmax and columns, then rows and columns."""
    matrix = raw.softmax(-1) + eps
    matrix = matrix / (matrix.sum(1, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(2, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(1, keepdim=True) + eps)
    return matrix


def _weighted_streams(weights: Tensor, streams: Tensor) -> Tensor:
    return (weights[:, :, None] * streams).sum(1)


def hc_merge(streams: Tensor, y: Tensor, post: Tensor, combination: Tensor) -> Tensor:
    # The sum runs over the FIRST index of the combination (trap 12 of the spec).
    mixed = _batched_matmul(combination.transpose(1, 2), streams)
    return post[:, :, None] * y[:, None, :] + mixed


def hc_collapse(
    streams: Tensor, fn: Weight, base: Weight, scale: Weight, norm: Weight, *, norm_eps: float, eps: float
) -> Tensor:
    mixed = _hc_project(streams, fn, norm_eps)
    pre = _sigmoid(mixed * dequantize(scale) + dequantize(base)) + eps
    return rms_norm(_weighted_streams(pre, streams), norm, norm_eps)


# ---------------------------------------------------------------------------------------------- compressor, rows


def compress(values: Tensor, gates: Tensor, overlap: bool) -> Tensor:
    if overlap:
        values, gates = _overlapping(values), _overlapping(gates)
    # torch's softmax over a middle dimension rounds by where its threads split the groups.
    share = (gates - gates.amax(1, keepdim=True)).exp()
    return (share * values).sum(1) / share.sum(1)


def _overlapping(groups: Tensor) -> Tensor:
    """Each group's second half of channels behind its predecessor's first half: [groups - 1, 2 ratio, dim]."""
    dim = groups.shape[2] // 2
    return torch.cat([groups[:-1, :, :dim], groups[1:, :, dim:]], dim=1)


def pack_rows(x: Tensor, layout: RowLayout) -> Tensor:
    if layout.code_bits == 32:
        return x.float().contiguous().view(torch.uint8)
    scales, scaled = _block_scaled(x[..., : layout.coded], layout)
    codes = _e4m3_codes(scaled) if layout.code_bits == 8 else _e2m1_packed(scaled)
    plain = x[..., layout.coded :].to(torch.bfloat16).contiguous().view(torch.uint8)
    parts = [codes, plain, scales] if layout.scales_last else [codes, scales, plain]
    used = sum(part.shape[-1] for part in parts)
    padding = codes.new_zeros(*codes.shape[:-1], layout.row_bytes - used)
    return torch.cat([*parts, padding], dim=-1)


def _block_scaled(x: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """Scale bytes [..., scales] and x divided by its block's scale, clamped to the format's range (spec 2.10)."""
    limit = _E4M3_MAX if layout.code_bits == 8 else _E2M1_MAX
    floor = _E4M3_FLOOR if layout.code_bits == 8 else _E2M1_FLOOR
    blocks = functional.pad(x, (0, layout.num_scales * layout.block - layout.coded))
    blocks = blocks.unflatten(-1, (layout.num_scales, layout.block))
    exponent = _scale_exponents(blocks.abs().amax(-1).clamp(min=floor), limit)
    scale = _e8m0_values()[exponent]
    scaled = (blocks / scale[..., None]).clamp(-limit, limit).flatten(-2)[..., : layout.coded]
    stored = exponent.to(torch.uint8) if layout.scale_bytes == 1 else scale.view(torch.uint8)
    return stored, scaled


def _scale_exponents(amax: Tensor, limit: float) -> Tensor:
    """ceil(log2(amax / limit)) + 127 from the float32 bits: the exponent, one more if any mantissa bit is set.

    NaN and infinity give 255, the scale that is NaN.
    """
    bits = (amax * torch.tensor(1.0 / limit, dtype=torch.float32)).view(torch.int32)
    return ((bits >> 23).long() + ((bits & 0x7FFFFF) != 0)).clamp(max=255)


def _e4m3_codes(scaled: Tensor) -> Tensor:
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def _e2m1_packed(scaled: Tensor) -> Tensor:
    codes = e2m1_codes(scaled)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def e2m1_codes(x: Tensor) -> Tensor:
    """Nearest e2m1 code of numbers within +-6, ties to the even code; uint8, one code a byte."""
    size = x.abs()
    code = torch.signbit(x).to(torch.uint8) << 3
    for tie, goes_up in (
        (0.25, False),
        (0.75, True),
        (1.25, False),
        (1.75, True),
        (2.5, False),
        (3.5, True),
        (5, False),
    ):
        code += size >= tie if goes_up else size > tie
    return code


def unpack_rows(packed: Tensor, layout: RowLayout) -> Tensor:
    if layout.code_bits == 32:
        return packed.contiguous().view(torch.float32)
    codes = packed[..., : layout.code_bytes].contiguous()
    values = codes.view(torch.float8_e4m3fn).float() if layout.code_bits == 8 else _e2m1_unpacked(codes)
    scale = _row_scales(packed, layout).repeat_interleave(layout.block, -1)[..., : layout.coded]
    if not layout.plain:
        return values * scale
    plain = packed[..., layout.plain_offset : layout.plain_offset + 2 * layout.plain].contiguous()
    return torch.cat([values * scale, plain.view(torch.bfloat16).float()], dim=-1)


def _e2m1_unpacked(codes: Tensor) -> Tensor:
    return _e2m1_pairs()[codes.long()].flatten(-2)


def _row_scales(packed: Tensor, layout: RowLayout) -> Tensor:
    stop = layout.scale_offset + layout.num_scales * layout.scale_bytes
    stored = packed[..., layout.scale_offset : stop].contiguous()
    return _e8m0_values()[stored.long()] if layout.scale_bytes == 1 else stored.view(torch.float32)


# ---------------------------------------------------------------------------------------------- index, attention


def select_rows(q: Tensor, weights: Tensor, keys: Tensor, layout: RowLayout, visible: Tensor, topk: int) -> Tensor:
    n, heads, _ = q.shape
    most = int(visible.max()) if n else 0
    width = min(topk, most)
    tile = max(1, _TILE_NUMBERS // max(most, heads * _BLOCK_ROWS))
    parts = [_best_rows(q[i : i + tile], weights[i : i + tile], keys, layout, visible[i : i + tile], width)
             for i in range(0, n, tile)]  # fmt: skip
    return torch.cat(parts) if parts else torch.empty(0, width, dtype=torch.int32)


def _best_rows(q: Tensor, weights: Tensor, keys: Tensor, layout: RowLayout, visible: Tensor, width: int) -> Tensor:
    """The selection of a few queries, whose scores over all rows are kept at once."""
    most = int(visible.max())
    if most <= width:  # all that is visible is selected: no scores are needed
        rows = torch.arange(width, dtype=torch.int32)
        return torch.where(rows < visible[:, None], rows, -1)
    scores = torch.empty(q.shape[0], most)
    step = max(_BLOCK_ROWS, _TILE_NUMBERS // (q.shape[0] * q.shape[1]))
    for first in range(0, most, step):
        dense = unpack_rows(keys[first : min(first + step, most)], layout)
        scores[:, first : first + step] = _index_scores(q, weights, dense)
    scores.masked_fill_(torch.arange(most) >= visible[:, None], -torch.inf)
    return _ascending(scores, visible, _largest(scores, width))


def _index_scores(q: Tensor, weights: Tensor, dense: Tensor) -> Tensor:
    """ReLU first, then the weight, then the sum over heads: [n, rows]."""
    n, heads, dim = q.shape
    num_rows = dense.shape[0]
    dense = functional.pad(dense, (0, 0, 0, -num_rows % _KEY_ALIGN))
    scores = _matmul(q.reshape(n * heads, dim), dense).view(n, heads, -1).relu_()
    return _batched_matmul(weights[:, None], scores)[:, 0, :num_rows]


def _largest(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, int64 [n, k] in any order; of equal ones the smaller column wins."""
    values, columns = scores.topk(k + 1, dim=1)
    tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
    if tied.numel():
        columns[tied, :k] = _top(scores[tied], k)
    return columns[:, :k]


def _ascending(scores: Tensor, visible: Tensor, columns: Tensor) -> Tensor:
    """The columns in order, int32; -1 at the end for those not visible."""
    none = scores.shape[1]
    rows = torch.where(columns < visible[:, None], columns, none).int().sort(1).values
    return torch.where(rows == none, -1, rows)


def sparse_attention(
    q: Tensor,
    sources: Sequence[Rows],
    sink: Weight | None,
    scale: float,
    value_dim: int,
    position: int,
    frequencies: Tensor | None = None,
) -> Tensor:
    n, heads, width = q.shape
    sinks = torch.full((heads,), -torch.inf) if sink is None else dequantize(sink)
    rows_each = max(sum(_num_columns(source) for source in sources), 1)
    tile = max(2, _TILE_NUMBERS // (rows_each * width))
    parts = []
    for first in range(0, n, tile):
        span = slice(first, min(first + tile, n))
        blocks = [block for source in sources for block in _gathered_blocks(source, span)]
        parts.append(_attend(q[span] * scale, blocks, sinks, value_dim))
    out = torch.cat(parts) if parts else q.new_empty(0, heads, value_dim)
    if frequencies is None:
        return out
    return _tail_rotated(out, torch.arange(position, position + n), frequencies, inverse=True)


def _num_columns(source: Rows) -> int:
    if source.index is not None:
        return source.index.shape[1]
    start, stop = source.bounds
    return int((stop - start).max()) if start.numel() else 0


def _gathered_blocks(source: Rows, span: slice) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows each query of the span sees, float32 [n, block, width], and where there is none [n, block]."""
    if source.index is not None:
        index = source.index[span].long()
        index = index[:, : int((index >= 0).sum(1).max())]
    else:
        start, stop = (bound[span] for bound in source.bounds)
        index = start[:, None] + torch.arange(int((stop - start).max()))
        index = torch.where(index < stop[:, None], index, -1)
    index = functional.pad(index, (0, -index.shape[1] % _BLOCK_ROWS), value=-1)
    needed, place = index.clamp(min=0).unique(return_inverse=True)
    if source.packed.shape[0] == 0:
        return
    dense = unpack_rows(source.packed[needed], source.layout)
    for first in range(0, index.shape[1], _BLOCK_ROWS):
        columns = slice(first, first + _BLOCK_ROWS)
        yield dense[place[:, columns]], index[:, columns] < 0


def _attend(q: Tensor, blocks: Sequence[tuple[Tensor, Tensor]], sinks: Tensor, value_dim: int) -> Tensor:
    """Softmax over all rows and the sink, which has a share but no value -> [n, heads, value_dim]."""
    scores = [
        _batched_matmul(q, rows.transpose(1, 2)).masked_fill_(hidden[:, None], -torch.inf) for rows, hidden in blocks
    ]
    top = sinks.expand(q.shape[:2])
    for block in scores:
        top = torch.maximum(top, block.amax(-1))
    total = (sinks - top).exp()
    values = torch.zeros(*q.shape[:2], value_dim)
    for block, (rows, _) in zip(scores, blocks, strict=True):
        share = block.sub_(top[:, :, None]).exp_()
        total = total + share.sum(-1)
        values += _batched_matmul(share, rows[..., :value_dim])
    return values / total[:, :, None]


# ---------------------------------------------------------------------------------------------- experts


def route(
    x: Tensor,
    gate: Weight,
    *,
    scoring: Literal["sqrtsoftplus", "sigmoid"],
    topk: int,
    scaling: float,
    bias: Weight | None = None,
    chosen: Tensor | None = None,
    groups: int = 1,
    topk_group: int = 1,
) -> tuple[Tensor, Tensor]:
    logits = linear(x, gate)
    scores = _softplus(logits).sqrt() if scoring == "sqrtsoftplus" else _sigmoid(logits)
    if chosen is None:
        choice = scores if bias is None else scores + dequantize(bias)
        chosen = _top(_within_groups(choice, groups, topk_group), topk)
    weights = scores.gather(1, chosen)
    return chosen, weights / weights.sum(1, keepdim=True) * scaling


def _top(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest; of equal ones the smaller column wins."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]


def _within_groups(choice: Tensor, groups: int, topk_group: int) -> Tensor:
    """-inf outside the best groups; a group counts its two best experts (spec 5.5)."""
    if groups == 1:
        return choice
    grouped: Tensor = choice.unflatten(1, (groups, -1))
    best = _top(grouped.topk(2, dim=2).values.sum(2), topk_group)
    dropped = torch.ones(choice.shape[0], groups, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(dropped[:, :, None], -torch.inf).view_as(choice)


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    bank: Experts,
    *,
    limit: float | None,
    weigh_first: bool,
    shared: Experts | None = None,
    breathe: Callable[[], None] | None = None,
) -> Tensor:
    total = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, place = (ids == expert).nonzero(as_tuple=True)
        weight = weights[token, place][:, None]
        inner = _gated(x[token], bank.w1[expert], bank.w3[expert], limit)
        y = linear(inner * weight if weigh_first else inner, bank.w2[expert])
        total.index_add_(0, token, y if weigh_first else y * weight)
        if breathe is not None:
            breathe()
    if shared is not None:
        total = total + feed_forward(x, shared.w1[0], shared.w2[0], shared.w3[0], limit)
    return total


def feed_forward(x: Tensor, w1: Weight, w2: Weight, w3: Weight, limit: float | None) -> Tensor:
    return linear(_gated(x, w1, w3, limit), w2)


def _gated(x: Tensor, w1: Weight, w3: Weight, limit: float | None) -> Tensor:
    """silu(w1 x) * w3 x; the gate is clamped from above only, the other factor on both sides (spec 2.7)."""
    gate, up = linear(x, w1), linear(x, w3)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return _silu(gate) * up
