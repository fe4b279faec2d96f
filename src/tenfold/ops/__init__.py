"""The seam for speed: the operations every backend offers, and the choice of one.

A backend is a module with the functions of `Ops`; `ops/reference.py` is the law the others are compared with.
Knows nothing of layers, sessions or files.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from tenfold import _native
from tenfold.errors import BackendMissing, UsageError
from tenfold.formats import RowLayout, WeightFormat

__all__ = [
    "BACKENDS",
    "BatchOps",
    "Experts",
    "FarMemory",
    "FusedOps",
    "Group",
    "Ops",
    "Recording",
    "RecordingOps",
    "Recordings",
    "Rows",
    "Stack",
    "Tick",
    "Weight",
    "device_of",
    "select",
]

BACKENDS = ("reference", "cpu", "triton")


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Weight:
    """A weight as it is stored: codes in `data`, block scales in `scale`; `shape` is the logical (out, in)."""

    name: str
    shape: tuple[int, ...]
    format: WeightFormat
    data: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Experts:
    """The routed experts of one layer: gate (`w1`), down (`w2`) and up (`w3`) projections by expert."""

    w1: tuple[Weight, ...]
    w2: tuple[Weight, ...]
    w3: tuple[Weight, ...]


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Stack:
    """Matrices that all meet the same activations."""

    weights: tuple[Weight, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Packed rows an attention call reads, and which of them each query sees.

    Query i sees rows `start[i]` to `stop[i]` - 1, or the rows `index[i]` lists (int32, -1 = none, at the end).
    Where each query has rows of its own, `packed` is int64 [n], their addresses, and `most` the rows of any.
    """

    packed: Tensor
    layout: RowLayout
    start: Tensor | None = None
    stop: Tensor | None = None
    index: Tensor | None = None
    most: int | None = None

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Start and stop of each query's rows, where no index lists them."""
        assert self.start is not None
        assert self.stop is not None
        return self.start, self.stop

    @property
    def columns(self) -> int:
        """The most rows any query sees."""
        if self.index is not None:
            return self.index.shape[1]
        return self.packed.shape[0] if self.most is None else self.most

    def part(self, queries: slice) -> Rows:
        """The same rows for some of the queries."""
        if self.index is not None:
            return Rows(self.packed, self.layout, index=self.index[queries])
        start, stop = self.bounds
        return Rows(self.packed, self.layout, start[queries], stop[queries])


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """What one token of each of several sessions adds to a compressor: as `BatchOps.compress_step` takes it."""

    values: Tensor
    gates: Tensor
    ape: Weight
    states: Tensor
    rows: Tensor
    norm: Weight
    layout: RowLayout
    spread: bool


