"""V3.2's grammar, turn by turn, and its parser on its own; what all grammars share is in test_chat."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tenfold.chat_v32 import Event, Parser, compose
from tenfold.errors import InputError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
OPEN = "<｜User｜>{}<｜Assistant｜>"


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def developer(content: str) -> dict[str, Any]:
    return {"role": "developer", "content": content}


def assistant(content: str = "", reasoning: str = "", *calls: tuple[str, str, str]) -> dict[str, Any]:
    tool_calls = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, name, arguments in calls
    ]
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": tool_calls}


def result(content: str, call_id: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def text(*messages: dict[str, Any], thinking: bool = False, **options: Any) -> str:
    return compose(messages, thinking=thinking, **options).text.removeprefix(BOS)


def test_the_question_ends_with_both_tokens() -> None:
    assert compose([user("U")], thinking=False).text == BOS + OPEN.format("U") + "</think>"
    assert text(user("U"), thinking=True) == OPEN.format("U") + "<think>"
    assert text({"role": "system", "content": "S"}, user("U")) == "S" + OPEN.format("U") + "</think>"


def test_only_the_last_user_message_opens_a_thought() -> None:
    turns = [user("a"), user("b"), assistant("c", "R"), user("d")]
    expected = [OPEN.format("a"), OPEN.format("b"), f"c{EOS}", OPEN.format("d")]
    assert text(*turns) == "</think>".join([*expected[:2], "".join(expected[2:]), ""])
    assert text(*turns, thinking=True) == "</think>".join([*expected[:2], "".join(expected[2:])]) + "<think>"


CALL = (
    '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="k" string="true">v</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="n" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
)
RESULTS = "\n\n<function_results>\n<result>OUT</result>\n</function_results>\n\n"


def test_calls_and_results_while_thinking() -> None:
    """Tools do not keep earlier reasoning (V4's do); the thought goes on after the results."""
    call = assistant("Let me see.", "R", ("c", "f", '{"k": "v", "n": 3}'))
    now = [user("U"), call, result("OUT", "c")]
    expected = OPEN.format("U") + f"<think>R</think>Let me see.{CALL}{EOS}{RESULTS}<think>"
    assert text(*now, thinking=True) == expected
    assert text(*now) == expected.replace("<think>R", "").replace("<think>", "</think>")
    later = [*now, assistant("A", "R2"), user("next")]
    expected = OPEN.format("U") + f"</think>Let me see.{CALL}{EOS}{RESULTS}</think>A{EOS}"
    assert text(*later, thinking=True) == expected + OPEN.format("next") + "<think>"


def test_several_calls_and_their_results_in_order() -> None:
    call = assistant("", "", ("one", "f", "{}"), ("two", "g", "[1]"))
    written = text(user("U"), call, result("second", "two"), result("first", "one"))
    assert written.endswith(
        '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n<｜DSML｜invoke name="g">\n'
        '<｜DSML｜parameter name="arguments" string="true">[1]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        f"</｜DSML｜function_calls>{EOS}\n\n<function_results>\n<result>first</result>\n<result>second</result>\n"
        "</function_results>\n\n</think>"
    )


def test_developer_messages() -> None:
    written = OPEN.format("\n\n# The user's message is: D")
    assert text(developer("D")) == written + "</think>"
    assert text(developer("D"), thinking=True) == written + "<think>"
    assert text(developer("D"), user("U"), thinking=True) == OPEN.format("U") + "<think>"
    assert text(developer("D"), user("U")) == written + "</think>" + OPEN.format("U") + "</think>"


def test_tools_and_response_format_belong_to_the_system_text() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "é"}}
    for system in ([{"role": "system", "content": "S"}], []):
        written = text(*system, user("U"), tools=[tool], response_format={"type": "object"})
        head, tail = written.split("\n\n## Tools\n", 1)
        assert head == ("S" if system else "")
        assert '<functions>\n{"name": "f", "description": "é"}\n</functions>\n\n\n## Response Format:\n' in tail
        assert tail.endswith('\n{"type": "object"}' + OPEN.format("U") + "</think>")


