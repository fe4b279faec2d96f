"""Experts: tokens grouped by expert on the device, gate and up with the clamped SwiGLU, down, and the sum.

Four launches however many tokens and experts: five where a plan needs two, three for one token, which needs none, and
one less where the caller adds up. The shared expert runs beside the routed ones, in the same launches. A bank is a
table of addresses, so its weights may lie anywhere on the device. Weighs before the down projection always;
`weigh_first` would change nothing but rounding. Knows nothing of routing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.ops import Experts, Weight
from tenfold.ops.triton.linear import (
    AS_BF16,
    AS_F32,
    AS_FP8_F32,
    FEW_ROWS,
    Matrix,
    Tiles,
    accumulate,
    address,
    matrix,
    rounded,
    tiles,
)
from tenfold.ops.triton.lowp import INTERPRET, to_bf16
from tenfold.ops.triton.rows import rms_norm, vector

__all__ = ["bank_table", "experts", "experts_onto", "feed_forward", "feed_forward_onto"]

NO_FORMAT = tl.constexpr(-1)
_CHUNK = 256
"""Pairs of token and expert that one program of the plan puts in order."""


# ---------------------------------------------------------------------------------------------- the plan


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(ids, counts, pairs, EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """counts [chunks, BINS]: pairs of each expert in each chunk."""
    chunk = tl.program_id(0)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), _count(ids, chunk, pairs, EXPERTS, BINS, CHUNK))


@triton.jit
def _count(ids, chunk, pairs, EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr):
    expert = _experts_of(ids, chunk * CHUNK + tl.arange(0, CHUNK), pairs, EXPERTS)
    return tl.histogram(expert, BINS).to(tl.int32)


@triton.jit
def _experts_of(ids, pair, pairs, EXPERTS: tl.constexpr):
    """The pairs' experts, EXPERTS for none; an id out of range, which would read any memory, is drawn into it."""
    expert = tl.load(ids + pair, mask=pair < pairs, other=0).to(tl.int32)
    return tl.where(pair < pairs, tl.minimum(tl.maximum(expert, 0), EXPERTS - 1), EXPERTS)


