"""The native operations on a session's memory, every build, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from tests.ops.cases import randn
from torch import Tensor

from tenfold import _native
from tenfold.formats import (
    BF16,
    F32,
    RowLayout,
    exact_layout,
    index_key_fp4,
    index_key_fp8,
    kv_row_v4,
    kv_row_v32,
)
from tenfold.ops import Rows, Weight, cpu_attention, reference

V4 = kv_row_v4(512, 64)
V4_TINY = kv_row_v4(128, 64)
V32 = kv_row_v32(512, 64)
ODD = RowLayout("odd", 38, 5, block=16, align=8)
ODD_FP4 = RowLayout("odd-fp4", 40, 5, code_bits=4, block=32, scale_bytes=4, scales_last=False, align=4)
LAYOUTS = [V4, V4_TINY, V32, ODD, ODD_FP4, exact_layout(V4_TINY), exact_layout(ODD)]
NAMES = [layout.name + str(layout.width) for layout in LAYOUTS]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=_native.available_isas(), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu_attention, "_kernel", lambda name: _native._kernel(name, request.param))
    return str(request.param)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(_native, "num_threads", lambda: request.param)
    return int(request.param)


def both_threads(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    results = []
    for count in (1, 2):
        monkeypatch.setattr(_native, "num_threads", lambda count=count: count)
        results.append(run())
    return results[0], results[1]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weight(data: Tensor) -> Weight:
    return Weight("w", tuple(data.shape), F32, data)


def packed(rows: int, layout: RowLayout, seed: int = 0) -> Tensor:
    return reference.pack_rows(random(rows, layout.width, seed=seed), layout)


def window(rows: Tensor, layout: RowLayout, n: int, width: int) -> Rows:
    """The last n rows of the pool are those of the queries; each sees `width` up to its own."""
    stop = torch.arange(rows.shape[0] - n + 1, rows.shape[0] + 1)
    return Rows(rows, layout, start=(stop - width).clamp(min=0), stop=stop)


def prefix(rows: Tensor, layout: RowLayout, stop: Tensor) -> Rows:
    return Rows(rows, layout, start=torch.zeros_like(stop), stop=stop)


def listed(rows: Tensor, layout: RowLayout, n: int, k: int, seed: int = 0) -> Rows:
    """Ascending rows, of varying number."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.full((n, k), -1, dtype=torch.int32)
    for i in range(n):
        count = int(torch.randint(0, min(k, rows.shape[0]) + 1, (), generator=generator))
        chosen = torch.randperm(rows.shape[0], generator=generator)[:count].sort().values
        index[i, :count] = chosen.int()
    return Rows(rows, layout, index=index)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest number of each row of the result."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = expected.abs().amax(-1, keepdim=True).clamp(min=1e-6) if expected.numel() else 1.0
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------- attention


def error_of(isa: str, layout: RowLayout, heads: int) -> float:
    """Whole numbers of 16 bits, two bf16 numbers, or float32: of the largest number of a result's row."""
    if heads < 8 or layout not in (V4, V4_TINY):
        return 1e-5
    return {"scalar": 1e-5, "amx": 2e-5}.get(isa, 3e-4)


