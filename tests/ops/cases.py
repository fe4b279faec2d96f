"""Every operation of a backend on random rows, at widths where vectors have a remainder and threads divide the work.

For test_rows_alone.py (the reference) and test_cpu_every_kernel.py. Knows nothing of what the results should be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from tenfold.config import RopeSpec
from tenfold.formats import F32, I64, exact_layout, index_key_fp4, index_key_fp8, kv_row_v4, kv_row_v32
from tenfold.models.blocks import rope_frequencies
from tenfold.ops import Experts, Ops, Rows, Stack, Weight, reference

Move = Callable[[Tensor], Tensor]


def in_place(tensor: Tensor) -> Tensor:
    return tensor


class Call(Protocol):
    """An operation on a slice of its rows; `move` puts every tensor that has rows elsewhere in memory."""

    def __call__(self, rows: slice, move: Move = in_place) -> tuple[Tensor, ...]: ...


Cases = Iterator[tuple[str, Call]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randint(low: int, high: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def f32(data: Tensor) -> Weight:
    return Weight("w", tuple(data.shape), F32, data)


def each(operation: Callable[..., Any], *parts: Tensor, **words: Any) -> Call:
    """`operation` on the same rows of all `parts`."""

    def call(rows: slice, move: Move = in_place) -> tuple[Tensor, ...]:
        result = operation(*(move(part[rows]) for part in parts), **words)
        return result if isinstance(result, tuple) else (result,)

    return call


def turned(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operation that takes positions behind a weight, as one that takes them behind x."""

    def call(x: Tensor, positions: Tensor, **words: Any) -> Tensor:
        return operation(x, positions=positions, **words)

    return call


def linear_cases(ops: Ops, T: int) -> Cases:
    x, heads, positions = randn(T, 96), randn(T, 5, 48, seed=1), randint(0, 1 << 20, (T,))
    frequencies = rope_frequencies(RopeSpec(10000.0, 48))
    w, v, deep = f32(randn(40, 96)), f32(randn(96)), f32(randn(96, 40))
    deep_rows = f32(randn(7, 96, seed=2))
    yield "embed", each(ops.embed, positions % 40, weight=w)
    yield "hc_embed", each(ops.hc_embed, positions % 40, weight=w, copies=3)
    yield "look_up", each(ops.look_up, positions % 40, table=Weight("table", (40, 5), I64, randint(0, 9, (40, 5))))
    yield "linear", each(ops.linear, x, weight=w)
    yield "linear_each", each(ops.linear_each, x, stack=Stack((w, deep_rows, w)))
    yield "linear-1", each(ops.linear, x, weight=f32(w.data[:1]))
    yield "grouped_linear", each(ops.grouped_linear, heads, weight=f32(randn(35, 48)))
    yield "rms_norm", each(ops.rms_norm, x, weight=v, eps=1e-6)
    yield "rms_norm-heads", each(ops.rms_norm, heads, weight=None, eps=1e-6)
    yield "layer_norm", each(ops.layer_norm, x, weight=v, bias=v, eps=1e-6)
    yield "rope", each(ops.rope, heads, positions, frequencies=frequencies)
    yield "rope-halves", each(ops.rope, heads, positions, frequencies=frequencies, interleaved=False)
    for weight in (f32(randn(48)), None):
        words = {"weight": weight, "eps": 1e-6, "frequencies": frequencies[:9]}
        yield f"norm_rope-{weight is None}", each(turned(ops.norm_rope), heads, positions, **words)
    yield "hadamard", each(ops.hadamard, heads[..., :32])
    yield "feed_forward", each(ops.feed_forward, x, w1=w, w2=deep, w3=f32(-w.data), limit=10.0)


def hyper_cases(ops: Ops, T: int) -> Cases:
    for m, d in ((4, 24), (4, 100), (2, 48)):
        streams, norms = randn(T, m, d), {"norm_eps": 1e-6, "eps": 1e-6}
        fn, base, scale = randn((2 + m) * m, m * d) * 0.2, randn((2 + m) * m), randn(3)
        norm = f32(randn(d) + 1)
        head = {"fn": f32(fn[:m]), "base": f32(base[:m]), "scale": f32(scale[:1]), "norm": norm} | norms
        mapping = {"fn": f32(fn), "base": f32(base), "scale": f32(scale), "norm": norm} | norms | {"iterations": 20}
        mix = each(ops.hc_mix, streams, **mapping)
        yield f"hc_mix-{m}-{d}", mix
        yield f"hc_merge-{m}-{d}", each(ops.hc_merge, streams, *mix(slice(0, T)))
        yield f"hc_collapse-{m}-{d}", each(ops.hc_collapse, streams, **head)