def test_control_ranges_are_the_grammar() -> None:
    prompt = compose([user("<think>"), assistant("</think>", "R"), user("｜DSML｜")], thinking=True)
    marked = [prompt.text[start:end] for start, end in prompt.control_ranges]
    turn = ["<｜User｜>", "<｜Assistant｜>"]
    assert marked == [BOS, *turn, "</think>", EOS, *turn, "<think>"]
    assert prompt.text.count("<think>") == 2


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([result("x", "c")], "follows no assistant message with tool_calls"),
        ([user("U"), assistant("A"), result("x", "c")], "follows no assistant message with tool_calls"),
        ([user("U"), assistant("A", "R")], "nothing to answer"),
        ([{"role": "system", "content": "S"}], "nothing to answer"),
        ([user("U"), assistant("A"), {"role": "system", "content": "S"}], "nothing to answer"),
        (
            [user("U"), assistant("", "", ("c", "f", "{}")), result("x", "d")],
            r"\['d'\] do not answer the calls \['c'\]",
        ),
        ([user("U"), assistant("", "", ("c", "f", "{}"), ("d", "f", "{}")), result("x", "d")], "one result for each"),
    ],
)
def test_impossible_conversations_are_named(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compose(messages, thinking=False)


def test_an_answer_without_reasoning_cannot_be_continued_while_thinking() -> None:
    called = assistant("", "", ("c", "f", "{}"))
    assert "<think></think>" in text(user("U"), called, result("x", "c"), thinking=True)
    turns = [user("U"), called, result("x", "c"), assistant("A"), {"role": "developer", "content": "D"}]
    assert text(*turns, thinking=True).endswith("<think>")
    with pytest.raises(InputError, match="neither reasoning_content nor calls"):
        compose([user("U"), assistant("A"), called, result("x", "c")], thinking=True)


def test_schemas_that_are_not_json_are_named() -> None:
    with pytest.raises(InputError, match="a tool's schema cannot be written as JSON"):
        compose([user("U")], thinking=False, tools=[{"function": {"name": b"f"}}])
    with pytest.raises(InputError, match="response_format cannot be written as JSON"):
        compose([user("U")], thinking=False, response_format={"x": {1, 2}})


# -- the parser


def parse(completion: str, *, thinking: bool = True) -> list[Event]:
    parser = Parser(thinking=thinking)
    return [*parser.push(completion), *parser.finish()]


def test_a_call_is_one_event_with_its_arguments() -> None:
    reasoning, content, call = parse("R</think>A" + CALL)
    assert (reasoning, content) == (Event("reasoning", "R"), Event("content", "A"))
    assert (call.kind, call.name, call.index) == ("tool_call", "f", 0)
    assert json.loads(call.text) == {"k": "v", "n": 3}
    assert call.id.startswith("call_00_")


def test_a_call_appears_as_soon_as_it_is_complete() -> None:
    parser = Parser(thinking=False)
    end = CALL.index("</｜DSML｜invoke>") + len("</｜DSML｜invoke>")
    assert parser.push(CALL[: end - 1]) == []
    assert [event.name for event in parser.push(CALL[end - 1 : end])] == ["f"]
    assert parser.push(CALL[end:]) == []
    assert parser.finish() == []


def test_a_call_within_reasoning_ends_it() -> None:
    kinds = [event.kind for event in parse("R" + CALL)]
    assert kinds == ["reasoning", "tool_call"]


def test_a_call_without_its_block_is_a_call() -> None:
    events = parse('A<｜DSML｜invoke name="f">\n</｜DSML｜invoke>', thinking=False)
    assert [(event.kind, event.text) for event in events] == [("content", "A"), ("tool_call", "{}")]


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ("", "{}"),
        ('<｜DSML｜parameter name="k">v</｜DSML｜parameter>', '{"k": "v"}'),
        ('<｜DSML｜parameter name="k" string="false">[1, </｜DSML｜parameter>', '{"k": [1, }'),
        ('<｜DSML｜parameter name="k" string="true">never ends', "{}"),
        ('<｜DSML｜parameter nome="k">v</｜DSML｜parameter>', "{}"),
    ],
)
def test_odd_parameters(body: str, arguments: str) -> None:
    (call,) = parse(f'<｜DSML｜function_calls><｜DSML｜invoke name="f">{body}</｜DSML｜invoke>', thinking=False)
    assert call.text == arguments


def test_markup_without_a_call_is_swallowed() -> None:
    for markup in ("<｜DSML｜", '<｜DSML｜function_calls>\n<｜DSML｜invoke nome="f">x</｜DSML｜invoke>'):
        assert parse("A\n\n" + markup, thinking=False) == [Event("content", "A")]


INSIDE = '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">'


@pytest.mark.parametrize("prefix", ["", INSIDE])
@pytest.mark.parametrize(
    "unit", ['<｜DSML｜parameter name="', "</thin", "\n", '<｜DSML｜invoke name="f">', "</｜DSML｜invoke>", '"']
)
def test_half_open_markup_costs_linear_time(prefix: str, unit: str) -> None:
    """A million characters at once: minutes if each opening were searched to the end."""
    parser = Parser(thinking=False)
    started = time.process_time()
    parser.push(prefix + unit * (1_000_000 // len(unit)))
    parser.finish()
    assert time.process_time() - started < 3


def test_many_small_pieces_cost_linear_time() -> None:
    """A long argument letter by letter: many seconds if each letter copied what came before."""
    parser = Parser(thinking=False)
    parser.push(INSIDE)
    started = time.process_time()
    for _ in range(300_000):
        parser.push("x")
    assert time.process_time() - started < 5
