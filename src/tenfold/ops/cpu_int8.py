"""The native CPU backend with activations rounded to int8, one scale per 32, wherever they meet MXFP4 weights.

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
    hc_merge,
    hc_mix,
    layer_norm,
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
    "hc_merge",
    "hc_mix",
    "layer_norm",
    "linear",
    "linear_each",
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

linear = partial(cpu_linear.linear, int8=True)
linear_each = partial(cpu_linear.linear_each, int8=True)
grouped_linear = partial(cpu_linear.grouped_linear, int8=True)
feed_forward = partial(cpu_linear.feed_forward, int8=True)
experts = partial(cpu_linear.experts, int8=True)
