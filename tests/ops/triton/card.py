"""Operations called from host memory: arguments go to the device of the backend, results come back.

In the interpreter both are the CPU and nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from tenfold.ops import Experts, Stack, Weight
from tenfold.ops.triton import Triton

__all__ = ["DEVICE", "on_card", "to_card"]

DEVICE = Triton(exact=False).device
_moved: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""What lies on the card of a weight, a stack or a bank: moved once, since kernels keep tables of them."""


def on_card(ops: Any, *names: str) -> Any:
    """The functions of these names, which take and give host memory."""
    return SimpleNamespace(**{name: _through(getattr(ops, name)) for name in names})


def _through(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **words: Any) -> Any:
        return _back(function(*map(to_card, arguments), **{name: to_card(word) for name, word in words.items()}))

    return call


def to_card(given: Any) -> Any:
    """The same in the memory of the device."""
    if isinstance(given, Tensor):
        return given.to(DEVICE)
    if not isinstance(given, Weight | Stack | Experts):
        return given
    if given not in _moved:
        _moved[given] = _copied(given)
    return _moved[given]


def _copied(given: Weight | Stack | Experts) -> Weight | Stack | Experts:
    if isinstance(given, Weight):
        scale = None if given.scale is None else given.scale.to(DEVICE)
        return Weight(given.name, given.shape, given.format, given.data.to(DEVICE), scale)
    if isinstance(given, Stack):
        return Stack(tuple(map(to_card, given.weights)))
    return Experts(*(tuple(map(to_card, weights)) for weights in (given.w1, given.w2, given.w3)))


def _back(found: Any) -> Any:
    return tuple(map(_back, found)) if isinstance(found, tuple) else found.cpu()
