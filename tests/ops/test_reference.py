"""The law against the specification and against naive loops: formats bit for bit, mathematics in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tenfold import config
from tenfold.formats import (
    BF16,
    E2M1_VALUES,
    F32,
    FP8_BLOCK,
    FP8_BLOCK_F32,
    MXFP4,
    RowLayout,
    exact_layout,
    index_key_fp4,
    index_key_fp8,
    kv_row_v4,
    kv_row_v32,
)
from tenfold.models.blocks import rope_frequencies
from tenfold.ops import Experts, Rows, Weight, reference

LAYOUTS = {
    "v4": kv_row_v4(512, 64),
    "v4-ragged": kv_row_v4(150, 22),
    "v3.2": kv_row_v32(512, 64),
    "index-fp4": index_key_fp4(128),
    "index-fp8": index_key_fp8(128),
}
SIZES = (0, 1, 63, 127, 128, 129)


def f32(*shape: int, scale: float = 1.0) -> Weight:
    return Weight("w", shape, F32, torch.randn(*shape) * scale)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    limit = tolerance * max(1.0, float(expected.abs().max())) if expected.numel() else 0.0
    assert not found.numel() or float((found.double() - expected.double()).abs().max()) <= limit


@pytest.fixture(autouse=True)
def fresh() -> None:
    """New numbers each time; a failure shows the seed to repeat it with."""
    seed = torch.seed() % 2**31
    print("torch.manual_seed", seed)
    torch.manual_seed(seed)


# ------------------------------------------------------------------------------------------------ number formats


def e4m3(code: int) -> float:
    """The number of an e4m3 code, from its bits: bias 7, no infinities."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    return sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


E4M3_CODES = [code for code in range(256) if code & 127 != 127]
ONE_BLOCK = RowLayout("one-block", 64, block=64)


def test_every_e4m3_code_survives_a_row() -> None:
    """Beside the largest number a block's scale is 1, so each code comes back as itself."""
    for start in range(0, len(E4M3_CODES), 63):
        codes = E4M3_CODES[start : start + 63]
        values = torch.tensor([e4m3(code) for code in codes] + [448.0] * (64 - len(codes)))
        packed = reference.pack_rows(values[None], ONE_BLOCK)
        assert packed[0, : len(codes)].tolist() == codes
        assert packed[0, 64] == 127
        assert torch.equal(reference.unpack_rows(packed, ONE_BLOCK)[0], values)


def test_e4m3_rounds_to_nearest_ties_to_even() -> None:
    positive = [e4m3(code) for code in range(127)]
    for low, high in zip(range(126), range(1, 127), strict=True):
        tie = (positive[low] + positive[high]) / 2
        values = torch.tensor([tie, math.nextafter(tie, 0.0), math.nextafter(tie, 1e9)] + [448.0] * 61)
        values[1:3] = torch.tensor([tie * (1 - 2**-20), tie * (1 + 2**-20)])
        found = reference.pack_rows(values[None], ONE_BLOCK)[0, :3].tolist()
        assert found == [low if low % 2 == 0 else high, low, high]


def test_every_e2m1_code_and_its_ties() -> None:
    signed = [*E2M1_VALUES, *(-value for value in E2M1_VALUES)]
    assert reference.e2m1_codes(torch.tensor(signed)).tolist() == list(range(16))
    for low, high in zip(range(7), range(1, 8), strict=True):
        tie = (E2M1_VALUES[low] + E2M1_VALUES[high]) / 2
        near = torch.tensor([tie, tie * (1 - 2**-20), tie * (1 + 2**-20)])
        even = low if low % 2 == 0 else high
        assert reference.e2m1_codes(near).tolist() == [even, low, high]
        assert reference.e2m1_codes(-near).tolist() == [8 + even, 8 + low, 8 + high]


