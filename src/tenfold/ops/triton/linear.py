"""Stored weights times activations: FP8 in blocks of 128 x 128, MXFP4, bf16 and f32, from one row to prefill tiles.

Weights are read as they are stored; codes are exact in bf16, so the only rounding is that of the activations
(`parts` 1) or of f32 sums. Knows nothing of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.formats import BF16, F32, FP8_BLOCK, FP8_BLOCK_F32, MXFP4
from tenfold.ops import Stack, Weight
from tenfold.ops.triton.lowp import INTERPRET, e2m1, e4m3, e8m0, mm_f32, mm_split
from tenfold.ops.triton.rows import rms_norm, vector

__all__ = [
    "Matrix",
    "Tiles",
    "accumulate",
    "address",
    "grouped_linear",
    "grouped_linear_into",
    "linear",
    "linear_each",
    "linear_onto",
    "matrix",
    "norm_linear",
    "norm_linear_each",
    "rounded",
    "tiles",
]

AS_F32 = tl.constexpr(0)
AS_BF16 = tl.constexpr(1)
AS_FP8 = tl.constexpr(2)  # e8m0 scales
AS_FP8_F32 = tl.constexpr(3)  # float32 scales
AS_MXFP4 = tl.constexpr(4)

FEW_ROWS = 16
"""Up to so many rows the weights' bytes set the pace: narrow tiles, activations as they come."""


