"""What a user does with the page and sees, in a real browser before a server whose answers are written down."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from starlette.responses import JSONResponse
from tests.server.page.fake_server import FakeServer, delta, ending, frame, progress, words
from tests.server.page.hands import ask, contents, drop, expect, last, settled, text, until

DOCUMENT = "Locks are taken on the whole file.\n" * 400


def test_an_answer_is_shown_while_it_comes(tab: Any, server: FakeServer) -> None:
    gate = threading.Event()
    server.play([*words("The **first** half"), gate, *words(" and the second."), ending(1200, 40, 1000)])
    ask(tab, "Why?")
    expect(last(tab).locator("strong")).to_have_text("first")
    expect(last(tab)).not_to_contain_text("second")
    expect(tab.locator("#stop")).to_be_visible()
    gate.set()
    expect(text(tab)).to_have_text("The first half and the second.")
    settled(tab)
    expect(last(tab).locator(".figures")).to_contain_text("1,200 tokens read · 1,000 of them from the store")
    expect(tab.locator("#question")).to_have_value("")
    expect(tab.locator("#panel-context")).to_have_text("1,240 of 1,048,576 tokens")
    expect(tab.locator("#panel-cached")).to_have_text("1,000 of 1,200 tokens")
    expect(tab.locator("#panel-kv")).to_have_text("430 kB")  # 282,624 + 1,240 * 118.6
    expect(tab.locator("#panel-v32")).to_have_text("1.63 MB, 3.8 times as much")
    expect(tab.locator("#panel-requests")).to_have_text("1 running, 0 waiting")


def test_what_the_server_is_asked(tab: Any, server: FakeServer) -> None:
    ask(tab, "Why?")
    settled(tab)
    ask(tab, "And then?")
    settled(tab)
    assert server.requests[0] == {
        "model": "tiny-v4-flash",
        "messages": [{"role": "user", "content": "Why?"}],
        "thinking": {"type": "disabled"},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert contents(server) == [("user", "Why?"), ("assistant", "An answer."), ("user", "And then?")]
    assert server.headers[0]["x-tenfold-progress"] == "1"
    assert "authorization" not in server.headers[0]
    assert "cookie" not in server.headers[0]


def test_settings_go_with_the_request(tab: Any, server: FakeServer) -> None:
    tab.click("#settings summary")
    tab.fill("#most", "77")
    tab.check("#thinking")
    ask(tab, "Why?")
    settled(tab)
    assert server.requests[0]["max_tokens"] == 77
    assert server.requests[0]["thinking"] == {"type": "enabled"}


def test_nothing_to_send_is_said(tab: Any, server: FakeServer) -> None:
    tab.click("#send")
    expect(tab.locator("#trouble")).to_have_text("Write a message or add a document first.")
    assert server.requests == []


@pytest.mark.parametrize("by", ["key", "button"])
def test_stop_reaches_the_server_and_keeps_the_text(tab: Any, server: FakeServer, by: str) -> None:
    gate = threading.Event()
    server.play([*words("Half of"), gate], [*words("Again."), ending()])
    ask(tab, "Why?")
    expect(last(tab)).to_contain_text("Half of")
    if by == "key":
        tab.keyboard.press("Escape")
    else:
        tab.locator("#stop").focus()
        tab.keyboard.press("Enter")
        expect(tab.locator("#send")).to_be_focused()
    expect(last(tab).locator(".note")).to_have_text("Stopped.")
    until(lambda: server.cancelled == 1, 2)
    ask(tab, "Go on")
    settled(tab)
    assert contents(server) == [("user", "Why?"), ("assistant", "Half of"), ("user", "Go on")]


def test_stopped_while_reading(tab: Any, server: FakeServer) -> None:
    server.play([progress(0, 1000), progress(250, 1000, 50.0, 15.0), threading.Event()], [*words("Now."), ending()])
    ask(tab, "Why?")
    expect(last(tab)).to_contain_text("Reading: 250 of 1,000 tokens · 50 tokens/s · about 15 s left")
    tab.keyboard.press("Escape")
    expect(last(tab).locator(".note")).to_contain_text("What was read is kept")
    tab.get_by_role("button", name="Regenerate").click()
    expect(last(tab)).to_contain_text("Now.")
    assert contents(server) == [("user", "Why?")]
    expect(tab.locator("article.answer")).to_have_count(1)


def test_regenerate_asks_the_same_and_replaces_the_answer(tab: Any, server: FakeServer) -> None:
    server.play([*words("One."), ending()], [*words("Two."), ending()], [*words("Three."), ending()])
    for question in ("First?", "Second?"):
        ask(tab, question)
        settled(tab)
    expect(tab.get_by_role("button", name="Regenerate")).to_have_count(1)
    tab.get_by_role("button", name="Regenerate").click()
    expect(text(tab)).to_have_text("Three.")
    settled(tab)
    assert contents(server, 2) == contents(server, 1)
    expect(tab.locator("article.answer")).to_have_count(2)
    expect(tab.locator("article.answer").first).to_contain_text("One.")


def test_an_edit_drops_what_followed_and_keeps_the_document(tab: Any, server: FakeServer) -> None:
    drop(tab, "book.txt", b"The book.")
    for question in ("First?", "Second?"):
        ask(tab, question)
        settled(tab)
    tab.get_by_role("button", name="Edit").first.click()
    area = tab.get_by_label("Edit your message")
    expect(area).to_be_focused()
    area.press("Escape")
    expect(tab.get_by_role("button", name="Edit").first).to_be_focused()
    tab.keyboard.press("Enter")
    area.fill("Changed?")
    area.press("Control+Enter")
    settled(tab)
    assert contents(server) == [("user", "The book.\n\nChanged?")]
    expect(tab.locator("article")).to_have_count(2)
    expect(tab.locator("article.question")).to_contain_text("Changed?")


def test_an_edit_can_drop_a_document(tab: Any, server: FakeServer) -> None:
    drop(tab, "one.txt", b"One")
    drop(tab, "two.txt", b"Two")
    expect(tab.locator("#attached li")).to_have_count(2)
    ask(tab, "Compare")
    settled(tab)
    assert contents(server) == [("user", "one.txt:\n\nOne\n\ntwo.txt:\n\nTwo\n\nCompare")]
    tab.get_by_role("button", name="Edit").click()
    tab.get_by_role("button", name="Remove one.txt").click()
    tab.get_by_label("Edit your message").press("Control+Enter")
    settled(tab)
    assert contents(server) == [("user", "Two\n\nCompare")]


def test_an_edit_stops_the_answer_under_way(tab: Any, server: FakeServer) -> None:
    server.play([*words("Old"), threading.Event()], [*words("New."), ending()])
    ask(tab, "First?")
    expect(last(tab)).to_contain_text("Old")
    tab.get_by_role("button", name="Edit").click()
    tab.get_by_label("Edit your message").fill("Second?")
    tab.get_by_label("Edit your message").press("Control+Enter")
    expect(last(tab)).to_contain_text("New.")
    settled(tab)
    until(lambda: server.cancelled == 1, 2)
    expect(tab.locator("article")).to_have_count(2)


def test_thinking_is_folded(tab: Any, server: FakeServer) -> None:
    gate = threading.Event()
    thoughts = [delta(reasoning_content=word) for word in ("Let ", "me ", "see.")]
    server.play([*thoughts, gate, *words("Yes."), ending()])
    ask(tab, "Is it?")
    fold = last(tab).locator("details")
    expect(fold.locator("summary")).to_have_text("Thinking, 3 words")
    assert fold.get_attribute("open") is None
    gate.set()
    expect(fold.locator("summary")).to_have_text("Thought, 3 words")
    fold.locator("summary").press("Enter")
    expect(fold.locator("p")).to_be_visible()
    expect(fold.locator("p")).to_have_text("Let me see.")
    settled(tab)
    ask(tab, "More?")
    settled(tab)
    assert contents(server)[1] == ("assistant", "Yes.")


# -------------------------------------------------------------------------------------------------- documents


def test_a_dropped_document_is_read_with_progress(tab: Any, server: FakeServer) -> None:
    first, second = threading.Event(), threading.Event()
    server.play(
        [
            frame({"ahead": 2}, "queued"),
            first,
            progress(1000, 4000),
            progress(2000, 4000, 800.0, 150.0),
            second,
            progress(4000, 4000, 800.0, 0.0),
            *words("Files."),
            ending(4000, 3, 1000),
        ]
    )
    drop(tab, "locks.txt", DOCUMENT.encode())
    expect(tab.locator("#attached")).to_contain_text("locks.txt 14.0 kB")
    ask(tab, "What is locked?")
    expect(last(tab)).to_contain_text("Waiting: 2 requests ahead")
    first.set()
    expect(last(tab)).to_contain_text(
        "Reading: 2,000 of 4,000 tokens · 1,000 from the store · 800 tokens/s · about 3 min left"
    )
    bar = last(tab).get_by_role("progressbar", name="Reading the prompt")
    assert bar.evaluate("bar => bar.value / bar.max") == 0.5
    expect(tab).to_have_title("50 % – tenfold")
    expect(tab.locator("#panel-context")).to_have_text("2,000 of 1,048,576 tokens")
    expect(tab.locator("#panel-reading")).to_have_text("800 tokens/s")
    expect(tab.locator("#panel-cached")).to_have_text("1,000 of 4,000 tokens")
    expect(tab.locator("#attached li")).to_have_count(0)
    second.set()
    settled(tab)
    expect(bar).not_to_be_visible()
    expect(tab).to_have_title("What is locked? – tenfold")
    assert contents(server) == [("user", f"{DOCUMENT}\n\nWhat is locked?")]
    expect(tab.locator("article.question")).not_to_contain_text("whole file")


def test_documents_can_be_chosen_and_taken_away(tab: Any, server: FakeServer) -> None:
    files = [{"name": name, "mimeType": "text/plain", "buffer": name.encode()} for name in ("a.txt", "b.txt")]
    with tab.expect_file_chooser() as chooser:
        tab.get_by_role("button", name="Add documents").click()
    chooser.value.set_files(files)
    tab.get_by_role("button", name="Remove a.txt").click()
    expect(tab.locator("#question")).to_be_focused()
    tab.keyboard.press("Control+Enter")  # a document alone is a message
    settled(tab)
    assert contents(server) == [("user", "b.txt")]


def test_a_document_of_megabytes_is_sent_whole(tab: Any, server: FakeServer) -> None:
    long = "".join(f"line {number} of a long document\n" for number in range(150_000))
    buffer = {"name": "long.txt", "mimeType": "text/plain", "buffer": long.encode()}
    tab.set_input_files("#files", files=[buffer])
    expect(tab.locator("#attached li")).to_have_count(1)
    ask(tab, "Well?")
    expect(last(tab)).to_contain_text("An answer.")
    settled(tab)
    assert contents(server) == [("user", f"{long}\n\nWell?")]
    tab.reload()  # more than localStorage would hold
    tab.get_by_role("button", name="Well?", exact=True).click()
    expect(tab.locator("article.question")).to_contain_text("long.txt 4.54 MB")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00caf\xe9", "x.bin is not UTF-8 text; convert it to text first."),
        (b"a\0b", "x.bin holds NUL bytes, so it is not text; convert it first."),
        (b" \n", "x.bin is empty."),
    ],
)
def test_what_is_no_text_is_refused_by_name(tab: Any, content: bytes, said: str) -> None:
    drop(tab, "x.bin", content)
    expect(tab.locator("#trouble")).to_have_text(said)
    expect(tab.locator("#attached li")).to_have_count(0)


def test_documents_are_sent_as_they_are(tab: Any, server: FakeServer) -> None:
    drop(tab, "x.txt", b"\xef\xbb\xbfone\r\n\xe2\x82\xac two\t\r\n\r\n")
    ask(tab, "?")
    settled(tab)
    assert contents(server) == [("user", "one\r\n€ two\t\r\n\r\n\n\n?")]  # as `tenfold run --file` joins them


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            [*words("Half"), frame({"error": {"message": "The engine died.", "type": "server_error"}})],
            "The engine died.",
        ),
        ([*words("Half")], "The stream ended before the answer was complete."),
        ([*words("Half"), "data: {broken\n\n"], "The connection broke before the answer was complete."),
        (
            JSONResponse({"error": {"message": "The queue is full."}}, 429, {"Retry-After": "30"}),
            "The queue is full. Try again in 30 s.",
        ),
        (JSONResponse({}, 502), "The server answered 502 Bad Gateway."),
    ],
)
def test_what_went_wrong_is_shown(tab: Any, server: FakeServer, script: Any, said: str) -> None:
    server.play(script, [*words("Better."), ending()])
    ask(tab, "Why?")
    expect(last(tab).locator(".note")).to_have_text(said)
    expect(last(tab).locator(".note")).to_have_class("note bad")
    if isinstance(script, list):
        expect(text(tab)).to_have_text("Half")
    tab.get_by_role("button", name="Regenerate").click()
    expect(last(tab)).to_contain_text("Better.")


def test_a_server_that_is_gone(tab: Any) -> None:
    tab.route("**/v1/**", lambda route: route.abort())
    tab.route("**/status", lambda route: route.abort())
    ask(tab, "Why?")
    expect(last(tab).locator(".note")).to_have_text("The server cannot be reached. Is it running?")
    expect(tab.locator("#model")).to_have_text("not reachable")


def test_the_longest_answer_is_no_error(tab: Any, server: FakeServer) -> None:
    server.play([*words("Half"), ending(reason="length")])
    ask(tab, "Why?")
    expect(last(tab).locator(".note")).to_have_text("The answer ends here because it reached its longest length.")
    expect(last(tab).locator(".note")).to_have_class("note")


def test_an_empty_answer_is_said(tab: Any, server: FakeServer) -> None:
    server.play([ending(5, 0)])
    ask(tab, "Why?")
    expect(last(tab).locator(".note")).to_have_text("The answer is empty.")
    expect(last(tab).locator(".note")).to_have_class("note")


def test_escape_stops_after_a_key_was_asked_for(tab: Any, server: FakeServer) -> None:
    """The settings were opened for the key; on a wide screen there is no menu that Escape could close instead."""
    server.play(JSONResponse({"error": {"message": "No key."}}, 401), [*words("Half"), threading.Event()])
    ask(tab, "Why?")
    expect(tab.locator("#key")).to_be_focused()
    tab.get_by_role("button", name="Regenerate").click()
    expect(last(tab)).to_contain_text("Half")
    tab.keyboard.press("Escape")
    expect(last(tab).locator(".note")).to_have_text("Stopped.")


def test_the_key_is_asked_for_and_kept_for_the_session(opened: Any, server: FakeServer) -> None:
    server.key = "sesame"
    tab = opened()
    expect(tab.locator("#model")).to_have_text("needs an API key")
    ask(tab, "Why?")
    expect(last(tab).locator(".note")).to_have_text("This server needs an API key.")
    expect(tab.locator("#key")).to_be_focused()
    tab.keyboard.type("sesame")
    tab.keyboard.press("Enter")
    expect(tab.locator("#model")).to_have_text("tiny-v4-flash")
    tab.get_by_role("button", name="Regenerate").click()
    expect(last(tab)).to_contain_text("An answer.")
    assert server.headers[-1]["authorization"] == "Bearer sesame"
    assert tab.evaluate("Object.values(sessionStorage)") == ["sesame"]
    assert tab.evaluate("Object.values(localStorage)") == []
    tab.reload()
    expect(tab.locator("#key")).to_have_value("sesame")


# ---------------------------------------------------------------------------------------------- conversations


def test_conversations_outlive_the_page_and_can_be_deleted(tab: Any, server: FakeServer) -> None:
    drop(tab, "book.txt", b"The book.")
    ask(tab, "First?")
    settled(tab)
    tab.get_by_role("button", name="New conversation").click()
    ask(tab, "Second?")
    settled(tab)
    tab.reload()
    expect(tab.locator("#conversations .title")).to_have_text(["Second?", "First?"])
    tab.get_by_role("button", name="First?", exact=True).click()
    expect(last(tab)).to_contain_text("An answer.")
    expect(tab.locator("article.question")).to_contain_text("book.txt")
    ask(tab, "Third?")
    settled(tab)
    assert contents(server)[0] == ("user", "The book.\n\nFirst?")
    tab.on("dialog", lambda dialog: dialog.accept())
    tab.get_by_role("button", name="Delete Second?").click()
    expect(tab.locator("#conversations .title")).to_have_text(["First?"])
    tab.get_by_role("button", name="Delete all").click()
    expect(tab.locator("#conversations li")).to_have_count(0)
    tab.reload()
    expect(tab.locator("#conversations li")).to_have_count(0)


def test_an_answer_goes_on_while_another_conversation_is_seen(tab: Any, server: FakeServer) -> None:
    gate = threading.Event()
    server.play([*words("Slow"), gate, *words(" answer."), ending()], [*words("Quick."), ending()])
    ask(tab, "Slow?")
    expect(last(tab)).to_contain_text("Slow")
    tab.get_by_role("button", name="New conversation").click()
    expect(tab.locator("#send")).to_be_visible()
    ask(tab, "Quick?")
    expect(last(tab)).to_contain_text("Quick.")
    settled(tab)
    gate.set()
    tab.get_by_role("button", name="Slow?", exact=True).click()
    expect(last(tab)).to_contain_text("Slow answer.")
    expect(tab.locator("article")).to_have_count(2)
    assert server.cancelled == 0


def test_a_page_closed_too_early_says_so(tab: Any, server: FakeServer) -> None:
    server.play([*words("Half"), threading.Event()], [*words("Whole."), ending()])
    ask(tab, "Why?")
    expect(last(tab)).to_contain_text("Half")
    tab.reload()
    until(lambda: server.cancelled == 1)
    tab.get_by_role("button", name="Why?", exact=True).click()
    expect(last(tab).locator(".note")).to_have_text("The page was closed before the answer was complete.")
    tab.get_by_role("button", name="Regenerate").click()
    expect(last(tab)).to_contain_text("Whole.")


def test_what_was_deleted_does_not_come_back(tab: Any, server: FakeServer) -> None:
    server.play([*words("Half"), threading.Event()])
    ask(tab, "Why?")
    expect(last(tab)).to_contain_text("Half")
    tab.on("dialog", lambda dialog: dialog.accept())
    tab.get_by_role("button", name="Delete Why?").click()
    until(lambda: server.cancelled == 1)
    tab.wait_for_timeout(200)
    tab.reload()
    expect(tab.locator("#conversations li")).to_have_count(0)
