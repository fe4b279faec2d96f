"""What a user does with the page, and what the server then got."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.server.page.fake_server import FakeServer

expect = pytest.importorskip("playwright.sync_api", reason="playwright is missing: the web page is not tried").expect


def ask(tab: Any, text: str) -> None:
    tab.fill("#question", text)
    tab.press("#question", "Control+Enter")


def drop(tab: Any, name: str, content: bytes) -> None:
    """A file let fall on the page, as a mouse would."""
    transfer = tab.evaluate_handle(
        """([name, bytes]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], name));
            return transfer;
        }""",
        [name, list(content)],
    )
    for kind in ("dragover", "drop"):
        tab.dispatch_event("main", kind, {"dataTransfer": transfer, "bubbles": True, "cancelable": True})


def last(tab: Any) -> Any:
    return tab.locator("article.answer").last


def text(tab: Any) -> Any:
    """The answer's own words: neither its thinking nor notes and buttons."""
    return last(tab).locator("> .markdown")


def settled(tab: Any) -> None:
    expect(tab.locator("#send")).to_be_visible()


def until(holds: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def contents(server: FakeServer, at: int = -1) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in server.requests[at]["messages"]]
