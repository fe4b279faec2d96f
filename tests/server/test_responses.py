"""OpenAI's Responses over a real socket."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from tests.server.fakes import MODEL, Served, real_language, saying, serving
from tests.server.test_chat_completions import CALL, CALLS_END
from tests.server.test_messages import events

TOOLS = [{"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}]


def post(served: Served, **changed: Any) -> httpx.Response:
    return served.http.post("/v1/responses", json={"model": MODEL, "input": "Hi", **changed})


def test_an_answer(hello: Served) -> None:
    found = post(hello, store=True, metadata={"a": "b"}).json()
    assert found["id"].startswith("resp_")
    assert found["status"] == "completed"
    reasoning, message = found["output"]
    assert reasoning["content"][0]["text"] == "Let me see."
    assert message["content"][0]["text"] == "Hello, world"
    usage = found["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] == 3
    assert (usage["output_tokens"], usage["output_tokens_details"]["reasoning_tokens"]) == (8, 5)
    assert usage["input_tokens"] == len(hello.jobs.jobs[-1].prompt)


def test_thinking_off_and_length(hello: Served) -> None:
    found = post(hello, reasoning={"effort": "none"}, max_output_tokens=1, temperature=0).json()
    assert [item["type"] for item in found["output"]] == ["message"]
    assert (found["status"], found["incomplete_details"]["reason"]) == ("incomplete", "max_output_tokens")
    assert hello.jobs.jobs[-1].sampling["temperature"] == 0


def test_a_stream(hello: Served) -> None:
    said = events(post(hello, stream=True))
    assert [event["sequence_number"] for event in said] == list(range(len(said)))
    kinds = [event["type"] for event in said]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    text = "".join(event["delta"] for event in said if event["type"] == "response.output_text.delta")
    assert text == "Hello, world"
    assert said[-1]["response"]["usage"]["output_tokens"] == 8


def test_tools() -> None:
    with serving(saying("</think>" + CALL + CALLS_END, real_language())) as served:
        found = post(served, tools=TOOLS).json()
        call = found["output"][-1]
        assert (call["type"], call["name"]) == ("function_call", "look")
        assert json.loads(call["arguments"]) == {"city": "Oslo"}
        more = [
            {"role": "user", "content": "Hi"},
            call,
            {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"},
        ]
        assert post(served, tools=TOOLS, input=more).status_code == 200


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"conversation": "x"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
            "input[0].content[0]",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"reasoning": {"effort": "extreme"}}, "input"),
    ],
    ids=str,
)
def test_refused_by_name(hello: Served, changed: dict[str, Any], param: str) -> None:
    answer = post(hello, **changed)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_nothing_is_kept(hello: Served) -> None:
    assert hello.http.get("/v1/responses/resp_x").status_code == 404