@triton.jit(do_not_specialize=["pairs", "num_blocks"])
def plan_kernel(
    ids, counts, order, blocks, pairs, num_blocks,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr,
    ALONE: tl.constexpr, SLAB: tl.constexpr,
):  # fmt: skip
    """order [pairs]: pairs by expert; blocks [num_blocks, 3]: expert (-1: none), first place in order, count <= BM."""
    chunk = tl.program_id(0)
    bins = tl.arange(0, BINS)
    if ALONE:
        total = _count(ids, chunk, pairs, EXPERTS, BINS, CHUNK)
        before = tl.zeros([BINS], tl.int32)
    else:
        total = tl.zeros([BINS], tl.int32)
        before = tl.zeros([BINS], tl.int32)
        for other in range(0, tl.num_programs(0)):
            some = tl.load(counts + other * BINS + bins)
            total += some
            before += tl.where(other < chunk, some, 0)
    total = tl.where(bins < EXPERTS, total, 0)
    first = tl.cumsum(total, 0) - total
    block_end = tl.cumsum((total + BM - 1) // BM, 0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = _experts_of(ids, pair, pairs, EXPERTS)
    place = tl.gather(first + before, expert, 0)
    for start in range(0, CHUNK, SLAB):  # behind the pairs of the same expert that come earlier in the chunk
        earlier = chunk * CHUNK + start + tl.arange(0, SLAB)
        same = _experts_of(ids, earlier, pairs, EXPERTS)[None, :] == expert[:, None]
        place += tl.sum((same & (earlier[None, :] < pair[:, None])).to(tl.int32), 1)
    tl.store(order + place, pair, mask=pair < pairs)
    for start in range(chunk * SLAB, num_blocks, tl.num_programs(0) * SLAB):
        block = start + tl.arange(0, SLAB)
        owner = tl.sum((block_end[None, :] <= block[:, None]).to(tl.int32), 1)
        found = owner < EXPERTS
        owner = tl.minimum(owner, BINS - 1)
        skipped = (block - tl.gather(block_end - (total + BM - 1) // BM, owner, 0)) * BM
        line = blocks + 3 * block
        tl.store(line, tl.where(found, owner, -1), mask=block < num_blocks)
        tl.store(line + 1, tl.gather(first, owner, 0) + skipped, mask=block < num_blocks)
        tl.store(line + 2, tl.minimum(tl.gather(total, owner, 0) - skipped, BM), mask=block < num_blocks)


# ---------------------------------------------------------------------------------------------- the products


@triton.jit
def _product(
    x, x_ok, table, expert, place: tl.constexpr, row, row_ok,
    K: tl.constexpr, FORMAT: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    norm=None, eps=None,
):  # fmt: skip
    """`accumulate` with one of an expert's three matrices; `place` is twice its number."""
    at = expert * 6 + place
    if FORMAT == AS_F32:
        codes = address(table, at, tl.float32)
        scale = codes
    elif FORMAT == AS_BF16:
        codes = address(table, at, tl.bfloat16)
        scale = codes
    elif FORMAT == AS_FP8_F32:
        codes = address(table, at, tl.uint8)
        scale = address(table, at + 1, tl.float32)
    else:
        codes = address(table, at, tl.uint8)
        scale = address(table, at + 1, tl.uint8)
    return accumulate(x, x_ok, codes, scale, row, row_ok, K, FORMAT, PARTS, BM, BN, BK, norm, eps)


@triton.jit
def _gated_tile(
    x, norm, eps, token, ok, weight, table, expert, out, out_row, inner, limit,
    NORMED: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, LIMITED: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """weight * silu(gate) * up of some rows and columns, to out [rows, inner]."""
    column = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    xs = x + token * K
    factors, small = None, None
    if NORMED:
        factors, small = norm, eps
    gate = _product(xs, ok, table, expert, 0, column, column < inner, K, FORMAT, PARTS, BM, BN, BK, factors, small)
    up = _product(xs, ok, table, expert, 4, column, column < inner, K, FORMAT, PARTS, BM, BN, BK, factors, small)
    if LIMITED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    y = gate / (1.0 + tl.exp(-gate)) * up * weight[:, None]
    if out.dtype.element_ty == tl.bfloat16:  # what the down projection would round
        y = to_bf16(y)
    tl.store(out + (out_row * inner)[:, None] + column[None, :], y, mask=ok[:, None] & (column < inner)[None, :])


@triton.jit
def _pairs_of(ids, order, blocks, block, EXPERTS: tl.constexpr, DIRECT: tl.constexpr, BM: tl.constexpr):
    """The expert of a block, -1 for none, its pairs and which of them are there. DIRECT: each pair is a block."""
    m = tl.arange(0, BM)
    if DIRECT:
        expert = tl.minimum(tl.maximum(tl.load(ids + block).to(tl.int32), 0), EXPERTS - 1)
        ok = m < 1
        pair = m * 0 + block
    else:
        expert = tl.load(blocks + 3 * block)
        ok = m < tl.load(blocks + 3 * block + 2)  # of a block without expert none is
        pair = tl.load(order + tl.load(blocks + 3 * block + 1) + m, mask=ok, other=0)
    return expert, ok, pair


@triton.jit(do_not_specialize=["n", "num_blocks", "inner", "shared_inner"])
def gate_up_kernel(
    x, norm, eps, weights, table, ids, order, blocks, out, shared_table, shared_out, n, num_blocks, inner,
    shared_inner, limit,
    TOPK: tl.constexpr, EXPERTS: tl.constexpr, DIRECT: tl.constexpr, NORMED: tl.constexpr,
    K: tl.constexpr, LIMITED: tl.constexpr, PARTS: tl.constexpr,
    FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [n * TOPK, inner] of the routed experts, shared_out [n, shared_inner] of the shared one, in later blocks.

    NORMED: of x normed as by `rms_norm`.
    """
    block = tl.program_id(0)
    m = tl.arange(0, BM)
    if FORMAT != NO_FORMAT:
        if block < num_blocks:
            expert, ok, pair = _pairs_of(ids, order, blocks, block, EXPERTS, DIRECT, BM)
            if expert >= 0:
                weight = tl.load(weights + pair, mask=ok, other=0.0)
                _gated_tile(
                    x, norm, eps, (pair // TOPK).to(tl.int64), ok, weight, table, expert, out, pair.to(tl.int64),
                    inner, limit, NORMED, K, FORMAT, LIMITED, PARTS, BM, BN, BK,
                )  # fmt: skip
    if SHARED_FORMAT != NO_FORMAT:
        if block >= num_blocks:
            token = ((block - num_blocks) * BM + m).to(tl.int64)
            one = tl.full([BM], 1.0, tl.float32)
            _gated_tile(
                x, norm, eps, token, token < n, one, shared_table, 0, shared_out, token, shared_inner, limit,
                NORMED, K, SHARED_FORMAT, LIMITED, PARTS, BM, BN, BK,
            )  # fmt: skip


@triton.jit
def _down_tile(
    x, row, ok, table, expert, out, out_row, hidden,
    K: tl.constexpr, FORMAT: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    column = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    inside = column < hidden
    y = _product(x + row * K, ok, table, expert, 2, column, inside, K, FORMAT, PARTS, BM, BN, BK)
    tl.store(out + (out_row * hidden)[:, None] + column[None, :], y, mask=ok[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["n", "num_blocks", "hidden"])
def down_kernel(
    gated, table, ids, order, blocks, out, shared_gated, shared_table, n, num_blocks, hidden,
    TOPK: tl.constexpr, LINES: tl.constexpr, EXPERTS: tl.constexpr, DIRECT: tl.constexpr,
    K: tl.constexpr, SHARED_K: tl.constexpr, FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [n, LINES, hidden]: the down projections of what `gate_up_kernel` made, the shared expert's last."""
    block = tl.program_id(0)
    m = tl.arange(0, BM)
    if FORMAT != NO_FORMAT:
        if block < num_blocks:
            expert, ok, short = _pairs_of(ids, order, blocks, block, EXPERTS, DIRECT, BM)
            if expert >= 0:
                pair = short.to(tl.int64)
                line = pair // TOPK * LINES + pair % TOPK
                _down_tile(gated, pair, ok, table, expert, out, line, hidden, K, FORMAT, PARTS, BM, BN, BK)
    if SHARED_FORMAT != NO_FORMAT:
        if block >= num_blocks:
            token = ((block - num_blocks) * BM + m).to(tl.int64)
            _down_tile(
                shared_gated, token, token < n, shared_table, 0, out, token * LINES + LINES - 1, hidden,
                SHARED_K, SHARED_FORMAT, PARTS, BM, BN, BK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["numbers", "hidden"])
def sum_kernel(y, before, out, numbers, hidden, ADDED: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """out [n, hidden]: the sum over y [n, LINES, hidden], and with ADDED what stands in `before`."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < numbers
    first = i // hidden * LINES * hidden + i % hidden
    total = tl.load(y + first, mask=ok, other=0.0)
    for line in tl.static_range(1, LINES):
        total += tl.load(y + first + line * hidden, mask=ok, other=0.0)
    if ADDED:
        total += tl.load(before + i, mask=ok, other=0.0)
    tl.store(out + i, total, mask=ok)


# ---------------------------------------------------------------------------------------------- launching


@dataclass(frozen=True, slots=True, eq=False)
class _Bank:
    """Experts that were checked: int64 [experts, 6] addresses of codes and scales of w1, w2, w3."""

    table: Tensor
    count: int
    gate_format: int
    down_format: int
    hidden: int
    inner: int


_banks: WeakKeyDictionary[Experts, _Bank] = WeakKeyDictionary()
_blocks: WeakKeyDictionary[Weight, tuple[tuple[tuple[int, int], ...], _Bank]] = WeakKeyDictionary()


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    bank: Experts,
    *,
    limit: float | None,
    weigh_first: bool,
    shared: Experts | None = None,
    parts: int,
    summed: bool = True,
) -> Tensor:
    """Not `summed`: [n, experts of a token, hidden], the shared one last, to be added up."""
    y = _of_each(x, ids, weights, bank, shared, limit, parts)
    return _sum(y) if summed else y


def experts_onto(
    x: Tensor,
    norm: Weight,
    eps: float,
    ids: Tensor,
    weights: Tensor,
    bank: Experts,
    *,
    limit: float | None,
    weigh_first: bool,
    shared: Experts | None = None,
    parts: int,
) -> Tensor:
    """x, and `experts` of x normed as by `rms_norm`."""
    return _sum(_of_each(x, ids, weights, bank, shared, limit, parts, norm, eps), x)


def _of_each(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    bank: Experts,
    shared: Experts | None,
    limit: float | None,
    parts: int,
    norm: Weight | None = None,
    eps: float = 0.0,
) -> Tensor:
    ready, beside = _bank(bank, x.device), None if shared is None else _bank(shared, x.device)
    if x.dim() != 2 or x.shape[1] != ready.hidden or (beside is not None and beside.hidden != ready.hidden):
        raise ValueError(f"x: expected rows of {ready.hidden}, also for the shared expert, got {tuple(x.shape)}")
    if ids.shape != weights.shape or ids.shape[:1] != x.shape[:1]:
        raise ValueError(f"ids, weights: expected [{x.shape[0]}, topk], got {tuple(ids.shape)}, {tuple(weights.shape)}")
    return _through(x, ids.contiguous(), weights.contiguous(), ready, beside, limit, parts, norm, eps)


def feed_forward(x: Tensor, w1: Weight, w2: Weight, w3: Weight, limit: float | None, *, parts: int) -> Tensor:
    """Every token through one expert: the shared part of `experts` alone."""
    return _alone(x, w1, w2, w3, limit, parts)[:, 0]


def feed_forward_onto(
    x: Tensor, norm: Weight, eps: float, w1: Weight, w2: Weight, w3: Weight, limit: float | None, *, parts: int
) -> Tensor:
    """x, and `feed_forward` of x normed as by `rms_norm`."""
    return _sum(_alone(x, w1, w2, w3, limit, parts, norm, eps), x)


def _alone(
    x: Tensor,
    w1: Weight,
    w2: Weight,
    w3: Weight,
    limit: float | None,
    parts: int,
    norm: Weight | None = None,
    eps: float = 0.0,
) -> Tensor:
    bank = _block(w1, w2, w3, x.device)
    if x.dim() != 2 or x.shape[1] != bank.hidden:
        raise ValueError(f"x: expected rows of {bank.hidden}, got {tuple(x.shape)}")
    none = torch.empty(x.shape[0], 0, dtype=torch.int64, device=x.device)
    return _through(x, none, x, None, bank, limit, parts, norm, eps)


def _through(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    bank: _Bank | None,
    shared: _Bank | None,
    limit: float | None,
    parts: int,
    norm: Weight | None,
    eps: float,
) -> Tensor:
    """The launches: [n, experts of a token, hidden]. Where a bank is missing, the other stands for it: no block and no
    format uses it. With `norm` of x normed, for few rows in the same launches."""
    if norm is not None and x.shape[0] > FEW_ROWS:
        x, norm = rms_norm(x, norm, eps), None
    n, topk = ids.shape
    lines = topk + (shared is not None)
    out = torch.empty(n, lines, x.shape[1], device=x.device)
    if n == 0:
        return out
    routed, beside = bank or shared, shared or bank
    assert routed is not None
    assert beside is not None
    t = _tiles(n, topk, routed, beside)
    direct = n == 1  # all its experts are different ones
    order, blocks = (ids, ids) if direct else _plan(ids, 0 if bank is None else bank.count, t.m)
    num_blocks, num_shared = topk if direct else blocks.shape[0], n if shared is not None else 0
    choices = max(topk, 1), routed.count, direct
    grid_rows = num_blocks + triton.cdiv(num_shared, t.m)
    formats = [NO_FORMAT.value if each is None else each.gate_format for each in (bank, shared)]
    down_formats = [NO_FORMAT.value if each is None else each.down_format for each in (bank, shared)]
    plain = AS_F32.value in formats + down_formats  # an f32 weight gets activations as they are
    stored = torch.float32 if parts == 3 or plain else torch.bfloat16
    gated = torch.empty(n * topk, routed.inner, dtype=stored, device=x.device)
    shared_gated = torch.empty(num_shared, beside.inner, dtype=stored, device=x.device)
    given = rounded(x, 3 if plain else parts)
    factors = given if norm is None else vector(norm, (routed.hidden,))
    gate_up_kernel[grid_rows, triton.cdiv(max(routed.inner, beside.inner), t.n)](
        given, factors, eps, weights, routed.table, ids, order, blocks, gated, beside.table, shared_gated,
        n, num_blocks, routed.inner, beside.inner, 0.0 if limit is None else limit,
        *choices, norm is not None, routed.hidden, limit is not None, parts, *formats, *t.sizes, **t.options,
    )  # fmt: skip
    down_kernel[grid_rows, triton.cdiv(routed.hidden, t.n)](
        gated, routed.table, ids, order, blocks, out, shared_gated, beside.table, n, num_blocks, routed.hidden,
        choices[0], lines, *choices[1:], routed.inner, beside.inner, *down_formats, parts, *t.sizes, **t.options,
    )  # fmt: skip
    return out


def _sum(y: Tensor, before: Tensor | None = None) -> Tensor:
    n, lines, hidden = y.shape
    out, numbers = torch.empty(n, hidden, device=y.device), n * hidden
    if numbers:
        block = triton.next_power_of_2(numbers) if INTERPRET.value else 1024
        given = out if before is None else before.contiguous()
        sum_kernel[(triton.cdiv(numbers, block),)](y, given, out, numbers, hidden, before is not None, lines, block)
    return out


def _tiles(n: int, topk: int, routed: _Bank, beside: _Bank) -> Tiles:
    """As tall as an expert's share of the rows, so that few rows are empty."""
    share = max(1, n * topk // routed.count)
    formats = sum({1 << form for each in (routed, beside) for form in (each.gate_format, each.down_format)})
    t = tiles(min(n, share), max(routed.inner, beside.inner, routed.hidden), formats)
    return t if INTERPRET.value else replace(t, n=min(t.n, 64))  # gate and up are two sums


def _plan(ids: Tensor, count: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """Pairs in order of their experts, int32 [pairs], and the blocks of one expert each, int32 [blocks, 3].

    There is room for as many blocks as any choice of experts can need.
    """
    pairs = ids.numel()
    num_blocks = min(pairs, count + pairs // block_rows)
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    blocks = torch.empty(num_blocks, 3, dtype=torch.int32, device=ids.device)
    if pairs == 0:
        return order, blocks
    chunks, bins = triton.cdiv(pairs, _CHUNK), max(triton.next_power_of_2(count + 1), 16)
    counts = torch.empty(chunks if chunks > 1 else 0, bins, dtype=torch.int32, device=ids.device)
    if chunks > 1:
        count_kernel[(chunks,)](ids, counts, pairs, count, bins, _CHUNK)
    slab = _CHUNK if INTERPRET.value else 16
    plan_kernel[(chunks,)](
        ids, counts, order, blocks, pairs, num_blocks, count, bins, _CHUNK, block_rows, chunks == 1, slab
    )
    return order, blocks


# ---------------------------------------------------------------------------------------------- banks


def bank_table(bank: Experts, device: torch.device) -> Tensor:
    """Where the experts of a bank lie, int64 [experts, 6]; a line may be changed between passes."""
    return _bank(bank, device).table


def _bank(bank: Experts, device: torch.device) -> _Bank:
    """Checked once in a bank's life. The table holds addresses, which are good as long as the bank lives."""
    found = _banks.get(bank)
    if found is None:
        triples = zip(bank.w1, bank.w2, bank.w3, strict=True)
        matrices = [(matrix(w1), matrix(w2), matrix(w3)) for w1, w2, w3 in triples]
        found = _banks[bank] = _bank_of(matrices, device)
    return found


def _block(w1: Weight, w2: Weight, w3: Weight, device: torch.device) -> _Bank:
    """A gated block of its own as a bank of one expert."""
    triple = (matrix(w1), matrix(w2), matrix(w3))
    addresses = tuple(each.addresses for each in triple)
    found = _blocks.get(w1)
    if found is None or found[0] != addresses:
        found = _blocks[w1] = (addresses, _bank_of([triple], device))
    return found[1]


def _bank_of(triples: list[tuple[Matrix, Matrix, Matrix]], device: torch.device) -> _Bank:
    if not triples:
        raise ValueError("bank: expected at least one expert")
    gate, down, _ = triples[0]
    inner, hidden = gate.out_features, gate.in_features
    expected = ((gate.format, inner, hidden), (down.format, hidden, inner), (gate.format, inner, hidden))
    for expert, triple in enumerate(triples):
        for name, found, wanted in zip(("w1", "w2", "w3"), triple, expected, strict=True):
            if (found.format, found.out_features, found.in_features) != wanted:
                raise ValueError(f"bank: {name} of expert {expert} has another format or shape than in expert 0")
    lines = [[place for each in triple for place in each.addresses] for triple in triples]
    table = torch.tensor(lines, dtype=torch.int64).to(device)
    return _Bank(table, len(triples), gate.format, down.format, hidden, inner)
