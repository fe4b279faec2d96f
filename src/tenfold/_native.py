"""The native CPU kernels: finds the library, picks the instruction set, checks arguments, calls.

Knows no model and no number format. Imports no torch: `isa` and `available_isas` answer without it, and a
kernel is only ever called with tensors, so torch is there by then.

A kernel lands here as a line of `_KERNELS` (its C arguments), a tuple of `Argument` (what its tensors must
be) and a function that checks and calls. ctypes releases the GIL for the length of a call.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tenfold.errors import BackendMissing, UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ISA_VARIABLE",
    "LIBRARY_VARIABLE",
    "Argument",
    "Line",
    "Recorder",
    "available_isas",
    "built_isas",
    "cpu_features",
    "isa",
    "library_path",
    "match",
    "num_threads",
    "recorded_by",
    "recorder",
    "replay",
    "rms_norm",
]

ISA_VARIABLE = "TENFOLD_ISA"
LIBRARY_VARIABLE = "TENFOLD_LIBRARY"
_ABI_VERSION = 7
_BUILD_HINT = "build it with `make env` in a clone, or `pip install -e .`"

_POINTER, _INT64, _INT32, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_KERNELS = {
    "rms_norm": (_POINTER, _POINTER, _POINTER, _INT64, _INT64, _FLOAT, _INT32),
    "linear": (*[_POINTER] * 5, *[_INT64] * 5, _INT32, _INT32),
    "linear_each": (*[_POINTER] * 2, _INT64, *[_POINTER] * 2, *[_INT64] * 3, _INT32),
    "experts": (*[_POINTER] * 8, *[_INT64] * 8, _INT32, _INT32, _FLOAT, _INT32),
    "sparse_attention": (_POINTER, _POINTER, _INT64, *[_POINTER] * 3, *[_INT64] * 6, _FLOAT, _POINTER, _INT32),
    "select_rows": (*[_POINTER] * 6, *[_INT64] * 4, _FLOAT, _INT32),
    "pack_rows": (*[_POINTER] * 3, _INT64, _INT32),
    "unpack_rows": (*[_POINTER] * 3, _INT64, _INT32),
    "hc_mix": (*[_POINTER] * 9, *[_INT64] * 3, _FLOAT, _FLOAT, _INT64, _INT32),
    "hc_collapse": (*[_POINTER] * 7, *[_INT64] * 3, _FLOAT, _FLOAT, _INT32),
    "turn_rows": (*[_POINTER] * 6, *[_INT64] * 4, _FLOAT, _INT32, _INT32),
    "rope": (*[_POINTER] * 4, *[_INT64] * 5, *[_INT32] * 3),
    "hadamard": (_POINTER, _POINTER, _INT64, _INT64, _INT32),
    "compress": (*[_POINTER] * 3, *[_INT64] * 5, *[_INT32] * 2),
    "embed": (*[_POINTER] * 3, *[_INT64] * 3, *[_INT32] * 2),
    "look_up": (*[_POINTER] * 3, *[_INT64] * 2),
    "route": (*[_POINTER] * 4, *[_INT64] * 5, _FLOAT, *[_INT32] * 3),
    "hc_merge": (*[_POINTER] * 5, *[_INT64] * 3, _INT32),
    "store_rows": (*[_POINTER] * 3, *[_INT64] * 3),
    "compress_step": (*[_POINTER] * 9, *[_INT64] * 4, _FLOAT, *[_INT32] * 2),
    "select_sessions": (*[_POINTER] * 6, *[_INT64] * 4, _FLOAT, _INT32),
    "attend_sessions": (*[_POINTER] * 2, _INT64, *[_POINTER] * 3, *[_INT64] * 4, _POINTER, _INT64, _FLOAT, _INT32),
    "peak_read": (_POINTER, _INT64, _POINTER, _INT32),
    "peak_float32": (_INT64, _POINTER, _POINTER, _INT32),
    "peak_int8": (_INT64, _POINTER, _POINTER, _INT32),
    "peak_int16": (_INT64, _POINTER, _POINTER, _INT32),
}


@dataclass(frozen=True, slots=True)
class Argument:
    """What one tensor argument must be: dense, on the CPU, of this dtype and these dimensions.

    Equal dimension names stand for equal sizes; a leading `*rows` stands for any number of axes and is bound
    to their product.
    """

    name: str
    dtype: str
    dims: tuple[str, ...]


_RMS_NORM = (
    Argument("x", "torch.float32", ("*rows", "width")),
    Argument("weight", "torch.float32", ("width",)),
    Argument("out", "torch.float32", ("*rows", "width")),
)


def match(arguments: tuple[Argument, ...], *tensors: Tensor) -> dict[str, int]:
    """Checks every tensor against its argument and returns the sizes by dimension name."""
    sizes: dict[str, int] = {}
    for argument, tensor in zip(arguments, tensors, strict=True):
        _check_memory(argument, tensor)
        _bind_shape(argument, tensor.shape, sizes)
    return sizes


def _check_memory(argument: Argument, tensor: Tensor) -> None:
    name = argument.name
    dtype = str(getattr(tensor, "dtype", type(tensor).__name__))
    if dtype != argument.dtype:
        raise TypeError(f"{name}: expected a tensor of {argument.dtype}, got {dtype}")
    if not tensor.is_cpu:
        raise TypeError(f"{name}: expected a tensor on cpu, got one on {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous memory, got strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}; call .contiguous() first"
        )
    if tensor.data_ptr() % tensor.itemsize:
        raise ValueError(f"{name}: its memory is not aligned to {tensor.itemsize} bytes; clone it first")


def _bind_shape(argument: Argument, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    dims = argument.dims
    leading = len(shape) - len(dims) + 1
    if dims[0][0] == "*" and leading >= 0 and leading != 1:
        axes = (math.prod(shape[:leading]), *shape[leading:])
    else:
        axes = shape
    fits = len(axes) == len(dims)
    for dim, size in zip(dims, axes, strict=False):
        fits = fits and sizes.setdefault(dim, size) == size
    if not fits:
        expected = ", ".join(f"{dim}={sizes[dim]}" if dim in sizes else dim for dim in dims)
        raise ValueError(f"{argument.name}: expected shape ({expected}), got {tuple(shape)}")


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, *, isa: str | None = None) -> Tensor:
    """`weight * x / sqrt(mean(x**2, -1) + eps)` over the last axis, float32. `out` may be `x` itself."""
    out = x.new_empty(x.shape) if out is None else out
    sizes = match(_RMS_NORM, x, weight, out)
    rows, width = sizes["*rows"], sizes["width"]
    if width == 0:
        raise ValueError("x: expected rows of at least one element, got width 0")
    kernel = _kernel("rms_norm", isa)
    kernel(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, width, eps, num_threads())
    return out


@cache
def isa() -> str:
    """The instruction set whose kernels run: the best that this CPU has, or the one TENFOLD_ISA names.

    Chosen once: a later change of the variable changes nothing.
    """
    wanted = os.environ.get(ISA_VARIABLE, "")
    return _usable_isa(wanted) if wanted else available_isas()[0]


@cache
def built_isas() -> tuple[str, ...]:
    """The instruction sets this library was built for, best first."""
    names: list[str] = []
    while name := _library().tenfold_isa(len(names)):
        names.append(name.decode())
    return tuple(names)


@cache
def available_isas() -> tuple[str, ...]:
    """Those of `built_isas` that run on this CPU, best first; `scalar` always does."""
    return tuple(name for name in built_isas() if _library().tenfold_select(name.encode()))


def cpu_features() -> tuple[str, ...]:
    """The instruction-set extensions that the CPU and the operating system offer, as the probe found them."""
    return tuple(_library().tenfold_cpu_features().decode().split())


def num_threads() -> int:
    """The threads a kernel uses: as many as torch, on torch's pool; one where torch has no OpenMP pool."""
    torch = sys.modules["torch"]
    return int(torch.get_num_threads()) if _shares_torch_threads() else 1


