"""Bytes of a session's memory from an `Anatomy`: what grows, what stays, by component. Knows no machine."""

from __future__ import annotations

from tenfold.planner.anatomy import Anatomy

__all__ = ["kv_by_component", "kv_bytes", "kv_bytes_per_token", "kv_fixed_bytes"]


def kv_by_component(anatomy: Anatomy, tokens: int) -> dict[str, float]:
    """Bytes after `tokens` tokens under the names of `ModelConfig.kv_bytes`, whose sums they equal."""
    found: dict[str, float] = {}

    def add(component: str, num_bytes: float) -> None:
        if num_bytes:
            found[component] = found.get(component, 0) + num_bytes

    for kind in anatomy.attention:
        rows = tokens // kind.ratio if kind.ratio else 0
        add("mla" if kind.name == "dsa" else kind.name, kind.layers * rows * kind.row_bytes)
        add("index_keys", kind.layers * rows * kind.index_row_bytes)
        add("window", kind.layers * kind.window * kind.row_bytes)
        add("state", kind.layers * kind.state_bytes)
    return found


def kv_bytes(anatomy: Anatomy, tokens: int) -> float:
    """Bytes of one session after `tokens` tokens."""
    return sum(kv_by_component(anatomy, tokens).values())


def kv_fixed_bytes(anatomy: Anatomy) -> float:
    """Window rings and pending state: held from the start."""
    return kv_bytes(anatomy, 0)


def kv_bytes_per_token(anatomy: Anatomy) -> float:
    """What one more token adds in the long run."""
    kinds = (kind for kind in anatomy.attention if kind.ratio)
    return sum(kind.layers * (kind.row_bytes + kind.index_row_bytes) / kind.ratio for kind in kinds)
