"""`POST /v1/chat/completions`: OpenAI's protocol with DeepSeek's thinking, prefixes and cache figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenfold.server import fields
from tenfold.server.answers import speak
from tenfold.server.errors import Refusal
from tenfold.server.language import Asked, Choice, Language
from tenfold.server.sampling import job_of, new_id, sampling_of
from tenfold.server.service import Call
from tenfold.server.voices import ChatVoice

__all__ = ["chat_completions", "recipe_body", "thinks"]

_RECIPE_FIELDS = ("messages", "tools", "tool_choice", "response_format", "stop", "logprobs", "top_logprobs")
_TEMPLATE_FIELDS = ("thinking", "enable_thinking", "reasoning_effort")


async def chat_completions(call: Call) -> None:
    body = fields.check(await call.json(), fields.CHAT)
    service = call.service
    service.check_model(body["model"])
    ready = service.ready()
    asked = await call.apart(_ask, service.language, body, ready.context)
    logprobs = body.get("top_logprobs", 0) if body.get("logprobs") else None
    sampling = sampling_of(body, ready, asked.max_tokens, logprobs, asked.request.inference_options.top_p)
    answer_id, count = new_id("chatcmpl-"), body.get("n", 1)
    choices = [
        Choice(
            asked,
            service.language,
            answer_id,
            service.name,
            logprobs=logprobs is not None,
            one_call=body.get("parallel_tool_calls") is False,
        )
        for _ in range(count)
    ]
    stream = body.get("stream", False)
    voice = ChatVoice(
        choices,
        answer_id,
        service.name,
        len(asked.prompt),
        stream=stream,
        include_usage=bool(body.get("stream_options", {}).get("include_usage")),
    )
    jobs = [job_of(call, body, asked.prompt, sampling, index, asked.constraint) for index in range(count)]
    await speak(call, jobs, voice, stream=stream)


def _ask(language: Language, body: Mapping[str, Any], context: int) -> Asked:
    return language.ask("chat", recipe_body(language, body), context)


def recipe_body(language: Language, body: Mapping[str, Any]) -> dict[str, Any]:
    """What deepseek-recipe is to read: its fields, in its words."""
    found = {name: body[name] for name in _RECIPE_FIELDS if name in body}
    found["messages"] = [_message(message, i) for i, message in enumerate(body["messages"])]
    max_tokens = body.get("max_completion_tokens", body.get("max_tokens"))
    if {"max_completion_tokens", "max_tokens"} <= body.keys() and body["max_tokens"] != max_tokens:
        raise Refusal(400, "it differs from max_completion_tokens; send one of them", param="max_tokens")
    if max_tokens is not None:
        found["max_tokens"] = max_tokens
    template = body.get("chat_template_kwargs", {})
    for name in template:
        if name not in _TEMPLATE_FIELDS:
            raise Refusal(400, f"{name[:40]!r} is none of {', '.join(_TEMPLATE_FIELDS)}", param="chat_template_kwargs")
    effort = body.get("reasoning_effort", template.get("reasoning_effort"))
    switch = template.get("thinking", template.get("enable_thinking"))
    asked = body.get("thinking", {}).get("type")
    if asked is None and isinstance(switch, bool):
        asked = "enabled" if switch else "disabled"
    thinking = thinks(language, asked, effort, _forces_a_tool(body), default=True)
    found["thinking"] = {"type": "enabled" if thinking else "disabled"}
    effort = language.effort(effort)
    if thinking and effort is not None:
        found["reasoning_effort"] = effort
    if not language.thinks:
        drop_tools(found, _forces_a_tool(body))
    return found


def thinks(language: Language, asked: str | None, effort: str | None, forced: bool, *, default: bool) -> bool:
    """Whether to reason first; not by default where a tool must be called, which leaves no room for it."""
    if not language.thinks:
        if asked == "enabled":
            raise Refusal(400, "this is a base model, which does not think; turn it off", param="thinking")
        return False
    if asked is not None:
        return asked != "disabled"
    if effort is not None:
        return effort != "none"
    return default and not forced


def drop_tools(found: dict[str, Any], forced: bool) -> None:
    """A base model never calls a tool; that is an answer to auto, not to required."""
    if forced:
        raise Refusal(400, "this is a base model, which calls no tools; use auto", param="tool_choice")
    found.pop("tools", None)
    found.pop("tool_choice", None)


def _forces_a_tool(body: Mapping[str, Any]) -> bool:
    choice = body.get("tool_choice")
    return bool(body.get("tools")) and (isinstance(choice, dict) or choice == "required")


def _message(message: object, index: int) -> object:
    """OpenAI's newer name of the system's role is its older one here."""
    if not isinstance(message, dict):
        raise Refusal(400, "it is no object", param=f"messages[{index}]")
    if message.get("role") == "developer":
        return {**message, "role": "system"}
    return message
