"""A disk that fails while a model is loaded: one sentence or the right tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.programs import needs_compiler, run

pytestmark = needs_compiler


def check(model: str | Path, stride: int) -> None:
    found = run("tests.cli.loading", model, stride)
    assert found["refused"] > 0 < found["right"]
    wrong = {name: found[name] for name in ("wrong", "raised", "unclear", "not_again", "files_left_open")}
    assert not any(wrong.values()), wrong


def test_some_calls_fail(model: Path) -> None:
    check(model, 20)


@pytest.mark.slow
def test_every_call_fails(model: Path) -> None:
    check(model, 1)


@pytest.mark.slow
def test_every_call_fails_for_an_embedded_model() -> None:
    check("tiny-v4-flash", 1)