@pytest.mark.parametrize(("bits", "limit", "floor"), [(8, 448.0, 1e-4), (4, 6.0, 6.0 * 2.0**-126)])
def test_scales_are_the_next_power_of_two(bits: int, limit: float, floor: float) -> None:
    layout = RowLayout("probe", 32, code_bits=bits, block=32)
    for exponent in range(-30, 60):
        exact = limit * 2.0**exponent
        for amax, expected in ((exact, exponent), (exact * (1 + 2**-20), exponent + 1)):
            row = torch.zeros(1, 32)
            row[0, 5] = -amax
            wanted = expected if amax >= floor else math.ceil(math.log2(floor / limit))
            assert int(reference.pack_rows(row, layout)[0, layout.scale_offset]) == wanted + 127
    zero = reference.pack_rows(torch.zeros(1, 32), layout)
    assert torch.equal(reference.unpack_rows(zero, layout), torch.zeros(1, 32))


@pytest.mark.parametrize("name", LAYOUTS)
def test_packing_twice_changes_no_value(name: str) -> None:
    """The bytes may: a largest number rounded down to a power of two allows a smaller scale."""
    layout = LAYOUTS[name]
    packed = reference.pack_rows(torch.randn(129, layout.width) * 3, layout)
    assert packed.shape == (129, layout.row_bytes)
    assert packed.dtype == torch.uint8
    once = reference.unpack_rows(packed, layout)
    assert torch.equal(reference.unpack_rows(reference.pack_rows(once, layout), layout), once)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_stay_near_their_numbers_without_bias(name: str) -> None:
    layout = LAYOUTS[name]
    x = torch.randn(400, layout.width)
    error = reference.unpack_rows(reference.pack_rows(x, layout), layout) - x
    step = 2.0**-4 if layout.code_bits == 8 else 2.0**-1.9  # half a step of the format, relative
    amax = x.abs().amax(1, keepdim=True)
    assert bool((error.abs() <= x.abs() * step + amax * 2.0**-8).all() or layout.code_bits == 4)
    up = float((error[:, : layout.coded] > 0).float().mean())
    down = float((error[:, : layout.coded] < 0).float().mean())
    assert abs(up - down) < 0.03


def test_the_bytes_of_a_v4_row() -> None:
    layout = LAYOUTS["v4"]
    x = torch.zeros(1, 512)
    x[0, 0], x[0, 447], x[0, 448], x[0, 511] = 448.0, 0.875, 1.0, -2.0
    row = reference.pack_rows(x, layout)[0]
    assert row.shape == (584,)
    assert int(row[0]) == 0b0_1111_110
    assert int(row[447]) == 0b0_1111_110  # 0.875 = 448 * 2^-9
    assert row[448:450].view(torch.bfloat16).item() == 1.0
    assert row[574:576].view(torch.bfloat16).item() == -2.0
    assert int(row[576]) == 127
    assert int(row[582]) == 127 - 9
    assert int(row[583]) == 0


def test_the_bytes_of_a_v32_row_and_of_index_keys() -> None:
    row = reference.pack_rows(torch.cat([torch.full((512,), 448.0 * 4), torch.ones(64)])[None], LAYOUTS["v3.2"])[0]
    assert row.shape == (656,)
    assert row[512:528].view(torch.float32).tolist() == [4.0] * 4
    assert row[528:530].view(torch.bfloat16).item() == 1.0
    key = reference.pack_rows(torch.full((1, 128), 6.0), LAYOUTS["index-fp8"])[0]
    assert key.shape == (132,)
    assert key[128:].view(torch.float32).item() == 2.0**-6
    nibbles = torch.zeros(1, 128)
    nibbles[0, 0], nibbles[0, 1] = 6.0, -0.5
    small = reference.pack_rows(nibbles, LAYOUTS["index-fp4"])[0]
    assert small.shape == (68,)
    assert int(small[0]) == 7 | (9 << 4)  # low nibble first
    assert int(small[64]) == 127


@pytest.mark.parametrize("name", LAYOUTS)
def test_exact_rows_lose_nothing(name: str) -> None:
    layout = exact_layout(LAYOUTS[name])
    x = torch.randn(7, layout.width)
    assert torch.equal(reference.unpack_rows(reference.pack_rows(x, layout), layout), x)