def test_rows_of_tables_are_looked_up_and_others_refused() -> None:
    ids = torch.tensor([3, 0, 39, 3])
    for data in (randn(40, 65), randn(40, 65).bfloat16(), randn(40, 1)):
        table = Weight("table", tuple(data.shape), BF16 if data.dtype is torch.bfloat16 else F32, data)
        assert torch.equal(cpu_attention.embed(ids, table), reference.embed(ids, table))
        assert torch.equal(cpu_attention.hc_embed(ids, table, 4), reference.hc_embed(ids, table, 4))
        assert cpu_attention.hc_embed(ids[:0], table, 4).shape == (0, 4, data.shape[1])
        for outside in (-1, 40):
            with pytest.raises(IndexError, match="there are 40 rows"):
                cpu_attention.embed(torch.tensor([outside]), table)
    with pytest.raises(TypeError, match="int64"):
        cpu_attention.embed(ids.int(), table)


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
@pytest.mark.parametrize("heads", [1, 3, 4, 10])
@pytest.mark.parametrize("n", [0, 1, 2, 33])
def test_attention_agrees_with_the_reference(layout: RowLayout, heads: int, n: int, threads: int, isa: str) -> None:
    q = random(n, heads, layout.width)
    pool, rows = packed(n + 50, layout), packed(201, layout, seed=1)
    sources = [window(pool, layout, n, 51), prefix(rows, layout, torch.arange(n) * 6), listed(rows, layout, n, 70)]
    sink = weight(random(heads))
    for value_dim in (layout.width, layout.width // 2 + 1):
        arguments = (q, sources, sink, layout.width**-0.5, value_dim, 7)
        found, law = cpu_attention.sparse_attention(*arguments), reference.sparse_attention(*arguments)
        close(found, law, error_of(isa, layout, heads))


@pytest.mark.parametrize("heads", [64, 65])
def test_attention_at_the_width_of_v4(heads: int, threads: int, isa: str) -> None:
    q = random(3, heads, 512)
    pool, rows = packed(130, V4), packed(900, V4, seed=1)
    index = torch.stack([torch.randperm(900)[:512].sort().values.int() for _ in range(3)])
    sources = [window(pool, V4, 3, 128), Rows(rows, V4, index=index)]
    arguments = (q, sources, weight(random(heads)), 512**-0.5, 512, 127)
    found, law = cpu_attention.sparse_attention(*arguments), reference.sparse_attention(*arguments)
    close(found, law, error_of(isa, V4, heads))


@pytest.mark.parametrize("heads", [6, 9])
def test_attention_without_a_sink_and_with_large_scores(heads: int, threads: int, isa: str) -> None:
    q = random(5, heads, 128) * 30  # scores of thousands, of which 1e-4 is a tenth
    sources = [listed(packed(300, V4_TINY), V4_TINY, 5, 200), window(packed(9, V4_TINY), V4_TINY, 5, 3)]
    arguments = (q, sources, None, 1.0, 128, 0)
    found, law = cpu_attention.sparse_attention(*arguments), reference.sparse_attention(*arguments)
    close(found, law, 100 * error_of(isa, V4_TINY, heads) if heads >= 8 else 1e-5)


@pytest.mark.parametrize("heads", [5, 8])
@pytest.mark.parametrize("top", [-200.0, 0.0, 200.0])
def test_attention_with_any_sink(top: float, heads: int, threads: int, isa: str) -> None:
    q, sources = random(4, heads, 128), [window(packed(9, V4_TINY), V4_TINY, 4, 3)]
    arguments = (q, sources, weight(torch.full((heads,), top)), 0.1, 128, 0)
    found, law = cpu_attention.sparse_attention(*arguments), reference.sparse_attention(*arguments)
    close(found, law, error_of(isa, V4_TINY, heads))


def test_attention_to_no_rows_at_all(threads: int) -> None:
    q, none = random(3, 4, 128), torch.zeros(3, dtype=torch.int64)
    empty = torch.empty(0, V4_TINY.row_bytes, dtype=torch.uint8)
    index = torch.empty(3, 0, dtype=torch.int32)
    sources = [Rows(empty, V4_TINY, start=none, stop=none), Rows(empty, V4_TINY, index=index)]
    for given in (sources, []):
        out = cpu_attention.sparse_attention(q, given, weight(random(4)), 1.0, 100, 0)
        assert torch.equal(out, torch.zeros(3, 4, 100))


@pytest.mark.parametrize("heads", [8, 15, 17, 48])
@pytest.mark.parametrize("seen", [1, 31, 32, 33, 127, 128, 129, 300])
def test_attention_to_rows_that_queries_have_in_common(heads: int, seen: int, threads: int, isa: str) -> None:
    """As where all of a layer's rows are seen: whole blocks of them, and the first of another."""
    q, rows = random(11, heads, 128), packed(310, V4_TINY)
    stops = torch.full((11,), seen)
    stops[4:] += torch.arange(7)
    sources = [window(packed(30, V4_TINY, seed=1), V4_TINY, 11, 7), prefix(rows, V4_TINY, stops)]
    for given in (sources, sources[::-1]):
        arguments = (q, given, weight(random(heads)), 128**-0.5, 128, 5)
        found, law = cpu_attention.sparse_attention(*arguments), reference.sparse_attention(*arguments)
        close(found, law, error_of(isa, V4_TINY, heads))


@pytest.mark.parametrize("heads", [3, 16])
@pytest.mark.parametrize("place", [5, V4_TINY.scale_offset, V4_TINY.plain_offset + 9])
def test_attention_to_a_row_that_is_no_number(heads: int, place: int, threads: int) -> None:
    """Who sees it gets no number there either; who does not is not disturbed. A code, a scale, and a bf16 number."""
    rows = packed(200, V4_TINY)
    rows[150, place] = 0x7F if place == 5 else 0xFF
    rows[150, place - 1] |= 0xC0 if place > V4_TINY.plain_offset else 0
    q = random(2, heads, 128)
    found = cpu_attention.sparse_attention(q, [prefix(rows, V4_TINY, torch.tensor([150, 160]))], None, 0.3, 128, 0)
    assert found[0].isfinite().all()
    assert found[1, :, 5].isnan().all()


@pytest.mark.skipif(not {"avx2", "avx512"} <= set(_native.available_isas()), reason="this CPU has but one of them")
@pytest.mark.parametrize("heads", [8, 21])
def test_attention_by_whole_numbers_has_the_same_bits_at_both_widths(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, rows = random(5, heads, 512), packed(400, V4)
    sources = [window(rows[:20], V4, 5, 9), listed(rows, V4, 5, 300)]
    found = []
    for isa in ("avx2", "avx512"):
        monkeypatch.setattr(cpu_attention, "_kernel", lambda name, isa=isa: _native._kernel(name, isa))
        found.append(cpu_attention.sparse_attention(q, sources, weight(random(heads)), 512**-0.5, 511, 3))
    assert torch.equal(*found)


@pytest.mark.parametrize("times", [1.0, 40.0])
def test_what_attention_rounds_of_a_row_is_little_beside_what_its_codes_have_lost(times: float) -> None:
    """One row is its own result. An outlier takes bits from all other channels, in its own block by the codes too."""
    x = random(50, 512)
    x[:, 77] *= times
    rows = reference.pack_rows(x, V4)
    stop = torch.arange(1, 51)
    found = cpu_attention.sparse_attention(
        random(50, 8, 512), [Rows(rows, V4, start=stop - 1, stop=stop)], None, 0.05, 512, 0
    )
    stored = reference.unpack_rows(rows, V4)
    assert (found - stored[:, None]).norm() < 0.05 * (stored - x).norm() * 8**0.5


@pytest.mark.parametrize("heads", [3, 8, 64])
def test_attention_of_a_query_does_not_depend_on_its_company(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: one by one, all together, on one thread and on two; the pool is cut as chunks would cut it."""
    n, layout = 37, V4_TINY
    q, sink = random(n, heads, 128) * 3, weight(random(heads))
    pool, rows = packed(n + 19, layout), packed(400, layout, seed=1)
    stops, lists = torch.arange(n) * 10, listed(rows, layout, n, 60)
    assert lists.index is not None
    index = lists.index

    def attend(first: int, stop: int) -> Tensor:
        near = pool[max(first, 0) : stop + 19]
        sources = [
            window(near, layout, stop - first, 20),
            prefix(rows, layout, stops[first:stop]),
            Rows(rows, layout, index=index[first:stop]),
        ]
        return cpu_attention.sparse_attention(q[first:stop], sources, sink, 0.3, 128, first)

    one, two = both_threads(monkeypatch, lambda: attend(0, n))
    assert torch.equal(one, two)
    for step in (1, 2, 5, 16):
        parts = [attend(first, min(first + step, n)) for first in range(0, n, step)]
        assert torch.equal(torch.cat(parts), one), step


SCALES = (0, 1, 64, 120, 127, 140)
"""Bytes of 2^-127, which is subnormal, to 2^13."""


@pytest.mark.parametrize("heads", [5, 8])
@pytest.mark.parametrize("scale", SCALES)
def test_attention_to_rows_of_every_code(scale: int, heads: int, threads: int, isa: str) -> None:
    rows = packed(256, V4_TINY)
    codes = ((torch.arange(256)[:, None] + 7 * torch.arange(64)) % 256).byte()
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    rows[:, :64], rows[:, V4_TINY.scale_offset] = codes, scale
    q = random(3, heads, 128) * 2.0 ** (120 - max(scale, 120))
    sources = [prefix(rows, V4_TINY, torch.tensor([256, 255, 31])), listed(rows, V4_TINY, 3, 200)]
    arguments = (q, sources, weight(random(heads)), 0.1, 128, 0)
    found, law = cpu_attention.sparse_attention(*arguments), reference.sparse_attention(*arguments)
    close(found, law, error_of(isa, V4_TINY, heads))


def test_attention_refuses_what_does_not_fit() -> None:
    q, rows = random(2, 3, 128), packed(5, V4_TINY)
    bound = torch.tensor([3, 6])
    with pytest.raises(IndexError, match="source 1: a query is to see rows that are not among the 5"):
        cpu_attention.sparse_attention(
            q, [window(rows, V4_TINY, 2, 2), prefix(rows, V4_TINY, bound)], None, 1.0, 128, 0
        )
    index = torch.tensor([[0, 5], [-1, -1]], dtype=torch.int32)
    with pytest.raises(IndexError, match="source 0"):
        cpu_attention.sparse_attention(q, [Rows(rows, V4_TINY, index=index)], None, 1.0, 128, 0)
    with pytest.raises(TypeError, match=r"source 0: index: expected a tensor of torch\.int32"):
        cpu_attention.sparse_attention(q, [Rows(rows, V4_TINY, index=index.long())], None, 1.0, 128, 0)
    with pytest.raises(ValueError, match="have 512 channels, the query has 128"):
        cpu_attention.sparse_attention(q, [window(packed(5, V4), V4, 2, 2)], None, 1.0, 128, 0)
    with pytest.raises(ValueError, match="expected contiguous memory"):
        cpu_attention.sparse_attention(q, [window(rows[::2], V4_TINY, 2, 2)], None, 1.0, 128, 0)
    with pytest.raises(ValueError, match="value_dim: expected 1 to 128, got 129"):
        cpu_attention.sparse_attention(q, [], None, 1.0, 129, 0)


# ---------------------------------------------------------------------------------------------- index

SHORT_KEY = RowLayout("index-e2m1", 32, code_bits=4, block=32, align=2)
KEYS = [index_key_fp4(128), index_key_fp4(64), SHORT_KEY, index_key_fp8(128), exact_layout(index_key_fp4(40))]
KEY_NAMES = [layout.name + str(layout.width) for layout in KEYS]


def deployed(q: Tensor, layout: RowLayout) -> Tensor:
    return reference.unpack_rows(reference.pack_rows(q, layout), layout)


def scores(q: Tensor, weights: Tensor, keys: Tensor, layout: RowLayout) -> Tensor:
    dense = reference.unpack_rows(keys, layout).double()
    return ((q.double() @ dense.t()).relu_() * weights.double()[:, :, None]).sum(1)


def check_selection(chosen: Tensor, exact: Tensor, visible: Tensor, topk: int) -> None:
    """Ascending, complete, and nothing left out that is better than the worst chosen by more than rounding."""
    most = int(visible.max())
    assert chosen.shape == (exact.shape[0], min(topk, most))
    assert chosen.dtype == torch.int32
    for row, score, count in zip(chosen, exact, visible.tolist(), strict=True):
        rows = row[row >= 0].long()
        assert len(rows) == min(topk, count)
        assert (row[len(rows) :] == -1).all()
        assert (rows.diff() > 0).all()
        if len(rows) in (0, count):
            continue
        left = torch.ones(count, dtype=torch.bool)
        left[rows] = False
        assert rows[-1] < count
        error = 1e-5 * float(score[:count].abs().max())
        assert score[:count][left].max() <= score[rows].min() + error


@pytest.mark.parametrize("layout", KEYS, ids=KEY_NAMES)
@pytest.mark.parametrize("heads", [1, 4, 7])
@pytest.mark.parametrize("rounded", [True, False])
def test_selection_is_that_of_the_best_scores(layout: RowLayout, heads: int, rounded: bool, threads: int) -> None:
    for n in (1, 2, 33):
        keys = packed(1000, layout)
        q = random(n, heads, layout.width)
        q = deployed(q, layout) if rounded else q
        weights = random(n, heads)
        visible = torch.linspace(1000, 3 * n, n).long()
        exact = scores(q, weights, keys, layout)
        for topk in (1, 16, 100, 999):
            chosen = cpu_attention.select_rows(q, weights, keys, layout, visible, topk)
            check_selection(chosen, exact, visible, topk)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rounded", [True, False])
def test_selection_among_keys_of_every_code(scale: int, rounded: bool, threads: int) -> None:
    """Half of the keys have the scale given, half one near 1 that makes them larger or smaller than all of those."""
    layout = index_key_fp4(64)
    keys = packed(512, layout)
    keys[:, :32] = ((torch.arange(512)[:, None] + 7 * torch.arange(32)) % 256).byte()
    keys[:, layout.scale_offset : layout.scale_offset + 2] = scale
    keys[::2, layout.scale_offset : layout.scale_offset + 2] = 126
    q = random(3, 6, 64)
    q, weights, visible = deployed(q, layout) if rounded else q, random(3, 6).abs(), torch.tensor([512, 511, 129])
    exact = scores(q, weights, keys, layout)
    for topk in (16, 400):
        check_selection(cpu_attention.select_rows(q, weights, keys, layout, visible, topk), exact, visible, topk)


@pytest.mark.parametrize("heads", [1, 2, 3, 16, 17, 64])
def test_selection_by_whole_numbers_is_the_same_in_every_build(
    heads: int, isa: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies too far apart for one scale a row: blocks of a key or of a query, a weight near nothing."""
    if isa == "scalar":
        pytest.skip("sums of float32 in another order")
    layout, n = index_key_fp4(128), 70
    keys = packed(1000, layout)
    keys[300:400, layout.scale_offset] += 3
    keys[500:520, layout.scale_offset + 3] += 4
    keys[700, layout.scale_offset + 1] = 255
    keys[800:, layout.scale_offset : layout.scale_offset + 4] = 130
    keys[801::2, layout.scale_offset : layout.scale_offset + 4] = 40
    q, weights, visible = random(n, heads, 128), random(n, heads), torch.linspace(1000, 31, n).long()
    q[3, :, :32] *= 2**3
    q[4, :, 32:64] *= 2**6
    q[5, -1] = 0.0
    q[6, 0, 64:96] = 0.0
    q[7] *= 2.0**-60
    weights[8], weights[9], weights[10, 0] = 0.0, 1e-30, 1e-30
    q = deployed(q, layout)
    for topk in (1, 30, 700):
        mine = cpu_attention.select_rows(q, weights, keys, layout, visible, topk)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_attention, "_kernel", lambda name: _native._kernel(name, "avx2"))
            theirs = cpu_attention.select_rows(q, weights, keys, layout, visible, topk)
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("count", [1, 3, 31, 33, 127, 129, 1000])
def test_selection_by_and_among_odd_numbers_of_rows(count: int, threads: int) -> None:
    layout = index_key_fp4(64)
    q, weights, keys = deployed(random(count, 4, 64), layout), random(count, 4), packed(count, layout)
    visible = torch.arange(count) + 1
    chosen = cpu_attention.select_rows(q, weights, keys, layout, visible, 30)
    check_selection(chosen, scores(q, weights, keys, layout), visible, 30)


def test_selection_of_few_rows_takes_them_all(threads: int) -> None:
    layout = index_key_fp4(128)
    q, weights, keys = random(4, 4, 128), random(4, 4), packed(9, layout)
    for visible in (torch.tensor([0, 3, 9, 8]), torch.zeros(4, dtype=torch.int64)):
        chosen = cpu_attention.select_rows(q, weights, keys, layout, visible, 20)
        assert torch.equal(chosen, reference.select_rows(q, weights, keys, layout, visible, 20))
    none = cpu_attention.select_rows(q[:0], weights[:0], keys, layout, visible[:0], 20)
    assert none.shape == (0, 0)


@pytest.mark.parametrize("layout", KEYS[:4], ids=KEY_NAMES[:4])
def test_of_equal_scores_the_smaller_row_wins(layout: RowLayout, threads: int) -> None:
    """Few different keys, so that the border runs through a crowd of equals; then all scores 0; then rising ones."""
    distinct = packed(7, layout)
    keys = distinct[torch.randint(0, 7, (1500,), generator=torch.Generator().manual_seed(1))]
    q, weights = deployed(random(3, 4, layout.width), layout), random(3, 4).abs() * 0 + 0.5
    visible = torch.tensor([1500, 1200, 77])
    for w in (weights, weights * 0):
        for topk in (5, 64, 700):
            chosen = cpu_attention.select_rows(q, w, keys, layout, visible, topk)
            assert torch.equal(chosen, reference.select_rows(q, w, keys, layout, visible, topk))


def test_scores_that_rise_and_fall_all_the_way(threads: int) -> None:
    layout = exact_layout(index_key_fp4(64))
    q, weights, visible = torch.ones(2, 1, 64), torch.ones(2, 1), torch.tensor([4000, 3999])
    rising = torch.arange(4000.0)[:, None].repeat(1, 64)
    for keys in (rising, rising.flip(0), (rising % 97)):
        rows = reference.pack_rows(keys.contiguous(), layout)
        chosen = cpu_attention.select_rows(q, weights, rows, layout, visible, 50)
        assert torch.equal(chosen, reference.select_rows(q, weights, rows, layout, visible, 50))


@pytest.mark.parametrize("layout", KEYS, ids=KEY_NAMES)
def test_selection_does_not_depend_on_company(layout: RowLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    n, keys = 35, packed(800, layout)
    q, weights = random(n, 6, layout.width), random(n, 6)
    q[::3] = deployed(q[::3], layout)
    visible = torch.arange(n) * 20 + 50

    def select(first: int, stop: int) -> Tensor:
        part = slice(first, stop)
        return cpu_attention.select_rows(q[part], weights[part], keys, layout, visible[part], 40)

    one, two = both_threads(monkeypatch, lambda: select(0, n))
    assert torch.equal(one, two)
    for step in (1, 3, 16):
        assert torch.equal(torch.cat([select(i, min(i + step, n)) for i in range(0, n, step)]), one)


def test_selection_refuses_what_does_not_fit() -> None:
    layout = index_key_fp4(64)
    q, weights, keys = random(2, 4, 64), random(2, 4), packed(9, layout)
    with pytest.raises(IndexError, match="visible: a query is to see 10 rows of the 9 there are"):
        cpu_attention.select_rows(q, weights, keys, layout, torch.tensor([3, 10]), 4)
    with pytest.raises(ValueError, match=r"weights: expected shape \(2, 4\), got \(2, 3\)"):
        cpu_attention.select_rows(q, weights[:, :3], keys, layout, torch.tensor([3, 9]), 4)
    with pytest.raises(TypeError, match=r"visible: expected a tensor of torch\.int64"):
        cpu_attention.select_rows(q, weights, keys, layout, torch.tensor([3, 9]).int(), 4)


# ---------------------------------------------------------------------------------------------- rows


def hard_numbers(rows: int, layout: RowLayout) -> Tensor:
    """Of every size a block may have, with ties, zeros of both signs, and numbers far below their block's scale."""
    x = random(rows, layout.width) * (2.0 ** torch.randint(-30, 30, (rows, 1)))
    x[1::5] *= 2.0 ** torch.randint(-40, 1, x[1::5].shape)
    x[2::5] = (x[2::5] * 8).round() / 8
    x[3::5] = 0.0
    x[4::7] *= -0.0
    x[::11, 0] = 3e38
    x[5::11] *= 1e-38
    return x


@pytest.mark.parametrize("layout", [*LAYOUTS, *KEYS], ids=[*NAMES, *KEY_NAMES])
@pytest.mark.parametrize("rows", [0, 1, 33, 129])
def test_rows_are_packed_and_unpacked_bit_for_bit(layout: RowLayout, rows: int, threads: int) -> None:
    if rows == 0 and layout.code_bits != 32:
        assert cpu_attention.pack_rows(torch.empty(0, layout.width), layout).shape == (0, layout.row_bytes)
        return
    x = hard_numbers(rows, layout)
    stored = cpu_attention.pack_rows(x, layout)
    assert torch.equal(stored, reference.pack_rows(x, layout))
    dense = cpu_attention.unpack_rows(stored, layout)
    assert torch.equal(dense.view(torch.int32), reference.unpack_rows(stored, layout).view(torch.int32))


@pytest.mark.parametrize("layout", [V4_TINY, ODD, index_key_fp4(64), index_key_fp8(128)], ids=str)
def test_every_code_and_every_scale_is_unpacked(layout: RowLayout) -> None:
    rows = torch.arange(256)
    stored = ((rows[:, None] * 37 + torch.arange(layout.row_bytes) * 101) % 256).byte()
    mine, law = cpu_attention.unpack_rows(stored, layout), reference.unpack_rows(stored, layout)
    assert torch.equal(mine.isnan(), law.isnan())
    assert torch.equal(mine.nan_to_num(0.0), law.nan_to_num(0.0))


def test_rows_of_any_leading_axes() -> None:
    layout, x = index_key_fp4(64), random(3, 5, 64)
    stored = cpu_attention.pack_rows(x, layout)
    assert torch.equal(stored, reference.pack_rows(x, layout))
    assert torch.equal(cpu_attention.unpack_rows(stored, layout), reference.unpack_rows(stored, layout))
    with pytest.raises(ValueError, match=r"x: expected shape \(3, 5, 64\), got \(3, 5, 63\)"):
        cpu_attention.pack_rows(x[..., 1:], layout)


# ---------------------------------------------------------------------------------------------- hyper-connections


def hyper(n: int, m: int, d: int, outputs: int, scales: int) -> tuple[Tensor, Weight, Weight, Weight, Weight]:
    fn = weight(random(outputs, m * d) / (m * d) ** 0.5)
    return random(n, m, d) * 3, fn, weight(random(outputs)), weight(random(scales) + 1), weight(random(d) + 1)


@pytest.mark.parametrize(("m", "d"), [(1, 5), (2, 64), (4, 33), (4, 256), (8, 40)])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 70])
def test_hyper_connections_agree_with_the_reference(n: int, m: int, d: int, threads: int) -> None:
    arguments = hyper(n, m, d, (2 + m) * m, 3)
    mine = cpu_attention.hc_mix(*arguments, norm_eps=1e-6, eps=1e-6, iterations=20)
    law = reference.hc_mix(*arguments, norm_eps=1e-6, eps=1e-6, iterations=20)
    for actual, expected in zip(mine, law, strict=True):
        close(actual, expected)
    collapse = hyper(n, m, d, m, 1)
    collapsed = cpu_attention.hc_collapse(*collapse, norm_eps=1e-6, eps=1e-6)
    close(collapsed, reference.hc_collapse(*collapse, norm_eps=1e-6, eps=1e-6))
    streams, y = arguments[0], random(n, d)
    close(cpu_attention.hc_merge(streams, y, *law[1:]), reference.hc_merge(streams, y, *law[1:]))


def test_hyper_connections_of_a_token_do_not_depend_on_its_company(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, *weights = hyper(43, 4, 520, 24, 3)

    def mix(first: int, stop: int) -> Tensor:
        part = streams[first:stop]
        parts = cpu_attention.hc_mix(part, *weights, norm_eps=1e-6, eps=1e-6, iterations=20)
        merged = cpu_attention.hc_merge(part, *parts)
        return torch.cat([merged.flatten(1), *(tensor.flatten(1) for tensor in parts)], 1)

    one, two = both_threads(monkeypatch, lambda: mix(0, 43))
    assert torch.equal(one, two)
    for step in (1, 3, 9, 16):
        assert torch.equal(torch.cat([mix(i, min(i + step, 43)) for i in range(0, 43, step)]), one)


def test_hyper_connections_refuse_what_does_not_fit() -> None:
    arguments = hyper(2, 9, 8, 99, 3)
    with pytest.raises(ValueError, match="expected 1 to 8 streams"):
        cpu_attention.hc_mix(*arguments, norm_eps=1e-6, eps=1e-6, iterations=2)
    streams, *weights = hyper(2, 4, 8, 23, 3)
    with pytest.raises(ValueError, match=r"fn: expected shape \(24, 32\), got \(23, 32\)"):
        cpu_attention.hc_mix(streams, *weights, norm_eps=1e-6, eps=1e-6, iterations=2)


# ---------------------------------------------------------------------------------------------- channels


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (5, 64), (33, 10), (3, 4, 64), (130, 7, 6), (2, 3, 2, 4)])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_agrees_with_the_reference(shape: tuple[int, ...], inverse: bool, interleaved: bool, threads: int) -> None:
    frequencies = 160000.0 ** -torch.linspace(0, 1, shape[-1] // 2)
    positions = torch.arange(shape[0]) * 7 + 1_000_000
    kw = {"inverse": inverse, "interleaved": interleaved}
    whole = random(*shape[:-1], shape[-1] + 3)
    for x in (whole[..., 3:], whole[..., 3:].contiguous()):
        mine = cpu_attention.rope(x, positions, frequencies, **kw)
        close(mine, reference.rope(x, positions, frequencies, **kw))


@pytest.mark.parametrize("layout", [V4_TINY, index_key_fp4(128), exact_layout(V4_TINY)], ids=str)
@pytest.mark.parametrize("n", [0, 1, 5, 130])
def test_steps_in_one_pass_give_the_bits_of_steps_one_by_one(layout: RowLayout, n: int, threads: int) -> None:
    x, heads, scale = random(n, 128), random(n, 5, 128), weight(random(128))
    positions, frequencies = torch.arange(n) * 7 + 1_000_000, 160000.0 ** -torch.linspace(0, 1, 32)

    def turned(x: Tensor) -> Tensor:
        return torch.cat([x[..., :64], cpu_attention.rope(x[..., 64:], positions, frequencies)], -1)

    for given in (scale, None):
        law = turned(cpu_attention.rms_norm(heads, given, 1e-6))
        assert torch.equal(cpu_attention.norm_rope(heads, given, 1e-6, positions, frequencies), law)
    close(law, reference.norm_rope(heads, None, 1e-6, positions, frequencies))
    for spread in (False, True):
        law = turned(cpu_attention.rms_norm(x, scale, 1e-6))
        law = cpu_attention.pack_rows(cpu_attention.hadamard(law) if spread else law, layout)
        found = cpu_attention.norm_rope_pack(x, scale, 1e-6, positions, frequencies, layout, spread)
        assert torch.equal(found, law)
    law = cpu_attention.unpack_rows(cpu_attention.pack_rows(cpu_attention.hadamard(turned(heads)), layout), layout)
    assert torch.equal(cpu_attention.rope_round(heads, positions, frequencies, layout, True), law)
    assert torch.equal(cpu_attention.rope_round(heads, positions, frequencies, layout, False), turned(heads))


def test_rows_that_cannot_be_turned_are_refused() -> None:
    x, positions, frequencies = random(3, 40), torch.arange(3), torch.ones(4)
    with pytest.raises(ValueError, match="expected a power of two of channels, got 40"):
        cpu_attention.rope_round(x, positions, frequencies, ODD, True)
    with pytest.raises(ValueError, match="rows of odd have 43 channels, got 40"):
        cpu_attention.rope_round(x, positions, frequencies, ODD, False)
    with pytest.raises(ValueError, match="expected at least 42 and more than 0 channels, got 40"):
        cpu_attention.norm_rope(x, None, 1e-6, positions, torch.ones(21))
    with pytest.raises(ValueError, match=r"positions: expected shape \(3,\), got \(2,\)"):
        cpu_attention.norm_rope(x, None, 1e-6, positions[:2], frequencies)


def test_attention_turns_its_output_back(threads: int) -> None:
    q, rows, frequencies = random(7, 5, 128), packed(60, V4_TINY), 10000.0 ** -torch.linspace(0, 1, 32)
    sources = [window(rows, V4_TINY, 7, 30)]
    plain = cpu_attention.sparse_attention(q, sources, None, 0.1, 100, 900_000)
    turned = cpu_attention.sparse_attention(q, sources, None, 0.1, 100, 900_000, frequencies)
    positions = torch.arange(900_000, 900_007)
    law = [plain[..., :36], cpu_attention.rope(plain[..., 36:], positions, frequencies, inverse=True)]
    assert torch.equal(turned, torch.cat(law, -1))
    close(turned, reference.sparse_attention(q, sources, None, 0.1, 100, 900_000, frequencies))
    with pytest.raises(ValueError, match="value_dim: expected 64 to 128, got 63"):
        cpu_attention.sparse_attention(q, sources, None, 0.1, 63, 0, frequencies)


@pytest.mark.parametrize("width", [1, 2, 64, 128])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_hadamard_agrees_with_the_reference(width: int, rows: int, threads: int) -> None:
    x = random(rows, 3, width)
    close(cpu_attention.hadamard(x), reference.hadamard(x))
    with pytest.raises(ValueError, match="power of two"):
        cpu_attention.hadamard(random(2, 12))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("ratio", "dim"), [(4, 64), (4, 33), (128, 16), (1, 1)])
