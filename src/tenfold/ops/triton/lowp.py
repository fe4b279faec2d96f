"""Low-precision numbers inside kernels: exact on every GPU from Ampere on and in Triton's CPU interpreter.

The interpreter truncates f32 to bf16, loses carries when it rounds to e4m3 and multiplies bf16 bit patterns; the
compiler has no e4m3 type below sm_89. So kernels touch only uint8 codes and f16 or f32 values, through these helpers.
Knows nothing of formats beyond single numbers.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

__all__ = [
    "INTERPRET",
    "e2m1",
    "e2m1_code",
    "e4m3",
    "e4m3_code",
    "e8m0",
    "mm",
    "mm_f32",
    "mm_split",
    "pow2_ceil_scale",
    "pow2_inverse",
    "round_bf16",
    "round_e4m3",
    "to_bf16",
]

# The kernels were compiled and checked with products contracted; Triton 3.10 will change what it does unasked, and
# 3.9 warns of it at the first compile.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run in the interpreter: decided when triton is imported, by TRITON_INTERPRET."""


@triton.jit
def e8m0(code):
    """2^(code - 127) as f32, for codes 0 to 254."""
    wide = code.to(tl.uint32)
    return tl.where(wide == 0, 0x00400000, wide << 23).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def e4m3(code):
    """The number of an e4m3 code as f32; the two codes of NaN read as +-480."""
    wide = code.to(tl.uint16)
    # The same fields at f16's places: a number 2^-8 times as large, subnormals included.
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def e2m1(code):
    """The number of the e2m1 code in the low four bits as f32."""
    wide = code.to(tl.uint16)
    return (((wide & 8) << 12) | ((wide & 7) << 9)).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def round_e4m3(x):
    """The nearest e4m3 number, kept as f32: ties to even, +-448 beyond the range."""
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    bits = x.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    subnormal = (x + 24576.0) - 24576.0  # 1.5 * 2^14: its last place is 2^-9, e4m3's step below 2^-6
    return tl.where(tl.abs(x) < 0.015625, subnormal, normal)


@triton.jit
def e4m3_code(x, rounded):
    """The code of `rounded`, which is `round_e4m3(x)`; x gives the sign where that is zero."""
    bits = rounded.to(tl.uint32, bitcast=True)
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    normal = (((bits >> 20) & 0x7FF) - (120 << 3)) & 0x7F
    subnormal = (tl.abs(rounded) * 512.0).to(tl.uint32)
    return (sign | tl.where(tl.abs(rounded) < 0.015625, subnormal, normal)).to(tl.uint8)


@triton.jit
def e2m1_code(x):
    """The nearest e2m1 code of a number within +-6, ties to the even code."""
    size = tl.abs(x)
    code = (size > 0.25).to(tl.uint32) + (size >= 0.75).to(tl.uint32) + (size > 1.25).to(tl.uint32)
    code += (size >= 1.75).to(tl.uint32) + (size > 2.5).to(tl.uint32) + (size >= 3.5).to(tl.uint32)
    code += (size > 5.0).to(tl.uint32)
    return (code | ((x.to(tl.uint32, bitcast=True) >> 28) & 8)).to(tl.uint8)


@triton.jit
def pow2_ceil_scale(amax, INVERSE_LIMIT: tl.constexpr):
    """The least power of two of at least amax * INVERSE_LIMIT: as f32 and as an e8m0 code."""
    bits = (amax * INVERSE_LIMIT).to(tl.uint32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.uint32)
    return (exponent << 23).to(tl.float32, bitcast=True), exponent.to(tl.uint8)


@triton.jit
def pow2_inverse(scale):
    """1 / scale for powers of two: exact, where a GPU's own division may be off by a place."""
    return (0x7F000000 - scale.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def to_bf16(x):
    """x, f32, as bf16: nearest, ties to even."""
    if INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def round_bf16(x):
    """The bf16 number nearest to x, kept as f32."""
    if INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def mm(a, b, acc):
    """acc + a b on the bf16 matrix units, for tiles of numbers that are exact in bf16."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)


@triton.jit
def mm_split(x, w, acc, PARTS: tl.constexpr):
    """acc + x w, for w exact in bf16 and any f32 x: rounded to bf16 (PARTS 1) or as a sum of three, which is x."""
    high = round_bf16(x)
    acc = mm(high, w, acc)
    if PARTS == 3:
        rest = x - high
        middle = round_bf16(rest)
        acc = mm(middle, w, acc)
        acc = mm(rest - middle, w, acc)
    return acc


@triton.jit
def mm_f32(a, b, acc):
    """acc + a b for f32 tiles, to about f32's precision on the matrix units."""
    return tl.dot(a, b, acc, input_precision="tf32x3")
