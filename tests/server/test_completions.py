"""Plain completions: text, ids, lists, holes, echoes."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from tests.server.fakes import MODEL, Served, plain_language, real_language, saying, serving


def post(served: Served, **changed: Any) -> httpx.Response:
    return served.http.post("/v1/completions", json={"model": MODEL, "prompt": "Once", "max_tokens": 9, **changed})


def test_a_text_goes_on(hello: Served) -> None:
    found = post(hello).json()
    assert found["object"] == "text_completion"
    assert found["choices"] == [{"index": 0, "text": "Hello, world", "logprobs": None, "finish_reason": "stop"}]
    assert found["usage"]["prompt_cache_hit_tokens"] == 2
    assert hello.jobs.jobs[-1].prompt == (0, *real_language().tokenizer.encode("Once"))


def test_control_tokens_in_a_prompt_are_letters(hello: Served) -> None:
    post(hello, prompt="<｜User｜>")
    control = real_language().tokenizer.control_ids
    assert [token for token in hello.jobs.jobs[-1].prompt if token in control] == [0]


def test_ids_are_taken_as_they_are(hello: Served) -> None:
    post(hello, prompt=[0, 128803, 129279])
    assert hello.jobs.jobs[-1].prompt == (0, 128803, 129279)


def test_several_prompts_and_answers(hello: Served) -> None:
    found = post(hello, prompt=["a", "b"], n=2).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    prompts = [job.prompt for job in hello.jobs.jobs[-4:]]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    assert found["usage"]["prompt_tokens"] == 4
    assert len(post(hello, prompt=[[1, 2], [3]]).json()["choices"]) == 2


def test_an_echo(hello: Served) -> None:
    assert post(hello, echo=True).json()["choices"][0]["text"] == "OnceHello, world"


def test_a_hole_is_filled(hello: Served) -> None:
    post(hello, prompt="before", suffix="after<｜fim▁end｜>")
    decoded = real_language().tokenizer.decode(hello.jobs.jobs[-1].prompt)
    begin = "<｜begin▁of▁sentence｜><｜fim▁begin｜>before<｜fim▁hole｜>after<｜fim▁end｜><｜fim▁end｜>"
    assert decoded == begin
    ends = [token for token in hello.jobs.jobs[-1].prompt if token == 128802]
    assert len(ends) == 1


def test_a_model_without_holes_says_so() -> None:
    with serving(saying("x", plain_language()), language=plain_language()) as served:
        answer = post(served, suffix="after")
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "suffix"
        assert post(served).json()["choices"][0]["text"] == "x"


def test_logprobs_and_stops(hello: Served) -> None:
    [choice] = post(hello, logprobs=1, stop=" wor").json()["choices"]
    assert choice["text"] == "Hello,"
    assert choice["finish_reason"] == "stop"
    found = choice["logprobs"]
    assert found["tokens"][:2] == ["Hello", ","]
    assert found["text_offset"][:2] == [0, 5]
    assert found["top_logprobs"][0] == {"Hello": -0.5}


def test_a_stream(hello: Served) -> None:
    answer = post(hello, stream=True, stream_options={"include_usage": True}, echo=True)
    lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "OnceHello, world"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [129_280]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a"] * 33}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a"] * 20, "n": 8}, "n"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "suffix": "x"}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 65_536}, "max_tokens"),
        ({"prompt": [5] * 70_000}, "prompt"),
        ({"best_of": 2}, "best_of"),
    ],
    ids=str,
)
def test_refused_by_name(hello: Served, changed: dict[str, Any], param: str) -> None:
    answer = post(hello, **changed)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
