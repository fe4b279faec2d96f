"""A store in a fresh folder that fails the test when it warns, unless the test looks at the warnings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tenfold.store import Store


@pytest.fixture
def warned() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, warned: list[str]) -> Iterator[Store]:
    opened = Store(tmp_path / "store", warn=warned.append)
    yield opened
    opened.close()
