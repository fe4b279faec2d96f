"""Clients that we did not write, unmodified, against scripted models with V4's grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pydantic
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_deepseek import ChatDeepSeek
from langchain_openai import ChatOpenAI
from tests.server.fakes import MODEL, Served, real_language, saying, serving
from tests.server.test_chat_completions import CALL, CALLS_END, TOOLS

QUESTION: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.fixture(scope="module")
def weather() -> Iterator[Served]:
    """A model that asks for the weather, then tells it; asked for JSON, it answers in JSON."""
    language = real_language()

    def script(job):
        prompt = language.tokenizer.decode(job.prompt)
        thinks = prompt.endswith("<think>")
        if job.constraint is not None and job.constraint.kind == "json":
            text = '{"city": "Oslo", "degrees": 7}'
        elif "rain, 7 degrees" in prompt or (job.constraint is None and "tool_calls" not in prompt):
            text = "It rains in Oslo."
        elif job.constraint is not None and job.constraint.in_call:
            text = CALL.partition("\n")[2] + CALLS_END
        else:
            text = "\n\n" + CALL + CALLS_END
        return saying("I had better look.</think>" * thinks + text, language, cached=4)(job)

    with serving(script, language=language) as served:
        yield served


@pytest.fixture
def gpt(weather: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=weather.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(weather: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=weather.url, api_key="none", max_retries=0)


class Weather(pydantic.BaseModel):
    """The weather in a city."""

    city: str
    degrees: int


def test_openai_chats(gpt: openai.OpenAI) -> None:
    answer = gpt.chat.completions.create(model=MODEL, messages=QUESTION)
    assert answer.choices[0].message.content == "It rains in Oslo."
    assert answer.choices[0].message.model_extra == {"reasoning_content": "I had better look."}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert gpt.models.list().data[0].id == MODEL
    assert gpt.models.retrieve(MODEL).id == MODEL


def test_openai_streams(gpt: openai.OpenAI) -> None:
    stream = gpt.chat.completions.create(
        model=MODEL, messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "It rains in Oslo."
    assert chunks[-1].usage is not None
    with gpt.chat.completions.stream(model=MODEL, messages=QUESTION) as helper:
        final = helper.get_final_completion()
    assert final.choices[0].message.content == "It rains in Oslo."


@pytest.mark.parametrize("stream", [False, True])
def test_openai_calls_tools(gpt: openai.OpenAI, stream: bool) -> None:
    messages = list(QUESTION)
    tools: Any = TOOLS
    for _ in range(3):
        if stream:
            with gpt.chat.completions.stream(model=MODEL, messages=messages, tools=tools) as helper:
                answer: Any = helper.get_final_completion()
        else:
            answer = gpt.chat.completions.create(model=MODEL, messages=messages, tools=tools)
        message = answer.choices[0].message
        if not message.tool_calls:
            break
        assert answer.choices[0].finish_reason == "tool_calls"
        messages.append(message)
        for call in message.tool_calls:
            assert json.loads(call.function.arguments) == {"city": "Oslo"}
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "rain, 7 degrees"})
    assert message.content == "It rains in Oslo."
    assert len(messages) == 3


def test_openai_structures_output(gpt: openai.OpenAI) -> None:
    parsed = gpt.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=Weather)
    assert parsed.choices[0].message.parsed == Weather(city="Oslo", degrees=7)
    response = gpt.responses.parse(model=MODEL, input="json please", text_format=Weather)
    assert response.output_parsed == Weather(city="Oslo", degrees=7)


def test_openai_completes(gpt: openai.OpenAI) -> None:
    assert gpt.completions.create(model=MODEL, prompt="Once", max_tokens=20).choices[0].text == "It rains in Oslo."
    stream = gpt.completions.create(model=MODEL, prompt="Once", max_tokens=20, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "It rains in Oslo."


def test_openai_responds(gpt: openai.OpenAI) -> None:
    answer = gpt.responses.create(model=MODEL, input="What is the weather?")
    assert answer.output_text == "It rains in Oslo."
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens == 4
    kinds = [event.type for event in gpt.responses.create(model=MODEL, input="What?", stream=True)]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    items: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
    tools: Any = [{"type": "function", "name": "look", "parameters": PARAMETERS, "strict": False}]
    first = gpt.responses.create(model=MODEL, input=items, tools=tools)
    call = first.output[-1]
    assert call.type == "function_call"
    items += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "rain, 7 degrees"}]
    assert gpt.responses.create(model=MODEL, input=items, tools=tools).output_text == "It rains in Oslo."


def test_openai_hears_of_mistakes(gpt: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        gpt.chat.completions.create(model=MODEL, messages=QUESTION, n=99)
    assert caught.value.param == "n"
    with pytest.raises(openai.NotFoundError) as missing:
        gpt.chat.completions.create(model="gpt-9", messages=QUESTION)
    assert missing.value.code == "model_not_found"


def test_anthropic_converses(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model=MODEL, max_tokens=50, messages=QUESTION)
    assert answer.content[0].type == "text"
    assert answer.content[0].text == "It rains in Oslo."
    assert answer.usage.cache_read_input_tokens == 4
    assert claude.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens > 4
    with claude.messages.stream(model=MODEL, max_tokens=50, messages=QUESTION) as stream:
        assert "".join(stream.text_stream) == "It rains in Oslo."


def test_anthropic_thinks(claude: anthropic.Anthropic) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    with claude.messages.stream(model=MODEL, max_tokens=2000, messages=QUESTION, thinking=thinking) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]
    again: Any = [*QUESTION, {"role": "assistant", "content": final.content}, {"role": "user", "content": "Sure?"}]
    claude.messages.create(model=MODEL, max_tokens=2000, messages=again, thinking=thinking)


@pytest.mark.parametrize("thinking", [False, True])
def test_anthropic_uses_tools(claude: anthropic.Anthropic, thinking: bool) -> None:
    tools: Any = [{"name": "look", "description": "the weather", "input_schema": PARAMETERS}]
    more: Any = {"thinking": {"type": "enabled", "budget_tokens": 1024}} if thinking else {}
    messages: Any = list(QUESTION)
    first = claude.messages.create(model=MODEL, max_tokens=2000, messages=messages, tools=tools, **more)
    assert first.stop_reason == "tool_use"
    call = first.content[-1]
    assert call.type == "tool_use"
    assert call.input == {"city": "Oslo"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain, 7 degrees"}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    last = claude.messages.create(model=MODEL, max_tokens=2000, messages=messages, tools=tools, **more)
    assert last.stop_reason == "end_turn"


def test_anthropic_hears_of_mistakes(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        claude.messages.create(model=MODEL, max_tokens=5, messages=QUESTION, extra_body={"temperature": 9})
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="claude", max_tokens=5, messages=QUESTION)


def chains(served: Served) -> list[Any]:
    url = served.url + "/v1"
    return [
        ChatOpenAI(model=MODEL, base_url=url, api_key=pydantic.SecretStr("none"), max_retries=0),
        ChatDeepSeek(model=MODEL, base_url=url, api_key=pydantic.SecretStr("none"), max_retries=0),
    ]


@pytest.mark.parametrize("which", [0, 1], ids=["openai", "deepseek"])
def test_langchain(weather: Served, which: int) -> None:
    model = chains(weather)[which]
    answer = model.invoke("What is the weather in Oslo?")
    assert answer.content == "It rains in Oslo."
    assert answer.usage_metadata["input_token_details"]["cache_read"] == 4
    if which:
        assert answer.additional_kwargs["reasoning_content"] == "I had better look."
    assert "".join(chunk.content for chunk in model.stream("What?")) == "It rains in Oslo."


@pytest.mark.parametrize("which", [0, 1], ids=["openai", "deepseek"])
def test_langchain_calls_tools(weather: Served, which: int) -> None:
    model = chains(weather)[which].bind_tools(
        [{"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}]
    )
    messages: list[Any] = [HumanMessage("What is the weather in Oslo?")]
    first = model.invoke(messages)
    [call] = first.tool_calls
    assert (call["name"], call["args"]) == ("look", {"city": "Oslo"})
    messages += [first, ToolMessage("rain, 7 degrees", tool_call_id=call["id"])]
    assert model.invoke(messages).content == "It rains in Oslo."


@pytest.mark.parametrize("which", [0, 1], ids=["openai", "deepseek"])
def test_langchain_structures_output(weather: Served, which: int) -> None:
    model = chains(weather)[which].with_structured_output(Weather, method="json_schema" if not which else "json_mode")
    assert model.invoke("Give me json for the weather") == Weather(city="Oslo", degrees=7)