@triton.jit
def address(table, place, TYPE: tl.constexpr):
    """The pointer that stands in an int64 table; tensors start at multiples of 16 bytes.

    Said of the pointer: said of the number it is lost, and every byte becomes a load of its own.
    """
    return tl.multiple_of(tl.load(table + place).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def accumulate(
    x, x_ok, codes, scale, row, row_ok,
    K: tl.constexpr, FORMAT: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    norm=None, eps=None,
):  # fmt: skip
    """Rows of activations [BM, K] times rows of a weight [BN, K], transposed -> f32 [BM, BN].

    x: a pointer to each row's first number. row: int64 places of the weight's rows. What is not ok counts as 0.
    With `norm` [K] of activations normed as by `rms_norm`: a row's level multiplies its products, so that one loop
    over the row is enough.
    """
    acc = tl.zeros([BM, BN], tl.float32)
    squares = tl.zeros([BM, BK], tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        some = tl.load(x[:, None] + k[None, :], mask=x_ok[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        if norm is not None:
            squares += some * some
            some = some * tl.load(norm + k, mask=k < K, other=0.0)[None, :]
        if FORMAT == AS_MXFP4:
            pair = first // 2 + tl.arange(0, BK // 2)
            read = row_ok[:, None] & (pair < K // 2)[None, :]
            byte = tl.load(codes + row[:, None] * (K // 2) + pair[None, :], mask=read, other=0)
            block = first // 32 + tl.arange(0, BK // 32)
            known = row_ok[:, None] & (block < K // 32)[None, :]
            power = e8m0(tl.load(scale + row[:, None] * (K // 32) + block[None, :], mask=known, other=0))
            power = tl.reshape(tl.broadcast_to(power[:, :, None], [BN, BK // 32, 16]), [BN, BK // 2])
            # A byte holds two neighbours: the even channels meet the low codes, the odd ones the high codes.
            even, odd = tl.split(tl.reshape(some, [BM, BK // 2, 2]))
            acc = mm_split(even, tl.trans(e2m1(byte & 15) * power), acc, PARTS)
            acc = mm_split(odd, tl.trans(e2m1(byte >> 4) * power), acc, PARTS)
        else:
            read = row_ok[:, None] & (k < K)[None, :]
            stored = tl.load(codes + row[:, None] * K + k[None, :], mask=read, other=0)
            if FORMAT == AS_F32:
                acc = mm_f32(some, tl.trans(stored), acc)
            elif FORMAT == AS_BF16:
                acc = mm_split(some, tl.trans(stored.to(tl.float32)), acc, PARTS)
            else:
                place = row // 128 * ((K + 127) // 128) + first // 128
                factor = tl.load(scale + place, mask=row_ok, other=0)
                if FORMAT == AS_FP8:
                    factor = e8m0(factor)
                if FORMAT == AS_FP8 and BM > 16:  # a power of two leaves codes exact; a second sum would take registers
                    acc = mm_split(some, tl.trans(e4m3(stored) * factor[:, None]), acc, PARTS)
                else:
                    part = mm_split(some, tl.trans(e4m3(stored)), tl.zeros([BM, BN], tl.float32), PARTS)
                    acc += part * factor[None, :]
    if norm is not None:
        acc = acc * tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
    return acc


@triton.jit(do_not_specialize=["n", "N", "wide"])
def linear_kernel(
    x, norm, eps, before, codes, scale, out, n, N, wide,
    NORMED: tl.constexpr, ADDED: tl.constexpr, GROUPS: tl.constexpr, ROW: tl.constexpr, K: tl.constexpr,
    FORMAT: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The first N of `wide` columns of out [n, GROUPS, wide]: the first K of x [n, GROUPS, ROW] by group with N rows
    of the weight each. NORMED: of x normed as by `rms_norm`. ADDED: and what stands in `before`, of out's shape."""
    group = tl.program_id(2)
    m = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    row = (group * N + column).to(tl.int64)
    weight, small = None, None
    if NORMED:
        weight, small = norm, eps
    acc = accumulate(
        x + (m * GROUPS + group) * ROW, m < n, codes, scale, row, column < N, K, FORMAT, PARTS, BM, BN, BK,
        weight, small,
    )  # fmt: skip
    place = ((m * GROUPS + group) * wide)[:, None] + column[None, :]
    ok = (m < n)[:, None] & (column < N)[None, :]
    if ADDED:
        acc += tl.load(before + place, mask=ok, other=0.0)
    tl.store(out + place, acc, mask=ok)


@triton.jit(do_not_specialize=["n"])
def linear_each_kernel(
    x, norm, eps, table, out, n,
    NORMED: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr, FORMATS: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The products of all weights of a stack; a line of the table is codes, scales, rows, format, rows before it.

    NORMED: of x normed as by `rms_norm`.
    """
    tile = tl.program_id(0)
    part = tile * 0
    begin = tile * 0
    tiles = tile * 0
    for i in tl.static_range(COUNT):  # the last part that begins at or before this tile
        part = tl.where(tile >= tiles, i, part)
        begin = tl.where(tile >= tiles, tiles, begin)
        tiles += tl.cdiv(tl.load(table + 5 * i + 2).to(tl.int32), BN)
    N = tl.load(table + 5 * part + 2)
    stored = tl.load(table + 5 * part + 3)
    m = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    row = ((tile - begin) * BN + tl.arange(0, BN)).to(tl.int64)
    to = out + n * tl.load(table + 5 * part + 4) + m[:, None] * N + row[None, :]
    ok = (m < n)[:, None] & (row < N)[None, :]
    xs = x + m * K
    weight, small = None, None
    if NORMED:
        weight, small = norm, eps
    if FORMATS & 1:
        if stored == 0:
            codes = address(table, 5 * part, tl.float32)
            acc = accumulate(xs, m < n, codes, codes, row, row < N, K, AS_F32, PARTS, BM, BN, BK, weight, small)
            tl.store(to, acc, mask=ok)
    if FORMATS & 2:
        if stored == 1:
            codes = address(table, 5 * part, tl.bfloat16)
            acc = accumulate(xs, m < n, codes, codes, row, row < N, K, AS_BF16, PARTS, BM, BN, BK, weight, small)
            tl.store(to, acc, mask=ok)
    if FORMATS & 4:
        if stored == 2:
            codes, scale = address(table, 5 * part, tl.uint8), address(table, 5 * part + 1, tl.uint8)
            acc = accumulate(xs, m < n, codes, scale, row, row < N, K, AS_FP8, PARTS, BM, BN, BK, weight, small)
            tl.store(to, acc, mask=ok)
    if FORMATS & 8:
        if stored == 3:
            codes, scale = address(table, 5 * part, tl.uint8), address(table, 5 * part + 1, tl.float32)
            acc = accumulate(xs, m < n, codes, scale, row, row < N, K, AS_FP8_F32, PARTS, BM, BN, BK, weight, small)
            tl.store(to, acc, mask=ok)
    if FORMATS & 16:
        if stored == 4:
            codes, scale = address(table, 5 * part, tl.uint8), address(table, 5 * part + 1, tl.uint8)
            acc = accumulate(xs, m < n, codes, scale, row, row < N, K, AS_MXFP4, PARTS, BM, BN, BK, weight, small)
            tl.store(to, acc, mask=ok)


# ---------------------------------------------------------------------------------------------- launching


@dataclass(frozen=True, slots=True)
class Tiles:
    """The shape of a product's tiles and what Triton makes of them."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.m, self.n, self.k

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def tiles(rows: int, out_features: int, formats: int) -> Tiles:
    """Tiles for so many rows of activations and the formats of weights that meet them, a bit each.

    An FP8 tile may not be deeper than a block of 128. float32 numbers take the space of four codes, and FP8 with
    float32 scales a second sum.
    """
    if INTERPRET.value:
        return Tiles(_within(rows, 16, 256), _within(out_features, 16, 1024), 128, 4, 1)
    if rows <= FEW_ROWS:
        return Tiles(16, 32, 128, 4, 4)
    if formats & 1 << AS_F32.value:
        return Tiles(64, 64, 32, 4, 2)
    if rows <= 64:
        return Tiles(64, 64, 64, 4, 3)
    return Tiles(128, 64 if formats & 1 << AS_FP8_F32.value else 128, 64, 8, 3)


def _within(size: int, low: int, high: int) -> int:
    power: int = triton.next_power_of_2(size)
    return min(max(power, low), high)


def linear(x: Tensor, weight: Weight, *, parts: int) -> Tensor:
    ready = matrix(weight)
    if x.dim() != 2 or x.shape[1] != ready.in_features:
        raise ValueError(f"x: expected [n, {ready.in_features}] for {weight.name}, got {tuple(x.shape)}")
    return _product(x[:, None], ready, parts)[:, 0]


def linear_onto(before: Tensor, x: Tensor, weight: Weight, *, parts: int) -> Tensor:
    """`before` [n, out] and the product."""
    ready = matrix(weight)
    if x.dim() != 2 or x.shape[1] != ready.in_features or before.shape != (x.shape[0], ready.out_features):
        raise ValueError(f"x, before: expected rows for {weight.name} {weight.shape}, got {tuple(x.shape)}")
    return _product(x[:, None], ready, parts, before=before.contiguous())[:, 0]


def norm_linear(x: Tensor, norm: Weight, eps: float, weight: Weight, *, parts: int) -> Tensor:
    """`linear` of x normed as by `rms_norm`, for few rows in one launch."""
    if x.shape[0] > FEW_ROWS:
        return linear(rms_norm(x, norm, eps), weight, parts=parts)
    ready = matrix(weight)
    if x.dim() != 2 or x.shape[1] != ready.in_features:
        raise ValueError(f"x: expected [n, {ready.in_features}] for {weight.name}, got {tuple(x.shape)}")
    return _product(x[:, None], ready, parts, norm=vector(norm, (ready.in_features,)), eps=eps)[:, 0]


def grouped_linear(x: Tensor, weight: Weight, *, parts: int) -> Tensor:
    ready = matrix(weight)
    if x.dim() != 3 or x.shape[2] != ready.in_features or ready.out_features % x.shape[1]:
        raise ValueError(f"x: expected shape for {weight.name} {weight.shape}, got {tuple(x.shape)}")
    return _product(x, ready, parts).flatten(1)


def grouped_linear_into(x: Tensor, weight: Weight, out: Tensor, *, parts: int) -> None:
    """`grouped_linear` of the first channels of x [n, groups, in or more], to the first of out [n, groups, out or
    more]."""
    ready = matrix(weight)
    fits = x.dim() == out.dim() == 3 and x.shape[:2] == out.shape[:2] and ready.out_features % x.shape[1] == 0
    if not fits or x.shape[2] < ready.in_features or out.shape[2] < ready.out_features // x.shape[1]:
        raise ValueError(f"x, out: {tuple(x.shape)} and {tuple(out.shape)} do not fit {weight.name} {weight.shape}")
    if not out.is_contiguous():
        raise ValueError("out: expected dense memory, since a copy would be filled")
    _product(x, ready, parts, out)


def _product(
    x: Tensor,
    ready: Matrix,
    parts: int,
    out: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    before: Tensor | None = None,
) -> Tensor:
    """x [n, groups, in or more] by group -> out [n, groups, out or more]."""
    n, groups, width = x.shape
    out_features = ready.out_features // groups
    if out is None:
        out = torch.empty(n, groups, out_features, device=x.device)
    if n:
        t = tiles(n, out_features, 1 << ready.format)
        grid = triton.cdiv(out_features, t.n), triton.cdiv(n, t.m), groups
        given = rounded(x, 3 if ready.format == AS_F32.value else parts)
        linear_kernel[grid](
            given, given if norm is None else norm, eps, out if before is None else before, ready.codes, ready.scale,
            out, n, out_features, out.shape[2], norm is not None, before is not None, groups, width, ready.in_features,
            ready.format, parts, *t.sizes, **t.options,
        )  # fmt: skip
    return out


def rounded(x: Tensor, parts: int) -> Tensor:
    """x, dense; where many rows meet a weight that rounds them, as bf16: half the bytes for every tile to read."""
    return x.contiguous() if parts == 3 or x.shape[0] <= FEW_ROWS else x.to(torch.bfloat16).contiguous()


def linear_each(x: Tensor, stack: Stack, *, parts: int) -> tuple[Tensor, ...]:
    """One launch for all."""
    return _each(x, stack, parts)


def norm_linear_each(x: Tensor, norm: Weight, eps: float, stack: Stack, *, parts: int) -> tuple[Tensor, ...]:
    """`linear_each` of x normed as by `rms_norm`, for few rows in one launch."""
    if x.shape[0] > FEW_ROWS:
        return _each(rms_norm(x, norm, eps), stack, parts)
    return _each(x.contiguous(), stack, parts, norm, eps)


def _each(x: Tensor, stack: Stack, parts: int, norm: Weight | None = None, eps: float = 0.0) -> tuple[Tensor, ...]:
    ready, n = _stacked(stack), x.shape[0]
    if x.dim() != 2 or x.shape[1] != ready.in_features:
        raise ValueError(f"x: expected [n, {ready.in_features}] for the stack, got {tuple(x.shape)}")
    out = torch.empty(n * sum(ready.out_features), device=x.device)
    if n:
        t = tiles(n, max(ready.out_features), ready.formats)
        grid = sum(triton.cdiv(size, t.n) for size in ready.out_features), triton.cdiv(n, t.m)
        # An f32 weight gets activations as they are, whatever the others round them to.
        given = rounded(x, 3 if ready.formats & 1 else parts)
        factors = given if norm is None else vector(norm, (ready.in_features,))
        linear_each_kernel[grid](
            given, factors, eps, ready.table, out, n,
            norm is not None, len(ready.out_features), ready.in_features, ready.formats, parts, *t.sizes, **t.options,
        )  # fmt: skip
    found = out.split([n * size for size in ready.out_features])
    return tuple(part.view(n, size) for part, size in zip(found, ready.out_features, strict=True))


# ---------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A weight that was checked, as the kernels want it; where there are no scales, `scale` is the codes again."""

    format: int
    codes: Tensor
    scale: Tensor
    out_features: int
    in_features: int

    @property
    def addresses(self) -> tuple[int, int]:
        return self.codes.data_ptr(), self.scale.data_ptr()


@dataclass(frozen=True, slots=True, eq=False)
class _Stacked:
    """A stack, checked: its table for `linear_each_kernel`, and a bit for each format in it."""

    table: Tensor
    out_features: tuple[int, ...]
    in_features: int
    formats: int


_stacks: WeakKeyDictionary[Stack, _Stacked] = WeakKeyDictionary()

_FORMATS = {F32.name: AS_F32, BF16.name: AS_BF16, MXFP4.name: AS_MXFP4}
_DTYPES = {F32.name: torch.float32, BF16.name: torch.bfloat16}


def matrix(weight: Weight) -> Matrix:
    """The weight for a kernel; a ValueError where it is none that the kernels can read."""
    form, codes, scale = weight.format, weight.data, weight.scale
    if len(weight.shape) != 2 or (form is MXFP4 and weight.shape[1] % 32):
        raise ValueError(f"{weight.name}: expected a matrix, of MXFP4 with a multiple of 32 columns: {weight.shape}")
    if form in (FP8_BLOCK, FP8_BLOCK_F32):
        # The scales' own dtype decides, as in the reference.
        kind = AS_FP8_F32 if scale is not None and scale.dtype is torch.float32 else AS_FP8
    elif form.name in _FORMATS:
        kind = _FORMATS[form.name]
    else:
        raise ValueError(f"{weight.name}: no kernel multiplies weights of {form.name}")
    codes = _dense(weight.name, codes, _DTYPES.get(form.name, torch.uint8), form.stored_shape(weight.shape))
    scale_shape = form.scale_shape(weight.shape)
    if scale_shape is not None:
        if scale is None:
            raise ValueError(f"{weight.name}: expected scales beside codes of {form.name}")
        scale = _dense(weight.name, scale, torch.float32 if kind is AS_FP8_F32 else torch.uint8, scale_shape)
    return Matrix(kind.value, codes, codes if scale is None else scale, *weight.shape)


def _dense(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if tensor.itemsize == 1:
        tensor = tensor.view(torch.uint8)
    if tensor.dtype is not dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(f"{name}: expected dense {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    if tensor.is_cuda and tensor.data_ptr() % 16:
        raise ValueError(f"{name}: its memory is not aligned to 16 bytes; clone it first")
    return tensor


def _stacked(stack: Stack) -> _Stacked:
    """Checked once in a stack's life. The table holds addresses, which are good as long as the stack lives."""
    found = _stacks.get(stack)
    if found is None:
        found = _stacks[stack] = _checked_stack([matrix(weight) for weight in stack.weights])
    return found


def _checked_stack(matrices: list[Matrix]) -> _Stacked:
    widths = {ready.in_features for ready in matrices}
    if len(widths) != 1:
        raise ValueError(f"stack: expected weights of one width, got {sorted(widths)}")
    lines, before, formats = [], 0, 0
    for ready in matrices:
        lines.append([*ready.addresses, ready.out_features, ready.format, before])
        before += ready.out_features
        formats |= 1 << ready.format
    table = torch.tensor(lines, dtype=torch.int64).to(matrices[0].codes.device)
    return _Stacked(table, tuple(ready.out_features for ready in matrices), widths.pop(), formats)
