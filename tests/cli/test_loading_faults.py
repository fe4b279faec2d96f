"""A disk that fails while a model is loaded: one sentence or the right tokens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)


def check(model: str | Path, stride: int) -> None:
    command = [sys.executable, "-m", "tests.cli.loading", str(model), str(stride)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["refused"] > 0 < found["right"]
    wrong = {name: found[name] for name in ("wrong", "raised", "unclear", "not_again", "files_left_open")}
    assert not any(wrong.values()), (wrong, done.stderr)


def test_some_calls_fail(model: Path) -> None:
    check(model, 20)


@pytest.mark.slow
def test_every_call_fails(model: Path) -> None:
    check(model, 1)


@pytest.mark.slow
def test_every_call_fails_for_an_embedded_model() -> None:
    check("tiny-v4-flash", 1)
