"""Bytes and offsets of the weight formats and of the rows of a session's memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.formats import (
    BF16,
    E2M1_VALUES,
    F32,
    FP8_BLOCK,
    FP8_BLOCK_F32,
    I64,
    MXFP4,
    RowLayout,
    WeightFormat,
    exact_layout,
    index_key_fp4,
    index_key_fp8,
    kv_row_v4,
    kv_row_v32,
)


@pytest.mark.parametrize(
    ("form", "stored", "scales", "num_bytes"),
    [
        (F32, (300, 160), None, 192_000),
        (BF16, (300, 160), None, 96_000),
        (I64, (300, 160), None, 384_000),
        (FP8_BLOCK, (300, 160), (3, 2), 48_006),
        (FP8_BLOCK_F32, (300, 160), (3, 2), 48_024),
        (MXFP4, (300, 80), (300, 5), 25_500),
    ],
    ids=lambda value: value.name if isinstance(value, WeightFormat) else "",
)
def test_a_matrix_in_each_format(
    form: WeightFormat, stored: tuple[int, ...], scales: tuple[int, int] | None, num_bytes: int
) -> None:
    assert form.stored_shape((300, 160)) == stored
    assert form.scale_shape((300, 160)) == scales
    assert form.bytes_of((300, 160)) == num_bytes


def test_a_vector_has_no_scales() -> None:
    assert BF16.stored_shape((7,)) == (7,)
    assert BF16.bytes_of((7,)) == 14


def test_wo_a_of_flash() -> None:
    assert FP8_BLOCK.scale_shape((8192, 4096)) == (64, 32)  # spec 3.1


def test_the_values_of_e2m1() -> None:
    """Sign aside, a code is two bits of exponent with bias 1 and one bit of mantissa; 0 and 1 are subnormal."""
    normal = [(1 + m / 2) * 2.0 ** (e - 1) for e in (1, 2, 3) for m in (0, 1)]
    assert list(E2M1_VALUES) == [0.0, 0.5, *normal]


@pytest.mark.parametrize(
    ("layout", "row_bytes", "plain_offset", "scale_offset", "num_scales"),
    [
        (kv_row_v4(512, 64), 584, 448, 576, 7),
        (index_key_fp4(128), 68, 68 - 4, 64, 4),
        (kv_row_v32(512, 64), 656, 528, 512, 4),
        (index_key_fp8(128), 132, 128, 128, 1),
    ],
    ids=lambda value: value.name if isinstance(value, RowLayout) else "",
)
def test_rows_as_deployed(
    layout: RowLayout, row_bytes: int, plain_offset: int, scale_offset: int, num_scales: int
) -> None:
    assert layout.row_bytes == row_bytes
    assert (layout.plain_offset, layout.scale_offset) == (plain_offset, scale_offset)
    assert layout.num_scales == num_scales


def test_rows_are_padded_to_their_alignment() -> None:
    assert kv_row_v4(512, 64).width == 512
    assert 448 + 2 * 64 + 7 == 583  # the eighth byte behind the scales is padding
    assert kv_row_v4(128, 64).row_bytes == 200  # 64 + 128 + 1 = 193


@given(st.integers(1, 600), st.integers(0, 64), st.booleans())
def test_parts_of_a_row_never_overlap(coded: int, half_plain: int, scales_last: bool) -> None:
    layout = RowLayout("row", coded, 2 * half_plain, scales_last=scales_last)
    plain = range(layout.plain_offset, layout.plain_offset + 2 * layout.plain)
    scales = range(layout.scale_offset, layout.scale_offset + layout.num_scales)
    covered = sorted([*range(layout.code_bytes), *plain, *scales])
    assert covered == list(range(layout.row_bytes))


@given(st.integers(1, 600), st.integers(0, 64))
def test_the_exact_row_is_float32(coded: int, plain: int) -> None:
    exact = exact_layout(RowLayout("row", coded, plain))
    assert exact.row_bytes == 4 * (coded + plain)
    assert exact.num_scales == 0
