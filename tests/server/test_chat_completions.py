"""Chat Completions over a real socket: shapes, fields, refusals."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from tests.server.fakes import MODEL, Served, real_language, saying, serving

USER = [{"role": "user", "content": "Hi"}]
BODY: dict[str, Any] = {"model": MODEL, "messages": USER}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]
CALL = (
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="look">\n<｜DSML｜parameter name="city" string="true">'
    "Oslo</｜DSML｜parameter>\n</｜DSML｜invoke>\n"
)
CALLS_END = "</｜DSML｜tool_calls>"


def post(served: Served, path: str = "/v1/chat/completions", **changed: Any) -> httpx.Response:
    return served.http.post(path, json={**BODY, **changed})


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    assert lines.count("[DONE]") == 1
    return [json.loads(line) for line in lines[:-1]]


def test_an_answer(hello: Served) -> None:
    answer = post(hello)
    assert answer.status_code == 200
    found = answer.json()
    assert found["id"].startswith("chatcmpl-")
    assert found["object"] == "chat.completion"
    assert found["model"] == MODEL
    [choice] = found["choices"]
    assert choice["message"]["content"] == "Hello, world"
    assert choice["message"]["reasoning_content"] == "Let me see."
    assert choice["finish_reason"] == "stop"
    usage = found["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_cache_hit_tokens"] == 3
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 5
    assert usage["completion_tokens"] == 8


def test_thinking_off_leaves_its_field_out(hello: Served) -> None:
    found = post(hello, thinking={"type": "disabled"}).json()
    assert found["choices"][0]["message"] == {"role": "assistant", "content": "Hello, world"}


@pytest.mark.parametrize("path", ["/chat/completions", "/beta/chat/completions"])
def test_deepseeks_paths(hello: Served, path: str) -> None:
    assert post(hello, path).status_code == 200


def test_a_stream_adds_up_to_the_answer(hello: Served) -> None:
    answer = post(hello, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(answer)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Hello, world"
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Let me see."
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_stream_without_usage_has_none(hello: Served) -> None:
    assert all(chunk["choices"] and chunk["usage"] is None for chunk in events(post(hello, stream=True)))


def test_several_choices(hello: Served) -> None:
    found = post(hello, n=3, seed=7).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert found["usage"]["completion_tokens"] == 24
    assert [job.sampling["seed"] for job in hello.jobs.jobs[-3:]] == [7, 8, 9]
    chunks = events(post(hello, n=3, stream=True))
    texts = {0: "", 1: "", 2: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content") or ""
    assert set(texts.values()) == {"Hello, world"}


def test_max_tokens_end_with_length(hello: Served) -> None:
    found = post(hello, max_tokens=2, thinking={"type": "disabled"}).json()
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 2
    assert post(hello, max_completion_tokens=2).json()["usage"]["completion_tokens"] == 2


def test_a_stop_string_is_never_shown_and_stops_the_engine() -> None:
    language = real_language()
    with serving(saying("one two three four", language, pause_s=0.01)) as served:
        found = post(served, stop=["thr", "zzz"], thinking={"type": "disabled"}).json()
        assert found["choices"][0]["message"]["content"] == "one two "
        assert found["choices"][0]["finish_reason"] == "stop"
        assert served.jobs.cancelled == [served.jobs.jobs[0].id]
        streamed = events(post(served, stop="thr", thinking={"type": "disabled"}, stream=True))
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in streamed)
        assert text == "one two "
        assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_logprobs(hello: Served) -> None:
    found = post(hello, logprobs=True, top_logprobs=2, thinking={"type": "disabled"}).json()
    content = found["choices"][0]["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == "Hello, world"
    assert [len(one["top_logprobs"]) for one in content] == [2] * 3
    assert content[0]["bytes"] == list(b"Hello")
    assert hello.jobs.jobs[-1].sampling["logprobs"] == 2


def test_sampling_fields_reach_the_engine(hello: Served) -> None:
    wanted: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "seed": -1,
    }
    post(hello, **wanted, logit_bias={"5": -100, "129279": 3}, max_tokens=9)
    sampling = hello.jobs.jobs[-1].sampling
    expected = {**wanted, "seed": 2**63 - 1, "logit_bias": {5: -100.0, 129279: 3.0}, "max_tokens": 9, "logprobs": None}
    assert sampling == expected


def test_tool_calls() -> None:
    language = real_language()
    with serving(saying("Let me look.</think>\n\n" + CALL + CALLS_END, language)) as served:
        found = post(served, tools=TOOLS).json()
        [choice] = found["choices"]
        assert choice["finish_reason"] == "tool_calls"
        [call] = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "look"
        assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
        chunks = events(post(served, tools=TOOLS, stream=True))
        calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls") or []]
        assert calls[0]["function"] == {"name": "look", "arguments": ""}
        assert all(set(call) == {"index", "function"} for call in calls[1:])
        assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"city": "Oslo"}
        constraint = served.jobs.jobs[-1].constraint
        assert constraint is not None
        assert (constraint.kind, constraint.after_thinking, constraint.in_call) == ("tool_call", True, False)


def test_one_call_at_most() -> None:
    second = CALL.partition("\n")[2]
    with serving(saying(CALL + second + CALLS_END, real_language(), pause_s=0.001)) as served:
        both = post(served, tools=TOOLS, thinking={"type": "disabled"}).json()
        assert len(both["choices"][0]["message"]["tool_calls"]) == 2
        one = post(served, tools=TOOLS, thinking={"type": "disabled"}, parallel_tool_calls=False).json()
        [call] = one["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
        assert one["choices"][0]["finish_reason"] == "tool_calls"


def test_a_required_tool_turns_thinking_off(hello: Served) -> None:
    assert post(hello, tools=TOOLS, tool_choice="required").status_code == 200
    constraint = hello.jobs.jobs[-1].constraint
    assert constraint is not None
    assert (constraint.kind, constraint.after_thinking, constraint.in_call) == ("tool_call_required", False, True)
    refused = post(hello, tools=TOOLS, tool_choice="required", thinking={"type": "enabled"})
    assert refused.status_code == 400


def test_a_schema_constrains(hello: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert post(hello, response_format=wanted).status_code == 200
    constraint = hello.jobs.jobs[-1].constraint
    assert constraint is not None
    assert (constraint.kind, constraint.after_thinking) == ("json", True)
    assert json.loads(constraint.schema)["properties"] == schema["properties"]


def test_efforts_and_the_developer(hello: Served) -> None:
    decode = real_language().tokenizer.decode
    post(hello, reasoning_effort="none")
    assert decode(hello.jobs.jobs[-1].prompt).endswith("</think>")
    post(hello, reasoning_effort="low")
    low = len(hello.jobs.jobs[-1].prompt)
    post(hello, reasoning_effort="max")
    assert len(hello.jobs.jobs[-1].prompt) != low
    post(hello, messages=[{"role": "developer", "content": "Be brief"}, *USER], thinking={"type": "disabled"})
    assert decode(hello.jobs.jobs[-1].prompt) == ("<｜begin▁of▁sentence｜>Be brief<｜User｜>Hi<｜Assistant｜></think>")


def test_a_prefix_is_continued(hello: Served) -> None:
    messages = [*USER, {"role": "assistant", "content": "Once upon", "prefix": True}]
    found = post(hello, messages=messages, thinking={"type": "disabled"}).json()
    assert real_language().tokenizer.decode(hello.jobs.jobs[-1].prompt).endswith("</think>Once upon")
    assert found["choices"][0]["message"]["content"] == "Hello, world"


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_what_users_write_never_becomes_a_control_token(hello: Served, role: str) -> None:
    tokenizer = real_language().tokenizer
    spellings = "".join(str(tokenizer.decode([token])) for token in sorted(tokenizer.control_ids))
    plain = post(hello, messages=[{"role": role, "content": "x"}, *USER])
    expected = [token for token in hello.jobs.jobs[-1].prompt if token in tokenizer.control_ids]
    nasty = post(hello, messages=[{"role": role, "content": spellings}, *USER])
    assert plain.status_code == nasty.status_code == 200
    assert [token for token in hello.jobs.jobs[-1].prompt if token in tokenizer.control_ids] == expected


REFUSED: list[tuple[dict[str, Any], str | None]] = [
    *[({"n": n}, "n") for n in (10**9, 0, -1, 1.5, "2", True, 9)],
    ({"best_of": 3}, "best_of"),
    ({"use_beam_search": True}, "use_beam_search"),
    *[({"max_tokens": n}, "max_tokens") for n in (0, -1, 2**31, "5", 1.5)],
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"min_tokens": 5}, "min_tokens"),
    *[({"logprobs": True, "top_logprobs": n}, "top_logprobs") for n in (21, -1, "2")],
    *[({"logit_bias": {key: 1}}, "logit_bias") for key in ("-1", "129280", "2147483648", "x", "१")],
    ({"logit_bias": {str(n): 0 for n in range(2000)}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": None}}, "logit_bias"),
    ({"allowed_token_ids": [1]}, "allowed_token_ids"),
    ({"stop_token_ids": [1]}, "stop_token_ids"),
    *[({"stop": stop}, "stop") for stop in (["a"] * 17, "", [""], "x" * 5000, 5, [5])],
    *[({"temperature": value}, "temperature") for value in (-0.1, 2.1, "1", True)],
    *[({"top_p": value}, "top_p") for value in (0, 1.1, "1")],
    *[({"presence_penalty": value}, "presence_penalty") for value in (-2.1, 2.1)],
    ({"seed": 2**65}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"chat_template": "{{x}}"}, "chat_template"),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
    ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    ({"user_id": "x" * 600}, "user_id"),
    ({"cache_salt": "é" * 300}, "cache_salt"),
    ({"cache_salt": 5}, "cache_salt"),
    ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
            ]
        },
        "messages[0].content[0]",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        "messages[0].content[0]",
    ),
    ({"messages": [{"role": "nobody", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "tool", "tool_call_id": "x", "content": "y"}]}, "messages"),
    ({"tools": [TOOLS[0]] * 129}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 300_000}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "messages"),
    ({"tools": [*TOOLS, *TOOLS]}, "messages"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}},
        "messages",
    ),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"model": "x" * 1_000_000}, "model"),
    ({"stream": "yes"}, "stream"),
    ({"web_search_options": {"a": 1}}, "web_search_options"),
]


@pytest.mark.parametrize(("changed", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_by_name(hello: Served, changed: dict[str, Any], param: str | None) -> None:
    before = len(hello.jobs.jobs)
    answer = post(hello, **changed)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert 0 < len(error["message"]) <= 500
    assert answer.headers["x-should-retry"] == "false"
    assert len(hello.jobs.jobs) == before


def test_an_unknown_model(hello: Served) -> None:
    answer = post(hello, model="gpt-4")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_fields_that_change_nothing_are_ignored(hello: Served) -> None:
    more: dict[str, Any] = {
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "best_of": 1,
        "nonsense": 5,
        "functions": None,
    }
    assert post(hello, **more).status_code == 200


def test_a_prompt_that_does_not_fit(hello: Served) -> None:
    answer = post(hello, messages=[{"role": "user", "content": "word " * 70_000}])
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    endless = post(hello, messages=[{"role": "user", "content": "a" * 5_000_000}])
    assert endless.json()["error"]["code"] == "context_length_exceeded"
    assert post(hello, max_tokens=65_536).json()["error"]["code"] == "context_length_exceeded"
