"""Quantised matrices: every code, every tie, every scale, and the way back."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tenfold.errors import InputError
from tenfold.formats import BF16, E2M1_VALUES, F32, FP8_BLOCK, FP8_BLOCK_F32, I64, MXFP4, WeightFormat
from tenfold.ops.reference import dequantize
from tenfold.quantise import fp8_block, mxfp4, quantize, scale_bytes, scale_values

E4M3_CODES = [code for code in range(256) if code & 0x7F != 0x7F]


def e4m3(code: int) -> float:
    """The number a code means, from its bits: sign, 4 of exponent with bias 7, 3 of mantissa."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -size if code & 128 else size


def e2m1(code: int) -> float:
    return -E2M1_VALUES[code & 7] if code & 8 else E2M1_VALUES[code]


def test_every_e4m3_code_survives() -> None:
    row = torch.zeros(1, 256)
    row[0, : len(E4M3_CODES)] = torch.tensor([e4m3(code) for code in E4M3_CODES])
    codes, scales = fp8_block(row)  # two blocks, the first holds 448, the second -448
    assert scales.tolist() == [[127, 127]]
    assert codes[0, : len(E4M3_CODES)].tolist() == E4M3_CODES


def test_e4m3_ties_go_to_the_even_code() -> None:
    below = [code for code in range(0x7E) if code + 1 < 0x7F]
    middles = [(e4m3(code) + e4m3(code + 1)) / 2 for code in below]
    row = torch.zeros(1, 256)
    row[0, : len(below)] = torch.tensor(middles)
    row[0, 128 : 128 + len(below)] = -torch.tensor(middles)
    row[0, [127, 255]] = 448.0
    codes = fp8_block(row)[0][0].tolist()
    even = [code + (code & 1) for code in below]
    assert codes[: len(below)] == even
    assert codes[128 : 128 + len(below)] == [code | 128 for code in even]


def test_e4m3_beside_a_tie() -> None:
    below = [code for code in range(0x7E) if code + 1 < 0x7F]
    middles = torch.tensor([(e4m3(code) + e4m3(code + 1)) / 2 for code in below])
    for towards, expected in ((0.0, below), (1000.0, [code + 1 for code in below])):
        row = torch.zeros(1, 128)
        row[0, : len(below)] = torch.nextafter(middles, torch.tensor(towards))
        row[0, 127] = 448.0
        assert fp8_block(row)[0][0, : len(below)].tolist() == expected


def test_every_e2m1_code_and_its_nibble() -> None:
    row = torch.tensor([[e2m1(code) for code in range(16)] * 2])
    packed, scales = mxfp4(row)
    assert scales.tolist() == [[127]]
    assert packed[0].tolist() == [low | (low + 1) << 4 for low in range(0, 16, 2)] * 2  # the first is the low nibble


def test_e2m1_ties_go_to_the_even_code() -> None:
    middles = [(low + high) / 2 for low, high in pairwise(E2M1_VALUES)]
    row = torch.zeros(1, 32)
    row[0, :7] = torch.tensor(middles)
    row[0, 7:14] = -torch.tensor(middles)
    row[0, 31] = 6.0
    assert nibbles(mxfp4(row)[0])[:14] == [0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14]


def nibbles(packed: Tensor) -> list[int]:
    return [code for octet in packed.flatten().tolist() for code in (octet & 15, octet >> 4)]


@pytest.mark.parametrize(("limit", "top"), [(448.0, 119), (6.0, 125)])
def test_scales_at_the_edge_of_every_binade(limit: float, top: int) -> None:
    """A largest magnitude of limit * scale takes that scale; the next number of bf16 takes the next scale."""
    exponents = range(-126, top)
    edges = torch.tensor([limit * 2.0**exponent for exponent in exponents])
    assert scale_bytes(edges, limit, 0.0).tolist() == [exponent + 127 for exponent in exponents]
    for more in (1 + 2.0**-7, 1.25, 1.5):
        assert scale_bytes(edges * more, limit, 0.0).tolist() == [exponent + 128 for exponent in exponents]


