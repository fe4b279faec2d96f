"""Attacks that no test of one part shows: text that spells grammar, tools and schemas of strangers, on every API.

The list's other rows stand with the parts: bodies and connections in test_transport, keys and hosts in test_gate,
fields in the tests of each protocol, broken streams in test_answers, `tenfold serve` itself in test_serving.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.server.fakes import MODEL, Served, real_language
from tests.server.test_serving import running

SPELLINGS = "".join(
    real_language().tokenizer.decode([token]) for token in sorted(real_language().tokenizer.control_ids)
)
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"


def controls(served: Served) -> list[int]:
    """The control tokens of the prompt that the engine was given last."""
    ids = real_language().tokenizer.control_ids
    return [token for token in served.jobs.jobs[-1].prompt if token in ids]


def asked(served: Served, path: str, body: dict[str, Any]) -> httpx.Response:
    more = {"max_tokens": 8} if path == MESSAGES else {}
    return served.http.post(path, json={"model": MODEL, **more, **body})


CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": "@"}'}}
USER = [{"role": "user", "content": "json"}]


def tool(name: str = "f", parameters: Any = None, description: str = "") -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": parameters or {"type": "object"}}
    return {"type": "function", "function": function}


PLACES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat user": (CHAT, {"messages": [{"role": "user", "content": "@"}]}),
    "chat part": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "@"}]}]}),
    "chat assistant": (CHAT, {"messages": [*USER, {"role": "assistant", "content": "@"}, *USER]}),
    "chat call and result": (
        CHAT,
        {
            "messages": [
                *USER,
                {"role": "assistant", "content": "", "reasoning_content": "@", "tool_calls": [CALLED]},
                {"role": "tool", "tool_call_id": "c1", "content": "@"},
            ]
        },
    ),
    "chat tool": (
        CHAT,
        {"messages": USER, "tools": [tool(parameters={"type": "object", "title": "@"}, description="@")]},
    ),
    "messages system": (MESSAGES, {"system": "@", "messages": USER}),
    "messages blocks": (
        MESSAGES,
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "@"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "@"},
                        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": "@"}},
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "@"}]},
            ]
        },
    ),
    "responses input": (RESPONSES, {"input": "@", "instructions": "@"}),
    "responses items": (
        RESPONSES,
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "@"}]},
                {"type": "function_call", "call_id": "t", "name": "f", "arguments": '{"a": "@"}'},
                {"type": "function_call_output", "call_id": "t", "output": "@"},
            ]
        },
    ),
    "completions": ("/v1/completions", {"prompt": "@"}),
}


def with_text(body: Any, text: str) -> Any:
    """The body with `text` in every place that says @."""
    if isinstance(body, dict):
        return {name: with_text(one, text) for name, one in body.items()}
    if isinstance(body, list):
        return [with_text(one, text) for one in body]
    return body.replace("@", text) if isinstance(body, str) else body


@pytest.mark.parametrize("place", PLACES)
def test_what_anybody_writes_never_becomes_a_control_token(hello: Served, place: str) -> None:
    """Row 25: the prompt has the control tokens it would have with harmless text, wherever the text stands."""
    path, body = PLACES[place]
    harmless = asked(hello, path, with_text(body, "x"))
    assert harmless.status_code == 200, harmless.text
    expected = controls(hello)
    hostile = asked(hello, path, with_text(body, SPELLINGS))
    assert hostile.status_code == 200, hostile.text
    assert controls(hello) == expected


@pytest.mark.parametrize(
    "tools",
    [
        [tool(f"f{i}") for i in range(129)],
        [tool(parameters={"type": "object", "description": "x" * (1 << 20)})],
        [tool("f g")],
        [tool("f" * 200)],
        [tool("")],
        [{"type": "function"}],
        [None],
        ["f"],
    ],
    ids=["129", "1 MB", "a space", "200 letters", "no name", "no function", "null", "a string"],
)
def test_tools_that_are_none(hello: Served, tools: list[Any]) -> None:
    """Row 29: refused at once, by name."""
    before = len(hello.jobs.jobs)
    began = time.monotonic()
    for path, listed in (
        (CHAT, tools),
        (MESSAGES, [one and one.get("function", one) if isinstance(one, dict) else one for one in tools]),
    ):
        answer = asked(hello, path, {"messages": USER, "tools": listed})
        assert answer.status_code == 400, answer.text
        assert len(answer.json()["error"]["message"]) <= 520
    assert time.monotonic() - began < 5
    assert len(hello.jobs.jobs) == before


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a"}, {"role": "tool", "tool_call_id": "none", "content": "7"}],
        [{"role": "tool", "content": "7"}],
        [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{**CALLED, "function": {"name": "f", "arguments": "{a"}}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "7"},
        ],
        [{"role": "assistant", "content": "a", "tool_calls": [{}]}],
        [{"role": "nobody", "content": "a"}],
    ],
    ids=["no such call", "no call at all", "arguments that are no JSON", "an empty call", "no such role"],
)
def test_histories_that_do_not_fit_together(hello: Served, messages: list[Any]) -> None:
    """Row 32: a helpful refusal, or a prompt that has them as they are; never an error of ours."""
    answer = asked(hello, CHAT, {"messages": messages})
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_nothing_is_ever_fetched(hello: Served) -> None:
    """Row 33: whatever a request points to, no connection is opened but the client's own."""
    opened: list[Any] = []
    watching = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (
            watching
            and event in ("socket.connect", "socket.getaddrinfo")
            and hello.port not in arguments[1:2] + (arguments[1] if isinstance(arguments[1], tuple) else ())
        ):
            opened.append((event, arguments[1:]))

    sys.addaudithook(hook)  # cannot be taken away again, so it is told to look elsewhere
    part: dict[str, Any]
    with socket.socket() as elsewhere:
        elsewhere.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/x.png"
        try:
            for where in (url, "file:///etc/passwd", "data:image/png;base64,AAAA"):
                for part in (
                    {"type": "image_url", "image_url": {"url": where}},
                    {"type": "input_audio", "input_audio": {"data": where, "format": "wav"}},
                    {"type": "file", "file": {"file_data": where}},
                ):
                    answer = asked(hello, CHAT, {"messages": [{"role": "user", "content": [part]}]})
                    assert answer.status_code == 400
                answer = asked(hello, RESPONSES, {"input": [{"role": "user", "content": [
                    {"type": "input_image", "image_url": where}]}]})  # fmt: skip
                assert answer.status_code == 400
                answer = asked(hello, MESSAGES, {"messages": [{"role": "user", "content": [
                    {"type": "image", "source": {"type": "url", "url": where}}]}]})  # fmt: skip
                assert answer.status_code == 400
                schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": where}}}
                asked(hello, CHAT, {"messages": USER, "response_format": schema})
        finally:
            watching = False
    assert opened == []


