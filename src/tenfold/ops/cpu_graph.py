"""A pass recorded once and then replayed: on the CPU what a CUDA graph is on a GPU.

Everything a pass of fixed sizes does is noted while it runs: calls of kernels with their arguments, which the library
then runs in a row without coming back to Python, and what torch itself computes. Sizes and addresses are those of the
recording; what differs from pass to pass has to lie in memory that the pass reads. What a pass computes on the way lies
in memory that it shares with other recordings, none of which runs at the same time. Knows no operation by name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tenfold import _native
from tenfold._native import Line
from tenfold.ops import Tick
from tenfold.ops.cpu_pool import Pool

__all__ = ["Recording", "Recordings", "recordings"]

_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}


class Recordings:
    """Passes of which one runs at a time, since they work in the same memory."""

    def __init__(self) -> None:
        self._pool = Pool()

    @property
    def num_bytes(self) -> int:
        """What all of them work in."""
        return self._pool.num_bytes

    def record(self, run: Callable[[Tick], Tensor]) -> Recording:
        """Runs a pass and records it. It is given what to tell its progress, and returns what a replay returns.

        It must have run before: what is computed once in a process is not part of a pass.
        """
        recorder = _Recorder(self._pool)
        with _native.recorded_by(recorder), recorder:
            out = run(recorder.mark)
        recorder.close()
        return Recording(recorder.items, recorder.kept, self._pool.unowned(out))


def recordings() -> Recordings:
    return Recordings()


class Recording:
    """A pass to replay; keeps alive all memory that it works in."""

    def __init__(self, items: Sequence[Callable[[], object] | float], kept: list[object], out: Tensor) -> None:
        self._items, self._kept, self.out = items, kept, out

    def replay(self, tick: Tick | None) -> Tensor:
        """What the pass returned, good until another of the recordings runs; `tick` hears of its progress, and may end
        it."""
        for item in self._items:
            if not isinstance(item, float):
                item()
            elif tick is not None:
                tick(item)
        return self.out


class _Recorder(TorchDispatchMode):
    """Notes what runs, in order: runs of kernels, torch's operations, and as numbers the progress that is told."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pool = pool
        self.items: list[Callable[[], object] | float] = []
        self.kept: list[object] = []
        self._calls: list[bytes] = []
        self._scratch = torch.empty(0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's word for: nothing in here is compiled. Otherwise its compiler is loaded, which takes seconds."""
        return False

    def call(self, line: Line, arguments: tuple[int | float | None, ...]) -> None:
        line.run(*arguments)
        self._calls.append(line.slots(arguments))

    def hold(self, memory: object) -> None:
        self.kept.append(memory)

    def scratch(self, numbers: int) -> Tensor:
        if self._scratch.shape[0] < numbers:
            self._scratch = torch.empty(numbers)  # of the pool, like all that is allocated
        return self._scratch

    def mark(self, share: float) -> None:
        self.close()
        self.items.append(float(share))

    def close(self) -> None:
        """What was called since becomes a program."""
        if not self._calls:
            return
        program = ctypes.create_string_buffer(b"".join(self._calls))
        self.kept.append(program)
        self.items.append(partial(_native.replay, ctypes.addressof(program), len(self._calls)))
        self._calls = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operation of torch: memory and views are only noted, all else is done again into the same memory."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a recorded pass asks for a number that may be another one the next time")
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)
        if is_view and not func._schema.is_mutable:
            self.kept.append(self._unowned(result))  # it may be all that keeps memory from elsewhere
            return result
        if func._schema.is_mutable:
            self._do_again(partial(func, *self._unowned(args), **self._unowned(kwargs)))
            return result
        mine = tree_map_only(Tensor, self._pool.like, result)
        if func not in _ALLOCATIONS:
            again = partial(_again, self._unowned(mine), func, self._unowned(args), self._unowned(kwargs))
            _copy(mine, result)
            self._do_again(again)
        return mine

    def _do_again(self, item: Callable[[], object]) -> None:
        self.close()
        self.items.append(item)

    def _unowned(self, values: Any) -> Any:
        return tree_map_only(Tensor, self._pool.unowned, values)


def _again(mine: Tensor | Sequence[Tensor], func: Any, args: Any, kwargs: Any) -> None:
    _copy(mine, func(*args, **kwargs))


def _copy(mine: Tensor | Sequence[Tensor], found: Tensor | Sequence[Tensor]) -> None:
    if isinstance(mine, Tensor):
        assert isinstance(found, Tensor)
        mine.copy_(found)
        return
    for own, other in zip(mine, found, strict=True):
        own.copy_(other)
