"""Weights times activations on the CPU: `linear`, `linear_each`, `grouped_linear`, `feed_forward`, `experts`.

Weights are multiplied as they are stored, so a mapped checkpoint needs no memory of its own. Activations stay
float32, and the only error is that of float32 sums, about 1e-7. With `rounded` those that meet MXFP4 weights are
rounded to int8, one scale per 32, and those that meet FP8 weights to some 11 bits of int16, one scale per 128; on CPUs
with AMX the first become bf16 and those that meet FP8 and bf16 weights two bf16 numbers each. That is faster;
docs/concepts/numerics.md has the errors. Knows nothing of any other operation, nor who chooses.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tenfold import _native
from tenfold._native import Argument, match
from tenfold.formats import BF16, F32, FP8_BLOCK, FP8_BLOCK_F32, MXFP4
from tenfold.ops import Experts, Stack, Weight
from tenfold.ops.cpu_pool import empty

__all__ = ["experts", "feed_forward", "grouped_linear", "linear", "linear_each", "prepare"]

_SLICE_NUMBERS = 1 << 24
"""Float32 numbers of scratch a call may take, 64 MiB; every slice of rows unpacks the weights again."""
_PART_FLOPS = 80 * 10**9
"""Of routed experts in one go: a third of a second on two cores."""

_BF16 = 1
_KERNEL_FORMATS = {F32.name: 0, BF16.name: _BF16, FP8_BLOCK.name: 2, FP8_BLOCK_F32.name: 3, MXFP4.name: 4}
_ROUNDED_FORMATS = {_BF16: 6, 2: 7, 3: 8, 4: 5}
"""The kernel format with rounded activations, where there is one."""
_HEAD_NUMBERS = 1 << 26
"""A weight in bf16 that has as many is a head: one row meets it, which nothing is gained by rounding."""
_CODE_DTYPES = {F32.name: torch.float32, BF16.name: torch.bfloat16}

_LINEAR = (Argument("x", "torch.float32", ("n", "in")),)
_GROUPED = (Argument("x", "torch.float32", ("n", "groups", "in")),)
_EXPERTS = (
    Argument("x", "torch.float32", ("n", "hidden")),
    Argument("ids", "torch.int64", ("n", "topk")),
    Argument("weights", "torch.float32", ("n", "topk")),
)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A weight that was checked, as the kernels want it. Holds addresses: only valid while the weight lives."""

    format: int
    codes: int
    scale: int
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class _Bank:
    """The experts of a layer, checked: int64 [experts, 6] addresses of codes and scales of w1, w2, w3."""

    addresses: Tensor
    gate_format: int
    down_format: int
    hidden: int
    inner: int

    @property
    def numbers_each(self) -> int:
        """Numbers of scratch for each token and expert."""
        return _padded(self.hidden) + 2 * self.inner + _padded(self.inner)


@dataclass(frozen=True, slots=True)
class _Stacked:
    """A stack, checked: int64 [weights, 5] as `Stacked` of native/kernels/kernels.hpp, and the rows of each weight."""

    parts: Tensor
    out_features: tuple[int, ...]
    in_features: int
    num_forms: int


_matrices: WeakKeyDictionary[Weight, _Matrix] = WeakKeyDictionary()
_stacks: WeakKeyDictionary[Stack, dict[bool, _Stacked]] = WeakKeyDictionary()
_banks: WeakKeyDictionary[Experts, _Bank] = WeakKeyDictionary()
_blocks: WeakKeyDictionary[Weight, tuple[tuple[_Matrix, ...], _Bank]] = WeakKeyDictionary()
# Values hold addresses and no weights: a weight that its own entry kept alive would never go.


def prepare(weight: Weight, resident: bool) -> Weight:
    """The weight as it is stored: the kernels read it so, from the mapped file or from memory alike."""
    return weight


def linear(x: Tensor, weight: Weight, *, rounded: bool = False, isa: str | None = None) -> Tensor:
    x = x.contiguous()
    rows = match(_LINEAR, x)["n"]
    return _product(x, weight, rows, 1, x.shape[1], rounded, isa)


