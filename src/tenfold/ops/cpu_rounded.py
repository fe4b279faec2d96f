"""The native CPU backend with activations rounded where that is faster: `rounded` of `ops/cpu_linear.py`.

What deployed numerics run: nearer to float32 than the official inference's own rounding (docs/concepts/numerics.md).
Every other operation is that of `ops/cpu.py`.
"""

from __future__ import annotations

from functools import partial

from tenfold.ops import cpu_linear
from tenfold.ops.cpu import (
    compress,
    compress_step,
    dequantize,
    embed,
    hadamard,
    hc_collapse,
    hc_embed,
    hc_merge,
    hc_mix,
    layer_norm,
    look_up,
    norm_rope,
    norm_rope_pack,
    pack_rows,
    prepare,
    recordings,
    rms_norm,
    rope,
    rope_round,
    route,
    select_rows,
    sparse_attention,
    store_rows,
    unpack_rows,
)

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

linear = partial(cpu_linear.linear, rounded=True)
linear_each = partial(cpu_linear.linear_each, rounded=True)
grouped_linear = partial(cpu_linear.grouped_linear, rounded=True)
feed_forward = partial(cpu_linear.feed_forward, rounded=True)
experts = partial(cpu_linear.experts, rounded=True)