def test_floors() -> None:
    assert scale_bytes(torch.zeros(1), 448.0, 1e-4).tolist() == [127 + math.ceil(math.log2(1e-4 / 448))]
    assert fp8_block(torch.zeros(1, 1))[1].tolist() == [[127 - 22]]
    assert mxfp4(torch.zeros(1, 32))[1].tolist() == [[1]]  # 2^-126


def test_the_meaning_of_scale_bytes() -> None:
    values = scale_values(torch.arange(256, dtype=torch.uint8))
    assert values[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert values[255].isnan()


@pytest.mark.parametrize("shape", [(1, 1), (1, 128), (127, 129), (128, 128), (130, 257), (300, 64)])
def test_fp8_blocks_are_independent(shape: tuple[int, int]) -> None:
    """Each block as if it were alone, at the edges too, and as near as three bits of mantissa come."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator) * torch.exp(4 * torch.randn(shape[0], 1, generator=generator))
    codes, scales = fp8_block(matrix)
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows, columns = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            alone, scale = fp8_block(matrix[rows, columns])
            assert torch.equal(codes[rows, columns], alone)
            assert scales[i, j] == scale[0, 0]
            amax = float(matrix[rows, columns].abs().max())
            assert 224.0 < amax / 2.0 ** (int(scales[i, j]) - 127) <= 448.0
    back = dequantize(quantize("w", matrix, FP8_BLOCK))
    step = scale_values(scales).repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    assert ((back - matrix).abs() <= torch.maximum(matrix.abs() / 16, step * 2.0**-10)).all()


@given(st.integers(0, 2**32), st.integers(-100, 100))
def test_mxfp4_takes_the_nearest_value(seed: int, exponent: int) -> None:
    matrix = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    packed, scales = mxfp4(matrix)
    assert packed.shape == (3, 32)
    back = dequantize(quantize("w", matrix, MXFP4))
    grid = scale_values(scales)[:, :, None, None] * torch.tensor([e2m1(code) for code in range(16)])
    distance = (matrix.view(3, 2, 32, 1) - grid).abs().amin(-1).view(3, 64)
    assert torch.equal((back - matrix).abs(), distance)


@pytest.mark.parametrize("form", [F32, BF16, FP8_BLOCK, FP8_BLOCK_F32, MXFP4], ids=lambda form: form.name)
def test_what_was_quantised_stays_as_it_is(form: WeightFormat) -> None:
    matrix = torch.randn(160, 96, generator=torch.Generator().manual_seed(3))
    once = dequantize(quantize("w", matrix, form))
    twice = quantize("w", once, form)
    assert torch.equal(dequantize(twice), once)
    assert (twice.name, twice.shape, twice.format) == ("w", (160, 96), form)
    assert twice.data.shape == form.stored_shape((160, 96))
    assert (None if twice.scale is None else tuple(twice.scale.shape)) == form.scale_shape((160, 96))


def test_scales_in_float32_mean_the_same() -> None:
    matrix = torch.randn(130, 130, generator=torch.Generator().manual_seed(4))
    one, other = quantize("w", matrix, FP8_BLOCK), quantize("w", matrix, FP8_BLOCK_F32)
    assert other.scale is not None
    assert other.scale.dtype == torch.float32
    assert torch.equal(dequantize(one), dequantize(other))


def test_bf16_matrices_are_welcome() -> None:
    matrix = torch.randn(4, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    for quantised in (fp8_block, mxfp4):
        for one, other in zip(quantised(matrix), quantised(matrix.float()), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_diverged_matrix_is_refused(bad: float) -> None:
    matrix = torch.zeros(2, 64)
    matrix[1, 3] = bad
    for quantised in (fp8_block, mxfp4):
        with pytest.raises(InputError, match="NaN or infinity"):
            quantised(matrix)


def test_shapes_and_formats_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="multiple of 32"):
        mxfp4(torch.zeros(2, 48))
    with pytest.raises(InputError, match=r"norm.*cannot be stored as fp8"):
        quantize("norm", torch.zeros(128), FP8_BLOCK)
    with pytest.raises(InputError, match="cannot be stored as i64"):
        quantize("w", torch.zeros(2, 2), I64)
