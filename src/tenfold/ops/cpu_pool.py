"""Memory for recorded passes: taken while one runs, free again as soon as nothing refers to it.

What a pass needs no longer its later operations take, so that a pass of many layers needs little more than one layer.
The addresses stay as long as the pool does: passes that never run at once may share one. Knows no operation.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque

import torch
from torch import Tensor

__all__ = ["Pool"]

_ALIGNMENT_BYTES = 64
_SLAB_BYTES = 1 << 20


class Pool:
    """Slabs of memory, and which parts of them are free."""

    def __init__(self) -> None:
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
        start, stop = self._take(-(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
        block = (ctypes.c_uint8 * num_bytes).from_address(start)  # lives as long as any tensor that shows a part of it
        weakref.finalize(block, self._given_back.append, (start, stop)).atexit = False
        return torch.frombuffer(block, dtype=torch.uint8).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def unowned(self, tensor: Tensor) -> Tensor:
        """A tensor that shows the same and keeps no part of the pool from being taken; one from elsewhere itself."""
        for slab in self._slabs:
            offset = tensor.data_ptr() - slab.data_ptr()
            if 0 <= offset < slab.nbytes:
                memory, place = slab.untyped_storage(), offset // tensor.itemsize
                return torch.empty(0, dtype=tensor.dtype).set_(memory, place, tensor.shape, tensor.stride())
        return tensor

    def _take(self, num_bytes: int) -> tuple[int, int]:
        while self._given_back:
            self._put(*self._given_back.popleft())
        fitting = [part for part in self._free if part[1] - part[0] >= num_bytes]
        if not fitting:
            slab = torch.empty(max(num_bytes, _SLAB_BYTES), dtype=torch.uint8)
            assert slab.data_ptr() % _ALIGNMENT_BYTES == 0
            self._slabs.append(slab)
            fitting = [(slab.data_ptr(), slab.data_ptr() + slab.nbytes)]
            self._free += fitting
        start, stop = min(fitting, key=lambda part: part[1] - part[0])
        self._free.remove((start, stop))
        if start + num_bytes < stop:
            self._free.append((start + num_bytes, stop))
        return start, start + num_bytes

    def _put(self, start: int, stop: int) -> None:
        """Free parts that touch become one."""
        for part in [part for part in self._free if part[0] == stop or part[1] == start]:
            self._free.remove(part)
            start, stop = min(start, part[0]), max(stop, part[1])
        self._free.append((start, stop))