@pytest.mark.parametrize("groups", [1, 2, 17])
def test_compress_agrees_with_the_reference(overlap: bool, ratio: int, dim: int, groups: int, threads: int) -> None:
    width = dim * (2 if overlap else 1)
    both = random(groups, ratio, 2 * width) * 5
    both[0, :, width:] = -torch.inf if overlap else 0.0
    values, gates = both[..., :width], both[..., width:]
    mine = cpu_attention.compress(values, gates, overlap)
    close(mine, reference.compress(values, gates, overlap))
    assert torch.equal(mine, cpu_attention.compress(values.contiguous(), gates.contiguous(), overlap))


def test_compress_of_no_group() -> None:
    assert cpu_attention.compress(torch.empty(0, 4, 8), torch.empty(0, 4, 8), False).shape == (0, 8)
    assert cpu_attention.compress(random(1, 4, 8), random(1, 4, 8), True).shape == (0, 4)
    with pytest.raises(ValueError, match="cannot pool"):
        cpu_attention.compress(random(1, 4, 8), random(1, 4, 7), True)


def test_rms_norm_with_and_without_a_weight() -> None:
    x = random(5, 3, 33)
    for given in (None, weight(random(33))):
        close(cpu_attention.rms_norm(x, given, 1e-6), reference.rms_norm(x, given, 1e-6))


