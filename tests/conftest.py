"""What every test may use. Knows nothing of any part under test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Their tests start processes and watch the clock: with `--dist loadgroup` one after another.
WITH_PROCESSES = tuple(Path(__file__).parent / name for name in ("server", "store"))

# Triton reads it when it is imported, and torch or transformers may be the first to do that. `make test-gpu` sets 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Side by side (`pytest -n`), each process with a core of its own: waiting threads that spin would take another's.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A busy machine is not a failure; an example that failed once is printed in a form that can be pasted.
settings.register_profile("tenfold", deadline=None, print_blob=True)
settings.load_profile("tenfold")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(folder in item.path.parents for folder in WITH_PROCESSES):
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from `torch.empty` and its kin holds NaN, so that an element left unwritten shows."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
