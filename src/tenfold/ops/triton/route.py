"""The choice of experts: scores, groups, the best few, their weights. The gate's product is `linear`'s.

Always of unrounded activations: a rounded one may choose another expert. Knows nothing of experts.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from tenfold.ops import Weight
from tenfold.ops.triton.linear import linear, norm_linear
from tenfold.ops.triton.lowp import INTERPRET
from tenfold.ops.triton.rows import vector

__all__ = ["route"]


@triton.jit
def _scores(logits, SOFTPLUS: tl.constexpr):
    if SOFTPLUS:
        small = tl.exp(-tl.abs(logits))
        above = 1.0 + small
        # log1p: what rounding 1 + small lost is put back as a factor
        lost = tl.where(above == 1.0, 1.0, above - 1.0)
        return tl.sqrt(tl.maximum(logits, 0.0) + tl.where(above == 1.0, small, tl.log(above) * (small / lost)))
    else:
        return 1.0 / (1.0 + tl.exp(-logits))


@triton.jit(do_not_specialize=["n"])
def weigh_kernel(
    logits, ids, weights, n, scaling, EXPERTS: tl.constexpr, TOPK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Weights of experts that were chosen beforehand."""
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    choice = tl.arange(0, BK)
    known = (token < n)[:, None] & (choice < TOPK)[None, :]
    place = (token * TOPK)[:, None] + choice[None, :]
    expert = tl.load(ids + place, mask=known, other=0)
    expert = tl.minimum(tl.maximum(expert, 0), EXPERTS - 1)  # one that is not there would read any memory
    score = _scores(tl.load(logits + (token * EXPERTS)[:, None] + expert, mask=known, other=0.0), SOFTPLUS)
    score = tl.where(known, score, 0.0)
    total = tl.sum(score, 1)
    total = tl.where(token < n, total, 1.0)
    tl.store(weights + place, score / total[:, None] * scaling, mask=known)


@triton.jit(do_not_specialize=["n"])
def choose_kernel(
    logits, bias, ids, weights, n, scaling,
    BIASED: tl.constexpr, GROUPS: tl.constexpr, BG: tl.constexpr, EACH: tl.constexpr, BE: tl.constexpr,
    TOPK_GROUP: tl.constexpr, TOPK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The TOPK best of GROUPS groups of EACH experts, of equal ones the smaller; only from the best few groups."""
    token = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    place = tl.arange(0, BG * BE)
    group, within = place // BE, place % BE
    there = (group < GROUPS) & (within < EACH)
    expert = group * EACH + within
    known = (token < n)[:, None] & there[None, :]
    at = logits + (token * (GROUPS * EACH))[:, None] + expert[None, :]
    score = _scores(tl.load(at, mask=known, other=0.0), SOFTPLUS)
    rank = score
    if BIASED:
        rank = rank + tl.load(bias + expert, mask=there, other=0.0)[None, :]
    none = float("-inf")
    rank = tl.where(there[None, :], rank, none)
    if GROUPS > 1:
        grouped = tl.reshape(rank, [BT, BG, BE])
        best = tl.max(grouped, 2)
        e = tl.arange(0, BE)[None, None, :]
        first = tl.min(tl.where(grouped == best[:, :, None], e, BE), 2)
        second = tl.max(tl.where(e == first[:, :, None], none, grouped), 2)
        g = tl.arange(0, BG)[None, :]
        value = tl.where(g < GROUPS, best + second, none)
        kept = tl.zeros([BT, BG], tl.int32)
        for _ in tl.static_range(TOPK_GROUP):
            top = tl.max(value, 1)
            which = tl.min(tl.where((value == top[:, None]) & (kept == 0), g, BG), 1)
            kept = tl.where(g == which[:, None], 1, kept)
            value = tl.where(g == which[:, None], none, value)
        rank = tl.reshape(tl.where((kept == 1)[:, :, None], grouped, none), [BT, BG * BE])
    choice = tl.arange(0, BK)[None, :]
    chosen = tl.zeros([BT, BK], tl.int32)
    weight = tl.zeros([BT, BK], tl.float32)
    for i in tl.static_range(TOPK):
        top = tl.max(rank, 1)
        which = tl.min(tl.where(rank == top[:, None], place[None, :], BG * BE), 1)
        taken = place[None, :] == which[:, None]
        weight = tl.where(choice == i, tl.sum(tl.where(taken, score, 0.0), 1)[:, None], weight)
        chosen = tl.where(choice == i, (which // BE * EACH + which % BE)[:, None], chosen)
        rank = tl.where(taken, none, rank)
    weight = weight / tl.sum(weight, 1)[:, None] * scaling
    to = (token * TOPK)[:, None] + choice
    wanted = (token < n)[:, None] & (choice < TOPK)
    tl.store(ids + to, chosen.to(tl.int64), mask=wanted)
    tl.store(weights + to, weight, mask=wanted)


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
    norm: Weight | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """With `norm`: of x normed as by `rms_norm`."""
    logits = linear(x, gate, parts=3) if norm is None else norm_linear(x, norm, eps, gate, parts=3)
    n, experts = logits.shape
    if not 0 < topk <= experts // groups * topk_group or experts % groups:
        raise ValueError(f"topk: cannot choose {topk} of {experts} experts in {topk_group} of {groups} groups")
    if groups > 1 and (experts < 2 * groups or topk_group > groups):
        raise ValueError(f"groups: cannot choose {topk_group} of {groups} groups of {experts // groups} experts")
    softplus, block_topk = scoring == "sqrtsoftplus", triton.next_power_of_2(topk)
    tokens = min(triton.next_power_of_2(max(n, 1)), 256) if INTERPRET.value else 1
    weights = torch.empty(n, topk, device=x.device)
    ids = torch.empty(n, topk, dtype=torch.int64, device=x.device) if chosen is None else chosen.contiguous()
    if n == 0:
        return ids, weights
    grid = (triton.cdiv(n, tokens),)
    if chosen is not None:
        weigh_kernel[grid](logits, ids, weights, n, scaling, experts, topk, block_topk, tokens, softplus)
        return ids, weights
    each = experts // groups
    choose_kernel[grid](
        logits, logits if bias is None else vector(bias, (experts,)), ids, weights, n, scaling,
        bias is not None, groups, triton.next_power_of_2(groups), each, triton.next_power_of_2(each),
        topk_group, topk, block_topk, tokens, softplus,
    )  # fmt: skip
    return ids, weights
