"""`POST /v1/responses`: OpenAI's newer protocol. Nothing is kept between requests, as with DeepSeek's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenfold.server import fields
from tenfold.server.answers import speak
from tenfold.server.chat_completions import drop_tools, thinks
from tenfold.server.errors import Refusal
from tenfold.server.language import Asked, Choice, Language
from tenfold.server.sampling import job_of, new_id, sampling_of
from tenfold.server.service import Call
from tenfold.server.voices import ResponsesVoice

__all__ = ["not_kept", "responses"]

_RECIPE_FIELDS = (
    "input",
    "instructions",
    "max_output_tokens",
    "temperature",
    "top_p",
    "tools",
    "tool_choice",
    "text",
    "reasoning",
    "user",
    "metadata",
)


async def responses(call: Call) -> None:
    body = fields.check(await call.json(), fields.RESPONSES)
    service = call.service
    service.check_model(body["model"])
    ready = service.ready()
    asked = await call.apart(_ask, service.language, body, ready.context)
    sampling = sampling_of(body, ready, asked.max_tokens, None, asked.request.inference_options.top_p)
    answer_id, stream = new_id("resp_"), body.get("stream", False)
    one_call = body.get("parallel_tool_calls") is False
    choice = Choice(asked, service.language, answer_id, service.name, one_call=one_call)
    voice = ResponsesVoice(choice, answer_id, service.name, len(asked.prompt), stream=stream)
    job = job_of(call, body, asked.prompt, sampling, 0, asked.constraint)
    await speak(call, [job], voice, stream=stream)


async def not_kept(call: Call) -> None:
    raise Refusal(404, "responses are not kept", code="response_not_found")


def _ask(language: Language, body: Mapping[str, Any], context: int) -> Asked:
    found = {name: body[name] for name in _RECIPE_FIELDS if name in body}
    reasoning = dict(body.get("reasoning", {}))
    effort = reasoning.get("effort")
    choice = body.get("tool_choice")
    forced = bool(body.get("tools")) and (
        choice == "required" or (isinstance(choice, dict) and choice.get("type") in ("function", "custom"))
    )
    if thinks(language, None, effort, forced, default=True):
        word = language.effort(effort)
        if word is not None:
            reasoning["effort"] = word
    else:
        reasoning["effort"] = "none"
    found["reasoning"] = reasoning
    if not language.thinks:
        drop_tools(found, forced)
    return language.ask("responses", found, context)
