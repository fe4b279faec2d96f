"""The choice of the GPU backend: there with a GPU or in the interpreter, an error with a way out elsewhere."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tenfold import ops
from tenfold.errors import BackendMissing


def test_without_a_gpu_it_is_an_error_that_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendMissing, match=r"GPU.*--backend cpu.*TRITON_INTERPRET=1"):
        ops.select("triton", exact=True)


def test_without_the_package_it_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendMissing, match="pip install"):
        ops.select("triton", exact=True)


def test_it_is_the_class_of_the_package() -> None:
    name, operations = ops.select("triton", exact=False)
    assert (name, type(operations).__name__) == ("triton", "Triton")
