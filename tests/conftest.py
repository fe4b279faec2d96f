"""What every test may use. Knows nothing of any part under test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Triton reads it when it is imported, and torch or transformers may be the first to do that. `make test-gpu` sets 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A busy machine is not a failure; an example that failed once is printed in a form that can be pasted.
settings.register_profile("tenfold", deadline=None, print_blob=True)
settings.load_profile("tenfold")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from `torch.empty` and its kin holds NaN, so that an element left unwritten shows."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