def library_path() -> Path:
    """Where the library lies: beside this file in a wheel, in site-packages for an editable install.

    TENFOLD_LIBRARY names another build of it, such as the one `make sanitize` makes.
    """
    if named := os.environ.get(LIBRARY_VARIABLE):
        if not Path(named).is_file():
            raise BackendMissing(
                f"{LIBRARY_VARIABLE} names {named}, which is no file; name a libtenfold.so or unset it."
            )
        return Path(named)
    folders = [Path(folder) for folder in sys.modules["tenfold"].__path__]
    for folder in folders:
        if (folder / "libtenfold.so").is_file():
            return folder / "libtenfold.so"
    looked = ", ".join(map(str, folders))
    raise BackendMissing(f"The native library libtenfold.so is not built: looked in {looked}; {_BUILD_HINT}.")


def _usable_isa(name: str) -> str:
    if name in available_isas():
        return name
    choice = f"set {ISA_VARIABLE} to one of {', '.join(available_isas())}, or unset it"
    if name in built_isas():
        raise BackendMissing(f"This CPU cannot run the {name} kernels; {choice}.")
    raise UsageError(f"There are no {name!r} kernels in this build; {choice}.")


class Recorder(Protocol):
    """What `recorded_by` hands calls to."""

    def call(self, line: Line, arguments: tuple[int | float | None, ...]) -> None:
        """Runs a kernel and notes it."""

    def hold(self, memory: object) -> None:
        """Keeps memory whose address a call was given."""

    def scratch(self, numbers: int) -> Tensor:
        """float32 numbers that stay where they are; each call may overwrite the last one's."""


