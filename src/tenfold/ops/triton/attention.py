"""`sparse_attention` on the GPU: one kernel for every kind of layer, which differ only in the rows a query sees.

A program takes some heads of one query through a part of its rows, those of the first source before those of the
second, with a running maximum. Where queries alone fill the device, one part is all and the program ends with the
sink, the division and the rotation; where they do not, the parts are merged by a second kernel. A row is read once
as key and value, in a block of channels that is a power of two; what a row has beyond (the rope channels of V3.2) is
key alone. Knows nothing of who chose the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.formats import RowLayout
from tenfold.ops import Rows, Weight
from tenfold.ops.triton.linear import address
from tenfold.ops.triton.lowp import INTERPRET, e4m3, e8m0, mm, mm_f32, to_bf16
from tenfold.ops.triton.rows import cos_sin

__all__ = ["sparse_attention"]

_LOG2E = 1.4426950408889634
_NONE, _RANGE, _LIST = 0, 1, 2
"""What a source is: nothing, bounds for each query, a list for each query."""


def sparse_attention(
    q: Tensor,
    sources: Sequence[Rows],
    sink: Weight | None,
    scale: float,
    value_dim: int,
    position: int | Tensor,
    frequencies: Tensor | None = None,
) -> Tensor:
    n, heads, width = q.shape
    pairs = 0 if frequencies is None else frequencies.shape[0]
    if not 0 < value_dim <= width or 2 * pairs > value_dim or (pairs and value_dim % 2):
        raise ValueError(f"value_dim: expected {max(2 * pairs, 1)} to {width}, even where rotated, got {value_dim}")
    if not 1 <= len(sources) <= 2 or any(source.layout != sources[0].layout for source in sources):
        raise ValueError("sources: expected one or two of the same layout")
    layout = sources[0].layout
    if layout.width != width or layout.code_bits == 4:
        raise ValueError(f"sources: expected rows of {width} channels of 8 or 32 bits, got {layout}")
    out = torch.empty(n, heads, value_dim, dtype=torch.float32, device=q.device)
    if n * heads == 0:
        return out
    heads_each = _heads_each(heads, n)
    rows_each = _rows_each(width)
    blocks = [-(-source.columns // rows_each) for source in sources]
    splits = _splits(sum(blocks), n * triton.cdiv(heads, heads_each), q.device)
    positions = position if isinstance(position, Tensor) else _consecutive(position, n, q.device)
    lanes = max(32, triton.next_power_of_2(splits))
    partial = lse = out
    if splits > 1:
        partial = torch.empty(n, splits, heads, value_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(n, splits, heads, dtype=torch.float32, device=q.device)
    sinks = out if sink is None else sink.data
    turns = out if frequencies is None else frequencies
    sizes: dict[str, Any] = _sizes(layout, width, value_dim)
    first, second = _source(sources[0]), _source(sources[1]) if len(sources) > 1 else _source(None, out)
    common = {"H": heads, "PAIRS": pairs, "VALUES": value_dim, "HAS_SINK": sink is not None}
    grid = (n, triton.cdiv(heads, heads_each), splits)
    _attend[grid](
        q.contiguous(), *first[0], *second[0], partial, lse, sinks, positions, turns,
        scale * _LOG2E,
        FIRST=first[1], SECOND=second[1], FIRST_EACH=first[2], SECOND_EACH=second[2],
        WHOLE=splits == 1, BH=heads_each, BK=rows_each, **sizes, **common,
        num_warps=8, num_stages=1,
    )  # fmt: skip
    if splits > 1:
        _merge[(n, heads)](
            partial, lse, sinks, positions, turns, out, splits, LANES=lanes, MAIN=sizes["MAIN"], **common
        )
    return out


def _heads_each(heads: int, n: int) -> int:
    """Heads of a program: all of a query's where there are many queries, so that a row is read once for all."""
    most = 32 if n >= 256 else 16
    return max(16, min(most, int(triton.next_power_of_2(heads))))


def _rows_each(width: int) -> int:
    """Rows of a block: as many as registers and shared memory hold beside the outputs on all GPUs from Ampere on."""
    return 32 if width <= 512 else 16


