"""A pass recorded once and then replayed: on the CPU what a CUDA graph is on a GPU.

Everything a pass of fixed sizes does is noted while it runs: calls of kernels with their arguments, which the library
then runs in a row without coming back to Python, and what torch itself computes. Sizes and addresses are those of the
recording; what differs from pass to pass has to lie in memory that the pass reads. Knows no operation by name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tenfold import _native
from tenfold._native import Line
from tenfold.ops import Tick

__all__ = ["Recording", "record"]

_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}


def record(run: Callable[[Tick], Tensor]) -> Recording:
    """Runs a pass and records it. It is given what to tell its progress, and returns what a replay returns.

    It must have run before: what is computed once in a process is not part of a pass.
    """
    recorder = _Recorder()
    with _native.recorded_by(recorder), recorder:
        out = run(recorder.mark)
    recorder.close()
    return Recording(recorder.items, recorder.kept, out)


class Recording:
    """A pass to replay; holds all memory that it works in."""

    def __init__(self, items: Sequence[Callable[[], object] | float], kept: list[object], out: Tensor) -> None:
        self._items, self._kept, self.out = items, kept, out

    def replay(self, tick: Tick | None) -> Tensor:
        """What the pass returned, good until the next replay; `tick` hears of its progress, and may end it."""
        for item in self._items:
            if not isinstance(item, float):
                item()
            elif tick is not None:
                tick(item)
        return self.out


class _Recorder(TorchDispatchMode):
    """Notes what runs, in order: runs of kernels, torch's operations, and as numbers the progress that is told."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
            self._scratch = torch.empty(numbers)  # kept, like all that is allocated; and so is the one before
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
        """An operation of torch: memory and views are only kept, all else is done again into the same memory."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.kept.append(result)
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a recorded pass asks for a number that may be another one the next time")
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)
        if func in _ALLOCATIONS or (is_view and not func._schema.is_mutable):
            return result
        self.close()
        self.items.append(
            partial(func, *args, **kwargs) if func._schema.is_mutable else partial(_again, result, func, args, kwargs)
        )
        return result


def _again(result: Tensor | Sequence[Tensor], func: Any, args: Any, kwargs: Any) -> None:
    found = func(*args, **kwargs)
    if isinstance(result, Tensor):
        result.copy_(found)
        return
    for mine, other in zip(result, found, strict=True):
        mine.copy_(other)
