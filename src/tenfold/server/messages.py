"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's protocol.

As there, thinking is off unless it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tenfold.server import fields
from tenfold.server.answers import speak
from tenfold.server.chat_completions import drop_tools, thinks
from tenfold.server.errors import Refusal
from tenfold.server.language import Asked, Choice, Language
from tenfold.server.sampling import job_of, new_id, sampling_of
from tenfold.server.service import Call
from tenfold.server.voices import MessagesVoice
from tenfold.server.wire import Constraint

__all__ = ["count_tokens", "messages"]

_RECIPE_FIELDS = ("messages", "system", "tools", "tool_choice", "stop_sequences", "max_tokens")


async def messages(call: Call) -> None:
    body = fields.check(await call.json(), fields.MESSAGES)
    service = call.service
    service.check_model(body["model"])
    ready = service.ready()
    asked = await call.apart(_ask, service.language, body, ready.context)
    sampling = sampling_of(body, ready, asked.max_tokens, None, asked.request.inference_options.top_p)
    answer_id, stream = new_id("msg_"), body.get("stream", False)
    one_call = bool(body.get("tool_choice", {}).get("disable_parallel_tool_use"))
    choice = Choice(asked, service.language, answer_id, service.name, one_call=one_call)
    voice = MessagesVoice(choice, answer_id, service.name, len(asked.prompt), call.request_id, stream=stream)
    job = job_of(call, body, asked.prompt, sampling, 0, _schema(body, asked) or asked.constraint)
    await speak(call, [job], voice, stream=stream)


async def count_tokens(call: Call) -> None:
    body = fields.check(await call.json(), fields.COUNT_TOKENS)
    service = call.service
    service.check_model(body["model"])
    ready = service.ready()
    asked = await call.apart(_ask, service.language, {**body, "max_tokens": 1}, ready.context)
    await call.answer({"input_tokens": len(asked.prompt)})


def _ask(language: Language, body: Mapping[str, Any], context: int) -> Asked:
    found = {name: body[name] for name in _RECIPE_FIELDS if name in body}
    last = body["messages"][-1]
    if isinstance(last, dict) and last.get("role") == "assistant":
        sentence = "the last message is the assistant's, expected the user's: an answer cannot be begun for the model"
        raise Refusal(400, sentence, param="messages")
    effort = body.get("output_config", {}).get("effort")
    choice = body.get("tool_choice", {}).get("type")
    forced = bool(body.get("tools")) and choice in ("any", "tool")
    asked = body.get("thinking", {}).get("type")
    thinking = thinks(language, asked, effort, forced, default=False)
    found["thinking"] = {"type": "enabled" if thinking else "disabled"}
    effort = language.effort(effort)
    if thinking and effort is not None:
        found["output_config"] = {"effort": effort}
    if not language.thinks:
        drop_tools(found, forced)
    return language.ask("messages", found, context)


def _schema(body: Mapping[str, Any], asked: Asked) -> Constraint | None:
    """Structured outputs, under their first name and their newer one."""
    wanted = body.get("output_config", {}).get("format") or body.get("output_format")
    if not wanted:
        return None
    if (
        not isinstance(wanted, dict)
        or wanted.get("type") != "json_schema"
        or not isinstance(wanted.get("schema"), dict)
    ):
        raise Refusal(400, "the format must be a json_schema with its schema", param="output_config")
    return Constraint("json", json.dumps(wanted["schema"]), after_thinking=asked.thinking)
