"""Anthropic's Messages over a real socket."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from tests.server.fakes import MODEL, Served, real_language, saying, serving
from tests.server.test_chat_completions import CALL, CALLS_END

BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}
TOOLS = [{"name": "look", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]


def post(served: Served, path: str = "/v1/messages", **changed: Any) -> httpx.Response:
    return served.http.post(path, json={**BODY, **changed})


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


@pytest.mark.parametrize("path", ["/v1/messages", "/anthropic/v1/messages"])
def test_an_answer(hello: Served, path: str) -> None:
    found = post(hello, path).json()
    assert found["type"] == "message"
    assert found["id"].startswith("msg_")
    assert found["content"] == [{"type": "text", "text": "Hello, world"}]
    assert found["stop_reason"] == "end_turn"
    usage = found["usage"]
    prompt = len(hello.jobs.jobs[-1].prompt)
    assert usage["cache_read_input_tokens"] == 3
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == prompt
    assert usage["output_tokens"] == 3


def test_thinking_is_asked_for(hello: Served) -> None:
    found = post(hello, thinking={"type": "enabled", "budget_tokens": 1024}).json()
    assert [block["type"] for block in found["content"]] == ["thinking", "text"]
    assert found["content"][0]["thinking"] == "Let me see."
    assert found["content"][0]["signature"]
    assert post(hello, thinking={"type": "adaptive"}).json()["content"][0]["type"] == "thinking"


def test_a_stream(hello: Served) -> None:
    said = events(post(hello, thinking={"type": "enabled", "budget_tokens": 1024}, stream=True))
    kinds = [event["type"] for event in said]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert said[0]["message"]["usage"]["cache_read_input_tokens"] == 3
    deltas = [event["delta"] for event in said if event["type"] == "content_block_delta"]
    assert "".join(delta.get("text", "") for delta in deltas) == "Hello, world"
    assert "".join(delta.get("thinking", "") for delta in deltas) == "Let me see."
    assert any(delta["type"] == "signature_delta" for delta in deltas)
    assert said[-2]["delta"]["stop_reason"] == "end_turn"
    assert said[-2]["usage"]["output_tokens"] == 8


def test_stop_sequences_and_length(hello: Served) -> None:
    found = post(hello, stop_sequences=[" wor"]).json()
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", " wor")
    assert found["content"] == [{"type": "text", "text": "Hello,"}]
    assert post(hello, max_tokens=1).json()["stop_reason"] == "max_tokens"


def test_tools() -> None:
    with serving(saying(CALL + CALLS_END, real_language())) as served:
        found = post(served, tools=TOOLS).json()
        assert found["stop_reason"] == "tool_use"
        [block] = found["content"]
        assert (block["type"], block["name"], block["input"]) == ("tool_use", "look", {"city": "Oslo"})
        said = events(post(served, tools=TOOLS, stream=True))
        parts = [event["delta"]["partial_json"] for event in said if event["type"] == "content_block_delta"]
        assert json.loads("".join(parts)) == {"city": "Oslo"}
        more = [
            {"role": "assistant", "content": [block]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block["id"], "content": "rain"}]},
        ]
        assert post(served, tools=TOOLS, messages=[*BODY["messages"], *more]).status_code == 200


def test_structured_output(hello: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert post(hello, output_config={"format": {"type": "json_schema", "schema": schema}}).status_code == 200
    constraint = hello.jobs.jobs[-1].constraint
    assert constraint is not None
    assert json.loads(constraint.schema) == schema
    assert post(hello, output_format={"type": "xml"}).status_code == 400


def test_counting(hello: Served) -> None:
    body = {name: BODY[name] for name in ("model", "messages")}
    found = hello.http.post("/v1/messages/count_tokens", json=body).json()
    post(hello)
    assert found == {"input_tokens": len(hello.jobs.jobs[-1].prompt)}


def test_system_and_cache_control(hello: Served) -> None:
    blocks = [{"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}}]
    assert post(hello, system=blocks).status_code == 200
    assert "Be brief" in real_language().tokenizer.decode(hello.jobs.jobs[-1].prompt)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"stop_sequences": [""]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools"),
    ],
    ids=str,
)
def test_refused_in_anthropics_shape(hello: Served, changed: dict[str, Any], word: str) -> None:
    answer = post(hello, **changed)
    assert answer.status_code == 400, answer.text
    found = answer.json()
    assert found["type"] == "error"
    assert found["error"]["type"] == "invalid_request_error"
    assert word in found["error"]["message"]
    assert found["request_id"] == answer.headers["x-request-id"]


def test_an_unknown_model(hello: Served) -> None:
    answer = post(hello, model="claude")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
