"""The native CPU backend: every operation by a kernel, but V3.2's one layer norm.

Weights stay as they are stored. Knows nothing of layers; what each operation means is in `Ops`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tenfold.ops import Weight
from tenfold.ops.cpu_attention import (
    compress,
    compress_step,
    embed,
    hadamard,
    hc_collapse,
    hc_embed,
    hc_merge,
    hc_mix,
    look_up,
    norm_rope,
    norm_rope_pack,
    pack_rows,
    rms_norm,
    rope,
    rope_round,
    route_logits,
    select_rows,
    sparse_attention,
    store_rows,
    unpack_rows,
)
from tenfold.ops.cpu_graph import recordings
from tenfold.ops.cpu_linear import experts, feed_forward, grouped_linear, linear, linear_each, prepare
from tenfold.ops.reference import dequantize, layer_norm

__all__ = [
    "compress",
    "compress_step",
    "dequantize",
    "embed",
    "experts",
    "feed_forward",
    "grouped_linear",
    "hadamard",
    "hc_collapse",
    "hc_embed",
    "hc_merge",
    "hc_mix",
    "layer_norm",
    "linear",
    "linear_each",
    "look_up",
    "norm_rope",
    "norm_rope_pack",
    "pack_rows",
    "prepare",
    "recordings",
    "rms_norm",
    "rope",
    "rope_round",
    "route",
    "select_rows",
    "sparse_attention",
    "store_rows",
    "unpack_rows",
]


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
    return route_logits(
        linear(x, gate),
        scoring=scoring,
        topk=topk,
        scaling=scaling,
        bias=bias,
        chosen=chosen,
        groups=groups,
        topk_group=topk_group,
    )