@pytest.mark.parametrize("shape", [(128, 128), (1, 128), (129, 300), (7, 33)])
@pytest.mark.parametrize("form", [FP8_BLOCK, FP8_BLOCK_F32])
def test_fp8_blocks_are_codes_times_scales(shape: tuple[int, int], form: Any) -> None:
    codes = torch.tensor(E4M3_CODES, dtype=torch.uint8)[torch.randint(len(E4M3_CODES), shape)]
    grid = form.scale_shape(shape)
    exponents = torch.randint(100, 150, grid)
    scale = exponents.to(torch.uint8) if form is FP8_BLOCK else torch.ldexp(torch.ones(grid), exponents - 127)
    found = reference.dequantize(Weight("w", shape, form, codes, scale))
    for i, j in ((0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 2)):
        assert float(found[i, j]) == e4m3(int(codes[i, j])) * 2.0 ** (int(exponents[i // 128, j // 128]) - 127)


def test_mxfp4_takes_the_low_nibble_first_and_extreme_scales() -> None:
    data = torch.arange(256, dtype=torch.uint8).view(8, 32)
    scale = torch.tensor([[0, 250], [127, 255]] * 4, dtype=torch.uint8)
    found = reference.dequantize(Weight("w", (8, 64), MXFP4, data, scale)).double()
    values = [*E2M1_VALUES, *(-value for value in E2M1_VALUES)]
    for row in range(8):
        for column in range(64):
            byte = int(data[row, column // 2])
            code = byte & 15 if column % 2 == 0 else byte >> 4
            exponent = int(scale[row, column // 32])
            expected = values[code] * 2.0 ** (exponent - 127) if exponent < 255 else math.nan
            assert float(found[row, column]) == expected or (math.isnan(expected) and found[row, column].isnan())


# ------------------------------------------------------------------------------------------------ vectors of the spec


def test_rope_frequencies_of_the_specification() -> None:
    v4 = config.preset("v4-flash").layers[2].rope
    v32 = config.preset("v3.2").layers[0].rope
    expected_v4 = {0: 1.0, 1: 6.87656022e-01, 14: 5.28685632e-03, 15: 3.63553858e-03, 16: 2.26562500e-03}
    expected_v4 |= {20: 2.96977778e-04, 24: 1.95312500e-05, 25: 5.37231267e-06, 26: 3.69430316e-06, 31: 5.68052904e-07}
    expected_v32 = {0: 1.0, 10: 5.62341325e-02, 11: 3.90069266e-02, 16: 5.5e-03, 22: 1.77827941e-04}
    expected_v32 |= {23: 3.33380358e-05, 24: 2.5e-05, 31: 3.33380358e-06}
    for spec, expected in ((v4, expected_v4), (v32, expected_v32)):
        found = rope_frequencies(spec)
        for i, frequency in expected.items():
            assert float(found[i]) == pytest.approx(frequency, rel=3e-7), i


def test_sliding_window_layers_have_no_yarn() -> None:
    frequencies = rope_frequencies(config.preset("v4-flash").layers[0].rope)
    close(frequencies, 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64), 1e-7)


def test_hyper_connection_of_the_specification() -> None:
    """m_k, scale and base of spec 9.3, brought in through fn with a single stream of ones."""
    mixed = (torch.arange(24) - 12) / 8.0
    streams = torch.ones(1, 4, 8)
    # An epsilon of 3 halves the projection, and lets the sum of the weights be seen through the norm.
    fn = (mixed[:, None] / 16).expand(24, 32).contiguous()
    scale = Weight("s", (3,), F32, torch.tensor([0.5, 0.7, 0.9]))
    base = Weight("b", (24,), F32, torch.sin(0.37 * torch.arange(24)))
    ones = Weight("n", (8,), F32, torch.ones(8))
    x, post, combination = reference.hc_mix(
        streams, Weight("f", (24, 32), F32, fn), base, scale, ones, norm_eps=3.0, eps=1e-6, iterations=20
    )
    pre = sum([0.32082230, 0.41924334, 0.51232052, 0.58253849])
    assert float(x[0, 0]) == pytest.approx(pre / (pre**2 + 3) ** 0.5, abs=1e-6)
    close(post[0], torch.tensor([1.14687049, 1.17264104, 1.13495445, 1.04324520]), 1e-6)
    expected = [
        [0.38814801, 0.28026959, 0.19445036, 0.13713112],
        [0.22890729, 0.23124157, 0.25039011, 0.28946000],
        [0.13790339, 0.20661832, 0.28973973, 0.36573762],
        [0.24504031, 0.28186953, 0.26541886, 0.20767032],
    ]
    close(combination[0], torch.tensor(expected), 1e-6)


def test_the_merge_sums_over_the_first_index() -> None:
    streams, y = torch.randn(3, 4, 16), torch.randn(3, 16)
    post, combination = torch.randn(3, 4), torch.randn(3, 4, 4)
    expected = post[:, :, None] * y[:, None] + torch.einsum("njk,njd->nkd", combination, streams)
    wrong = post[:, :, None] * y[:, None] + torch.einsum("njk,nkd->njd", combination, streams)
    found = reference.hc_merge(streams, y, post, combination)
    close(found, expected)
    assert float((found - wrong).abs().max()) > 0.1


# ------------------------------------------------------------------------------------------------ naive twins


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_is_a_rotation_in_the_complex_plane(interleaved: bool) -> None:
    x, positions, frequencies = torch.randn(5, 3, 16), torch.randint(0, 10**6, (5,)), torch.rand(8) * 1e-3
    turned = reference.rope(x, positions, frequencies, interleaved=interleaved)
    pairs = x.unflatten(-1, (8, 2)) if interleaved else x.unflatten(-1, (2, 8)).mT
    angles = (positions.float()[:, None] * frequencies).double()[:, None]
    expected = torch.view_as_real(torch.view_as_complex(pairs.double().contiguous()) * torch.exp(1j * angles))
    close(turned, expected.flatten(-2) if interleaved else expected.mT.flatten(-2))
    back = reference.rope(turned, positions, frequencies, inverse=True, interleaved=interleaved)
    close(back, x)


@pytest.mark.parametrize("width", [2, 64, 128])
def test_hadamard_is_sylvesters(width: int) -> None:
    signs = [[(-1) ** bin(i & j).count("1") for j in range(width)] for i in range(width)]
    matrix = torch.tensor(signs, dtype=torch.float64) / math.sqrt(width)
    x = torch.randn(3, 2, width)
    close(reference.hadamard(x), x.double() @ matrix)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.usefixtures("poisoned")
def test_linear_parts_at_odd_sizes(n: int) -> None:
    x, weight = torch.randn(n, 96), f32(40, 96)
    close(reference.linear(x, weight), x.double() @ weight.data.double().T)
    half = Weight("w", (40, 96), BF16, weight.data.bfloat16())
    close(reference.linear(x, half), x.double() @ half.data.double().T)
    grouped = f32(3 * 20, 32)
    expected = torch.einsum("ngi,goi->ngo", x.view(n, 3, 32).double(), grouped.data.view(3, 20, 32).double())
    close(reference.grouped_linear(x.view(n, 3, 32), grouped), expected.reshape(n, 60))
    norm = f32(96)
    double = x.double()
    factor = torch.rsqrt(double.square().mean(1, keepdim=True) + 1e-6)
    close(reference.rms_norm(x, norm, 1e-6), double * factor * norm.data)
    close(reference.rms_norm(x, None, 1e-6), double * factor)
    bias = f32(96)
    expected = torch.nn.functional.layer_norm(double, (96,), norm.data.double(), bias.data.double(), 1e-6)
    close(reference.layer_norm(x, norm, bias, 1e-6), expected)


@pytest.mark.parametrize("ratio", [4, 16])
@pytest.mark.parametrize("first", [True, False])
def test_overlapping_entries_pool_two_groups(ratio: int, first: bool) -> None:
    values, gates = torch.randn(6, ratio, 20), torch.randn(6, ratio, 20)
    if first:
        gates[0] = -torch.inf
    found = reference.compress(values, gates, True)
    for i in range(5):
        for channel in range(10):
            a = torch.cat([values[i, :, channel], values[i + 1, :, 10 + channel]]).double()
            g = torch.cat([gates[i, :, channel], gates[i + 1, :, 10 + channel]]).double()
            assert float(found[i, channel]) == pytest.approx(float((g.softmax(0) * a).sum()), abs=1e-5)


def test_plain_entries_pool_one_group() -> None:
    values, gates = torch.randn(3, 128, 8), torch.randn(3, 128, 8)
    close(reference.compress(values, gates, False), (gates.double().softmax(1) * values.double()).sum(1))
    assert reference.compress(values[:0], gates[:0], False).shape == (0, 8)
    assert reference.compress(values[:1], gates[:1], True).shape == (0, 4)


def naive_selection(q: Tensor, weights: Tensor, keys: Tensor, visible: list[int], topk: int) -> list[list[int]]:
    scores = torch.einsum("nh,nhr->nr", weights.double(), torch.einsum("nhd,rd->nhr", q, keys).double().relu())
    rows = []
    for i, count in enumerate(visible):
        best = sorted(range(count), key=lambda row: (-float(scores[i, row]), row))[:topk]
        rows.append(sorted(best))
    return rows


@pytest.mark.parametrize("tile", [64, 1 << 24])
@pytest.mark.parametrize("n", [0, 1, 63, 129])
def test_selection_is_the_naive_one_ties_included(monkeypatch: pytest.MonkeyPatch, n: int, tile: int) -> None:
    """Small whole numbers make every score exact, and most of them tied."""
    monkeypatch.setattr(reference, "_TILE_NUMBERS", tile)
    layout = exact_layout(index_key_fp4(32))
    q, keys = torch.randint(-1, 2, (n, 3, 32)).float(), torch.randint(-1, 2, (200, 32)).float()
    weights = torch.randint(-2, 3, (n, 3)).float()
    visible = torch.randint(0, 201, (n,))
    packed = reference.pack_rows(keys, layout)
    found = reference.select_rows(q, weights, packed, layout, visible, 17)
    expected = naive_selection(q, weights, keys, visible.tolist(), 17)
    assert [[row for row in rows if row >= 0] for rows in found.tolist()] == expected
    assert all(rows == sorted(rows, key=lambda row: (row < 0, row)) for rows in found.tolist())
    assert found.dtype == torch.int32


def test_selection_of_everything_or_nothing() -> None:
    layout = index_key_fp4(32)
    keys = reference.pack_rows(torch.randn(10, 32), layout)
    q, weights = torch.randn(4, 2, 32), torch.randn(4, 2)
    found = reference.select_rows(q, weights, keys, layout, torch.tensor([0, 3, 10, 1]), 64)
    assert [[row for row in rows if row >= 0] for rows in found.tolist()] == [[], [0, 1, 2], list(range(10)), [0]]
    assert reference.select_rows(q, weights, keys, layout, torch.zeros(4, dtype=torch.int64), 64).shape == (4, 0)


def naive_attention(q: Tensor, seen: list[list[Tensor]], sink: Tensor | None, scale: float, value_dim: int) -> Tensor:
    out = torch.zeros(*q.shape[:2], value_dim, dtype=torch.float64)
    for i, rows in enumerate(seen):
        for head in range(q.shape[1]):
            z = torch.tensor([float(q[i, head].double() @ row.double()) * scale for row in rows], dtype=torch.float64)
            shares = z.exp() / (z.exp().sum() + (0.0 if sink is None else float(sink[head].double().exp())))
            for share, row in zip(shares, rows, strict=True):
                out[i, head] += share * row[:value_dim].double()
    return out


@pytest.mark.parametrize("n", [0, 1, 5, 63])
@pytest.mark.parametrize("with_sink", [True, False])
@pytest.mark.parametrize("tile", [1, 1 << 24])
@pytest.mark.usefixtures("poisoned")
def test_attention_over_window_and_chosen_rows(
    monkeypatch: pytest.MonkeyPatch, n: int, with_sink: bool, tile: int
) -> None:
    monkeypatch.setattr(reference, "_TILE_NUMBERS", tile)
    layout = kv_row_v4(48, 16)
    window, entries = torch.randn(n + 6, 48), torch.randn(40, 48)
    packed = [reference.pack_rows(rows, layout) for rows in (window, entries)]
    window, entries = (reference.unpack_rows(rows, layout) for rows in packed)
    q, sink = torch.randn(n, 3, 48), f32(3)
    stop = torch.arange(7, n + 7)
    start = (stop - 7).clamp(min=0)
    index = torch.stack([torch.randperm(40)[:9].sort().values for _ in range(n)]) if n else torch.empty(0, 9)
    index = index.int()
    index[1::2, 5:] = -1
    sources = [Rows(packed[0], layout, start=start, stop=stop), Rows(packed[1], layout, index=index)]
    seen = [
        [*window[int(start[i]) : int(stop[i])], *(entries[row] for row in index[i].tolist() if row >= 0)]
        for i in range(n)
    ]
    found = reference.sparse_attention(q, sources, sink if with_sink else None, 0.3, 40, 0)
    close(found, naive_attention(q, seen, sink.data if with_sink else None, 0.3, 40))


def test_attention_with_nothing_compressed_yet() -> None:
    layout = kv_row_v4(48, 16)
    window = reference.pack_rows(torch.randn(3, 48), layout)
    q = torch.randn(3, 2, 48)
    stop = torch.arange(1, 4)
    alone = [Rows(window, layout, start=torch.zeros_like(stop), stop=stop)]
    empty = window[:0]
    with_prefix = [*alone, Rows(empty, layout, start=torch.zeros(3).long(), stop=torch.zeros(3).long())]
    with_index = [*alone, Rows(empty, layout, index=torch.empty(3, 0, dtype=torch.int32))]
    expected = reference.sparse_attention(q, alone, None, 1.0, 48, 0)
    for sources in (with_prefix, with_index):
        assert torch.equal(reference.sparse_attention(q, sources, None, 1.0, 48, 0), expected)


@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 4])
def test_routing_is_the_naive_one(scoring: Any, groups: int) -> None:
    x, gate, bias = torch.randn(33, 24), f32(16, 24), f32(16)
    ids, weights = reference.route(
        x, gate, scoring=scoring, topk=3, scaling=2.5, bias=bias, groups=groups, topk_group=min(groups, 2)
    )
    logits = x.double() @ gate.data.double().T
    scores = torch.nn.functional.softplus(logits).sqrt() if scoring == "sqrtsoftplus" else logits.sigmoid()
    for i in range(33):
        choice = (scores[i] + bias.data.double()).tolist()
        allowed = list(range(16))
        if groups > 1:
            best = sorted(range(4), key=lambda g: -sum(sorted(choice[4 * g : 4 * g + 4])[-2:]))[:2]
            allowed = [expert for group in best for expert in range(4 * group, 4 * group + 4)]
        expected = sorted(allowed, key=lambda expert: -choice[expert])[:3]
        assert ids[i].tolist() == expected
        share = scores[i, expected]
        close(weights[i], share / share.sum() * 2.5)


def test_hash_routing_weighs_the_experts_it_is_given() -> None:
    x, gate = torch.randn(4, 8), f32(5, 8)
    chosen = torch.tensor([[0, 4], [1, 2], [4, 0], [3, 1]])
    ids, weights = reference.route(x, gate, scoring="sqrtsoftplus", topk=2, scaling=1.5, chosen=chosen)
    assert torch.equal(ids, chosen)
    close(weights.sum(1), torch.full((4,), 1.5))


def test_equal_experts_go_to_the_smaller_number() -> None:
    ids, _ = reference.route(torch.zeros(2, 8), f32(6, 8), scoring="sigmoid", topk=3, scaling=1.0)
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("n", [0, 1, 63])
@pytest.mark.parametrize("weigh_first", [True, False])
@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.usefixtures("poisoned")
def test_experts_are_the_naive_ones(n: int, weigh_first: bool, limit: float | None) -> None:
    bank = Experts(*(tuple(f32(*shape) for _ in range(4)) for shape in ((12, 8), (8, 12), (12, 8))))
    x, weights = torch.randn(n, 8), torch.rand(n, 2)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(n)]) if n else torch.empty(0, 2, dtype=torch.int64)
    expected = torch.zeros(n, 8, dtype=torch.float64)
    for i in range(n):
        for expert, weight in zip(ids[i].tolist(), weights[i].double(), strict=True):
            w1, w2, w3 = (stack[expert].data.double() for stack in (bank.w1, bank.w2, bank.w3))
            gate, up = w1 @ x[i].double(), w3 @ x[i].double()
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            expected[i] += weight * (w2 @ (torch.nn.functional.silu(gate) * up))
    close(reference.experts(x, ids, weights, bank, limit=limit, weigh_first=weigh_first), expected)
    if n:
        one = reference.feed_forward(x, bank.w1[0], bank.w2[0], bank.w3[0], limit)
        alone = reference.experts(x, torch.zeros(n, 1).long(), torch.ones(n, 1), bank, limit=limit, weigh_first=True)
        close(one, alone)


# ------------------------------------------------------------------------------------------------ rows are on their own


def rowwise_cases() -> dict[str, tuple[int, Callable[[slice], Tensor]]]:
    """Operations as functions of a slice of their rows."""
    n = 300
    x, heads, streams = torch.randn(n, 64), torch.randn(n, 4, 128), torch.randn(n, 4, 64)
    fn, base, scale, matrix, norm = f32(24, 256), f32(24), f32(3), f32(40, 64), f32(64)
    layout = kv_row_v4(128, 64)
    rows = reference.pack_rows(torch.randn(n, 128), layout)
    stop = torch.arange(1, n + 1)
    bank = Experts(*(tuple(f32(*shape, scale=0.1) for _ in range(4)) for shape in ((32, 64), (64, 32), (32, 64))))
    ids, weights = reference.route(x, f32(4, 64), scoring="sigmoid", topk=2, scaling=1.0)
    keys = reference.pack_rows(torch.randn(75, 128), index_key_fp4(128))

    def attention(s: slice) -> Tensor:
        window = Rows(rows, layout, start=(stop[s] - 9).clamp(min=0), stop=stop[s])
        prefix = Rows(rows, layout, start=torch.zeros_like(stop[s]), stop=stop[s] // 4)
        return reference.sparse_attention(heads[s], [window, prefix], None, 0.1, 128, s.start)

    def selection(s: slice) -> Tensor:
        chosen = reference.select_rows(heads[s], x[s, :4], keys, index_key_fp4(128), stop[s] // 4, 9)
        return torch.nn.functional.pad(chosen, (0, 9 - chosen.shape[1]), value=-1)

    return {
        "linear": (n, lambda s: reference.linear(x[s], matrix)),
        "rms_norm": (n, lambda s: reference.rms_norm(x[s], norm, 1e-6)),
        "hadamard": (n, lambda s: reference.hadamard(heads[s])),
        "hc_mix": (
            n,
            lambda s: reference.hc_mix(streams[s], fn, base, scale, norm, norm_eps=1e-6, eps=1e-6, iterations=20)[2],
        ),
        "hc_merge": (n, lambda s: reference.hc_merge(streams[s], x[s], x[s, :4], x[s, :16].reshape(-1, 4, 4))),
        "experts": (n, lambda s: reference.experts(x[s], ids[s], weights[s], bank, limit=10.0, weigh_first=True)),
        "attention": (n, attention),
        "selection": (n, selection),
    }


@pytest.mark.parametrize("name", rowwise_cases())
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    """Bit for bit: that is why chunking, batching and rewinding change nothing."""
    n, run = rowwise_cases()[name]
    whole = run(slice(0, n))
    for start in (0, 3, 50):
        for count in (1, 2, 3, 7, 8, 9, 11, 17, 64, 129, 250):
            assert torch.equal(run(slice(start, start + count)), whole[start : start + count]), (start, count)