# ---------------------------------------------------------------------------------------------- router


@pytest.mark.parametrize("scoring", ["sqrtsoftplus", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("n", [0, 1, 33])
def test_routing_agrees_with_the_reference(
    scoring: Literal["sqrtsoftplus", "sigmoid"], groups: int, n: int, threads: int
) -> None:
    if n == 0:
        groups = 1  # the reference cannot group what is not there
    x, gate, bias = random(n, 32), weight(random(24, 32)), weight(random(24))
    logits = reference.linear(x, gate)
    fixed = torch.randint(0, 24, (n, 5))
    for biased in (bias, None):
        for chosen in (None, fixed):
            law = reference.route(
                x, gate, scoring=scoring, topk=5, scaling=2.5, bias=biased, chosen=chosen, groups=groups, topk_group=2
            )
            mine = cpu_attention.route_logits(
                logits, scoring=scoring, topk=5, scaling=2.5, bias=biased, chosen=chosen, groups=groups, topk_group=2
            )
            assert torch.equal(mine[0], law[0])
            close(mine[1], law[1])


def test_routing_of_equal_logits_takes_the_first_experts() -> None:
    ids, weights = cpu_attention.route_logits(torch.zeros(2, 8), scoring="sigmoid", topk=3, scaling=1.0)
    assert ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))


def test_routing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="cannot choose 9 of 8 experts"):
        cpu_attention.route_logits(torch.zeros(2, 8), scoring="sigmoid", topk=9, scaling=1.0)
    chosen = torch.tensor([[0], [8]])
    with pytest.raises(IndexError, match="there are 8 experts, got 0 to 8"):
        cpu_attention.route_logits(torch.zeros(2, 8), scoring="sigmoid", topk=1, scaling=1.0, chosen=chosen)