def _splits(blocks: int, programs: int, device: torch.device) -> int:
    """Parts of a query's rows: enough for two waves of programs, and none smaller than two blocks."""
    wanted = -(-2 * _multiprocessors(device) // programs)
    return max(1, min(wanted, blocks // 2))


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _consecutive(position: int, n: int, device: torch.device) -> Tensor:
    return torch.arange(position, position + n, device=device)


def _sizes(layout: RowLayout, width: int, value_dim: int) -> dict[str, int]:
    """How a row is cut: `MAIN` channels, a power of two, as key and value, and `TAIL` more as key alone."""
    split = layout.code_bits == 8 and layout.plain and value_dim <= layout.coded
    main = layout.coded if split else width
    return {
        "CODE_BITS": layout.code_bits,
        "ROW_BYTES": layout.row_bytes,
        "CODED": layout.coded,
        "PLAIN_OFFSET": layout.plain_offset,
        "SCALE_OFFSET": layout.scale_offset,
        "SCALE_BYTES": layout.scale_bytes,
        "BLOCK": layout.block,
        "WIDTH": width,
        "END": main,
        "MAIN": max(16, triton.next_power_of_2(main)),
        "TAIL": max(16, triton.next_power_of_2(width - main)) if split else 0,
    }


def _source(source: Rows | None, nothing: Tensor | None = None) -> tuple[tuple[Any, ...], int, bool]:
    """The arguments that describe a source: rows, bounds or list, stride and columns; its kind; rows of its own."""
    if source is None:
        return (nothing, nothing, nothing, 0, 0), _NONE, False
    each, rows = source.packed.dtype is torch.int64, source.packed
    if source.index is not None:
        index = source.index.contiguous()
        return (rows, index, index, index.shape[1], index.shape[1]), _LIST, each
    start, stop = source.bounds
    return (rows, start, stop, 0, source.columns), _RANGE, each


@triton.jit
def _dot(a, b, acc, CODE_BITS: tl.constexpr):
    if CODE_BITS == 32:
        return mm_f32(a, b, acc)
    else:
        return mm(a, b, acc)


@triton.jit
def _narrow(x, CODE_BITS: tl.constexpr):
    """What meets quantised rows is rounded to bf16, as the models were trained for."""
    if CODE_BITS == 32:
        return x
    else:
        return to_bf16(x)


@triton.jit
def _coded(code, exponent):
    """e4m3 codes times 2^(exponent - 127): bf16 on the GPU, where 16 bits on the way take half the shared memory."""
    if INTERPRET:
        return e4m3(code) * e8m0(exponent)
    else:
        # The same fields at bf16's places are a number 2^-120 times as large.
        small = ((code & 0x80).to(tl.uint16) << 8) | ((code & 0x7F).to(tl.uint16) << 4)
        factor = (exponent.to(tl.uint16) << 7).to(tl.bfloat16, bitcast=True)
        return small.to(tl.bfloat16, bitcast=True) * 1.329227995784916e36 * factor


@triton.jit
def _load_main(
    place,
    ok,
    CODE_BITS: tl.constexpr,
    CODED: tl.constexpr,
    PLAIN_OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    END: tl.constexpr,
    MAIN: tl.constexpr,
):
    """[rows, MAIN], zero where not `ok`: bf16 on the GPU, where codes times powers of two are exact."""
    d = tl.arange(0, MAIN)[None, :]
    place, live = place[:, None], ok[:, None]
    if CODE_BITS == 32:
        return tl.load(place.to(tl.pointer_type(tl.float32)) + d, mask=live & (d < END), other=0.0)
    else:
        coded = live & (d < CODED)
        code = tl.load(place + d, mask=coded, other=0)
        if SCALE_BYTES == 4:
            factor = tl.load((place + SCALE_OFFSET).to(tl.pointer_type(tl.uint32)) + d // BLOCK, mask=coded, other=0)
            exponent = (factor >> 23).to(tl.uint8)  # float32 powers of two
        else:
            exponent = tl.load(place + SCALE_OFFSET + d // BLOCK, mask=coded, other=0)
        value = _coded(code, exponent)
        if END > CODED:
            plain = tl.load(
                (place + PLAIN_OFFSET).to(tl.pointer_type(tl.bfloat16)) + (d - CODED),
                mask=live & (d >= CODED) & (d < END),
                other=0.0,
            )
            value = tl.where(d < CODED, value, plain.to(value.dtype))
        return value


@triton.jit
def _fold(
    top, total, acc, q, tail, base, slot, ok, scale,
    CODE_BITS: tl.constexpr, ROW_BYTES: tl.constexpr, CODED: tl.constexpr, PLAIN_OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    END: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One block of rows into the running maximum, total and sum of values."""
    place = base + slot.to(tl.int64) * ROW_BYTES
    row = _load_main(place, ok, CODE_BITS, CODED, PLAIN_OFFSET, SCALE_OFFSET, SCALE_BYTES, BLOCK, END, MAIN)
    score = _dot(q, tl.trans(row), tl.zeros([BH, BK], tl.float32), CODE_BITS)
    if TAIL:
        e = tl.arange(0, TAIL)[None, :]
        plain = tl.load(
            (place + PLAIN_OFFSET)[:, None].to(tl.pointer_type(tl.bfloat16)) + e,
            mask=ok[:, None] & (e < WIDTH - END),
            other=0.0,
        )
        score = _dot(tail, tl.trans(plain), score, CODE_BITS)
    score = tl.where(ok[None, :], score * scale, -float("inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    base_top = tl.where(new_top == -float("inf"), 0.0, new_top)  # a block may hold no row at all
    share, keep = tl.exp2(score - base_top[:, None]), tl.exp2(top - base_top)
    acc = _dot(_narrow(share, CODE_BITS), row, acc * keep[:, None], CODE_BITS)
    return new_top, total * keep + tl.sum(share, 1), acc


@triton.jit
def _turned(
    acc, position, frequencies, BH: tl.constexpr, MAIN: tl.constexpr, VALUES: tl.constexpr, PAIRS: tl.constexpr
):
    """The last 2 PAIRS of VALUES channels of [BH, MAIN] rotated back."""
    pair = tl.arange(0, MAIN // 2) - (VALUES // 2 - PAIRS)
    turned = (pair >= 0) & (pair < PAIRS)
    angle = position.to(tl.float32) * tl.load(frequencies + pair, mask=turned, other=0.0)
    cos, sin = cos_sin(angle)
    cos, sin = cos[None, :], sin[None, :]
    even, odd = tl.split(tl.reshape(acc, [BH, MAIN // 2, 2]))
    return tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), [BH, MAIN])


@triton.jit
def _base(rows, t, EACH: tl.constexpr):
    """Where a query's rows begin."""
    if EACH:
        return address(rows, t, tl.uint8)
    else:
        return rows


@triton.jit
def _seen(start, stop, columns, t, KIND: tl.constexpr):
    """The first row a query sees and how many, or how long its list is."""
    if KIND == 1:
        begin = tl.load(start + t).to(tl.int32)
        return begin, tl.load(stop + t).to(tl.int32) - begin
    else:
        return columns * 0, columns


@triton.jit
def _slots(lists, stride, begin, count, t, place, KIND: tl.constexpr):
    """The rows at some places of what a query sees, and whether there are any."""
    ok = place < count
    if KIND == 1:
        return begin + place, ok
    else:
        slot = tl.load(lists + t.to(tl.int64) * stride + place, mask=ok, other=-1)
        return tl.maximum(slot, 0), slot >= 0


@triton.jit(do_not_specialize=["stride_a", "columns_a", "stride_b", "columns_b"])
def _attend(
    q, rows_a, start_a, stop_a, stride_a, columns_a, rows_b, start_b, stop_b, stride_b, columns_b,
    out, lse, sinks, positions, frequencies, scale,
    FIRST: tl.constexpr, SECOND: tl.constexpr, FIRST_EACH: tl.constexpr, SECOND_EACH: tl.constexpr,
    WHOLE: tl.constexpr, CODE_BITS: tl.constexpr, ROW_BYTES: tl.constexpr, CODED: tl.constexpr,
    PLAIN_OFFSET: tl.constexpr, SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, END: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, H: tl.constexpr,
    PAIRS: tl.constexpr, VALUES: tl.constexpr, HAS_SINK: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BH heads of query t over blocks [lo, hi) of its rows, those of both sources counted on."""
    t, s = tl.program_id(0), tl.program_id(2)
    h, d, k = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, MAIN), tl.arange(0, BK)
    line = (t.to(tl.int64) * H + h)[:, None]
    mine = (h < H)[:, None]
    main = tl.load(q + line * WIDTH + d[None, :], mask=mine & (d < END)[None, :], other=0.0)
    main = _narrow(main, CODE_BITS)
    tail = main
    if TAIL:
        e = tl.arange(0, TAIL)
        tail = tl.load(q + line * WIDTH + END + e[None, :], mask=mine & (e < WIDTH - END)[None, :], other=0.0)
        tail = _narrow(tail, CODE_BITS)
    top = tl.full([BH], -float("inf"), tl.float32)
    total, acc = tl.zeros([BH], tl.float32), tl.zeros([BH, MAIN], tl.float32)
    begin_a, count_a = _seen(start_a, stop_a, columns_a, t, FIRST)
    begin_b, count_b = _seen(start_b, stop_b, columns_b, t, SECOND)
    blocks_a, blocks_b = tl.cdiv(count_a, BK), tl.cdiv(count_b, BK)
    each = tl.cdiv(blocks_a + blocks_b, tl.num_programs(2))
    lo, hi = s * each * BK, (s + 1) * each * BK
    base = _base(rows_a, t, FIRST_EACH)
    for k0 in range(lo, tl.minimum(hi, count_a), BK):
        slot, ok = _slots(start_a, stride_a, begin_a, count_a, t, k0 + k, FIRST)
        top, total, acc = _fold(
            top, total, acc, main, tail, base, slot, ok, scale, CODE_BITS, ROW_BYTES, CODED, PLAIN_OFFSET,
            SCALE_OFFSET, SCALE_BYTES, BLOCK, WIDTH, END, MAIN, TAIL, BH, BK,
        )  # fmt: skip
    if SECOND != 0:
        lo, hi = lo - blocks_a * BK, hi - blocks_a * BK
        base = _base(rows_b, t, SECOND_EACH)
        for k0 in range(tl.maximum(lo, 0), tl.minimum(hi, count_b), BK):
            slot, ok = _slots(start_b, stride_b, begin_b, count_b, t, k0 + k, SECOND)
            top, total, acc = _fold(
                top, total, acc, main, tail, base, slot, ok, scale, CODE_BITS, ROW_BYTES, CODED, PLAIN_OFFSET,
                SCALE_OFFSET, SCALE_BYTES, BLOCK, WIDTH, END, MAIN, TAIL, BH, BK,
            )  # fmt: skip
    if WHOLE:
        if HAS_SINK:
            sink = tl.load(sinks + h, mask=h < H, other=0.0) * 1.4426950408889634
            new_top = tl.maximum(top, sink)
            acc *= tl.exp2(top - new_top)[:, None]
            total = total * tl.exp2(top - new_top) + tl.exp2(sink - new_top)
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        if PAIRS:
            acc = _turned(acc, tl.load(positions + t), frequencies, BH, MAIN, VALUES, PAIRS)
        tl.store(out + line * VALUES + d[None, :], acc, mask=mine & (d < VALUES)[None, :])
    else:
        place = (t.to(tl.int64) * tl.num_programs(2) + s) * H + h
        divisor = tl.where(total == 0.0, 1.0, total)
        acc = acc / divisor[:, None]
        weight = tl.where(total == 0.0, -float("inf"), tl.where(top == -float("inf"), 0.0, top) + tl.log2(divisor))
        tl.store(out + place[:, None] * VALUES + d[None, :], acc, mask=mine & (d < VALUES)[None, :])
        tl.store(lse + place, weight, mask=h < H)


@triton.jit(do_not_specialize=["splits"])
def _merge(
    partial, lse, sinks, positions, frequencies, out, splits,
    LANES: tl.constexpr, H: tl.constexpr, MAIN: tl.constexpr, PAIRS: tl.constexpr, VALUES: tl.constexpr,
    HAS_SINK: tl.constexpr,
):  # fmt: skip
    """The parts of one head of one query, and the sink, which has a share but no value."""
    t, h = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, LANES), tl.arange(0, MAIN)
    first = t.to(tl.int64) * splits
    weight = tl.load(lse + (first + s) * H + h, mask=s < splits, other=-float("inf"))
    top = tl.max(weight, 0)
    if HAS_SINK:
        sink = tl.load(sinks + h) * 1.4426950408889634
        top = tl.maximum(top, sink)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp2(weight - top), 0)
    if HAS_SINK:
        total += tl.exp2(sink - top)
    acc = tl.zeros([1, MAIN], tl.float32)
    for i in range(0, splits):
        share = tl.exp2(tl.load(lse + (first + i) * H + h) - top)
        row = tl.load(partial + ((first + i) * H + h) * VALUES + d[None, :], mask=(d < VALUES)[None, :], other=0.0)
        acc += row * share
    acc = acc / tl.where(total == 0.0, 1.0, total)
    if PAIRS:
        acc = _turned(acc, tl.load(positions + t), frequencies, 1, MAIN, VALUES, PAIRS)
    place = (t.to(tl.int64) * H + h) * VALUES
    tl.store(out + place + d[None, :], acc, mask=(d < VALUES)[None, :])
