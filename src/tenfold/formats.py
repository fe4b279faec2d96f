"""Number formats as data: bits, blocks, scales, and the bytes they need. Knows nothing of tensors.

Two families: `WeightFormat` is how a matrix lies in a checkpoint (spec 3.1), `RowLayout` how one row of a
session's memory lies in RAM and on disk (spec 2.11 and 5.6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

__all__ = [
    "BF16",
    "E2M1_VALUES",
    "F32",
    "FP8_BLOCK",
    "FP8_BLOCK_F32",
    "I64",
    "MXFP4",
    "RowLayout",
    "WeightFormat",
    "exact_layout",
    "index_key_fp4",
    "index_key_fp8",
    "kv_row_v4",
    "kv_row_v32",
]

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the eight e2m1 codes; codes 8-15 are the negatives."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How a weight lies in a safetensors file: dtype of the codes, and of one scale per `block`, if any."""

    name: str
    dtype: str
    bits: int
    block: tuple[int, int] | None = None
    scale_dtype: str | None = None

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the code tensor for a weight of `shape`; fp4 packs two inputs a byte."""
        if self.bits == 4:
            return (*shape[:-1], shape[-1] // 2)
        return tuple(shape)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """Shape of the scale tensor for a matrix of `shape` (out, in)."""
        if self.block is None:
            return None
        rows, columns = shape
        return ceil(rows / self.block[0]), ceil(columns / self.block[1])

    def bytes_of(self, shape: Sequence[int]) -> int:
        """Bytes of codes and scales of a weight of `shape`."""
        code_bytes = prod(shape) * self.bits // 8
        scales = self.scale_shape(shape)
        if scales is None:
            return code_bytes
        return code_bytes + prod(scales) * (4 if self.scale_dtype == "F32" else 1)


F32 = WeightFormat("f32", "F32", 32)
BF16 = WeightFormat("bf16", "BF16", 16)
I64 = WeightFormat("i64", "I64", 64)
FP8_BLOCK = WeightFormat("fp8", "F8_E4M3", 8, (128, 128), "F8_E8M0")
FP8_BLOCK_F32 = WeightFormat("fp8-f32scale", "F8_E4M3", 8, (128, 128), "F32")
MXFP4 = WeightFormat("mxfp4", "I8", 4, (1, 32), "F8_E8M0")


@dataclass(frozen=True, slots=True)
class RowLayout:
    """One row of a stream: `coded` quantised channels, then `plain` channels, with a scale per `block` channels.

    Byte order within a row: codes, then (`scales_last`) plain channels and scales, or scales and plain
    channels; zero padding up to `align`. `code_bits` 8 is e4m3, 4 is e2m1 (low nibble first), 32 is float32
    without scales. Scales are e8m0 (1 byte) or float32 powers of two (4 bytes). Plain channels are bf16.
    """

    name: str
    coded: int
    plain: int = 0
    code_bits: int = 8
    block: int = 64
    scale_bytes: int = 1
    scales_last: bool = True
    align: int = 1

    @property
    def width(self) -> int:
        """Channels of a row."""
        return self.coded + self.plain

    @property
    def num_scales(self) -> int:
        return 0 if self.code_bits == 32 else ceil(self.coded / self.block)

    @property
    def code_bytes(self) -> int:
        return self.coded * self.code_bits // 8

    @property
    def plain_offset(self) -> int:
        """Byte at which the bf16 channels start."""
        return self.code_bytes if self.scales_last else self.code_bytes + self.num_scales * self.scale_bytes

    @property
    def scale_offset(self) -> int:
        """Byte at which the scales start."""
        return self.code_bytes + 2 * self.plain if self.scales_last else self.code_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, padding included."""
        used = self.code_bytes + 2 * self.plain + self.num_scales * self.scale_bytes
        return ceil(used / self.align) * self.align


def kv_row_v4(head_dim: int, rope_dim: int) -> RowLayout:
    """V4's KV row: e4m3 in blocks of 64 with e8m0 scales, the rope channels bf16; 584 B at 512 channels."""
    return RowLayout("kv-e4m3-bf16", head_dim - rope_dim, rope_dim, block=64, align=8)


def index_key_fp4(head_dim: int) -> RowLayout:
    """V4's index key: e2m1 in blocks of 32 with e8m0 scales; 68 B at 128 channels."""
    return RowLayout("index-e2m1", head_dim, code_bits=4, block=32)


def kv_row_v32(latent_dim: int, rope_dim: int) -> RowLayout:
    """V3.2's latent row: e4m3 in blocks of 128 with float32 scales, then bf16 rope channels; 656 B at 512 + 64."""
    return RowLayout("mla-e4m3-bf16", latent_dim, rope_dim, block=128, scale_bytes=4, scales_last=False)


def index_key_fp8(head_dim: int) -> RowLayout:
    """V3.2's index key: e4m3 with one float32 scale a row; 132 B at 128 channels."""
    return RowLayout("index-e4m3", head_dim, block=head_dim, scale_bytes=4)


def exact_layout(layout: RowLayout) -> RowLayout:
    """The same row in float32, for `numerics="exact"`."""
    return RowLayout(f"{layout.name}-exact", layout.width, code_bits=32)
