"""Why a V4 model is cheaper than V3.2: the saving shared out among its causes.

Each cause is a switch from the base's way to the target's. A cause's share is its Shapley value: the saving it brings,
averaged over every order in which the switches may be thrown; the shares add up to the whole saving. Undoing one
switch of the finished model (`variants.UNDONE`) answers another question and may even have the other sign.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tenfold.errors import UsageError
from tenfold.planner.anatomy import Anatomy, AttentionKind
from tenfold.planner.memory import kv_bytes
from tenfold.planner.work import FP8_EQUIVALENT, Counting, step_work, total_flops

__all__ = ["Share", "flops_shares", "kv_shares", "shapley"]

FLOPS_CAUSES = {
    "csa": "CSA: the indexer scores compressed keys",
    "fp4": "indexer in fp4",
    "hybrid": "hybrid: HCA in the other layers, no indexer there",
    "topk": "smaller top-k (with the window)",
    "heads": "heads and their geometry",
    "backbone": "backbone (projections, experts, hyper-connections, compressor, head)",
    "depth": "depth",
}
KV_CAUSES = {
    "csa": "CSA: fewer entries and index keys",
    "hybrid": "hybrid: HCA in the other layers, no index keys there",
    "layout": "entry layout",
    "fp4": "index keys in fp4",
    "fixed": "window and compressor state",
    "depth": "depth",
}


@dataclass(frozen=True, slots=True)
class Share:
    """What one cause saves, in the unit of what was compared, and as a share of the whole saving."""

    cause: str
    saved: float
    share: float


def shapley(switches: Sequence[str], cost: Callable[[frozenset[str]], float]) -> dict[str, float]:
    """How far each switch lowers `cost`, averaged over all orders of throwing them."""
    costs = {frozenset(on): cost(frozenset(on)) for n in range(len(switches) + 1)
             for on in itertools.combinations(switches, n)}  # fmt: skip
    saved = dict.fromkeys(switches, 0.0)
    for on, before in costs.items():
        orders = math.factorial(len(on)) * math.factorial(len(switches) - len(on) - 1) if len(on) < len(switches) else 0
        for switch in switches:
            if switch not in on:
                saved[switch] += orders / math.factorial(len(switches)) * (before - costs[on | {switch}])
    return saved


def flops_shares(base: Anatomy, target: Anatomy, context: int, counting: Counting = FP8_EQUIVALENT) -> list[Share]:
    """Shares in the FLOPs of the token that makes the context `context` long; largest first."""
    _check(base, target)

    def cost(on: frozenset[str]) -> float:
        return total_flops(step_work(_mixed(base, target, on), context - 1, 1), counting)

    return _shares(_switches(FLOPS_CAUSES, base, target), cost)


def kv_shares(base: Anatomy, target: Anatomy, context: int) -> list[Share]:
    """Shares in the bytes of a session of `context` tokens; largest first."""
    _check(base, target)

    def cost(on: frozenset[str]) -> float:
        mixed = _mixed(base, target, on)
        growing = replace(mixed, attention=tuple(replace(k, window=0, state_bytes=0) for k in mixed.attention))
        return kv_bytes(growing, context) + (_fixed_bytes(base, target, on) if "fixed" in on else 0)

    return _shares(_switches(KV_CAUSES, base, target), cost)


def _check(base: Anatomy, target: Anatomy) -> None:
    if len(base.attention) != 1 or not base.attention[0].index_heads or base.attention[0].ratio != 1:
        raise UsageError(f"the saving is explained against V3.2's architecture, not {base.name}; use --against v3.2")
    if sum(1 for kind in target.attention if kind.index_heads) != 1 or target.attention == base.attention:
        raise UsageError(
            f"the saving is explained for V4's architecture, not {target.name}; compare v4-pro or v4-flash"
        )


def _switches(causes: dict[str, str], base: Anatomy, target: Anatomy) -> dict[str, str]:
    """Depth is a cause only where the models differ in it."""
    return {key: text for key, text in causes.items() if key != "depth" or base.layers != target.layers}


def _shares(switches: dict[str, str], cost: Callable[[frozenset[str]], float]) -> list[Share]:
    saved = shapley(tuple(switches), cost)
    whole = sum(saved.values())
    found = [Share(switches[key], amount, amount / whole if whole else 0.0) for key, amount in saved.items()]
    return sorted(found, key=lambda share: -share.saved)


def _scale(base: Anatomy, target: Anatomy, on: frozenset[str]) -> float:
    """Layers of the mixture over those of the target."""
    return 1.0 if "depth" in on else base.layers / target.layers


def _mixed(base: Anatomy, target: Anatomy, on: frozenset[str]) -> Anatomy:
    """The base with the switches in `on` thrown. The window comes with the hybrid or with the smaller top-k."""
    scale, old = _scale(base, target, on), base.attention[0]
    new = next(kind for kind in target.attention if kind.index_heads)
    heads, rows = new if "heads" in on else old, new if "layout" in on else old
    index = new if "fp4" in on else old

    def shaped(kind: AttentionKind, layers: float) -> AttentionKind:
        return replace(
            kind,
            layers=layers,
            heads=heads.heads,
            key_width=heads.key_width,
            value_width=heads.value_width,
            row_bytes=rows.row_bytes,
        )

    sparse = replace(
        new,
        ratio=new.ratio if "csa" in on else old.ratio,
        topk=new.topk if "topk" in on else old.topk,
        window=new.window if on & {"hybrid", "topk"} else old.window,
        index_heads=index.index_heads,
        index_dim=index.index_dim,
        index_row_bytes=index.index_row_bytes,
        index_precision=index.index_precision,
    )
    if "hybrid" in on:
        others = [shaped(kind, kind.layers * scale) for kind in target.attention if kind is not new]
        kinds = (shaped(sparse, new.layers * scale), *others)
    else:
        kinds = (shaped(sparse, target.layers * scale),)
    return replace(target, matrices=(target if "backbone" in on else base).matrices, attention=kinds)


def _fixed_bytes(base: Anatomy, target: Anatomy, on: frozenset[str]) -> float:
    """The target's windows and state, in the mixture's number of layers and entry layout."""
    row_bytes = (target if "layout" in on else base).attention[0].row_bytes
    per_layer = (kind.layers * (kind.window * row_bytes + kind.state_bytes) for kind in target.attention)
    return _scale(base, target, on) * sum(per_layer)