class _Recording(threading.local):
    recorder: Recorder | None = None


_recording = _Recording()


def recorder() -> Recorder | None:
    """Who records this thread's calls."""
    return _recording.recorder


@contextmanager
def recorded_by(one: Recorder) -> Iterator[None]:
    """All kernel calls of this thread go through `one`."""
    _recording.recorder = one
    try:
        yield
    finally:
        _recording.recorder = None


@dataclass(frozen=True, slots=True)
class Line:
    """A kernel of one instruction set: its line in the library's table, what it takes, and how it is called."""

    address: int
    types: tuple[Any, ...]
    run: Callable[..., None]

    def slots(self, arguments: tuple[int | float | None, ...]) -> bytes:
        """The line, how many arguments there are, and these in eight bytes each, as `tenfold_replay` wants them."""
        parts = [struct.pack("qq", self.address, len(arguments))]
        parts += [bytes(kind(value)).ljust(8, b"\0") for kind, value in zip(self.types, arguments, strict=True)]
        return b"".join(parts)


def replay(program: int, calls: int) -> None:
    """Runs `calls` calls that lie at an address, as `Line.slots` makes them; the threads stay together meanwhile."""
    _library().tenfold_replay(program, calls, num_threads())


@cache
def _library() -> ctypes.CDLL:
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as exc:
        raise BackendMissing(f"The native library {path} does not load: {exc}; {_BUILD_HINT}.") from exc
    library.tenfold_abi_version.restype = _INT32
    found = library.tenfold_abi_version()
    if found != _ABI_VERSION:
        raise BackendMissing(f"{path} has interface {found}, expected {_ABI_VERSION}; {_BUILD_HINT}.")
    library.tenfold_cpu_features.restype = ctypes.c_char_p
    library.tenfold_isa.argtypes, library.tenfold_isa.restype = [_INT32], ctypes.c_char_p
    library.tenfold_select.argtypes, library.tenfold_select.restype = [ctypes.c_char_p], _POINTER
    library.tenfold_line.argtypes, library.tenfold_line.restype = [_POINTER, ctypes.c_char_p], _POINTER
    library.tenfold_kernel.argtypes, library.tenfold_kernel.restype = [_POINTER], _POINTER
    library.tenfold_replay.argtypes, library.tenfold_replay.restype = [_POINTER, _INT64, _INT32], None
    library.tenfold_use_openmp.argtypes, library.tenfold_use_openmp.restype = [_POINTER] * 3, None
    return library


def _kernel(name: str, isa_name: str | None) -> Callable[..., None]:
    """The callable of one kernel, of the chosen instruction set unless another is named."""
    line = _line(name, isa_name)
    recorder = _recording.recorder
    if recorder is None:
        return line.run
    return lambda *arguments: recorder.call(line, arguments)


@cache
def _line(name: str, isa_name: str | None) -> Line:
    chosen = isa() if isa_name is None else _usable_isa(isa_name)
    address = _library().tenfold_line(_library().tenfold_select(chosen.encode()), name.encode())
    types = _KERNELS[name]
    return Line(address, types, ctypes.CFUNCTYPE(None, *types)(_library().tenfold_kernel(address)))


@cache
def _shares_torch_threads() -> bool:
    """Hands torch's own OpenMP runtime to the library; False where torch was built without one.

    Symbols are looked up through torch's extension module, so they come from the very runtime that torch runs
    on, whatever its file is called: no second pool of threads is ever started.
    """
    torch_extension = sys.modules["torch"]._C.__file__
    runtime = ctypes.CDLL(torch_extension)
    try:
        entries = (runtime.GOMP_parallel, runtime.omp_get_thread_num, runtime.omp_get_num_threads)
    except AttributeError:
        return False
    _library().tenfold_use_openmp(*(ctypes.cast(entry, _POINTER) for entry in entries))
    return True
