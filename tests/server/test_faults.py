"""Sockets, pipes and files that fail under a server: clients hear of it, and nothing stays broken."""

from __future__ import annotations

import pytest
from tests.programs import needs_compiler, run

pytestmark = needs_compiler


def check(stride: int, part: int = 0) -> None:
    found = run("tests.server.faults", stride, part)
    assert found["right"] > 0
    assert found["refused"] + found["cut"] > 0
    wrong = {name: found[name] for name in ("hung", "tidy", "wrong", "unclear", "not_again")}
    assert not any(wrong.values()), wrong


def test_some_calls_fail() -> None:
    check(28)


@pytest.mark.slow
def test_every_call_fails() -> None:
    check(1)
