"""A real browser and a server whose answers are written down, for the tests of the web page.

They need Debian's chromium (or another on the PATH) and PyPI's playwright; skipped, aloud, where one is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
from tests.server.page.fake_server import FakeServer, ending, serving, words

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _skip(request, "playwright is not installed")
    if CHROMIUM is None:
        _skip(request, "there is no chromium on the PATH; install Debian's chromium")
    with sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM)
        yield made
        made.close()


def _skip(request: pytest.FixtureRequest, reason: str) -> NoReturn:
    said = f"the web page is not tried in a browser: {reason}"
    request.config.pluginmanager.getplugin("terminalreporter").write_line(f"\nSKIPPED: {said}")
    pytest.skip(said)


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with serving() as fake:
        yield fake


@pytest.fixture
def server(running: FakeServer) -> FakeServer:
    fresh = FakeServer(url=running.url)
    running.__dict__.update(fresh.__dict__)
    running.play([*words("An answer."), ending()])
    return running


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, server: FakeServer) -> Iterator[Open]:
    """Opens tabs; at the end no script of theirs has failed and nothing was asked of anybody else."""
    from playwright.sync_api import expect

    contexts, troubles, addresses = [], [], []

    def start(**options: Any) -> Any:
        context = browser.new_context(viewport={"width": 1200, "height": 800}, **options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("request", lambda asked: addresses.append(asked.url))
        tab.goto(server.url)
        expect(tab.locator("#model")).not_to_be_empty()
        return tab

    yield start
    for context in contexts:
        context.close()
    assert troubles == []
    assert [address for address in addresses if not address.startswith(server.url)] == []


@pytest.fixture
def tab(opened: Open) -> Any:
    return opened()


@pytest.fixture(scope="module")
def renderer(browser: Any, running: FakeServer) -> Iterator[Any]:
    """A tab in which markdown is rendered, shared: no test of it changes the page."""
    tab = browser.new_page()
    tab.goto(running.url)
    yield tab
    tab.close()
