"""The native side of `Ops` for everything but weights: attention, selection, packed rows, channels, streams.

Every function has the signature and the meaning of its namesake in `ops/reference.py`. Tensors are checked here,
before a pointer leaves Python. What a query gets does not depend, to the last bit, on the queries that come with
it or on the number of threads.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tenfold import _native
from tenfold.formats import RowLayout
from tenfold.ops import Rows, Weight, reference
from tenfold.ops.cpu_pool import empty

__all__ = [
    "compress",
    "compress_step",
    "embed",
    "hadamard",
    "hc_collapse",
    "hc_embed",
    "hc_merge",
    "hc_mix",
    "look_up",
    "norm_rope",
    "norm_rope_pack",
    "pack_rows",
    "rms_norm",
    "rope",
    "rope_round",
    "route_logits",
    "select_rows",
    "sparse_attention",
    "store_rows",
    "unpack_rows",
]

_MOST_STREAMS = 8
_MOST_PAIRS = 256
_MOST_EXPERTS = 1024
_MOST_SOURCES = 4
_NORM, _SPREAD, _PACK, _ROUND = 1, 2, 4, 8
"""Steps of `turn_rows` in native/kernels/kernels.hpp; the rotation is always one."""

_LAYOUT_FIELDS = (
    "coded",
    "plain",
    "code_bits",
    "block",
    "scale_bytes",
    "plain_offset",
    "scale_offset",
    "row_bytes",
)


class _Layout(ctypes.Structure):
    """`RowLayout` of native/kernels/rows.hpp."""

    _fields_ = [(name, ctypes.c_int64) for name in _LAYOUT_FIELDS]


class _Rows(ctypes.Structure):
    """`Rows` of native/kernels/rows.hpp."""

    _fields_ = [
        ("packed", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("start", ctypes.c_void_p),
        ("stop", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("layout", _Layout),
    ]


@cache
def _layout(layout: RowLayout) -> _Layout:
    return _Layout(*(getattr(layout, name) for name in _LAYOUT_FIELDS))


def _kernel(name: str) -> Callable[..., None]:
    return _native._kernel(name, None)


def _checked(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a dense tensor on the CPU of this dtype and shape; anything else is refused."""
    if tensor.dtype is not dtype or not tensor.is_cpu:
        raise TypeError(f"{name}: expected a tensor of {dtype} on cpu, got {tensor.dtype} on {tensor.device}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected contiguous memory, got strides {tensor.stride()} for shape {shape}")
    return _aligned(name, tensor)


