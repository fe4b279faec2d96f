"""Servers that many tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.server.fakes import Served, real_language, saying, serving


@pytest.fixture(scope="module")
def hello() -> Iterator[Served]:
    """A server whose model answers `Hello, world` after thinking, or at once where it does not think."""
    language = real_language()

    def script(job):
        thinks = language.tokenizer.decode(job.prompt).endswith("<think>")
        text = "Let me see.</think>Hello, world" if thinks else "Hello, world"
        return saying(text, language, cached=3)(job)

    with serving(script, language=language) as served:
        yield served
