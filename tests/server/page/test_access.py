"""Keyboard, screen reader, narrow screens, colours."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from tests.server.page.fake_server import FakeServer, delta, ending, frame, progress, words
from tests.server.page.hands import ask, contents, drop, expect, last, settled, until

HERE = Path(__file__).parent
NAMELESS = (HERE / "names.js").read_text(encoding="utf-8")
CONTRAST = (HERE / "contrast.js").read_text(encoding="utf-8")


def focused(tab: Any) -> str:
    return str(tab.evaluate("(document.activeElement.textContent || document.activeElement.id).trim()"))


def test_the_keyboard_is_enough(tab: Any, server: FakeServer) -> None:
    server.play([*words("One."), ending()], [*words("Two."), ending()], [*words("Three"), threading.Event()])
    expect(tab.locator("#question")).to_be_focused()
    tab.keyboard.type("Why?\nTell me.")  # Enter is a new line
    tab.keyboard.press("Control+Enter")
    settled(tab)
    assert contents(server) == [("user", "Why?\nTell me.")]
    expect(tab.locator("#question")).to_be_focused()
    walk = []
    for _ in range(4):
        tab.keyboard.press("Shift+Tab")
        walk.append(focused(tab))
        ring = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert ring == "solid", walk
    assert walk == ["Copy", "Regenerate", "Copy", "Edit"]
    for _ in range(2):
        tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")  # Regenerate
    expect(last(tab)).to_contain_text("Two.")
    expect(tab.locator("#question")).to_be_focused()
    walk = []
    for _ in range(3):
        tab.keyboard.press("Tab")
        walk.append(focused(tab))
    assert walk == ["Add documents", "thinking", "Send"]
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Space")
    expect(tab.locator("#thinking")).to_be_checked()
    tab.locator("#question").focus()
    tab.keyboard.type("More")
    tab.keyboard.press("Meta+Enter")
    expect(last(tab)).to_contain_text("Three")
    tab.keyboard.press("Escape")
    expect(last(tab).locator(".note")).to_have_text("Stopped.")


def test_the_first_tab_stop_leads_to_the_message_box(tab: Any) -> None:
    tab.evaluate("document.body.tabIndex = -1; document.body.focus()")
    tab.keyboard.press("Tab")
    link = tab.get_by_role("link", name="Skip to the message box")
    expect(link).to_be_focused()
    expect(link).to_be_in_viewport()
    tab.keyboard.press("Enter")
    expect(tab.locator("#question")).to_be_focused()


def test_a_screen_reader_hears_blocks_not_tokens(tab: Any, server: FakeServer) -> None:
    tab.evaluate(
        """() => {
            window.heard = [];
            new MutationObserver(() => window.heard.push(document.getElementById("said").textContent))
                .observe(document.getElementById("said"), { childList: true });
        }"""
    )
    gate = threading.Event()
    text = "First sentence. Another one.\n\n```py\nx = 1\n```\n\nThe end of it."
    server.play([progress(0, 1000), progress(10, 1000, 5.0, 20.0), gate, *words(text, 1), 3.0, ending()])
    ask(tab, "Why?")
    expect(tab.locator("#said")).to_have_text("Reading: 0 of 1,000 tokens")
    gate.set()
    settled(tab)
    until(lambda: "Answer complete." in tab.evaluate("window.heard.join(' ')"))
    heard = tab.evaluate("window.heard")
    assert len(heard) <= 5, heard
    assert " ".join(heard).count("First sentence. Another one.") == 1
    assert "Code, 1 lines." in " ".join(heard)
    assert "The end of it." in " ".join(heard)
    assert tab.get_attribute("#said", "aria-live") == "polite"
    assert tab.evaluate("document.querySelectorAll('[aria-live]').length") == 1


RICH = """# Title