def linear_each(x: Tensor, stack: Stack, *, rounded: bool = False, isa: str | None = None) -> tuple[Tensor, ...]:
    """One call for all, the weights' rows shared out between the threads one matrix after the other."""
    x = x.contiguous()
    n, ready = match(_LINEAR, x)["n"], _stacked(stack, rounded)
    columns = x.shape[1]
    if columns != ready.in_features:
        raise ValueError(f"x: expected rows of {ready.in_features}, got {tuple(x.shape)}")
    y = empty(n * sum(ready.out_features))
    if n and columns:
        panels, slice_rows = _scratch(n, ready.num_forms * _padded(columns))
        _native._kernel("linear_each", isa)(
            x.data_ptr(), ready.parts.data_ptr(), len(ready.out_features), y.data_ptr(), panels.data_ptr(),
            n, columns, slice_rows, _native.num_threads(),
        )  # fmt: skip
    else:
        y.zero_()
    parts = y.split([n * size for size in ready.out_features])
    return tuple(part.view(n, size) for part, size in zip(parts, ready.out_features, strict=True))


def grouped_linear(x: Tensor, weight: Weight, *, rounded: bool = False, isa: str | None = None) -> Tensor:
    x = x.contiguous()
    sizes = match(_GROUPED, x)
    return _product(x, weight, sizes["n"], sizes["groups"], sizes["in"], rounded, isa)


def _product(
    x: Tensor, weight: Weight, n: int, groups: int, in_features: int, rounded: bool, isa: str | None
) -> Tensor:
    matrix = _matrix(weight)
    if matrix.in_features != in_features or groups == 0 or matrix.out_features % groups:
        raise ValueError(f"x: expected shape for {weight.name} {weight.shape}, got {tuple(x.shape)}")
    y = empty(n, matrix.out_features)
    if y.numel() == 0 or in_features == 0:
        return y.zero_()
    panels, slice_rows = _scratch(n, groups * _padded(in_features))
    out_features = matrix.out_features // groups
    _native._kernel("linear", isa)(
        x.data_ptr(), matrix.codes, matrix.scale, y.data_ptr(), panels.data_ptr(), n, groups, out_features,
        in_features, slice_rows, _form_of(matrix, rounded), _native.num_threads(),
    )  # fmt: skip
    return y


def feed_forward(
    x: Tensor,
    w1: Weight,
    w2: Weight,
    w3: Weight,
    limit: float | None,
    *,
    rounded: bool = False,
    isa: str | None = None,
) -> Tensor:
    x = x.contiguous()
    match(_LINEAR, x)
    return _alone(x, _block(w1, w2, w3), limit, rounded, isa)


def _alone(x: Tensor, bank: _Bank, limit: float | None, rounded: bool, isa: str | None) -> Tensor:
    """Every token through the one expert of a bank."""
    n = x.shape[0]
    ids, weights = torch.zeros(n, 1, dtype=torch.int64), torch.ones(n, 1)
    return _experts(x, ids, weights, bank, None, limit, rounded, isa)


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    bank: Experts,
    *,
    limit: float | None,
    weigh_first: bool,
    shared: Experts | None = None,
    breathe: Callable[[], None] | None = None,
    rounded: bool = False,
    isa: str | None = None,
) -> Tensor:
    """Tokens grouped by expert, in one call, or in some where they take long and there is somebody to `breathe`.

    `weigh_first` changes nothing but rounding: it is always so.
    """
    ready, beside = _bank(bank), None if shared is None else _bank(shared)
    if beside is not None and beside.addresses.shape[0] != 1:
        raise ValueError(f"shared: expected a bank of one expert, got {beside.addresses.shape[0]}")
    _check_ids(ids, ready.addresses.shape[0])
    parts = None if breathe is None else _parts(ids, ready)
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    return _experts(x, ids, weights, ready, beside, limit, rounded, isa, parts, breathe)


