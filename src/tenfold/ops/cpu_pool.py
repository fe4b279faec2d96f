"""Memory that is taken while a pass runs and free again as soon as nothing refers to it.

What a pass needs no longer its later operations take, so that a pass of many layers needs little more than one layer.
`empty` is for large results: asked of the system for each anew, memory comes page by page, a sixth of the time of
reading with a full-width V4-Flash. A recorded pass has a pool of its own, whose addresses stay as long as it does:
passes that never run at once may share one. Knows no operation.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

from tenfold import _native

__all__ = ["Pool", "empty", "release"]

_ALIGNMENT_BYTES = 64
_SLAB_BYTES = 1 << 20
_LARGE_BYTES = 2 << 20
"""Smaller results the heap has room for without going to the system."""
_RESULT_SLAB_BYTES = 1 << 28
"""For large results; of a slab only what was written once takes memory."""


class Pool:
    """Slabs of memory, and which parts of them are free."""

    def __init__(self, slab_bytes: int = _SLAB_BYTES) -> None:
        self._slab_bytes = slab_bytes
        self._slabs: list[Tensor] = []
        self._free: list[tuple[int, int]] = []  # addresses, start and stop; no two of them touch
        self._given_back: deque[tuple[int, int]] = deque()  # by any thread, in the middle of anything

    @property
    def num_bytes(self) -> int:
        return sum(slab.nbytes for slab in self._slabs)

    def like(self, tensor: Tensor) -> Tensor:
        """Memory for what a tensor that shares its memory with nobody holds, which is not copied."""
        num_bytes = tensor.untyped_storage().nbytes()
        if not num_bytes:
            return tensor
        return self.take(num_bytes).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], more than none, of any value."""
        start, stop = self._take(-(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
        block = (ctypes.c_uint8 * num_bytes).from_address(start)  # lives as long as any tensor that shows a part of it
        weakref.finalize(block, _give_back, self._given_back, (start, stop), self._slab_of(start)).atexit = False
        return torch.frombuffer(block, dtype=torch.uint8)

    def release(self) -> None:
        """Slabs of which nothing is in use go back to the system."""
        self._sort_in()
        free = {_ends(slab) for slab in self._slabs}.intersection(self._free)
        self._slabs = [slab for slab in self._slabs if _ends(slab) not in free]
        self._free = [part for part in self._free if part not in free]

    def unowned(self, tensor: Tensor) -> Tensor:
        """A tensor that shows the same and keeps no part of the pool from being taken; one from elsewhere itself."""
        slab = self._slab_of(tensor.data_ptr())
        if slab is None:
            return tensor
        memory, place = slab.untyped_storage(), (tensor.data_ptr() - slab.data_ptr()) // tensor.itemsize
        return torch.empty(0, dtype=tensor.dtype).set_(memory, place, tensor.shape, tensor.stride())

    def _take(self, num_bytes: int) -> tuple[int, int]:
        self._sort_in()
        fitting = [part for part in self._free if part[1] - part[0] >= num_bytes]
        if not fitting:
            slab = torch.empty(max(num_bytes, self._slab_bytes), dtype=torch.uint8)
            assert slab.data_ptr() % _ALIGNMENT_BYTES == 0
            self._slabs.append(slab)
            fitting = [_ends(slab)]
            self._free += fitting
        start, stop = min(fitting, key=lambda part: part[1] - part[0])
        self._free.remove((start, stop))
        if start + num_bytes < stop:
            self._free.append((start + num_bytes, stop))
        return start, start + num_bytes

    def _slab_of(self, address: int) -> Tensor | None:
        return next((slab for slab in self._slabs if slab.data_ptr() <= address < _ends(slab)[1]), None)

    def _sort_in(self) -> None:
        while self._given_back:
            self._put(*self._given_back.popleft())

    def _put(self, start: int, stop: int) -> None:
        """Free parts that touch become one."""
        for part in [part for part in self._free if part[0] == stop or part[1] == start]:
            self._free.remove(part)
            start, stop = min(start, part[0]), max(stop, part[1])
        self._free.append((start, stop))


def _give_back(given_back: deque[tuple[int, int]], part: tuple[int, int], slab: Tensor | None) -> None:
    """Until now the slab had to stay, also where its pool went before."""
    given_back.append(part)


def _ends(slab: Tensor) -> tuple[int, int]:
    return slab.data_ptr(), slab.data_ptr() + slab.nbytes


class _Results(threading.local):
    """One thread's pool for large results."""

    def __init__(self) -> None:
        self.pool = Pool(_RESULT_SLAB_BYTES)


_results = _Results()


def empty(*shape: int) -> Tensor:
    """Float32 numbers of any value, dense, on the CPU."""
    num_bytes = 4 * math.prod(shape)
    if num_bytes < _LARGE_BYTES or _native.recorder() is not None or torch.are_deterministic_algorithms_enabled():
        return torch.empty(shape)  # a recording has its own pool; torch, asked to be deterministic, fills it with NaN
    return _results.pool.take(num_bytes).view(torch.float32).view(shape)


def release() -> None:
    """What this thread's large results have left goes back to the system."""
    _results.pool.release()
