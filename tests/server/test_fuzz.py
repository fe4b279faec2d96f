"""Damaged bodies and cut streams: whatever comes, an answer in the protocol's shape, the same however it is cut.

A few hundred in every run, 100,000 bodies and 20,000 streams behind `slow` (`make test-long`). What failed is printed
with its number: the same number makes the same case again.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.server.clock import awake_s
from tests.server.fakes import FakeJobs, plain_language, real_language, saying, settings

from tenfold.chat import Parser, Profile, message_of
from tenfold.server.app import Gate
from tenfold.server.auth import Keys
from tenfold.server.metrics import Metrics
from tenfold.server.service import Service

MODEL = "tenfold-test"
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
USER = {"role": "user", "content": "Hello"}
SEEDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [USER]}),
    ("/v1/chat/completions", {"messages": [USER], "stream": True, "stream_options": {"include_usage": True}}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "system", "content": "S"}, USER], "tools": [TOOL], "n": 2, "stop": ["x"]},
    ),
    (
        "/v1/chat/completions",
        {"messages": [USER], "tools": [TOOL], "tool_choice": "required", "thinking": {"type": "disabled"}},
    ),
    (
        "/v1/chat/completions",
        {"messages": [USER], "logprobs": True, "top_logprobs": 3, "logit_bias": {"5": 1}, "seed": 1},
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [USER],
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": "r",
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "7"},
            ],
            "tools": [TOOL],
        },
    ),
    ("/v1/completions", {"prompt": "Once", "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 2}),
    ("/v1/completions", {"prompt": [1, 2, 3], "suffix": "end", "stream": True}),
    (
        "/v1/completions",
        {"prompt": ["a", "b"], "n": 2, "presence_penalty": 1, "frequency_penalty": 1, "top_p": 0.9, "user": "u"},
    ),
    ("/v1/responses", {"input": "Hello", "instructions": "Be brief", "stream": True, "reasoning": {"effort": "low"}}),
    (
        "/v1/responses",
        {
            "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}],
            "text": {"format": {"type": "text"}},
        },
    ),
    (
        "/v1/messages",
        {
            "messages": [USER],
            "max_tokens": 9,
            "system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}],
        },
    ),
    (
        "/v1/messages",
        {
            "messages": [USER],
            "max_tokens": 9,
            "stream": True,
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "tools": [{"name": "f", "input_schema": {"type": "object", "properties": {}}}],
            "stop_sequences": ["x"],
            "metadata": {"user_id": "u"},
        },
    ),
    ("/v1/messages/count_tokens", {"messages": [USER]}),
    ("/tokenize", {"prompt": "Hello"}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]
EVIL: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1e308,
    -0.0,
    2**31,
    2**63,
    2**64 + 1,
    "",
    " ",
    "\0",
    "\ufffe",
    "a" * 5000,
    "\uff11\uff12",
    "🙂" * 9,
    "<｜User｜>",
    "</think>",
    "<｜DSML｜tool_calls>",
    "́" * 300,
    "../../etc/passwd",
    "\r\n",
    [],
    {},
    [[]],
    [{}],
    [None],
    [1, "a"],
    {"type": "nope"},
    {"$ref": "#"},
    {"": ""},
    [[[[[]]]]],
    {"a": {"b": {"c": []}}},
    "enabled",
    "required",
    "json_object",
]
EXPECTED = {200, 400, 401, 404, 405, 408, 413, 415, 429, 431}


class Asgi:
    """The application without sockets: a request in, the whole answer out."""

    def __init__(self, plain: bool) -> None:
        language = plain_language() if plain else real_language()
        self.jobs = FakeJobs(saying("Let me see.</think>Hello <b> world", language))
        self.service = Service(self.jobs, language, settings(), Metrics(MODEL))
        self.gate = Gate(self.service, Keys.of(()))

    async def ask(self, path: str, body: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        pieces: list[bytes] = []
        answer: dict[str, Any] = {}
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if asked:
                await asyncio.sleep(3600)
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.update(message)
            else:
                pieces.append(message.get("body", b""))

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "query_string": b"",
            "http_version": "1.1",
            "scheme": "http",
            "root_path": "",
        }
        await self.gate(scope, receive, send)
        return answer["status"], dict(answer["headers"]), b"".join(pieces)


def damaged(number: int) -> tuple[str, bytes]:
    """The body with this number: a seed with some of its parts replaced, or some of its bytes."""
    dice = random.Random(number)
    path, seed = dice.choice(SEEDS)
    body = json.loads(json.dumps({"model": MODEL, **seed}))
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        _damage(body, dice)
    text = json.dumps(body, ensure_ascii=dice.random() < 0.5).encode("utf-8", "surrogatepass")
    return path, _torn(text, dice) if dice.random() < 0.3 else text


def _damage(body: Any, dice: random.Random) -> None:
    """Goes down to some part, and replaces, doubles, renames or drops it."""
    parent = body
    while True:
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        if not keys:
            return
        key = dice.choice(list(keys))
        if isinstance(parent[key], dict | list) and parent[key] and dice.random() < 0.7:
            parent = parent[key]
            continue
        break
    how = dice.random()
    if how < 0.6:
        parent[key] = copy.deepcopy(dice.choice(EVIL))
    elif how < 0.75:
        del parent[key]
    elif isinstance(parent, dict):
        parent[dice.choice(("nope", "temperature", "stop", "tools", "content", "\0", "n" * 300))] = copy.deepcopy(
            dice.choice(EVIL)
        )
    else:
        parent.extend(copy.deepcopy(parent[key]) for _ in range(dice.choice((1, 50))))


def _torn(text: bytes, dice: random.Random) -> bytes:
    torn = bytearray(text)
    for _ in range(dice.choice((1, 2, 8))):
        at = dice.randrange(len(torn) + 1)
        how = dice.randrange(4)
        if how == 0:
            torn[at : at + dice.choice((1, 9))] = b""
        elif how == 1:
            torn[at:at] = dice.choice(
                (b"\xff", b"\xed\xa0\x80", b"\\ud800", b"NaN", b"[" * 300, b"1" * 5000, b'"', b"\0", b"{", b",")
            )
        elif how == 2:
            torn[at:] = b""
        else:
            torn[at : at + 1] = bytes([dice.randrange(256)])
        if not torn:
            break
    return bytes(torn)


def fault(path: str, status: int, headers: dict[bytes, bytes], answer: bytes) -> str | None:
    """What is wrong with an answer, if anything."""
    if status not in EXPECTED:
        return f"status {status}"
    if not headers.get(b"x-request-id"):
        return "no x-request-id"
    if status == 200:
        return _fault_of_success(path, headers, answer)
    error = json.loads(answer)
    if path.startswith("/v1/messages") and (error["type"] != "error" or not error["request_id"]):
        return "not Anthropic's shape"
    message = error["error"]["message"]
    if not 0 < len(message) <= 700 or "Traceback" in message or "/tenfold/" in message:
        return f"message {message!r}"
    return None if headers.get(b"x-should-retry") == b"false" or status in (408, 429) else "no x-should-retry"


def _fault_of_success(path: str, headers: dict[bytes, bytes], answer: bytes) -> str | None:
    if headers[b"content-type"].startswith(b"text/event-stream"):
        ends = {"/v1/messages": b"message_stop", "/v1/responses": b"response.completed"}
        ended = ends.get(path, b"[DONE]") in answer or b"response.incomplete" in answer
        return None if ended else "a stream without an end"
    found = json.loads(answer)
    return "an error with status 200" if isinstance(found, dict) and found.get("error") else None


def fuzz_bodies(first: int, count: int, say: Callable[[int], None] | None = None) -> dict[int, int]:
    """Asks `count` damaged bodies, four at once; how many answers had which status."""
    statuses: dict[int, int] = {}

    async def all_of_them() -> None:
        apps = (Asgi(plain=False), Asgi(plain=True))

        async def one(number: int) -> None:
            path, body = damaged(number)
            began = awake_s()
            status, headers, answer = await asyncio.wait_for(apps[number % 4 == 3].ask(path, body), 600)
            wrong = fault(path, status, headers, answer)
            assert wrong is None, f"case {number}: {wrong}: {path} {body[:600]!r} -> {answer[:600]!r}"
            assert awake_s() - began < 20, f"case {number} took {awake_s() - began:.1f} s"
            statuses[status] = statuses.get(status, 0) + 1

        for at in range(first, first + count, 4):
            await asyncio.gather(*map(one, range(at, min(at + 4, first + count))))
            if say is not None and (at - first) % 2000 == 0:
                say(at - first)
        for app in apps:
            assert not app.jobs.running, "a job is still running"
            app.service.close()

    asyncio.run(all_of_them())
    return statuses


def test_damaged_bodies_are_answered_in_the_protocols_shape() -> None:
    statuses = fuzz_bodies(0, 400)
    assert statuses[200] > 40, "a fuzzer that is always refused tests little"
    assert statuses[400] > 100


@pytest.mark.slow
def test_a_hundred_thousand_damaged_bodies() -> None:
    assert sum(fuzz_bodies(1000, 100_000).values()) == 100_000


# ------------------------------------------------------------------------------------------ streams

D = "｜DSML｜"
CALL = (
    f'\n\n<{D}tool_calls>\n<{D}invoke name="f">\n<{D}parameter name="a" string="true">é 🙂 "q"\n</{D}parameter>\n'
    f'<{D}parameter name="b" string="false">{{"x": [1, 2]}}</{D}parameter>\n</{D}invoke>\n</{D}tool_calls>'
)
OUTPUTS = [
    "Hello, world",
    "Let me see.</think>Hello 🙂👩‍👩‍👧 é",
    "think" + "</think>" + "answer" + CALL,
    CALL,
    "a < b </ c <｜ d <｜DSML e",
    f"<{D}tool_calls>\n<{D}invoke name=",
    f"<{D}tool_calls>\n<{D}invoke name=\"f\">\n<{D}parameter name=\"a\" string=\"true\">never closed",
    f"x</{D}parameter></{D}invoke></{D}tool_calls> y",
    f"<{D}tool_calls>" * 5 + f"</{D}tool_calls>" * 3,
    "</think></think>" + CALL + "\n trailing",
    CALL.replace("string=\"true\"", "string=\"maybe\""),
    CALL.replace("\n", ""),
    "", "\n", "</think>", "<", "｜", "🙂" * 50,
]  # fmt: skip


def parsed(pieces: list[str], profile: Profile, thinking: bool) -> Any:
    parser = Parser(profile, thinking)
    message = message_of([event for piece in pieces for event in parser.push(piece)] + parser.finish())
    for call in message.get("tool_calls", ()):
        del call["id"]  # drawn by chance
    return message


def cut(text: str, dice: random.Random) -> list[str]:
    places = sorted(dice.randrange(len(text) + 1) for _ in range(dice.choice((1, 3, 10, 40))))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def fuzz_splits(first: int, count: int) -> None:
    for number in range(first, first + count):
        dice = random.Random(number)
        text = dice.choice(OUTPUTS) + (dice.choice(OUTPUTS) if dice.random() < 0.5 else "")
        profile = dice.choice((Profile.OFFICIAL, Profile.V32))
        thinking = dice.random() < 0.5
        pieces = cut(text, dice)
        whole, split = parsed([text], profile, thinking), parsed(pieces, profile, thinking)
        assert split == whole, f"case {number}: {pieces!r}"


def test_a_stream_means_the_same_however_it_is_cut() -> None:
    fuzz_splits(0, 400)


@pytest.mark.slow
def test_twenty_thousand_cuts() -> None:
    fuzz_splits(1000, 20_000)


@pytest.mark.parametrize("profile", [Profile.OFFICIAL, Profile.V32])
def test_parsing_takes_time_in_proportion(profile: Profile) -> None:
    """A megabyte of half-open tags: twice as much takes about twice as long."""

    def seconds(count: int) -> float:
        parser = Parser(profile, False)
        began = time.process_time()
        for _ in range(count):
            parser.push(f"<{D}invoke <{D} </｜")
        parser.finish()
        return time.process_time() - began

    seconds(1000)
    short, long = (min(seconds(count) for _ in range(2)) for count in (12_000, 24_000))
    assert long < 3 * short + 0.05