def _aligned(name: str, tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if address % tensor.itemsize:
        raise ValueError(f"{name}: its memory is not aligned to {tensor.itemsize} bytes; clone it first")
    return address


def _checked_rows(name: str, packed: Tensor, layout: RowLayout, width: int, num_sessions: int | None) -> int:
    """The address of rows, or of the table that says where each session's are."""
    if layout.width != width:
        raise ValueError(f"{name}: rows of {layout.name} have {layout.width} channels, the query has {width}")
    if num_sessions is not None:
        return _checked(name, packed, torch.int64, (num_sessions,))
    return _checked(name, packed, torch.uint8, (packed.shape[0], layout.row_bytes))


_vectors: WeakKeyDictionary[Weight, tuple[tuple[int, ...], int, Tensor]] = WeakKeyDictionary()
"""Shape and address of a weight's numbers and the tensor that owns them; not the weight, which would stay for ever."""


def _numbers(name: str, weight: Weight, shape: tuple[int, ...]) -> int:
    """The address of a weight's numbers as float32, unpacked and checked once in its life."""
    found = _vectors.get(weight)
    if found is None or found[0] != shape:
        data = weight.data if weight.data.dtype is torch.float32 else reference.dequantize(weight)
        found = _vectors[weight] = (shape, _checked(name, data, torch.float32, shape), data)
    return found[1]


# ---------------------------------------------------------------------------------------------- channels


def rms_norm(x: Tensor, weight: Weight | None, eps: float) -> Tensor:
    x, width = x.contiguous(), x.shape[-1]
    if width == 0:
        raise ValueError("x: expected rows of at least one element, got width 0")
    address = _checked("x", x, torch.float32, x.shape)
    scale = None if weight is None else _numbers("weight", weight, (width,))
    out = empty(*x.shape)
    _kernel("rms_norm")(address, scale, out.data_ptr(), x.numel() // width, width, eps, _native.num_threads())
    return out


def norm_rope(x: Tensor, weight: Weight | None, eps: float, positions: Tensor, frequencies: Tensor) -> Tensor:
    x = x.contiguous()
    scale = None if weight is None else _numbers("weight", weight, (x.shape[-1],))
    return _turned(x, scale, eps, positions, frequencies, None, _NORM, empty(*x.shape))


def norm_rope_pack(
    x: Tensor,
    weight: Weight,
    eps: float,
    positions: Tensor,
    frequencies: Tensor,
    layout: RowLayout,
    spread: bool,
) -> Tensor:
    x, (n, width) = x.contiguous(), x.shape
    steps = _NORM | _PACK | (_SPREAD if spread else 0)
    out = torch.empty(n, layout.row_bytes, dtype=torch.uint8)
    return _turned(x, _numbers("weight", weight, (width,)), eps, positions, frequencies, layout, steps, out)


def rope_round(x: Tensor, positions: Tensor, frequencies: Tensor, layout: RowLayout, spread: bool) -> Tensor:
    x = x.contiguous()
    steps = _SPREAD | _ROUND if spread else 0
    return _turned(x, None, 0.0, positions, frequencies, layout, steps, empty(*x.shape))


def _turned(
    x: Tensor,
    weight: int | None,
    eps: float,
    positions: Tensor,
    frequencies: Tensor,
    layout: RowLayout | None,
    steps: int,
    out: Tensor,
) -> Tensor:
    """x [n, ..., width], dense, through the steps, to `out`."""
    n, width, pairs = x.shape[0], x.shape[-1], frequencies.shape[0]
    positions, frequencies = positions.contiguous(), frequencies.contiguous()
    _check_steps(width, pairs, layout, steps)
    _kernel("turn_rows")(
        _checked("x", x, torch.float32, x.shape),
        weight,
        _checked("positions", positions, torch.int64, (n,)),
        _checked("frequencies", frequencies, torch.float32, (pairs,)),
        None if layout is None else ctypes.addressof(_layout(layout)),
        out.data_ptr(),
        n,
        math.prod(x.shape[1:-1]),
        width,
        pairs,
        eps,
        steps,
        _native.num_threads(),
    )
    return out


@cache
def _check_steps(width: int, pairs: int, layout: RowLayout | None, steps: int) -> None:
    if pairs > _MOST_PAIRS or 2 * pairs > width or width == 0:
        raise ValueError(f"x: expected at least {2 * pairs} and more than 0 channels, got {width}")
    if steps & _SPREAD and width & (width - 1):
        raise ValueError(f"x: expected a power of two of channels, got {width}")
    if layout is not None and layout.width != width:
        raise ValueError(f"x: rows of {layout.name} have {layout.width} channels, got {width}")


def rope(
    x: Tensor, positions: Tensor, frequencies: Tensor, *, inverse: bool = False, interleaved: bool = True
) -> Tensor:
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        x = x.contiguous()
    n, dim = x.shape[0], x.shape[-1]
    rows, pairs = math.prod(x.shape[1:-1]), dim // 2
    if pairs > _MOST_PAIRS:
        raise ValueError(f"x: expected at most {2 * _MOST_PAIRS} channels, got {dim}")
    if x.dtype is not torch.float32 or not x.is_cpu:
        raise TypeError(f"x: expected a tensor of torch.float32 on cpu, got {x.dtype} on {x.device}")
    positions, frequencies = positions.contiguous(), frequencies.contiguous()
    given = (
        _aligned("x", x),
        _checked("positions", positions, torch.int64, (n,)),
        _checked("frequencies", frequencies, torch.float32, (dim // 2,)),
    )
    out = empty(*x.shape)
    strides = x.stride(0), x.stride(1) if x.dim() == 3 else dim
    _kernel("rope")(*given, out.data_ptr(), n, rows, pairs, *strides, inverse, interleaved, _native.num_threads())
    return out


def hadamard(x: Tensor) -> Tensor:
    x, width = x.contiguous(), x.shape[-1]
    if width & (width - 1) or not width:
        raise ValueError(f"x: expected a power of two of channels, got {width}")
    address = _checked("x", x, torch.float32, tuple(x.shape))
    out = empty(*x.shape)
    _kernel("hadamard")(address, out.data_ptr(), x.numel() // width, width, _native.num_threads())
    return out


def compress(values: Tensor, gates: Tensor, overlap: bool) -> Tensor:
    groups, ratio, width = values.shape
    if gates.shape != values.shape or (overlap and (width % 2 or not groups)) or not ratio:
        raise ValueError(f"values, gates: cannot pool {tuple(values.shape)} by {tuple(gates.shape)}")
    if values.stride() != gates.stride() or values.stride(-1) != 1:
        values, gates = values.contiguous(), gates.contiguous()
    for name, tensor in (("values", values), ("gates", gates)):
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            raise TypeError(f"{name}: expected a tensor of torch.float32 on cpu, got {tensor.dtype} on {tensor.device}")
    out = torch.empty(groups - 1 if overlap else groups, width // 2 if overlap else width)
    _kernel("compress")(
        _aligned("values", values),
        _aligned("gates", gates),
        out.data_ptr(),
        groups,
        ratio,
        out.shape[1],
        values.stride(0),
        values.stride(1),
        overlap,
        _native.num_threads(),
    )
    return out


def route_logits(
    logits: Tensor,
    *,
    scoring: Literal["sqrtsoftplus", "sigmoid"],
    topk: int,
    scaling: float,
    bias: Weight | None = None,
    chosen: Tensor | None = None,
    groups: int = 1,
    topk_group: int = 1,
) -> tuple[Tensor, Tensor]:
    """`route` from the gate's logits [n, experts] on."""
    n, experts = logits.shape
    logits = logits.contiguous()
    if not 0 < topk <= experts // groups * topk_group or experts > _MOST_EXPERTS or experts % groups:
        raise ValueError(f"topk: cannot choose {topk} of {experts} experts in {topk_group} of {groups} groups")
    if groups > 1 and (experts < 2 * groups or topk_group > groups):
        raise ValueError(f"groups: cannot choose {topk_group} of {groups} groups of {experts // groups} experts")
    ids = torch.empty(n, topk, dtype=torch.int64) if chosen is None else chosen.contiguous()
    unchecked = chosen is None or not n or _native.recorder() is not None  # recorded: the model checked its table
    if not unchecked and not 0 <= int(ids.min()) <= int(ids.max()) < experts:
        raise IndexError(f"chosen: there are {experts} experts, got {int(ids.min())} to {int(ids.max())}")
    given = (
        _checked("logits", logits, torch.float32, (n, experts)),
        None if bias is None else _numbers("bias", bias, (experts,)),
        _checked("chosen", ids, torch.int64, (n, topk)),
    )
    weights = torch.empty(n, topk)
    sizes, softplus = (n, experts, topk, groups, topk_group), scoring == "sqrtsoftplus"
    _kernel("route")(*given, weights.data_ptr(), *sizes, scaling, softplus, chosen is not None, _native.num_threads())
    return ids, weights


# ---------------------------------------------------------------------------------------------- rows


def pack_rows(x: Tensor, layout: RowLayout) -> Tensor:
    if layout.code_bits == 32:
        return reference.pack_rows(x, layout)
    x = x.contiguous()
    address = _checked("x", x, torch.float32, (*x.shape[:-1], layout.width))
    out = torch.empty(*x.shape[:-1], layout.row_bytes, dtype=torch.uint8)
    rows = math.prod(x.shape[:-1])
    _kernel("pack_rows")(address, ctypes.addressof(_layout(layout)), out.data_ptr(), rows, _native.num_threads())
    return out


def unpack_rows(packed: Tensor, layout: RowLayout) -> Tensor:
    if layout.code_bits == 32:
        return reference.unpack_rows(packed, layout)
    packed = packed.contiguous()
    address = _checked("packed", packed, torch.uint8, (*packed.shape[:-1], layout.row_bytes))
    out = torch.empty(*packed.shape[:-1], layout.width)
    rows = math.prod(packed.shape[:-1])
    _kernel("unpack_rows")(address, ctypes.addressof(_layout(layout)), out.data_ptr(), rows, _native.num_threads())
    return out


# ---------------------------------------------------------------------------------------------- tables


def embed(ids: Tensor, weight: Weight) -> Tensor:
    return _embedded(ids, weight, 1)[:, 0]


def look_up(ids: Tensor, table: Weight) -> Tensor:
    ids, data = ids.contiguous(), table.data
    out = torch.empty(ids.shape[0], data.shape[1], dtype=torch.int64)
    _kernel("look_up")(
        _checked("table", data, torch.int64, tuple(data.shape)), _checked_ids(ids, data.shape[0]), out.data_ptr(),
        *out.shape,
    )  # fmt: skip
    return out


def _embedded(ids: Tensor, weight: Weight, copies: int) -> Tensor:
    """float32 [n, copies, width]: rows of a table in float32 or bf16."""
    ids, data = ids.contiguous(), weight.data
    dtype = torch.bfloat16 if data.dtype is torch.bfloat16 else torch.float32
    out = empty(ids.shape[0], copies, data.shape[1])
    _kernel("embed")(
        _checked("table", data, dtype, tuple(data.shape)), _checked_ids(ids, data.shape[0]), out.data_ptr(),
        *out.shape, dtype is torch.bfloat16, _native.num_threads(),
    )  # fmt: skip
    return out


def _checked_ids(ids: Tensor, num_rows: int) -> int:
    """The address of numbers of rows. A recorded pass does not look again: its tokens are the vocabulary's."""
    address = _checked("ids", ids, torch.int64, (ids.shape[0],))
    if ids.numel() and _native.recorder() is None:
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= num_rows:
            raise IndexError(f"ids: there are {num_rows} rows, got {low} to {high}")
    return address


# ---------------------------------------------------------------------------------------------- hyper-connections


def hc_embed(ids: Tensor, weight: Weight, copies: int) -> Tensor:
    return _embedded(ids, weight, copies)


def hc_mix(
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
    streams, (n, m, d) = streams.contiguous(), _stream_shape(streams)
    outputs = (2 + m) * m
    x, post, combination = empty(n, d), torch.empty(n, m), torch.empty(n, m, m)
    mixed = torch.empty(n, outputs)
    _kernel("hc_mix")(
        _checked("streams", streams, torch.float32, (n, m, d)),
        *_projection(fn, base, scale, norm, outputs, 3, m, d),
        x.data_ptr(), post.data_ptr(), combination.data_ptr(), mixed.data_ptr(),
        n, m, d, norm_eps, eps, iterations, _native.num_threads(),
    )  # fmt: skip
    return x, post, combination


def hc_collapse(
    streams: Tensor, fn: Weight, base: Weight, scale: Weight, norm: Weight, *, norm_eps: float, eps: float
) -> Tensor:
    streams, (n, m, d) = streams.contiguous(), _stream_shape(streams)
    x, mixed = empty(n, d), torch.empty(n, m)
    _kernel("hc_collapse")(
        _checked("streams", streams, torch.float32, (n, m, d)),
        *_projection(fn, base, scale, norm, m, 1, m, d),
        x.data_ptr(), mixed.data_ptr(), n, m, d, norm_eps, eps, _native.num_threads(),
    )  # fmt: skip
    return x


def _projection(
    fn: Weight, base: Weight, scale: Weight, norm: Weight, outputs: int, num_scales: int, m: int, d: int
) -> tuple[int, ...]:
    """The addresses of the four weights."""
    return (
        _numbers("fn", fn, (outputs, m * d)),
        _numbers("base", base, (outputs,)),
        _numbers("scale", scale, (num_scales,)),
        _numbers("norm", norm, (d,)),
    )


def hc_merge(streams: Tensor, y: Tensor, post: Tensor, combination: Tensor) -> Tensor:
    n, m, d = _stream_shape(streams)
    streams, y, post, combination = (t.contiguous() for t in (streams, y, post, combination))
    out = empty(*streams.shape)
    _kernel("hc_merge")(
        _checked("streams", streams, torch.float32, (n, m, d)),
        _checked("y", y, torch.float32, (n, d)),
        _checked("post", post, torch.float32, (n, m)),
        _checked("combination", combination, torch.float32, (n, m, m)),
        out.data_ptr(), n, m, d, _native.num_threads(),
    )  # fmt: skip
    return out


def _stream_shape(streams: Tensor) -> tuple[int, int, int]:
    n, m, d = streams.shape
    if not 1 <= m <= _MOST_STREAMS or d == 0:
        raise ValueError(f"streams: expected 1 to {_MOST_STREAMS} streams of some width, got {tuple(streams.shape)}")
    return n, m, d


# ---------------------------------------------------------------------------------------------- index


def select_rows(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    layout: RowLayout,
    visible: Tensor,
    topk: int,
    most: int | None = None,
    factor: float = 1.0,
) -> Tensor:
    n, heads, dim = q.shape
    q, weights, visible = q.contiguous(), weights.contiguous(), visible.contiguous()
    addresses = (
        _checked("q", q, torch.float32, (n, heads, dim)),
        _checked("weights", weights, torch.float32, (n, heads)),
        _checked_rows("keys", keys, layout, dim, None if most is None else n),
        ctypes.addressof(_layout(layout)),
        _checked("visible", visible, torch.int64, (n,)),
    )
    kernel = "select_rows" if most is None else "select_sessions"
    if most is None:
        most = int(visible.max()) if n else 0
        if most > keys.shape[0]:
            raise IndexError(f"visible: a query is to see {most} rows of the {keys.shape[0]} there are")
    out = torch.empty(n, min(topk, most), dtype=torch.int32)
    _kernel(kernel)(*addresses, out.data_ptr(), n, heads, dim, out.shape[1], factor, _native.num_threads())
    return out


# ---------------------------------------------------------------------------------------------- sessions


def store_rows(rows: Tensor, addresses: Tensor, places: Tensor, ring: int | None = None) -> None:
    n, row_bytes = rows.shape
    rows = rows.contiguous()
    _kernel("store_rows")(
        _checked("rows", rows, torch.uint8, (n, row_bytes)),
        _checked("addresses", addresses, torch.int64, (n,)),
        _checked("places", places, torch.int64, (n,)),
        n, row_bytes, ring or 0,
    )  # fmt: skip


def compress_step(
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
    n, width = values.shape
    values, gates, frequencies = values.contiguous(), gates.contiguous(), frequencies.contiguous()
    dim, pairs = width // 2 if overlap else width, frequencies.shape[0]
    steps = _NORM | _PACK | (_SPREAD if spread else 0)
    _check_steps(dim, pairs, layout, steps)
    _kernel("compress_step")(
        _checked("values", values, torch.float32, (n, width)),
        _checked("gates", gates, torch.float32, (n, width)),
        _numbers("ape", ape, (ratio, width)),
        _checked("states", states, torch.int64, (n,)),
        _checked("rows", rows, torch.int64, (n,)),
        _checked("positions", positions, torch.int64, (n,)),
        _numbers("norm", norm, (dim,)),
        _checked("frequencies", frequencies, torch.float32, (pairs,)),
        ctypes.addressof(_layout(layout)),
        n, ratio, width, pairs, eps, overlap, steps,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- attention


def _describe(source: Rows, name: str, n: int, width: int, to: _Rows) -> tuple[Tensor, ...]:
    """Fills in `to`; what is returned has to live as long as it."""
    num_sessions = None if source.most is None else n
    to.packed = _checked_rows(f"{name}: packed", source.packed, source.layout, width, num_sessions)
    to.num_rows = source.packed.shape[0] if source.most is None else 2 * source.most  # a ring lies there twice
    to.layout = _layout(source.layout)
    if source.index is not None:
        index = source.index.contiguous()
        to.columns = index.shape[1]
        to.index = _checked(f"{name}: index", index, torch.int32, (n, index.shape[1]))
        return (index,)
    start, stop = (bound.contiguous() for bound in source.bounds)
    to.start = _checked(f"{name}: start", start, torch.int64, (n,))
    to.stop = _checked(f"{name}: stop", stop, torch.int64, (n,))
    to.columns = -1
    return start, stop


def sparse_attention(
    q: Tensor,
    sources: Sequence[Rows],
    sink: Weight | None,
    scale: float,
    value_dim: int,
    position: int | Tensor,
    frequencies: Tensor | None = None,
) -> Tensor:
    n, heads, width = q.shape
    pairs = 0 if frequencies is None else frequencies.shape[0]
    if not 0 < value_dim <= width or 2 * pairs > value_dim or pairs > _MOST_PAIRS:
        raise ValueError(f"value_dim: expected {max(2 * pairs, 1)} to {width}, got {value_dim}")
    q = q.contiguous()
    out = empty(n, heads, value_dim)
    given = (_Rows * len(sources))()
    kept = [_describe(source, f"source {i}", n, width, given[i]) for i, source in enumerate(sources)]
    common = (
        _checked("q", q, torch.float32, (n, heads, width)),
        ctypes.addressof(given),
        len(sources),
        None if sink is None else _numbers("sink", sink, (heads,)),
        None if frequencies is None else _checked("frequencies", frequencies, torch.float32, (pairs,)),
        out.data_ptr(),
        n,
        heads,
        width,
        value_dim,
    )
    threads = _native.num_threads()
    if isinstance(position, Tensor):
        if len(sources) > _MOST_SOURCES:
            raise ValueError(f"sources: expected at most {_MOST_SOURCES}, got {len(sources)}")
        if (recorder := _native.recorder()) is not None:
            recorder.hold(given)
        _kernel("attend_sessions")(*common, _checked("position", position, torch.int64, (n,)), pairs, scale, threads)
        return out
    refused = ctypes.c_int32()
    _kernel("sparse_attention")(*common, position, pairs, scale, ctypes.addressof(refused), threads)
    del kept
    if refused.value >= 0:
        rows = sources[refused.value].packed.shape[0]
        raise IndexError(f"source {refused.value}: a query is to see rows that are not among the {rows} there are")
    return out
