"""Models that do not exist: one thing about a model undone, and the baselines it is compared with.

Each is an `Anatomy` made from another one. Knows nothing of how they are shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tenfold.planner.anatomy import Anatomy, AttentionKind

__all__ = ["UNDONE", "all_experts", "dense_mla", "gqa8", "with_attention_of", "without_absorption"]

_BF16_BYTES = 2
_GQA_GROUPS, _GQA_HEAD_DIM = 8, 128


def dense_mla(base: Anatomy) -> Anatomy:
    """V3.2 without its indexer, which is V3.1: every query attends to every row."""
    kinds = tuple(
        replace(kind, topk=None, index_heads=0, index_dim=0, index_row_bytes=0, name="mla") for kind in base.attention
    )
    matrices = tuple(part for part in base.matrices if not part.component.startswith("indexer"))
    return replace(base, name="dense MLA (V3.1)", matrices=matrices, attention=kinds)


def without_absorption(base: Anatomy, key_width: int, value_width: int) -> Anatomy:
    """Attention in full heads, as a prefill computes MLA where that is cheaper (192 and 128 for V3.1)."""
    kinds = tuple(replace(kind, key_width=key_width, value_width=value_width) for kind in base.attention)
    return replace(base, attention=kinds)


def gqa8(base: Anatomy) -> Anatomy:
    """The same model with 8 groups of keys and values of 128 channels in bf16, attended densely."""
    dense = dense_mla(base)
    row_bytes = 2 * _GQA_GROUPS * _GQA_HEAD_DIM * _BF16_BYTES
    kinds = tuple(
        replace(kind, key_width=_GQA_HEAD_DIM, value_width=_GQA_HEAD_DIM, row_bytes=row_bytes, name="gqa8")
        for kind in dense.attention
    )
    return replace(dense, name="GQA8 in bf16", attention=kinds)


def with_attention_of(backbone: Anatomy, attention: Anatomy) -> Anatomy:
    """The matrices of one model with the attention of another."""
    return replace(backbone, attention=attention.attention, name=f"{backbone.name} with {attention.name}'s attention")


def all_experts(base: Anatomy) -> Anatomy:
    """Every token through every expert: what the mixture of experts saves."""
    matrices = tuple(
        replace(part, multiply_adds=round(part.multiply_adds / part.share), share=1.0) for part in base.matrices
    )
    return replace(base, matrices=matrices)


def _each_indexed(change: Callable[[AttentionKind, Anatomy], AttentionKind]) -> Callable[[Anatomy, Anatomy], Anatomy]:
    """A change to the layers that have an indexer."""

    def made(model: Anatomy, base: Anatomy) -> Anatomy:
        kinds = tuple(change(kind, base) if kind.index_heads else kind for kind in model.attention)
        return replace(model, attention=kinds)

    return made


def _sparse_everywhere(model: Anatomy, ratio: int | None) -> Anatomy:
    """The indexed kind of layer in every layer."""
    sparse = next(kind for kind in model.attention if kind.index_heads)
    return replace(model, attention=(replace(sparse, layers=model.layers, ratio=ratio or sparse.ratio),))


def _with_heads(model: Anatomy, heads: int) -> Anatomy:
    return replace(model, attention=tuple(replace(kind, heads=heads) for kind in model.attention))


def _in_bf16(model: Anatomy) -> Anatomy:
    kinds = tuple(
        replace(kind, row_bytes=_BF16_BYTES * kind.key_width, index_row_bytes=_BF16_BYTES * kind.index_dim)
        for kind in model.attention
    )
    return replace(model, attention=kinds)


def _fp8_index(kind: AttentionKind, base: Anatomy) -> AttentionKind:
    return replace(kind, index_precision="fp8", index_row_bytes=_sparse(base).index_row_bytes)


def _sparse(base: Anatomy) -> AttentionKind:
    return next(kind for kind in base.attention if kind.index_heads)


UNDONE: dict[str, Callable[[Anatomy, Anatomy], Anatomy]] = {
    "indexer in fp8 instead of fp4": _each_indexed(_fp8_index),
    "index over uncompressed keys (ratio 1)": _each_indexed(lambda kind, base: replace(kind, ratio=1)),
    "CSA in every layer (no HCA, no window layers)": lambda model, base: _sparse_everywhere(model, None),
    "uncompressed sparse attention in every layer": lambda model, base: _sparse_everywhere(model, 1),
    "V3.2's top-k": _each_indexed(lambda kind, base: replace(kind, topk=_sparse(base).topk)),
    "V3.2's backbone": lambda model, base: replace(model, matrices=base.matrices),
    "all rows in bf16": lambda model, base: _in_bf16(model),
    "V3.2's number of heads": lambda model, base: _with_heads(model, base.attention[0].heads),
}
"""One thing about a V4 model undone, given the V3.2 model it is compared with."""
