"""Makes Triton's interpreter bearable: by itself it prepares the language anew in every call within a kernel."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

if importlib.util.find_spec("triton"):
    from triton.language import core

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


class _Prepared:
    """The language as the interpreter needs it, for one launch; what calls within it prepare again is left out."""

    depth = 0

    def __init__(self, *scopes: Any) -> None:
        self.scopes = scopes
        _Prepared.depth += 1
        # Triton 3.6 makes an int of an array of one number, as a bound of a loop, which numpy 2.4 refuses.
        core.tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    def restore(self) -> None:
        _Prepared.depth -= 1
        for scope in reversed(self.scopes):
            scope.restore()


class _Nothing:
    def restore(self) -> None:
        pass


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> Iterator[None]:
    from triton.language import standard
    from triton.runtime import interpreter

    real, library = interpreter._patch_lang, standard.sum.fn

    def patch_lang(fn: Any) -> Any:
        return _Nothing() if _Prepared.depth else _Prepared(real(fn), real(library))

    interpreter._patch_lang = patch_lang
    yield
    interpreter._patch_lang = real