def _parts(ids: Tensor, bank: _Bank) -> list[tuple[int, int]]:
    """Experts, first and behind the last, that take no longer together than a pass may go without a tick."""
    num_experts = bank.addresses.shape[0]
    most = max(1, _PART_FLOPS // (6 * bank.hidden * bank.inner))
    counts = torch.bincount(ids.flatten(), minlength=num_experts).tolist()
    parts, first, pairs = [], 0, 0
    for expert, count in enumerate(counts):
        if pairs and pairs + count > most:
            parts.append((first, expert))
            first, pairs = expert, 0
        pairs += count
    return [*parts, (first, num_experts)]


class _SharedExpert(ctypes.Structure):
    """`SharedExpert` of native/kernels/kernels.hpp."""

    _fields_ = [
        ("addresses", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("inner", "gate_format", "down_format")],
    ]


def _experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    bank: _Bank,
    shared: _Bank | None,
    limit: float | None,
    rounded: bool,
    isa: str | None,
    parts: Sequence[tuple[int, int]] | None = None,
    breathe: Callable[[], None] | None = None,
) -> Tensor:
    """`parts` of the routed experts one after the other, all of them at once if None; the shared one with the last."""
    sizes = match(_EXPERTS, x, ids, weights)
    n, topk, num_experts = sizes["n"], sizes["topk"], bank.addresses.shape[0]
    if sizes["hidden"] != bank.hidden or (shared is not None and shared.hidden != bank.hidden):
        raise ValueError(f"x: expected rows of {bank.hidden}, also for the shared expert, got {tuple(x.shape)}")
    out = empty(*x.shape)
    if n * topk == 0 or bank.inner == 0 or bank.hidden == 0:
        return out.zero_() if shared is None else _alone(x, shared, limit, rounded, isa)
    beside, each, more = None, bank.numbers_each, 0
    if shared is not None:
        more, summand = shared.numbers_each, empty(*x.shape)
        each -= -more // topk  # rounded up
        formats = _kernel_format(shared.gate_format, rounded), _kernel_format(shared.down_format, rounded)
        beside = _SharedExpert(shared.addresses.data_ptr(), summand.data_ptr(), shared.inner, *formats)
        if (recorder := _native.recorder()) is not None:
            recorder.hold(beside)
    pairs = torch.empty(2 * n * topk + num_experts + n + 2, dtype=torch.int32)
    memory, slice_pairs = _scratch(n * topk, each, more)
    kernel, shared_address = _native._kernel("experts", isa), None if beside is None else ctypes.addressof(beside)
    for first, last in parts or ((0, num_experts),):
        kernel(
            x.data_ptr(), ids.data_ptr(), weights.data_ptr(), bank.addresses.data_ptr(),
            shared_address if last == num_experts else None, out.data_ptr(), pairs.data_ptr(), memory.data_ptr(),
            n, topk, num_experts, first, last, bank.hidden, bank.inner, slice_pairs,
            _kernel_format(bank.gate_format, rounded), _kernel_format(bank.down_format, rounded),
            math.inf if limit is None else limit, _native.num_threads(),
        )  # fmt: skip
        if breathe is not None:
            breathe()
    return out


def _check_ids(ids: Tensor, num_experts: int) -> None:
    """An id out of range would read another tensor's memory. A recorded call has none: its ids are the router's."""
    if ids.numel() == 0 or _native.recorder() is not None:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= num_experts:
        raise ValueError(f"ids: expected 0 to {num_experts - 1}, got {low if low < 0 else high}")


class _Memory(threading.local):
    """One thread's scratch, kept from call to call: asked for anew each time it would leave the heap full of holes."""

    def __init__(self) -> None:
        self.numbers = torch.empty(0)


_memory = _Memory()