EXACT_KEY = exact_layout(index_key_fp4(32))
FP4_KEYS = tuple(index_key_fp4(dim) for dim in (32, 64, 128))  # 17, 34 and 68 bytes


def row_cases(ops: Ops, T: int) -> Cases:
    for ratio, dim in ((4, 24), (4, 112), (8, 36), (16, 16), (128, 24), (128, 64)):
        pair = randn(T, ratio, dim), randn(T, ratio, dim, seed=1)
        yield f"compress-{ratio}-{dim}", each(ops.compress, *pair, overlap=False)
    for layout in (kv_row_v4(512, 64), kv_row_v4(40, 8), kv_row_v32(96, 16), index_key_fp8(128), *FP4_KEYS):
        rows, positions = randn(T, layout.width), randint(0, 1 << 20, (T,))
        packed = reference.pack_rows(rows, layout)
        yield f"pack_rows-{layout.name}-{layout.width}", each(ops.pack_rows, rows, layout=layout)
        words = {"frequencies": rope_frequencies(RopeSpec(160000.0, 8)), "layout": layout}
        for spread in (False, True)[: 1 + (layout.width & (layout.width - 1) == 0)]:
            name = f"{layout.name}-{layout.width}-{spread}"
            packing = {"weight": f32(randn(layout.width)), "eps": 1e-6, "spread": spread} | words
            yield f"norm_rope_pack-{name}", each(turned(ops.norm_rope_pack), rows, positions, **packing)
            yield f"rope_round-{name}", each(ops.rope_round, rows, positions, spread=spread, **words)
        yield f"unpack_rows-{layout.name}-{layout.width}", each(ops.unpack_rows, packed, layout=layout)


def expert_cases(ops: Ops, T: int) -> Cases:
    x = randn(T, 96)
    for scoring, count, groups in (("sqrtsoftplus", 9, 1), ("sigmoid", 16, 4)):
        words = {"gate": f32(randn(count, 96)), "bias": f32(randn(count) * 0.2), "scoring": scoring, "topk": 3}
        words |= {"scaling": 1.5, "groups": groups, "topk_group": groups // 2 or 1}
        route = each(ops.route, x, **words)
        yield f"route-{scoring}", route
        shapes = ((20, 96), (96, 20), (20, 96))
        bank = Experts(*(tuple(f32(randn(*shape, seed=e)) for e in range(count)) for shape in shapes))
        for first in (True, False):
            words = {"bank": bank, "limit": 10.0, "weigh_first": first}
            yield f"experts-{count}-{first}", each(ops.experts, x, *route(slice(0, T)), **words)
        words["shared"] = Experts(*((f32(randn(*shape, seed=99)),) for shape in shapes))
        yield f"experts-{count}-shared", each(ops.experts, x, *route(slice(0, T)), **words)


def attention_cases(ops: Ops, T: int) -> Cases:
    layout = exact_layout(kv_row_v4(40, 8))
    packed = reference.pack_rows(randn(max(400, T + 100), 40), layout)
    stop = torch.arange(1, T + 1) + 100
    start = (stop - randint(1, 150, (T,))).clamp(min=0)
    order = torch.rand(T, 400, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :70].sort(1).values
    index = torch.where(torch.arange(70) < randint(0, 71, (T, 1)), order, -1).int()

    def attend(q: Tensor, start: Tensor, stop: Tensor, index: Tensor, sink: Weight) -> Tensor:
        sources = [Rows(packed, layout, start=start, stop=stop), Rows(packed, layout, index=index)]
        return ops.sparse_attention(q, sources, sink, 0.2, 32, 0)

    for heads in (1, 4, 5):
        q = randn(T, heads, 40, seed=1)
        yield f"sparse_attention-{heads}", each(attend, q, start, stop, index, sink=f32(randn(heads)))
    keys = reference.pack_rows(randn(300, 32), EXACT_KEY)

    def select(q: Tensor, weights: Tensor, visible: Tensor) -> Tensor:
        return ops.select_rows(q, weights, keys, EXACT_KEY, visible, 40)

    queries = randn(T, 16, 32, seed=1), randn(T, 16, seed=2), randint(200, 301, (T,))
    yield "select_rows", each(select, *queries)


def every_case(ops: Ops, T: int) -> dict[str, Call]:
    """Each operation of a backend on T rows, by name; what the name begins with is the operation."""
    makers = (linear_cases, hyper_cases, row_cases, expert_cases, attention_cases)
    return {name: call for maker in makers for name, call in maker(ops, T)}
