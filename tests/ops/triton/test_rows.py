"""Norms, rotation, Hadamard and packed rows against the reference."""

from __future__ import annotations

import pytest
import torch
from tests.ops.cases import f32, randint, randn
from tests.ops.triton.card import on_card
from torch import Tensor

from tenfold.config import RopeSpec
from tenfold.formats import RowLayout, exact_layout, index_key_fp4, index_key_fp8, kv_row_v4, kv_row_v32
from tenfold.models.blocks import rope_frequencies
from tenfold.ops import reference
from tenfold.ops.triton import rows as kernels

turned = on_card(
    kernels, "hadamard", "layer_norm", "norm_rope", "norm_rope_pack", "pack_rows", "rms_norm", "rope", "rope_round",
    "unpack_rows",
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("poisoned")

LAYOUTS = (
    kv_row_v4(512, 64),
    kv_row_v4(40, 8),
    kv_row_v32(512, 64),
    kv_row_v32(96, 16),
    index_key_fp8(128),
    index_key_fp8(96),
    *(index_key_fp4(dim) for dim in (32, 128)),
)
layout_cases = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.name}-{layout.width}")
FREQUENCIES = rope_frequencies(RopeSpec(160000.0, 8))
EPS = 1e-6


def assert_near(found: Tensor, expected: Tensor, limit: float = 2e-6) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert not found.isnan().any()
    if expected.numel():
        assert (found - expected).abs().max() <= limit * expected.abs().max()


def positions(n: int) -> Tensor:
    return randint(0, 1 << 20, (n,))


@layout_cases
def test_rows_are_packed_to_the_byte(layout: RowLayout) -> None:
    x = randn(33, layout.width) * torch.logspace(-6, 4, 33)[:, None]
    x[0] = 0.0
    x[1] = -0.0
    packed = reference.pack_rows(x, layout)
    assert torch.equal(turned.pack_rows(x, layout), packed)
    assert torch.equal(turned.unpack_rows(packed, layout), reference.unpack_rows(packed, layout))
    assert turned.pack_rows(x[:0], layout).shape == (0, layout.row_bytes)
    assert torch.equal(turned.pack_rows(x.view(3, 11, -1), layout).view(packed.shape), packed)


@layout_cases
def test_every_code_is_unpacked(layout: RowLayout) -> None:
    packed = reference.pack_rows(randn(256, layout.width), layout)
    codes = torch.arange(256, dtype=torch.uint8)[:, None] + torch.arange(layout.code_bytes, dtype=torch.uint8)
    if layout.code_bits == 8:
        codes[(codes & 0x7F) == 0x7F] = 0
    packed[:, : layout.code_bytes] = codes
    assert torch.equal(turned.unpack_rows(packed, layout), reference.unpack_rows(packed, layout))


@layout_cases
@pytest.mark.parametrize("spread", [False, True])
def test_rows_normed_rotated_and_packed(layout: RowLayout, spread: bool) -> None:
    if (spread and layout.width & (layout.width - 1)) or (spread and layout.width > 128):
        pytest.skip("only the index keys, of a power of two, are spread")
    n = 70
    x, weight = randn(n, layout.width), f32(randn(layout.width, seed=1) + 1)
    words = (weight, EPS, positions(n), FREQUENCIES, layout, spread)
    found, expected = turned.norm_rope_pack(x, *words), reference.norm_rope_pack(x, *words)
    # A number next to a tie may be rounded to the other side: no more than one step, and that seldom.
    assert (found == expected).float().mean() > 0.999
    assert_near(reference.unpack_rows(found, layout), reference.unpack_rows(expected, layout), 0.26)
    turn = (positions(n), FREQUENCIES, layout, spread)
    found, expected = turned.rope_round(x, *turn), reference.rope_round(x, *turn)
    assert ((found - expected).abs() <= 2e-6 * expected.abs().max()).float().mean() > 0.999
    assert_near(found, expected, 0.26)
    exact = exact_layout(layout)
    x = turned.norm_rope_pack(x, weight, EPS, positions(n), FREQUENCIES, exact, spread)
    assert x.shape == (n, exact.row_bytes)


@pytest.mark.parametrize("n", [0, 1, 3, 63, 127, 128, 129])
def test_channels(n: int) -> None:
    x, heads, weight = randn(n, 96), randn(n, 5, 48, seed=1), f32(randn(96, seed=2))
    at, frequencies = positions(n), rope_frequencies(RopeSpec(10000.0, 48))
    assert_near(turned.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    assert_near(turned.rms_norm(heads, None, EPS), reference.rms_norm(heads, None, EPS))
    assert_near(turned.layer_norm(x, weight, weight, EPS), reference.layer_norm(x, weight, weight, EPS), 5e-6)
    assert_near(turned.hadamard(heads[..., :32]), reference.hadamard(heads[..., :32]))
    for inverse in (False, True):
        for interleaved in (False, True):
            words = {"inverse": inverse, "interleaved": interleaved}
            assert_near(turned.rope(heads, at, frequencies, **words), reference.rope(heads, at, frequencies, **words))
    part = heads.transpose(0, 1).contiguous().transpose(0, 1)[..., 16:32]
    assert_near(turned.rope(part, at, frequencies[:8]), reference.rope(part, at, frequencies[:8]))
    turn = (EPS, at, frequencies[:9])
    assert_near(turned.norm_rope(heads, None, *turn), reference.norm_rope(heads, None, *turn))
    own = f32(weight.data[:48])
    assert_near(turned.norm_rope(heads, own, *turn), reference.norm_rope(heads, own, *turn))


def test_angles_hold_at_a_million_tokens() -> None:
    at = torch.arange((1 << 20) - 4096, 1 << 20)
    x = torch.tensor([1.0, 0.0]).repeat(4096, 32)
    frequencies = rope_frequencies(RopeSpec(10000.0, 64))
    angles = (at.float()[:, None] * frequencies).double()
    expected = torch.stack([angles.cos(), angles.sin()], -1).flatten(1)
    assert (turned.rope(x, at, frequencies) - expected).abs().max() < 2e-7


def test_wrong_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        turned.hadamard(randn(2, 48))
    with pytest.raises(ValueError, match="512"):
        turned.pack_rows(randn(2, 500), LAYOUTS[0])
    with pytest.raises(ValueError, match="584"):
        turned.unpack_rows(torch.zeros(2, 500, dtype=torch.uint8), LAYOUTS[0])
