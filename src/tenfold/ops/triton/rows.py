"""Channels of a row: norms, rotation, Hadamard, and rows packed as a session's memory holds them.

One kernel takes a few rows whole through the steps a caller wants, so a row is read and written once. Angles are
reduced in float64: at a million tokens the GPU's own sine of a float32 angle means nothing. Knows nothing of layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.formats import RowLayout
from tenfold.ops import Weight
from tenfold.ops.triton.lowp import (
    INTERPRET,
    e2m1,
    e2m1_code,
    e4m3,
    e4m3_code,
    e8m0,
    mm_split,
    pow2_ceil_scale,
    pow2_inverse,
    round_bf16,
    round_e4m3,
    to_bf16,
)

__all__ = [
    "cos_sin",
    "hadamard",
    "layer_norm",
    "norm_rope",
    "norm_rope_pack",
    "pack_rows",
    "rms_norm",
    "rope",
    "rope_round",
    "spread_rows",
    "turned_apart",
    "unpack_rows",
    "vector",
]

_NOTHING, _ROUND, _PACK = 0, 1, 2
"""What `turn_kernel` does with a row at the end, beside storing it."""


# ---------------------------------------------------------------------------------------------- kernels


@triton.jit
def cos_sin(angle):
    """Cosine and sine of f32 angles of any size, to about 1e-7: the quarter turn in float64, then polynomials."""
    wide = angle.to(tl.float64)
    quarter = tl.floor(wide * 0.6366197723675814 + 0.5)
    x = (wide - quarter * 1.5707963267948966).to(tl.float32)  # within +-pi/4
    turns = quarter.to(tl.int32) & 3
    xx = x * x
    sin = x + x * xx * (-1.6666654611e-1 + xx * (8.3321608736e-3 + xx * -1.9515295891e-4))
    cos = 1.0 - 0.5 * xx + xx * xx * (4.166664568298827e-2 + xx * (-1.388731625493765e-3 + xx * 2.443315711809948e-5))
    swapped = (turns & 1) == 1
    c, s = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return tl.where((turns == 1) | (turns == 2), -c, c), tl.where(turns >= 2, -s, s)


@triton.jit
def turned_apart(y, position, frequencies, ROWS: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr):
    """The first 2 * PAIRS channels of y [ROWS, WIDE] rotated, i with i + PAIRS; PAIRS is a power of two."""
    lane = tl.arange(0, WIDE // 2)
    angle = position.to(tl.float32) * tl.load(frequencies + lane, mask=lane < PAIRS, other=0.0)
    cos, sin = cos_sin(angle)  # 1 and 0 beyond
    cos, sin = cos[None, :], sin[None, :]
    both = tl.permute(tl.reshape(y, [ROWS, WIDE // (2 * PAIRS), 2, PAIRS]), (0, 1, 3, 2))
    first, second = tl.split(both)
    first, second = tl.reshape(first, [ROWS, WIDE // 2]), tl.reshape(second, [ROWS, WIDE // 2])
    both = tl.join(first * cos - second * sin, first * sin + second * cos)
    both = tl.permute(tl.reshape(both, [ROWS, WIDE // (2 * PAIRS), PAIRS, 2]), (0, 1, 3, 2))
    return tl.reshape(both, [ROWS, WIDE])


@triton.jit
def spread_rows(x, BR: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr):
    """x [BR, BW], 0 beyond WIDTH, times the orthonormal Sylvester-Hadamard matrix of WIDTH."""
    i = tl.arange(0, BW)
    parity = i[:, None] & i[None, :]
    parity ^= parity >> 8
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    signs = (1 - 2 * (parity & 1)).to(tl.float32)
    return mm_split(x, signs, tl.zeros([BR, BW], tl.float32), 3) * (WIDTH**-0.5)


@triton.jit(do_not_specialize=["rows", "each"])
def turn_kernel(
    x, weight, positions, frequencies, out, rows, each, eps,
    WIDTH: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, PAIRS: tl.constexpr, SPREAD: tl.constexpr, FINISH: tl.constexpr,
    CODED: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr, SCALE_BYTES: tl.constexpr,
    PLAIN_AT: tl.constexpr, SCALE_AT: tl.constexpr, ROW_BYTES: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Rows [rows, WIDTH] normed, their last 2 * PAIRS channels rotated, spread, rounded or packed, as the steps say.

    `each` rows have one position. The format is that of `RowLayout`; BLOCK numbers, a power of two, have one scale.
    """
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    ok = row < rows
    channel = tl.arange(0, BW)
    inside = ok[:, None] & (channel < WIDTH)[None, :]
    y = tl.load(x + (row * WIDTH)[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        y = y * tl.rsqrt(tl.sum(y * y, 1) / WIDTH + eps)[:, None]
        if WEIGHTED:
            y = y * tl.load(weight + channel, mask=channel < WIDTH, other=0.0)[None, :]
    if PAIRS > 0:
        pair = tl.arange(0, BW // 2) - (WIDTH - 2 * PAIRS) // 2
        turned = (pair >= 0) & (pair < PAIRS)
        position = tl.load(positions + row // each, mask=ok, other=0).to(tl.float32)
        cos, sin = cos_sin(position[:, None] * tl.load(frequencies + pair, mask=turned, other=0.0)[None, :])
        even, odd = tl.split(tl.reshape(y, [BR, BW // 2, 2]))
        y = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BR, BW])
    if SPREAD:
        y = spread_rows(y, BR, WIDTH, BW)
    if FINISH == 0:
        tl.store(out + (row * WIDTH)[:, None] + channel[None, :], y, mask=inside)
    else:
        coded = (channel < CODED)[None, :]
        blocks = tl.reshape(tl.where(coded, y, 0.0), [BR, BW // BLOCK, BLOCK])
        amax = tl.maximum(tl.max(tl.abs(blocks), 2), FLOOR)
        scale, exponent = pow2_ceil_scale(amax, 1.0 / LIMIT)
        scaled = tl.reshape(tl.minimum(tl.maximum(blocks * pow2_inverse(scale)[:, :, None], -LIMIT), LIMIT), [BR, BW])
        if BITS == 8:
            rounded = round_e4m3(scaled)
            code = e4m3_code(scaled, rounded)
        else:
            code = e2m1_code(scaled)
            rounded = e2m1(code)
        if FINISH == 1:
            factor = tl.reshape(tl.broadcast_to(scale[:, :, None], [BR, BW // BLOCK, BLOCK]), [BR, BW])
            y = tl.where(coded, rounded * factor, round_bf16(y))
            tl.store(out + (row * WIDTH)[:, None] + channel[None, :], y, mask=inside)
        else:
            line = out + row * ROW_BYTES
            if BITS == 8:
                tl.store(line[:, None] + channel[None, :], code, mask=ok[:, None] & coded)
            else:
                low, high = tl.split(tl.reshape(code, [BR, BW // 2, 2]))
                pair_at = tl.arange(0, BW // 2)[None, :]
                tl.store(line[:, None] + pair_at, low | (high << 4), mask=ok[:, None] & (pair_at < CODED // 2))
            if CODED < WIDTH:
                to = (line + PLAIN_AT).to(tl.pointer_type(tl.bfloat16))
                tl.store(
                    to[:, None] + (channel - CODED)[None, :], to_bf16(y), mask=inside & (channel >= CODED)[None, :]
                )
            number = tl.arange(0, BW // BLOCK)[None, :]
            if SCALE_BYTES == 4:
                to = (line + SCALE_AT).to(tl.pointer_type(tl.float32))
                tl.store(to[:, None] + number, scale, mask=ok[:, None] & (number < SCALES))
            else:
                tl.store((line + SCALE_AT)[:, None] + number, exponent, mask=ok[:, None] & (number < SCALES))
            rest = CODED * BITS // 8 + 2 * (WIDTH - CODED) + SCALES * SCALE_BYTES + tl.arange(0, 16)[None, :]
            tl.store(line[:, None] + rest, tl.zeros([BR, 16], tl.uint8), mask=ok[:, None] & (rest < ROW_BYTES))


@triton.jit(do_not_specialize=["rows"])
def unpack_kernel(
    packed, out, rows,
    WIDTH: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
    CODED: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, SCALE_BYTES: tl.constexpr,
    PLAIN_AT: tl.constexpr, SCALE_AT: tl.constexpr, ROW_BYTES: tl.constexpr,
):  # fmt: skip
    """Packed rows as float32 [rows, WIDTH]."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    ok = (row < rows)[:, None]
    line = (packed + row * ROW_BYTES)[:, None]
    channel = tl.arange(0, BW)[None, :]
    coded = ok & (channel < CODED)
    code = tl.load(line + channel * BITS // 8, mask=coded, other=0)
    if BITS == 8:
        y = e4m3(code)
    else:
        y = e2m1(code >> (channel % 2 * 4).to(tl.uint8))
    if SCALE_BYTES == 4:
        at = (line + SCALE_AT).to(tl.pointer_type(tl.float32))
        y *= tl.load(at + channel // BLOCK, mask=coded, other=0.0)
    else:
        y *= e8m0(tl.load(line + SCALE_AT + channel // BLOCK, mask=coded, other=0))
    if CODED < WIDTH:
        at = (line + PLAIN_AT).to(tl.pointer_type(tl.bfloat16))
        plain = tl.load(at + (channel - CODED), mask=ok & (channel >= CODED) & (channel < WIDTH), other=0.0)
        y = tl.where(channel < CODED, y, plain.to(tl.float32))
    tl.store(out + (row * WIDTH)[:, None] + channel, y, mask=ok & (channel < WIDTH))


@triton.jit(do_not_specialize=["rows", "each", "stride_token", "stride_row"])
def rope_kernel(
    x, positions, frequencies, out, rows, each, stride_token, stride_row,
    PAIRS: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows of 2 * PAIRS channels rotated, `each` of them to a position; out is dense."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    pair = tl.arange(0, BP)
    ok = (row < rows)[:, None] & (pair < PAIRS)[None, :]
    position = tl.load(positions + row // each, mask=row < rows, other=0).to(tl.float32)
    cos, sin = cos_sin(position[:, None] * tl.load(frequencies + pair, mask=pair < PAIRS, other=0.0)[None, :])
    if INVERSE:
        sin = -sin
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + PAIRS
    line = (x + row // each * stride_token + row % each * stride_row)[:, None]
    a = tl.load(line + first[None, :], mask=ok, other=0.0)
    b = tl.load(line + second[None, :], mask=ok, other=0.0)
    to = (out + row * (2 * PAIRS))[:, None]
    tl.store(to + first[None, :], a * cos - b * sin, mask=ok)
    tl.store(to + second[None, :], a * sin + b * cos, mask=ok)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(x, weight, bias, out, rows, eps, WIDTH: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr):
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    channel = tl.arange(0, BW)
    known = channel < WIDTH
    inside = (row < rows)[:, None] & known[None, :]
    place = (row * WIDTH)[:, None] + channel[None, :]
    y = tl.load(x + place, mask=inside, other=0.0)
    y = tl.where(inside, y - (tl.sum(y, 1) / WIDTH)[:, None], 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, 1) / WIDTH + eps)[:, None]
    factor, offset = tl.load(weight + channel, mask=known, other=0.0), tl.load(bias + channel, mask=known, other=0.0)
    tl.store(out + place, y * factor[None, :] + offset[None, :], mask=inside)


# ---------------------------------------------------------------------------------------------- launching


@dataclass(frozen=True, slots=True)
class Steps:
    """What a call wants of `turn_kernel`."""

    norm: bool = False
    spread: bool = False
    finish: int = _NOTHING
    layout: RowLayout | None = None


def rms_norm(x: Tensor, weight: Weight | None, eps: float) -> Tensor:
    return _turned(x, Steps(norm=True), torch.empty(x.shape, device=x.device), weight, eps)


def norm_rope(x: Tensor, weight: Weight | None, eps: float, positions: Tensor, frequencies: Tensor) -> Tensor:
    out = torch.empty(x.shape, device=x.device)
    return _turned(x, Steps(norm=True), out, weight, eps, positions, frequencies)


def norm_rope_pack(
    x: Tensor,
    weight: Weight,
    eps: float,
    positions: Tensor,
    frequencies: Tensor,
    layout: RowLayout,
    spread: bool,
) -> Tensor:
    if layout.code_bits == 32:
        out = torch.empty(x.shape, device=x.device)
        return _turned(x, Steps(True, spread), out, weight, eps, positions, frequencies).view(torch.uint8)
    out = torch.empty(x.shape[0], layout.row_bytes, dtype=torch.uint8, device=x.device)
    return _turned(x, Steps(True, spread, _PACK, layout), out, weight, eps, positions, frequencies)


def rope_round(x: Tensor, positions: Tensor, frequencies: Tensor, layout: RowLayout, spread: bool) -> Tensor:
    rounds = spread and layout.code_bits != 32
    steps = Steps(False, spread, _ROUND, layout) if rounds else Steps(False, spread)
    return _turned(x, steps, torch.empty(x.shape, device=x.device), None, 0.0, positions, frequencies)


def hadamard(x: Tensor) -> Tensor:
    return _turned(x, Steps(spread=True), torch.empty(x.shape, device=x.device))


def pack_rows(x: Tensor, layout: RowLayout) -> Tensor:
    if layout.code_bits == 32:
        return x.float().contiguous().view(torch.uint8)
    out = torch.empty(*x.shape[:-1], layout.row_bytes, dtype=torch.uint8, device=x.device)
    return _turned(x, Steps(finish=_PACK, layout=layout), out)


def unpack_rows(packed: Tensor, layout: RowLayout) -> Tensor:
    packed = packed.contiguous()
    if packed.shape[-1] != layout.row_bytes:
        raise ValueError(f"packed: expected rows of {layout.row_bytes} bytes, got {tuple(packed.shape)}")
    if layout.code_bits == 32:
        return packed.view(torch.float32)
    out = torch.empty(*packed.shape[:-1], layout.width, device=packed.device)
    rows = math.prod(packed.shape[:-1])
    if rows:
        block_width, block_rows = _block(layout.width, rows)
        unpack_kernel[(triton.cdiv(rows, block_rows),)](
            packed, out, rows, layout.width, block_width, block_rows, layout.coded, layout.code_bits, layout.block,
            layout.scale_bytes, layout.plain_offset, layout.scale_offset, layout.row_bytes,
        )  # fmt: skip
    return out


def rope(
    x: Tensor, positions: Tensor, frequencies: Tensor, *, inverse: bool = False, interleaved: bool = True
) -> Tensor:
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        x = x.contiguous()
    pairs, each = frequencies.shape[0], math.prod(x.shape[1:-1])
    if x.shape[-1] != 2 * pairs:
        raise ValueError(f"x: expected {2 * pairs} channels, got {x.shape[-1]}")
    out = torch.empty(x.shape, device=x.device)
    rows = x.shape[0] * each
    if rows:
        block_width, block_rows = _block(2 * pairs, rows)
        strides = x.stride(0), x.stride(-2) if x.dim() > 2 else 0
        rope_kernel[(triton.cdiv(rows, block_rows),)](
            x, positions.contiguous(), frequencies, out, rows, each, *strides,
            pairs, block_width // 2, block_rows, inverse, interleaved,
        )  # fmt: skip
    return out


def layer_norm(x: Tensor, weight: Weight, bias: Weight, eps: float) -> Tensor:
    x, width = x.contiguous(), x.shape[-1]
    out, rows = torch.empty_like(x), x.numel() // width
    if rows:
        block_width, block_rows = _block(width, rows)
        layer_norm_kernel[(triton.cdiv(rows, block_rows),)](
            x, vector(weight, (width,)), vector(bias, (width,)), out, rows, eps, width, block_width, block_rows
        )
    return out


def _turned(
    x: Tensor,
    steps: Steps,
    out: Tensor,
    weight: Weight | None = None,
    eps: float = 0.0,
    positions: Tensor | None = None,
    frequencies: Tensor | None = None,
) -> Tensor:
    """x [n, ..., width] through the steps, to `out`."""
    x, width = x.contiguous(), x.shape[-1]
    pairs = 0 if frequencies is None else frequencies.shape[0]
    layout = steps.layout
    if 2 * pairs > width or width == 0:
        raise ValueError(f"x: expected at least {2 * pairs} and more than 0 channels, got {width}")
    if steps.spread and width & (width - 1):
        raise ValueError(f"x: expected a power of two of channels, got {width}")
    if layout is not None and layout.width != width:
        raise ValueError(f"x: rows of {layout.name} have {layout.width} channels, got {width}")
    rows = x.numel() // width
    if rows == 0:
        return out
    block_width, block_rows = _block(width, rows, steps)
    factors = None if weight is None else vector(weight, (width,))
    given = [x if tensor is None else tensor.contiguous() for tensor in (factors, positions, frequencies)]
    turn_kernel[(triton.cdiv(rows, block_rows),)](
        x, *given, out, rows, rows // x.shape[0], eps, width, block_width, block_rows,
        steps.norm, weight is not None, pairs, steps.spread, steps.finish, *_format(layout, block_width),
    )  # fmt: skip
    return out


def _format(layout: RowLayout | None, block_width: int) -> tuple[int | float, ...]:
    """The format as `turn_kernel` takes it."""
    if layout is None:
        return 0, 8, block_width, 0, 1, 0, 0, 0, 1.0, 1.0
    limit, floor = (448.0, 1e-4) if layout.code_bits == 8 else (6.0, 6.0 * 2.0**-126)
    block = block_width if layout.num_scales == 1 else layout.block
    places = layout.plain_offset, layout.scale_offset, layout.row_bytes
    return layout.coded, layout.code_bits, block, layout.num_scales, layout.scale_bytes, *places, limit, floor


def _block(width: int, rows: int, steps: Steps | None = None) -> tuple[int, int]:
    """Channels, a power of two, and rows that a program takes."""
    spread = steps is not None and steps.spread
    block_width = max(triton.next_power_of_2(width), 16 if spread else 2)
    most = 1 << 18 if INTERPRET.value else 2048
    block_rows = min(triton.next_power_of_2(rows), max(1, most // block_width))
    return block_width, max(block_rows, 16) if spread else block_rows


_vectors: WeakKeyDictionary[Weight, Tensor] = WeakKeyDictionary()


def vector(weight: Weight, shape: tuple[int, ...]) -> Tensor:
    """A weight's numbers as dense float32, unpacked and checked once in its life."""
    found = _vectors.get(weight)
    if found is None:
        found = _vectors[weight] = weight.data.float().contiguous()
    if tuple(found.shape) != shape:
        raise ValueError(f"{weight.name}: expected shape {shape}, got {tuple(found.shape)}")
    return found
