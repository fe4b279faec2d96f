"""Every operation row by row: what a row gives depends on no other row, to the bit, and no number of rows is special.

Any chunking, any batch and any rewind give the same logits because of this. The widths are those at which vectors
have a remainder and at which threads divide the work. Values themselves are the matter of test_reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tenfold.config import RopeSpec
from tenfold.formats import F32, RowLayout, exact_layout, index_key_fp4, index_key_fp8, kv_row_v4, kv_row_v32
from tenfold.models.blocks import rope_frequencies
from tenfold.ops import Experts, Rows, Weight, reference

T = 141
SIZES = (0, 1, 63, 127, 128, 129)
Call = Callable[[slice], tuple[Tensor, ...]]
Cases = Iterator[tuple[str, Call]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randint(low: int, high: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def f32(data: Tensor) -> Weight:
    return Weight("w", tuple(data.shape), F32, data)


def each(operation: Callable[..., Any], *parts: Tensor, **words: Any) -> Call:
    """`operation` on the same rows of all `parts`."""

    def call(rows: slice) -> tuple[Tensor, ...]:
        result = operation(*(part[rows] for part in parts), **words)
        return result if isinstance(result, tuple) else (result,)

    return call


def linear_cases() -> Cases:
    x, heads, positions = randn(T, 96), randn(T, 5, 48, seed=1), randint(0, 1 << 20, (T,))
    frequencies = rope_frequencies(RopeSpec(10000.0, 48))
    w, v, deep = f32(randn(40, 96)), f32(randn(96)), f32(randn(96, 40))
    yield "embed", each(reference.embed, positions % 40, weight=w)
    yield "linear", each(reference.linear, x, weight=w)
    yield "linear-1", each(reference.linear, x, weight=f32(w.data[:1]))
    yield "grouped_linear", each(reference.grouped_linear, heads, weight=f32(randn(35, 48)))
    yield "rms_norm", each(reference.rms_norm, x, weight=v, eps=1e-6)
    yield "rms_norm-heads", each(reference.rms_norm, heads, weight=None, eps=1e-6)
    yield "layer_norm", each(reference.layer_norm, x, weight=v, bias=v, eps=1e-6)
    yield "rope", each(reference.rope, heads, positions, frequencies=frequencies)
    yield "rope-halves", each(reference.rope, heads, positions, frequencies=frequencies, interleaved=False)
    yield "hadamard", each(reference.hadamard, heads[..., :32])
    yield "feed_forward", each(reference.feed_forward, x, w1=w, w2=deep, w3=f32(-w.data), limit=10.0)


def hyper_cases() -> Cases:
    for m, d in ((4, 24), (4, 100), (2, 48)):
        streams, norms = randn(T, m, d), {"norm_eps": 1e-6, "eps": 1e-6}
        fn, base, scale = randn((2 + m) * m, m * d) * 0.2, randn((2 + m) * m), randn(3)
        head = {"fn": f32(fn[:m]), "base": f32(base[:m]), "scale": f32(scale[:1])} | norms
        mapping = {"fn": f32(fn), "base": f32(base), "scale": f32(scale)} | norms | {"iterations": 20}
        mix = each(reference.hc_mix, streams, **mapping)
        yield f"hc_mix-{m}-{d}", mix
        yield f"hc_merge-{m}-{d}", each(reference.hc_merge, streams, *mix(slice(0, T)))
        yield f"hc_collapse-{m}-{d}", each(reference.hc_collapse, streams, **head)


FP4_KEYS = tuple(index_key_fp4(dim) for dim in (32, 64, 128))  # 17, 34 and 68 bytes


def row_cases() -> Cases:
    for ratio, dim in ((4, 24), (4, 112), (8, 36), (16, 16), (128, 24), (128, 64)):
        pair = randn(T, ratio, dim), randn(T, ratio, dim, seed=1)
        yield f"compress-{ratio}-{dim}", each(reference.compress, *pair, overlap=False)
    for layout in (kv_row_v4(512, 64), kv_row_v4(40, 8), kv_row_v32(96, 16), index_key_fp8(128), *FP4_KEYS):
        rows = randn(T, layout.width)
        packed = reference.pack_rows(rows, layout)
        yield f"pack-{layout.name}-{layout.width}", each(reference.pack_rows, rows, layout=layout)
        yield f"unpack-{layout.name}-{layout.width}", each(reference.unpack_rows, packed, layout=layout)


def expert_cases() -> Cases:
    x = randn(T, 96)
    for scoring, count, groups in (("sqrtsoftplus", 9, 1), ("sigmoid", 16, 4)):
        words = {"gate": f32(randn(count, 96)), "bias": f32(randn(count) * 0.2), "scoring": scoring, "topk": 3}
        words |= {"scaling": 1.5, "groups": groups, "topk_group": groups // 2 or 1}
        route = each(reference.route, x, **words)
        yield f"route-{scoring}", route
        shapes = ((20, 96), (96, 20), (20, 96))
        bank = Experts(*(tuple(f32(randn(*shape, seed=e)) for e in range(count)) for shape in shapes))
        for first in (True, False):
            words = {"bank": bank, "limit": 10.0, "weigh_first": first}
            yield f"experts-{count}-{first}", each(reference.experts, x, *route(slice(0, T)), **words)


def attention_cases() -> Cases:
    layout = exact_layout(kv_row_v4(40, 8))
    packed = reference.pack_rows(randn(400, 40), layout)
    stop = torch.arange(1, T + 1) + 100
    start = (stop - randint(1, 150, (T,))).clamp(min=0)
    order = torch.rand(T, 400, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :70].sort(1).values
    index = torch.where(torch.arange(70) < randint(0, 71, (T, 1)), order, -1).int()

    def attend(q: Tensor, start: Tensor, stop: Tensor, index: Tensor, sink: Weight) -> Tensor:
        sources = [Rows(packed, layout, start=start, stop=stop), Rows(packed, layout, index=index)]
        return reference.sparse_attention(q, sources, sink, 0.2, 32, 0)

    for heads in (1, 4, 5):
        q = randn(T, heads, 40, seed=1)
        yield f"sparse_attention-{heads}", each(attend, q, start, stop, index, sink=f32(randn(heads)))
    keys = reference.pack_rows(randn(300, 32), EXACT_KEY)

    def select(q: Tensor, weights: Tensor, visible: Tensor) -> Tensor:
        return reference.select_rows(q, weights, keys, EXACT_KEY, visible, 40)

    queries = randn(T, 16, 32, seed=1), randn(T, 16, seed=2), randint(200, 301, (T,))
    yield "select_rows", each(select, *queries)


EXACT_KEY = exact_layout(index_key_fp4(32))
CASES: dict[str, Call] = {
    name: call
    for cases in (linear_cases, hyper_cases, row_cases, expert_cases, attention_cases)
    for name, call in cases()
}


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("threads")
def test_a_slice_of_the_rows_gives_a_slice_of_the_result(name: str) -> None:
    whole = CASES[name](slice(0, T))
    for n in (1, 2, 3, 7, 8, 9, 16, 17, 31, 64, 65, 127, 128):
        for start in (0, 5, T - n):
            span = slice(start, min(start + n, T))
            for part, full in zip(CASES[name](span), whole, strict=True):
                assert torch.equal(part, full[span]), (n, start)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("poisoned")
def test_every_number_of_rows_is_computed_whole(name: str) -> None:
    for n in SIZES:
        for part in CASES[name](slice(0, n)):
            assert part.shape[0] == n
            assert not part.is_floating_point() or part.isfinite().all()


@pytest.mark.parametrize("heads", [1, 16, 17, 64])
@pytest.mark.usefixtures("threads")
def test_equal_keys_are_ties_wherever_they_lie(heads: int) -> None:
    """A key's score must not depend on its place in the tile or on how many keys are scored with it."""
    q, weights = randn(6, heads, 32), randn(6, heads, seed=1).abs()
    for count in (*range(2, 40), 63, 64, 65, 127, 129, 700):
        keys = reference.pack_rows(randn(1, 32, seed=2).expand(count, 32), EXACT_KEY)
        found = reference.select_rows(q, weights, keys, EXACT_KEY, torch.full((6,), count), count // 2)
        assert torch.equal(found, torch.arange(count // 2, dtype=torch.int32).expand(6, -1)), count


def test_scores_of_extreme_logits_stay_finite() -> None:
    gate = f32(torch.tensor([[1.0], [-1.0], [0.0]]))
    x = torch.tensor([[0.0], [80.0], [1000.0], [-20.0]])
    for scoring in ("sqrtsoftplus", "sigmoid"):
        _, weights = reference.route(x, gate, scoring=scoring, topk=3, scaling=1.0)
        assert weights.isfinite().all()
        assert weights.sum(1).tolist() == pytest.approx([1.0] * 4, rel=1e-6)


@pytest.mark.parametrize("layout", [kv_row_v4(512, 64), kv_row_v32(512, 64), *FP4_KEYS], ids=lambda layout: layout.name)
@pytest.mark.parametrize("number", [float("nan"), -float("nan"), float("inf")])
def test_a_number_that_is_none_stays_visible(layout: RowLayout, number: float) -> None:
    """The sampler then says so; a crash here, or a finite row, would hide which network diverged."""
    x = randn(3, layout.width)
    x[1, 5] = number
    found = reference.unpack_rows(reference.pack_rows(x, layout), layout)
    assert found[1, : layout.block].isnan().all()
    assert found[[0, 2]].isfinite().all()