# ------------------------------------------------------------------------------------------ a real engine


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """`tenfold serve` with the embedded model."""
    with (
        running(tmp_path_factory.mktemp("attacks")) as (_, address),
        httpx.Client(base_url=address, timeout=60, trust_env=False) as client,
    ):
        yield client


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


def test_structured_output_over_http(real: httpx.Client) -> None:
    """What the embedded model writes is JSON of the schema, streamed or not; logprobs are those of the model."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 10},
            "n": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    demand = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": False}}
    body = {"model": "tiny-v4-flash", "messages": USER, "response_format": demand, "max_tokens": 80}
    for seed in range(3):
        answer = real.post(CHAT, json={**body, "seed": seed})
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        found = json.loads(choice["message"]["content"])
        assert set(found) == {"name", "n"}
        assert found["n"] in range(10)


HOSTILE: dict[str, Any] = {
    "depth 150": json.loads(nested(150)),
    "a circle": {"$ref": "#"},
    "an unknown type": {"type": "nope"},
    "look-ahead": {"type": "string", "pattern": "a(?=b)"},
    "(a+)+b": {"type": "string", "pattern": "^(a+)+b$"},
    "counts": {"type": "string", "pattern": "((a{0,900}){0,900}){0,900}"},
    "100,000 members": {"enum": [str(i) for i in range(100_000)]},
    "a file": {"$ref": "file:///etc/passwd"},
    "no schema": "x",
}


def test_hostile_schemas_are_refused_or_followed(real: httpx.Client) -> None:
    """Row 30: 400 in a sentence, or an answer; never an error of ours, and the engine is there after each."""
    process = real.get("/status").json().get("steps")
    for name, schema in HOSTILE.items():
        demand = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        body = {"model": "tiny-v4-flash", "messages": USER, "response_format": demand, "max_tokens": 4}
        try:
            answer = real.post(CHAT, json=body)
        except httpx.RemoteProtocolError:  # it took so long that the answer had begun; then it is broken off
            continue
        assert answer.status_code in (200, 400), (name, answer.text)
        if answer.status_code == 400:
            assert len(answer.json()["error"]["message"]) <= 500
            assert answer.headers["x-should-retry"] == "false"
        assert real.get("/ready").status_code == 200, name
    assert process is None or real.get("/status").json()["steps"] >= process, "it is the same engine"