def _scratch(rows: int, numbers_each: int, more: int = 0) -> tuple[Tensor, int]:
    """Memory for as many rows as a slice has, good until this thread's next call, and how many these are."""
    slice_rows = min(rows, max(1, _SLICE_NUMBERS // numbers_each))
    numbers = slice_rows * numbers_each + more
    if (recorder := _native.recorder()) is not None:
        return recorder.scratch(numbers), slice_rows
    if _memory.numbers.shape[0] < numbers:
        _memory.numbers = torch.empty(0)  # before the new one is there
        _memory.numbers = torch.empty(numbers)
    return _memory.numbers, slice_rows


def _kernel_format(stored: int, rounded: bool) -> int:
    return _ROUNDED_FORMATS.get(stored, stored) if rounded else stored


def _form_of(matrix: _Matrix, rounded: bool) -> int:
    is_head = matrix.format == _BF16 and matrix.out_features * matrix.in_features >= _HEAD_NUMBERS
    return _kernel_format(matrix.format, rounded and not is_head)


def _padded(columns: int) -> int:
    return (columns + 31) // 32 * 32


def _matrix(weight: Weight) -> _Matrix:
    """Checked once in a weight's life."""
    found = _matrices.get(weight)
    if found is None:
        found = _matrices[weight] = _checked(weight)
    return found


def _checked(weight: Weight) -> _Matrix:
    name, form = weight.name, weight.format.name
    if form not in _KERNEL_FORMATS or len(weight.shape) != 2:
        raise ValueError(f"{name}: expected a matrix of {', '.join(_KERNEL_FORMATS)}, got {form} {weight.shape}")
    if weight.format is MXFP4 and weight.shape[1] % 32:
        raise ValueError(f"{name}: expected a multiple of 32 columns, got {weight.shape}")
    shape = weight.format.stored_shape(weight.shape)
    scale_shape = weight.format.scale_shape(weight.shape)
    codes = _dense(f"{name}: codes", weight.data, _CODE_DTYPES.get(form, torch.uint8), shape)
    scale, kernel_format = 0, _KERNEL_FORMATS[form]
    if scale_shape is not None:
        if weight.scale is None:
            raise ValueError(f"{name}: expected scales beside codes of {form}")
        # The scales' own dtype decides, as in the reference.
        of_float = weight.scale.dtype == torch.float32 and weight.format is not MXFP4
        scale = _dense(f"{name}: scales", weight.scale, torch.float32 if of_float else torch.uint8, scale_shape)
        if weight.format is not MXFP4:
            kernel_format = _KERNEL_FORMATS[(FP8_BLOCK_F32 if of_float else FP8_BLOCK).name]
    return _Matrix(kernel_format, codes, scale, *weight.shape)


def _dense(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a tensor that is as a kernel wants it."""
    argument = Argument(what, str(dtype), tuple(str(size) for size in shape))
    if dtype is torch.uint8 and tensor.itemsize == 1:
        tensor = tensor.view(torch.uint8)
    match((argument,), tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{what}: expected shape {shape}, got {tuple(tensor.shape)}")
    return tensor.data_ptr()


def _stacked(stack: Stack, rounded: bool) -> _Stacked:
    """Checked once in a stack's life; weights of one format stand together, so that each form is packed once."""
    found = _stacks.setdefault(stack, {})
    if rounded not in found:
        found[rounded] = _checked_stack(stack, rounded)
    return found[rounded]


def _checked_stack(stack: Stack, rounded: bool) -> _Stacked:
    matrices = [_matrix(weight) for weight in stack.weights]
    widths = {matrix.in_features for matrix in matrices}
    if len(widths) != 1:
        raise ValueError(f"stack: expected weights of one width, got {sorted(widths)}")
    parts, form = [], 0
    formats = [_form_of(matrix, rounded) for matrix in matrices]
    for place, matrix in enumerate(matrices):
        form += place > 0 and formats[place] != formats[place - 1]
        parts.append([matrix.codes, matrix.scale, matrix.out_features, formats[place], form])
    sizes = tuple(matrix.out_features for matrix in matrices)
    return _Stacked(torch.tensor(parts, dtype=torch.int64), sizes, widths.pop(), form + 1)


def _bank(bank: Experts) -> _Bank:
    found = _banks.get(bank)
    if found is None:
        found = _banks[bank] = _checked_bank(bank)
    return found


def _block(w1: Weight, w2: Weight, w3: Weight) -> _Bank:
    """A gated block of its own as a bank of one expert."""
    triple = (_matrix(w1), _matrix(w2), _matrix(w3))
    found = _blocks.get(w1)
    if found is None or found[0] != triple:
        found = _blocks[w1] = (triple, _bank_of([triple]))
    return found[1]


def _checked_bank(bank: Experts) -> _Bank:
    triples = zip(bank.w1, bank.w2, bank.w3, strict=True)
    return _bank_of([(_matrix(w1), _matrix(w2), _matrix(w3)) for w1, w2, w3 in triples])


def _bank_of(triples: list[tuple[_Matrix, _Matrix, _Matrix]]) -> _Bank:
    if not triples:
        raise ValueError("bank: expected at least one expert")
    gate, down, _ = triples[0]
    inner, hidden = gate.out_features, gate.in_features
    expected = ((gate.format, inner, hidden), (down.format, hidden, inner), (gate.format, inner, hidden))
    for expert, triple in enumerate(triples):
        for name, matrix, wanted in zip(("w1", "w2", "w3"), triple, expected, strict=True):
            if (matrix.format, matrix.out_features, matrix.in_features) != wanted:
                raise ValueError(f"bank: {name} of expert {expert} has another format or shape than in expert 0")
    addresses = [[address for matrix in triple for address in (matrix.codes, matrix.scale)] for triple in triples]
    return _Bank(torch.tensor(addresses, dtype=torch.int64), gate.format, down.format, hidden, inner)
