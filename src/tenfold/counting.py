"""A backend that counts: every operation is carried out by another one, its multiply-adds and bytes noted.

What is counted is what the operations mean, by the planner's definitions (`planner/work.py`), so that the two can be
compared: a kernel that finds a short cut still counts in full. Knows nothing of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from tenfold import checkpoint
from tenfold.config import ModelConfig
from tenfold.formats import I64, RowLayout
from tenfold.ops import Experts, Ops, Rows, Stack, Weight
from tenfold.planner.anatomy import PRECISIONS, Precision
from tenfold.planner.work import Work

__all__ = ["CountingOps", "counting"]

_KEY_PRECISIONS: dict[int, Precision] = {4: "fp4", 8: "fp8", 32: "f32"}


class CountingOps:
    """Implements `Ops` by another backend. `counted` is the work since `restart`; each weight counts once."""

    def __init__(self, ops: Ops, config: ModelConfig) -> None:
        self._ops = ops
        self._component = {spec.name: spec.component for spec in checkpoint.tensors(config)}
        self.restart()

    def restart(self) -> None:
        self._seen: set[int] = set()
        self._counted: dict[tuple[str, Precision], list[int]] = {}

    @property
    def counted(self) -> tuple[Work, ...]:
        return tuple(Work(*key, numbers[0], numbers[1], numbers[2]) for key, numbers in self._counted.items())

    def __getattr__(self, name: str) -> Any:
        """Operations that neither multiply matrices nor read weights or rows."""
        return getattr(self._ops, name)

    def _add(
        self, component: str, precision: Precision, multiply_adds: int = 0, weight_bytes: int = 0, kv_bytes: int = 0
    ) -> None:
        numbers = self._counted.setdefault((component, precision), [0, 0, 0])
        for place, amount in enumerate((multiply_adds, weight_bytes, kv_bytes)):
            numbers[place] += amount

    def _read(self, *weights: Weight | None, multiply_adds: int = 0) -> None:
        """The weights of one operation; `multiply_adds` counts for the first."""
        for weight in weights:
            if weight is None:
                continue
            num_bytes = 0 if id(weight) in self._seen else weight.format.bytes_of(weight.shape)
            self._seen.add(id(weight))
            self._add(self._component[weight.name], PRECISIONS[weight.format.name], multiply_adds, num_bytes)
            multiply_adds = 0

    def embed(self, ids: Tensor, weight: Weight) -> Tensor:
        if self._component[weight.name] == "embed":
            self._add("embed", "bf16", 0, weight.format.bytes_of((ids.numel(), weight.shape[1])))
        else:  # the compressor's table of positions, a few rows that are all in use
            self._read(weight)
        return self._ops.embed(ids, weight)

    def hc_embed(self, ids: Tensor, weight: Weight, copies: int) -> Tensor:
        return self.embed(ids, weight)[:, None, :].repeat(1, copies, 1)

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        self._read(weight, multiply_adds=x.shape[0] * weight.shape[0] * weight.shape[1])
        return self._ops.linear(x, weight)

    def linear_each(self, x: Tensor, stack: Stack) -> tuple[Tensor, ...]:
        for weight in stack.weights:
            self._read(weight, multiply_adds=x.shape[0] * weight.shape[0] * weight.shape[1])
        return self._ops.linear_each(x, stack)

    def grouped_linear(self, x: Tensor, weight: Weight) -> Tensor:
        self._read(weight, multiply_adds=x.shape[0] * weight.shape[0] * weight.shape[1])
        return self._ops.grouped_linear(x, weight)

    def rms_norm(self, x: Tensor, weight: Weight | None, eps: float) -> Tensor:
        self._read(weight)
        return self._ops.rms_norm(x, weight, eps)

    def layer_norm(self, x: Tensor, weight: Weight, bias: Weight, eps: float) -> Tensor:
        self._read(weight, bias)
        return self._ops.layer_norm(x, weight, bias, eps)

    def norm_rope(self, x: Tensor, weight: Weight | None, eps: float, positions: Tensor, frequencies: Tensor) -> Tensor:
        self._read(weight)
        return self._ops.norm_rope(x, weight, eps, positions, frequencies)

    def norm_rope_pack(self, x: Tensor, weight: Weight, *arguments: Any, **kw: Any) -> Tensor:
        self._read(weight)
        return self._ops.norm_rope_pack(x, weight, *arguments, **kw)

    def hc_mix(self, streams: Tensor, fn: Weight, base: Weight, scale: Weight, norm: Weight, **kw: Any) -> Any:
        n, m, d = streams.shape
        self._read(norm)
        self._read(fn, base, scale, multiply_adds=n * (fn.shape[0] * fn.shape[1] + m * d))
        return self._ops.hc_mix(streams, fn, base, scale, norm, **kw)

    def hc_merge(self, streams: Tensor, y: Tensor, post: Tensor, combination: Tensor) -> Tensor:
        n, m, d = streams.shape
        self._add("mhc", "f32", n * d * (m + m * m))
        return self._ops.hc_merge(streams, y, post, combination)

    def hc_collapse(self, streams: Tensor, fn: Weight, base: Weight, scale: Weight, norm: Weight, **kw: Any) -> Tensor:
        n, m, d = streams.shape
        self._read(norm)
        self._read(fn, base, scale, multiply_adds=n * (fn.shape[0] * fn.shape[1] + m * d))
        return self._ops.hc_collapse(streams, fn, base, scale, norm, **kw)

    def select_rows(
        self, q: Tensor, weights: Tensor, keys: Tensor, layout: RowLayout, visible: Tensor, topk: int
    ) -> Tensor:
        multiply_adds = q.shape[1] * q.shape[2] * int(visible.sum())
        kv_bytes = (int(visible.max()) if visible.numel() else 0) * layout.row_bytes
        self._add("indexer_score", _KEY_PRECISIONS[layout.code_bits], multiply_adds, 0, kv_bytes)
        return self._ops.select_rows(q, weights, keys, layout, visible, topk)

    def sparse_attention(
        self,
        q: Tensor,
        sources: Sequence[Rows],
        sink: Weight | None,
        scale: float,
        value_dim: int,
        position: int,
        frequencies: Tensor | None = None,
    ) -> Tensor:
        self._read(sink)
        for source in sources:
            entries, rows = _seen_rows(source)
            multiply_adds = entries * q.shape[1] * (q.shape[2] + value_dim)
            self._add("attn_core", "bf16", multiply_adds, 0, rows * source.layout.row_bytes)
        return self._ops.sparse_attention(q, sources, sink, scale, value_dim, position, frequencies)

    def route(self, x: Tensor, gate: Weight, **kw: Any) -> tuple[Tensor, Tensor]:
        self._read(gate, kw.get("bias"), multiply_adds=x.shape[0] * gate.shape[0] * gate.shape[1])
        if kw.get("chosen") is not None:
            self._add("embed", "bf16", 0, I64.bytes_of(kw["chosen"].shape))
        return self._ops.route(x, gate, **kw)

    def experts(
        self, x: Tensor, ids: Tensor, weights: Tensor, bank: Experts, shared: Experts | None = None, **kw: Any
    ) -> Tensor:
        used = ids.unique().tolist()
        for names in (bank.w1, bank.w2, bank.w3):
            rows, columns = names[0].shape
            self._read(*(names[expert] for expert in used), multiply_adds=ids.numel() * rows * columns)
        for weight in () if shared is None else (*shared.w1, *shared.w2, *shared.w3):
            self._read(weight, multiply_adds=x.shape[0] * weight.shape[0] * weight.shape[1])
        return self._ops.experts(x, ids, weights, bank, shared=shared, **kw)

    def feed_forward(self, x: Tensor, w1: Weight, w2: Weight, w3: Weight, limit: float | None) -> Tensor:
        for weight in (w1, w2, w3):
            self._read(weight, multiply_adds=x.shape[0] * weight.shape[0] * weight.shape[1])
        return self._ops.feed_forward(x, w1, w2, w3, limit)


def counting(ops: Ops, config: ModelConfig) -> tuple[Ops, CountingOps]:
    """The counting backend as the `Ops` it implements, and as the counter it is."""
    counter = CountingOps(ops, config)
    return cast(Ops, counter), counter


def _seen_rows(source: Rows) -> tuple[int, int]:
    """Rows summed over queries, and those read at least once (selected ones as if no two queries shared one)."""
    if source.index is not None:
        entries = int((source.index >= 0).sum())
        return entries, min(entries, source.packed.shape[0])
    start, stop = source.bounds
    if not start.numel():
        return 0, 0
    return int((stop - start).sum()), int(stop.max() - start.min())