class Ops(Protocol):
    """The operations of a backend. Activations are float32; n counts tokens, or rows, and may be 0."""

    def prepare(self, weight: Weight, resident: bool) -> Weight:
        """The weight in the form this backend likes best; `resident` allows it to be unpacked in memory."""

    def dequantize(self, weight: Weight) -> Tensor:
        """The weight unpacked: float32 of its logical shape."""

    def embed(self, ids: Tensor, weight: Weight) -> Tensor:
        """ids int64 [n] -> [n, hidden]."""

    def look_up(self, ids: Tensor, table: Weight) -> Tensor:
        """ids int64 [n] -> rows of a table of int64, [n, width]."""

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """x [n, in] -> [n, out]."""

    def linear_each(self, x: Tensor, stack: Stack) -> tuple[Tensor, ...]:
        """`linear` of x [n, in] with each weight of the stack."""

    def grouped_linear(self, x: Tensor, weight: Weight) -> Tensor:
        """x [n, groups, in], weight [groups * out, in] -> [n, groups * out]; group g uses its own rows."""

    def rms_norm(self, x: Tensor, weight: Weight | None, eps: float) -> Tensor:
        """x [..., width] -> x * rsqrt(mean(x^2) + eps) * weight."""

    def layer_norm(self, x: Tensor, weight: Weight, bias: Weight, eps: float) -> Tensor:
        """x [..., width] -> (x - mean) * rsqrt(variance + eps) * weight + bias."""

    def rope(
        self,
        x: Tensor,
        positions: Tensor,
        frequencies: Tensor,
        *,
        inverse: bool = False,
        interleaved: bool = True,
    ) -> Tensor:
        """Rotates x [n, ..., dim] by positions [n] times frequencies [dim / 2]; pairs (2i, 2i+1) or (i, i + dim/2)."""

    def norm_rope(self, x: Tensor, weight: Weight | None, eps: float, positions: Tensor, frequencies: Tensor) -> Tensor:
        """x [n, ..., width] normed as by `rms_norm`, then its last channels rotated as by `rope`."""

    def norm_rope_pack(
        self,
        x: Tensor,
        weight: Weight,
        eps: float,
        positions: Tensor,
        frequencies: Tensor,
        layout: RowLayout,
        spread: bool,
    ) -> Tensor:
        """`norm_rope`, then `hadamard` where it is spread, then `pack_rows`: x [n, width] -> uint8 [n, row_bytes]."""

    def rope_round(self, x: Tensor, positions: Tensor, frequencies: Tensor, layout: RowLayout, spread: bool) -> Tensor:
        """x [n, ..., width], its last channels rotated as by `rope`; where it is spread also `hadamard`, and rounded
        to what packed rows of the layout hold."""

    def hadamard(self, x: Tensor) -> Tensor:
        """x [..., power of two] times the orthonormal Sylvester-Hadamard matrix."""

    def hc_mix(
        self,
        streams: Tensor,
        fn: Weight,
        base: Weight,
        scale: Weight,
        norm: Weight,
        *,
        norm_eps: float,
        eps: float,
        iterations: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """streams [n, m, d] -> normed sub-layer input [n, d], post [n, m], combination [n, m, m] (spec 2.1)."""

    def hc_embed(self, ids: Tensor, weight: Weight, copies: int) -> Tensor:
        """ids int64 [n] -> the residual streams at first, copies of the embedding [n, copies, d] (spec 2.1)."""

    def hc_merge(self, streams: Tensor, y: Tensor, post: Tensor, combination: Tensor) -> Tensor:
        """post_k y + sum over j of combination[j, k] streams_j -> [n, m, d]."""

    def hc_collapse(
        self, streams: Tensor, fn: Weight, base: Weight, scale: Weight, norm: Weight, *, norm_eps: float, eps: float
    ) -> Tensor:
        """streams [n, m, d] -> [n, d] after the last norm (spec 2.8)."""

    def compress(self, values: Tensor, gates: Tensor, overlap: bool) -> Tensor:
        """Softmax-pooled entries: values, gates [groups, ratio, width] -> [groups, dim] (spec 2.4).

        With overlap the first group is the predecessor of the first entry, its gates -inf where there is none;
        then width = 2 dim and there are groups - 1 entries.
        """

    def pack_rows(self, x: Tensor, layout: RowLayout) -> Tensor:
        """x [..., width] -> uint8 [..., row_bytes], quantised as the layout says."""

    def unpack_rows(self, packed: Tensor, layout: RowLayout) -> Tensor:
        """uint8 [..., row_bytes] -> float32 [..., width]."""

    def select_rows(
        self, q: Tensor, weights: Tensor, keys: Tensor, layout: RowLayout, visible: Tensor, topk: int
    ) -> Tensor:
        """The top rows by sum over heads of weights * relu(q . key), for each query (spec 2.5, 5.4).

        q [n, heads, dim], weights [n, heads], keys uint8 [rows, row_bytes], visible int [n]: the first
        `visible` rows count. Returns int32 [n, min(topk, largest visible)], ascending, -1 at the end; of equal
        scores the smaller row wins.
        """

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
        """One softmax over all rows of all sources -> [n, heads, value_dim] (spec 2.6).

        q [n, heads, width]; a row's first `value_dim` channels are its value. `sink` [heads] adds e^sink to the
        denominator. The queries stand at consecutive positions from `position`; with `frequencies` the last channels
        of each output are rotated back by its query's, as values that were stored rotated want it.
        """

    def route(
        self,
        x: Tensor,
        gate: Weight,
        *,
        scoring: Literal["sqrtsoftplus", "sigmoid"],
        topk: int,
        scaling: float,
        bias: Weight | None = None,
        chosen: Tensor | None = None,
        groups: int = 1,
        topk_group: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """x [n, d] -> expert ids int64 [n, topk] and weights [n, topk]; `chosen` gives the ids (hash routing)."""

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        bank: Experts,
        *,
        limit: float | None,
        weigh_first: bool,
        shared: Experts | None = None,
        breathe: Callable[[], None] | None = None,
    ) -> Tensor:
        """Sum over the chosen experts -> [n, d]; `limit` clamps as in spec 2.7, `weigh_first` weighs before w2.

        With `shared`, a bank of one, the same as adding its `feed_forward`. `breathe` is called now and then where it
        takes long; what it raises ends it.
        """

    def feed_forward(self, x: Tensor, w1: Weight, w2: Weight, w3: Weight, limit: float | None) -> Tensor:
        """w2(silu(w1 x) * w3 x) -> [n, d]; the dense layers."""


class BatchOps(Ops, Protocol):
    """What a backend offers beside that takes one token each of many sessions at once and asks the device nothing.

    Sessions' memory is given by addresses, int64 [n]; `Rows` may be such a table.
    """

    def select_rows(
        self,
        q: Tensor,
        weights: Tensor,
        keys: Tensor,
        layout: RowLayout,
        visible: Tensor,
        topk: int,
        most: int | None = None,
        factor: float = 1.0,
    ) -> Tensor:
        """As in `Ops`, of weights that count `factor` times; keys may be addresses of each query's own, of which there
        are `most` at most.

        int32 [n, min(topk, rows there are)]: there may be more -1 at the end.
        """

    def sparse_attention(
        self,
        q: Tensor,
        sources: Sequence[Rows],
        sink: Weight | None,
        scale: float,
        value_dim: int,
        position: int | Tensor,
        frequencies: Tensor | None = None,
    ) -> Tensor:
        """As in `Ops`; `position` may be each query's own."""

    def store_rows(self, rows: Tensor, addresses: Tensor, places: Tensor, ring: int | None = None) -> None:
        """Row i of rows, uint8 [n, row_bytes], to row places[i] at its address; with `ring` modulo that, twice: into
        either of the two copies that lie there."""

    def compress_step(
        self,
        values: Tensor,
        gates: Tensor,
        ape: Weight,
        states: Tensor,
        rows: Tensor,
        positions: Tensor,
        ratio: int,
        overlap: bool,
        norm: Weight,
        eps: float,
        frequencies: Tensor,
        layout: RowLayout,
        spread: bool,
    ) -> None:
        """Adds a token to each compressor state at `states`: values [n, width], and gates with the row of `ape` [ratio,
        width] that is their place's. Where it completes a group, the group's entry goes as by `compress` and
        `norm_rope_pack` to its place in the rows at `rows`."""

    def keep_experts_far(self, hot: int) -> FarMemory:
        """From now on routed experts are read where what comes back keeps them, copies of `hot` of each layer apart."""

    def rest(self) -> None:
        """Between two passes: what is better done when nothing runs."""


class FusedOps(BatchOps, Protocol):
    """What a backend offers beside for passes of one token each, where the number of launches sets the pace.

    `reads_codes`: products with stored codes round activations to bf16 at most, so nothing is gained by unpacking them.
    """

    reads_codes: bool

    def norm_linear_each(self, x: Tensor, norm: Weight, eps: float, stack: Stack) -> tuple[Tensor, ...]:
        """`linear_each` of x normed as by `rms_norm`."""

    def linear_onto(self, before: Tensor, x: Tensor, weight: Weight) -> Tensor:
        """`before` [n, out], and `linear` of x."""

    def grouped_linear_into(self, x: Tensor, weight: Weight, out: Tensor) -> None:
        """`grouped_linear` of the first channels of each group of x, to the first of out [n, groups, out or more]."""

    def hc_merge_mix(
        self,
        streams: Tensor,
        y: Tensor,
        post: Tensor,
        combination: Tensor,
        fn: Weight,
        base: Weight,
        scale: Weight,
        norm: Weight,
        *,
        norm_eps: float,
        eps: float,
        iterations: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`hc_merge`, then `hc_mix` of the streams that it made: these, and what `hc_mix` gives.

        Here and in `hc_merge` y may be [n, parts, d], to be added up.
        """

    def experts_apart(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        bank: Experts,
        *,
        limit: float | None,
        weigh_first: bool,
        shared: Experts | None = None,
    ) -> Tensor:
        """As `experts`, not yet added up: [n, parts, d]."""

    def experts_onto(
        self,
        x: Tensor,
        norm: Weight,
        eps: float,
        ids: Tensor,
        weights: Tensor,
        bank: Experts,
        *,
        limit: float | None,
        weigh_first: bool,
        shared: Experts | None = None,
    ) -> Tensor:
        """x, and `experts` of x normed as by `rms_norm`."""

    def feed_forward_onto(
        self, x: Tensor, norm: Weight, eps: float, w1: Weight, w2: Weight, w3: Weight, limit: float | None
    ) -> Tensor:
        """x, and `feed_forward` of x normed as by `rms_norm`."""

    def route(
        self,
        x: Tensor,
        gate: Weight,
        *,
        scoring: Literal["sqrtsoftplus", "sigmoid"],
        topk: int,
        scaling: float,
        bias: Weight | None = None,
        chosen: Tensor | None = None,
        groups: int = 1,
        topk_group: int = 1,
        norm: Weight | None = None,
        eps: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """As in `Ops`; with `norm` of x normed as by `rms_norm`."""

    def enter(
        self,
        row: Tensor,
        norm: Weight,
        eps: float,
        positions: Tensor,
        frequencies: Tensor,
        rings: Tensor,
        ring: int,
        layout: RowLayout,
        groups: Sequence[Group],
        ratio: int,
        overlap: bool,
        q: Tensor,
        q_index: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Rows [n, width] enter the rings as by `norm_rope_pack` and `store_rows`, and groups grow as by
        `compress_step`: at most one of rows like those of the ring, then one of others, index keys.

        q [n, heads, width] comes back as by `norm_rope` without a weight; q_index [n, index heads, key width], where
        there are keys, as by `rope_round` in the form that `select_rows` takes quickest.
        """

    def enter_latent(
        self,
        q: Tensor,
        q_index: Tensor,
        row: Tensor,
        key: Tensor,
        norm: Weight,
        key_norm: Weight,
        key_bias: Weight,
        eps: float,
        positions: Tensor,
        frequencies: Tensor,
        rows: Tensor,
        layout: RowLayout,
        keys: Tensor,
        key_layout: RowLayout,
        spread: bool,
    ) -> tuple[Tensor, Tensor]:
        """A token of each session into its latent rows and index keys, and its queries as these want them (spec 5).

        row [n, latent + rope] is normed but for its last channels, which are rotated; key [n, dim] is normed as by
        `layer_norm`, its first channels are rotated, i with i + rope / 2, and where it is spread `hadamard` follows.
        q [n, heads, nope + rope] -> [n, heads, latent + rope], of which only the last are filled, rotated;
        q_index [n, index heads, dim] -> rotated, spread and rounded as keys are, in the form that `select_rows` takes
        quickest.
        """


Tick = Callable[[float], None]
"""Is told the share of a pass that is done."""


class RecordingOps(Protocol):
    """What a backend offers beside whose passes are replayed without a device's graphs."""

    def recordings(self) -> Recordings:
        """None yet."""


class Recordings(Protocol):
    """Passes of which one runs at a time, since they work in the same memory."""

    def record(self, run: Callable[[Tick], Tensor]) -> Recording:
        """A pass that ran once before, recorded; `run` is given what to tell its progress."""


class Recording(Protocol):
    """A pass to replay; `out` is what it returned when it was recorded, good until another of the recordings runs."""

    out: Tensor

    def replay(self, tick: Tick | None) -> Tensor:
        """What the pass returns, as good as `out`; `tick` hears of its progress, and may end it."""


class FarMemory(Protocol):
    """Host memory that a backend reads across the bus."""

    def keep(self, weight: Weight) -> Weight:
        """The weight, copied there."""


def select(name: str, *, exact: bool) -> tuple[str, Ops]:
    """The backend called `name`, with the name it resolves to; one that is missing is an error, never replaced.

    `auto` is cpu where the native library is built, else reference. Unless `exact`, a backend may round activations
    as finely as the models were trained for.
    """
    if name == "auto":
        name = "cpu" if _is_built() else "reference"
    if name == "reference":
        from tenfold.ops import reference

        return name, cast(Ops, reference)
    if name == "cpu":
        from tenfold.ops import cpu, cpu_rounded

        _native.isa()  # raises BackendMissing with the command to build it
        return name, cast(Ops, cpu if exact else cpu_rounded)
    if name == "triton":
        return name, _triton(exact)
    raise UsageError(f"unknown backend {name!r}; the backends are auto, {', '.join(BACKENDS)}")


def device_of(ops: Ops) -> torch.device:
    """Where a backend's tensors live: the CPU, unless it says otherwise."""
    device: torch.device = getattr(ops, "device", torch.device("cpu"))
    return device


def _triton(exact: bool) -> Ops:
    if importlib.util.find_spec("triton") is None:
        raise BackendMissing("backend triton needs the package triton; install it with: pip install 'tenfold[gpu]'")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendMissing(
            "backend triton needs an NVIDIA GPU, and torch finds none; use --backend cpu, or set TRITON_INTERPRET=1 "
            "to run its kernels on the CPU, thousands of times slower"
        )
    from tenfold.ops.triton import Triton

    return cast(Ops, Triton(exact=exact))


def _is_built() -> bool:
    try:
        _native.library_path()
    except BackendMissing:
        return False
    return True
