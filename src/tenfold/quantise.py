"""Float matrices -> the codes and scales of a checkpoint (spec 2.10, 3.1); `reference.dequantize` leads back.

Knows nothing of files or models. Scales are powers of two: 2^ceil(log2(amax / limit)), where amax is the
largest magnitude of a block, but not less than the format's floor, and limit is 448 (e4m3) or 6 (e2m1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tenfold.errors import InputError
from tenfold.formats import BF16, F32, FP8_BLOCK, FP8_BLOCK_F32, MXFP4, WeightFormat
from tenfold.ops import Weight
from tenfold.ops.reference import e2m1_codes

__all__ = ["FP8_EDGE", "MXFP4_EDGE", "fp8_block", "mxfp4", "quantize", "scale_bytes", "scale_values"]

E4M3_LIMIT, E4M3_FLOOR = 448.0, 1e-4
E2M1_LIMIT, E2M1_FLOOR = 6.0, 6.0 * 2.0**-126
FP8_EDGE, MXFP4_EDGE = 128, 32


def quantize(name: str, matrix: Tensor, form: WeightFormat) -> Weight:
    """A float matrix (out, in) in any weight format but I64; vectors only in BF16 and F32."""
    shape = tuple(matrix.shape)
    if form in (F32, BF16):
        return Weight(name, shape, form, matrix.to(torch.float32 if form is F32 else torch.bfloat16))
    if matrix.dim() != 2 or form not in (FP8_BLOCK, FP8_BLOCK_F32, MXFP4):
        raise InputError(f"{name}: {list(shape)} cannot be stored as {form.name}; give a matrix and a float format")
    if form is MXFP4:
        return Weight(name, shape, form, *mxfp4(matrix))
    codes, scales = fp8_block(matrix)
    return Weight(name, shape, form, codes, scales if form is FP8_BLOCK else scale_values(scales))


def fp8_block(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> e4m3 codes [out, in] and e8m0 scales [ceil(out / 128), ceil(in / 128)], both uint8.

    Rounds to nearest, ties to the even code. NaN and infinity are refused.
    """
    rows, columns = matrix.shape
    padded = functional.pad(_finite(matrix), (0, -columns % FP8_EDGE, 0, -rows % FP8_EDGE))
    blocks = padded.unflatten(1, (-1, FP8_EDGE)).unflatten(0, (-1, FP8_EDGE))  # [R, 128, C, 128]
    scales = scale_bytes(blocks.abs().amax((1, 3)), E4M3_LIMIT, E4M3_FLOOR)
    scaled = (blocks / scale_values(scales)[:, None, :, None]).clamp(-E4M3_LIMIT, E4M3_LIMIT)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8).flatten(2, 3).flatten(0, 1)
    return codes[:rows, :columns].contiguous(), scales


def mxfp4(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> two e2m1 codes a byte [out, in / 2], low nibble first, and e8m0 scales [out, in / 32].

    Rounds to nearest, ties to the even code. NaN and infinity are refused, as is an input width that is no
    multiple of 32.
    """
    if matrix.shape[1] % MXFP4_EDGE:
        raise InputError(f"{matrix.shape[1]} inputs a row, expected a multiple of {MXFP4_EDGE} for MXFP4")
    blocks = _finite(matrix).unflatten(1, (-1, MXFP4_EDGE))  # [out, blocks, 32]
    scales = scale_bytes(blocks.abs().amax(2), E2M1_LIMIT, E2M1_FLOOR)
    scaled = (blocks / scale_values(scales)[:, :, None]).clamp(-E2M1_LIMIT, E2M1_LIMIT)
    codes = e2m1_codes(scaled.flatten(1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scales


def scale_bytes(amax: Tensor, limit: float, floor: float) -> Tensor:
    """e8m0 byte of 2^ceil(log2(amax / limit)), from the float32 bits: the exponent, plus 1 if a bit is set."""
    bits = (amax.float().clamp(min=floor) * torch.tensor(1.0 / limit, dtype=torch.float32)).view(torch.int32)
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).to(torch.uint8)


def scale_values(scales: Tensor) -> Tensor:
    """e8m0 bytes -> float32: byte b means 2^(b - 127); 0 is subnormal, 255 is NaN."""
    return torch.exp2(scales.double() - 127.0).float().masked_fill(scales == 255, float("nan"))


def _finite(matrix: Tensor) -> Tensor:
    if not torch.isfinite(matrix).all():
        raise InputError("the matrix holds NaN or infinity and cannot be quantised; look for the layer that diverged")
    return matrix.float()