Text with `code`, a [link](https://a.b) and **weight**.

> A quote

| a | b |
|---|---|
| 1 | 2 |

```py
x = 1
```
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_names_and_contrast(opened: Any, server: FakeServer, scheme: str, width: int) -> None:
    tab = opened(color_scheme=scheme)
    tab.set_viewport_size({"width": width, "height": 800})
    failed = [delta(reasoning_content="Hm. `x`"), *words(RICH), frame({"error": {"message": "It failed."}})]
    server.play([*words("One."), ending(1000, 10, 900)], failed, [progress(100, 1000, 50.0, 18.0), threading.Event()])
    for question in ("First?", "Second?"):
        drop(tab, "book.txt", b"text")
        ask(tab, question)
        settled(tab)
    last(tab).locator("summary").click()
    tab.get_by_role("button", name="Edit").first.click()
    drop(tab, "no.bin", b"\xff")
    drop(tab, "more.txt", b"text")
    looked = []
    for _ in range(2):
        assert tab.evaluate(NAMELESS) == []
        seen, poor = tab.evaluate(CONTRAST)
        assert poor == []
        looked.append(seen)
        if width == 390:
            tab.get_by_role("button", name="Menu").click()
        else:
            ask(tab, "Third?")
            expect(last(tab)).to_contain_text("Reading: 100")
    assert min(looked) > 20


@pytest.mark.parametrize("width", [320, 390, 600, 900, 1920])
def test_nothing_is_wider_than_the_screen(opened: Any, server: FakeServer, width: int) -> None:
    tab = opened()
    tab.set_viewport_size({"width": width, "height": 700})
    wide = "x" * 300 + "\n\n" + "|" + "wide column|" * 12 + "\n" + "|-" * 12 + "|\n\n```\n" + "y" * 300 + "\n```\n"
    server.play([*words(wide, 50), ending()])
    drop(tab, "n" * 200 + ".txt", b"text")
    ask(tab, "z" * 300)
    settled(tab)
    drop(tab, "n" * 200 + ".txt", b"text")
    inner = (
        "[...document.querySelectorAll('html, body, main, #scroll, #composer')].map(o => o.scrollWidth - o.clientWidth)"
    )
    assert max(tab.evaluate(inner)) <= 0
    for name in ("#send", "#question", "#attach"):
        expect(tab.locator(name)).to_be_in_viewport(ratio=1)


def test_the_menu_of_a_narrow_screen(opened: Any) -> None:
    tab = opened()
    tab.set_viewport_size({"width": 390, "height": 800})
    expect(tab.locator("#panel")).not_to_be_visible()
    menu = tab.get_by_role("button", name="Menu")
    menu.focus()
    tab.keyboard.press("Enter")
    expect(tab.locator("#panel")).to_be_visible()
    assert menu.get_attribute("aria-expanded") == "true"
    tab.keyboard.press("Tab")
    assert focused(tab) == "New conversation"
    tab.keyboard.press("Escape")
    expect(tab.locator("#panel")).not_to_be_visible()
    expect(menu).to_be_focused()


def test_who_wants_no_motion_gets_none(opened: Any) -> None:
    moving = """[...document.querySelectorAll("*")].filter(
        (one) => !/^(0s(, )?)+$/.test(getComputedStyle(one).transitionDuration)).length"""
    assert opened(reduced_motion="reduce").evaluate(moving) == 0
    assert opened(reduced_motion="no-preference").evaluate(moving) > 0


def test_the_end_is_followed_until_one_scrolls_up(tab: Any, server: FakeServer) -> None:
    gate = threading.Event()
    server.play([*words("line\n\n" * 60, 6), gate, *words("line\n\n" * 60, 6), ending()])
    below = "(s => s.scrollHeight - s.scrollTop - s.clientHeight)(document.getElementById('scroll'))"
    ask(tab, "Lines?")
    expect(last(tab).locator(".markdown p")).to_have_count(60)
    until(lambda: tab.evaluate(below) < 80)
    tab.hover("#transcript")
    tab.mouse.wheel(0, -400)
    until(lambda: tab.evaluate(below) > 300)
    top = tab.evaluate("document.getElementById('scroll').scrollTop")
    gate.set()
    settled(tab)
    assert tab.evaluate("document.getElementById('scroll').scrollTop") == top
