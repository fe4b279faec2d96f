"""What V3.2 does to a token of each of several sessions in one launch, against the reference step by step."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from tests.ops.cases import f32, randn
from tests.ops.test_cpu_linear import weight
from tests.ops.triton.card import DEVICE, to_card

from tenfold.formats import (
    BF16,
    F32,
    FP8_BLOCK,
    FP8_BLOCK_F32,
    WeightFormat,
    exact_layout,
    index_key_fp8,
    kv_row_v32,
)
from tenfold.models.deepseek_v32 import split_by_head
from tenfold.ops import reference
from tenfold.ops.triton import latent

pytestmark = pytest.mark.usefixtures("poisoned")
EPS = 1e-6
POSITIONS = torch.tensor([3, 0, 11])
"""Of three sessions with room for 12 rows each."""


@pytest.mark.parametrize("exact", [False, True], ids=["deployed", "exact"])
@pytest.mark.parametrize(
    ("wide", "pairs", "dim", "heads", "index_heads"),
    [(96, 8, 32, 5, 3), (512, 32, 128, 33, 17), (32, 4, 16, 2, 2)],
    ids=["odd", "wide", "narrow"],
)
def test_all_of_a_layer_enters_at_once(
    wide: int, pairs: int, dim: int, heads: int, index_heads: int, exact: bool
) -> None:
    layout, key_layout = kv_row_v32(wide, 2 * pairs), index_key_fp8(dim)
    if exact:
        layout, key_layout = exact_layout(layout), exact_layout(key_layout)
    turns, nope = 0.3 ** torch.arange(pairs).float(), 24
    q, q_index = randn(3, heads, nope + 2 * pairs), randn(3, index_heads, dim, seed=1)
    row, key = randn(3, wide + 2 * pairs, seed=2), 2 + randn(3, dim, seed=3)
    norm, key_norm, bias = f32(randn(wide, seed=4)), f32(randn(dim, seed=5)), f32(randn(dim, seed=6))
    rows, keys = (torch.zeros(3, 12, one.row_bytes, dtype=torch.uint8, device=DEVICE) for one in (layout, key_layout))
    addresses = [torch.tensor([one.data_ptr() for one in some]).to(DEVICE) for some in (rows, keys)]
    given = map(to_card, (q, q_index, row, key, norm, key_norm, bias))
    rest: Any = (EPS, to_card(POSITIONS), to_card(turns), addresses[0], layout, addresses[1], key_layout, not exact)
    queries, met = latent.enter_latent(*given, *rest)

    assert queries.shape == (3, heads, wide + 2 * pairs)
    tail = reference.rope(q[..., nope:], POSITIONS, turns)
    torch.testing.assert_close(queries[..., wide:].cpu(), tail, rtol=0, atol=2e-6 * float(tail.abs().max()))

    def spread(x: torch.Tensor) -> torch.Tensor:
        turned = reference.rope(x[..., : 2 * pairs], POSITIONS, turns, interleaved=False)
        x = torch.cat([turned, x[..., 2 * pairs :]], -1)
        return x if exact else reference.hadamard(x)

    wanted = spread(q_index)
    if not exact:
        wanted = reference.unpack_rows(reference.pack_rows(wanted, key_layout), key_layout)
        assert met.dtype == torch.bfloat16
    found = met.float().cpu()
    assert not found.isnan().any()
    # A number next to a tie may be rounded to the other side: one of e4m3's steps.
    assert (found != wanted).float().mean() < (1.0 if exact else 0.01)
    torch.testing.assert_close(found, wanted, rtol=1e-5 if exact else 0.14, atol=2e-5)

    wanted_row = torch.cat(
        [reference.rms_norm(row[:, :wide], norm, EPS), reference.rope(row[:, wide:], POSITIONS, turns)], 1
    )
    wanted_key = spread(reference.layer_norm(key, key_norm, bias, EPS))
    for memory, one, expected in ((rows, layout, wanted_row), (keys, key_layout, wanted_key)):
        packed = reference.pack_rows(expected, one)
        for i, place in enumerate(POSITIONS.tolist()):
            mine = memory[i].cpu()
            assert not mine[torch.arange(12) != place].any()
            found = reference.unpack_rows(mine[place], one)
            wanted = reference.unpack_rows(packed[i], one)
            assert exact or (found != wanted).float().mean() < 0.02
            torch.testing.assert_close(found, wanted, rtol=1e-5 if exact else 0.14, atol=2e-5)


@pytest.mark.parametrize("form", [F32, BF16, FP8_BLOCK, FP8_BLOCK_F32], ids=lambda form: form.name)
def test_absorbed_matrices_keep_their_codes(form: WeightFormat) -> None:
    """Of three heads, 256 channels of a key and 128 of a value out of 384."""
    whole = weight(form, 3 * 384, 384)
    head = reference.dequantize(whole).view(3, 384, 384)
    k_up, v_up = split_by_head(whole, 3, 256)
    assert k_up.format is v_up.format is form
    assert (k_up.shape, v_up.shape) == ((3 * 384, 256), (3 * 128, 384))
    assert torch.equal(reference.dequantize(k_up), head[:, :256].transpose(1, 2).reshape(-1, 256))
    assert torch.equal(reference.dequantize(v_up), head[:, 256:].reshape(-1, 384))


def test_nobody_and_what_does_not_fit() -> None:
    layout, key_layout = kv_row_v32(96, 16), index_key_fp8(32)
    norm, key_norm, turns = f32(randn(96)), f32(randn(32)), torch.ones(8)
    nobody = torch.empty(0, dtype=torch.int64)

    def enter(q: int, key: int, frequencies: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = (randn(0, 2, q), randn(0, 3, 32), randn(0, 112), randn(0, key), norm, key_norm, key_norm)
        rest: Any = (
            EPS,
            to_card(nobody),
            to_card(frequencies),
            to_card(nobody),
            layout,
            to_card(nobody),
            key_layout,
            True,
        )
        return latent.enter_latent(*map(to_card, given), *rest)

    queries, met = enter(40, 32, turns)
    assert (queries.shape, met.shape) == ((0, 2, 112), (0, 3, 32))
    with pytest.raises(ValueError, match="key"):
        enter(40, 31, turns)
    with pytest.raises(ValueError, match="power of two"):
        enter(40, 32, turns[:7].clone())
