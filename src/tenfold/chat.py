"""Chat: messages -> prompt, completion -> reasoning, content and tool calls, in its checkpoint's grammar.

V4's grammar is DeepSeek's own, from deepseek-recipe; V3.2's is in `chat_v32`; a base model gets plain text.
What users wrote never becomes a control token: a prompt says which of its characters are grammar, and to the
tokenizer the rest is letters. Messages and tools have OpenAI's form. Knows nothing of models and HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, Unpack

import deepseek_recipe

from tenfold import chat_v32
from tenfold.chat_v32 import Event
from tenfold.errors import ConfigError, InputError, TenfoldError, UsageError, disk_errors
from tenfold.tokenizer import Prompt, Tokenizer

__all__ = [
    "Event",
    "Options",
    "Parser",
    "Profile",
    "compose",
    "message_of",
    "profile_for",
    "prompt_of",
    "render",
    "render_ids",
]


class Profile(StrEnum):
    """Which grammar a checkpoint was trained for. The two of V4 differ in the reasoning efforts."""

    PREVIEW = "preview"  # V4-Flash and V4-Pro of April 2026
    OFFICIAL = "official"  # V4 checkpoints of July 2026 (0731) and later
    V32 = "v3.2"
    PLAIN = "plain"  # a base model: no roles, no thinking, no tools


Continues = Literal["reasoning", "content"]

_LAST_GRAMMAR_ID = 128_828  # a vocabulary that ends before it cannot hold the grammar's control tokens
_V4_ENCODER = Path("encoding", "encoding_dsv4.py")
_V4_ENCODER_CHARS = 1_000_000
_EFFORTS: dict[Profile, dict[str | None, str]] = {  # the checkpoint's word -> deepseek-recipe's
    Profile.PREVIEW: {None: "low", "high": "low", "max": "high"},
    Profile.OFFICIAL: {None: "high", "low": "low", "high": "high", "max": "max"},
}
_V4_GRAMMAR = {*chat_v32.CONTROL_TOKENS, "<｜latest_reminder｜>"}
_V4_ROLES = ("system", "user", "assistant", "tool", "latest_reminder")
_ROLES = {
    Profile.PREVIEW: _V4_ROLES,
    Profile.OFFICIAL: _V4_ROLES,
    Profile.V32: ("system", "developer", "user", "assistant", "tool"),
    Profile.PLAIN: ("system", "user", "assistant"),
}
_FIELDS = {
    "system": ("content",),
    "developer": ("content",),
    "user": ("content",),
    "latest_reminder": ("content",),
    "assistant": ("content", "reasoning_content", "tool_calls", "prefix"),
    "tool": ("content", "tool_call_id"),
}


class Options(TypedDict, total=False):
    """The keyword arguments of `compose`, which explains them."""

    thinking: bool | None
    effort: str | None
    tools: Sequence[Mapping[str, Any]] | None
    response_format: Mapping[str, Any] | None


class HasRaw(Protocol):
    """A parsed config that keeps the json it came from."""

    @property
    def raw(self) -> Mapping[str, Any]: ...


def profile_for(
    config: Mapping[str, Any] | HasRaw, *, folder: str | Path | None = None, override: str | None = None
) -> Profile:
    """The profile of a checkpoint; `override` names one and wins.

    V4: if the checkpoint's folder has its encoder, that decides, by knowing official efforts or not (it is
    searched, never run). Else `dspark_*` keys mean official. The preview weights with a DSpark head have such
    keys too: without the encoder they need the override.
    """
    if override is not None:
        return _named(override)
    fields = config if isinstance(config, Mapping) else config.raw
    model_type = fields.get("model_type")
    if model_type not in ("deepseek_v4", "deepseek_v32"):
        raise ConfigError(
            f"no chat grammar is known for model_type {model_type!r}, expected deepseek_v4 or deepseek_v32; "
            f"choose a profile yourself: {', '.join(Profile)}"
        )
    if fields.get("vocab_size", 0) <= _LAST_GRAMMAR_ID:
        return Profile.PLAIN
    if model_type == "deepseek_v32":
        return Profile.V32
    return Profile.OFFICIAL if _knows_official_efforts(fields, folder) else Profile.PREVIEW


def _named(name: str) -> Profile:
    if name not in tuple(Profile):
        raise UsageError(f"chat profile is {name!r}, expected one of {', '.join(Profile)}")
    return Profile(name)


def _knows_official_efforts(fields: Mapping[str, Any], folder: str | Path | None) -> bool:
    if folder is not None:
        encoder = Path(folder) / _V4_ENCODER
        with disk_errors(encoder):
            if encoder.is_file():
                with encoder.open(encoding="utf-8", errors="replace") as file:
                    return "REASONING_EFFORT_PROMPTS" in file.read(_V4_ENCODER_CHARS)
    return any(key.startswith("dspark_") for key in fields)


def compose(
    messages: Sequence[Mapping[str, Any]],
    profile: Profile,
    *,
    thinking: bool | None = None,
    effort: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Mapping[str, Any] | None = None,
) -> Prompt:
    """The prompt that asks for the next assistant message, with its control tokens marked.

    `thinking` None is the profile's default: on, but off for plain. `effort` is high or max for preview, low,
    high or max for official; None is high. `response_format` is a JSON schema. A last assistant message whose
    `prefix` is true is continued (V4). Plain joins the contents by blank lines.
    """
    thinks = _thinks(profile, thinking, effort)
    checked = _checked(messages, profile)
    if profile is Profile.PLAIN:
        _refuse(profile, tools=tools, response_format=response_format)
        return Prompt("\n\n".join(chat_v32.text_of(message.get("content")) for message in checked))
    with _mapped():
        if profile is Profile.V32:
            return chat_v32.compose(checked, thinking=thinks, tools=tools or (), response_format=response_format)
        return _compose_v4(checked, _EFFORTS[profile][effort] if thinks else None, tools, response_format)


def render(messages: Sequence[Mapping[str, Any]], profile: Profile, **options: Unpack[Options]) -> str:
    """The text of `compose`, to look at; encoding it would trust whatever users wrote, see `render_ids`."""
    return compose(messages, profile, **options).text


def render_ids(
    messages: Sequence[Mapping[str, Any]],
    profile: Profile,
    tokenizer: Tokenizer,
    **options: Unpack[Options],
) -> list[int]:
    """The ids of `compose`; only grammar becomes control tokens. Plain text begins with BOS if known."""
    ids = tokenizer.encode_prompt(compose(messages, profile, **options))
    bos = tokenizer.token_to_id(chat_v32.BOS) if profile is Profile.PLAIN else None
    return ids if bos is None else [bos, *ids]


def _compose_v4(
    messages: list[dict[str, Any]],
    effort: str | None,
    tools: Sequence[Mapping[str, Any]] | None,
    response_format: Mapping[str, Any] | None,
) -> Prompt:
    """Through deepseek-recipe's Chat Completions request, which checks a lot. No effort means no thinking."""
    body: dict[str, Any] = {"model": "DeepSeek-V4-Pro", "messages": messages}
    body |= {"thinking": {"type": "enabled" if effort else "disabled"}, "reasoning_effort": effort}
    if tools:
        body["tools"] = list(tools)
    if response_format is not None:
        schema = {"name": "response", "schema": response_format}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    request = deepseek_recipe.ChatCompletionRequest(body)
    conversation = request.convert(deepseek_recipe.ConversionOptions()).conversation
    return prompt_of(conversation)


def prompt_of(conversation: deepseek_recipe.Conversation) -> Prompt:
    """V4's prompt of a conversation that deepseek-recipe has converted."""
    rendered = deepseek_recipe.DeepseekV4Encoding().render_conversation(conversation)
    return Prompt(rendered.prompt, tuple(_grammar_only(rendered)))


def _grammar_only(rendered: deepseek_recipe.RenderedPrompt) -> Iterator[tuple[int, int]]:
    """The control tokens of the grammar; the library also marks grounding tokens that assistant contents spell."""
    for start, end in rendered.special_ranges:
        if rendered.prompt[start:end] in _V4_GRAMMAR:
            yield start, end


@contextmanager
def _mapped() -> Iterator[None]:
    """Foreign errors of the block become InputError; a Rust panic is no Exception, so the net is wide."""
    try:
        yield
    except (TenfoldError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as exc:
        sentence = f"the conversation cannot be rendered: {exc or type(exc).__name__}"
        raise InputError(f"{sentence}; correct its messages or tools") from exc


def _thinks(profile: Profile, thinking: bool | None, effort: str | None) -> bool:
    thinks = profile is not Profile.PLAIN if thinking is None else thinking
    if thinks and profile is Profile.PLAIN:
        raise InputError("thinking is on, but a plain model has no thinking; turn it off")
    efforts = [known for known in _EFFORTS.get(profile, {}) if known is not None]
    if effort is not None and effort not in efforts:
        raise InputError(f"effort is {effort!r}, profile {profile} has {' '.join(efforts) or 'none'}; leave it out")
    if effort is not None and not thinks:
        raise InputError(f"effort is {effort!r}, but thinking is off; leave one of them out")
    return thinks


def _refuse(profile: Profile, **given: object) -> None:
    for name, value in given.items():
        if value:
            raise InputError(f"{name} is given, but profile {profile} has none; leave it out")


def _checked(messages: Sequence[Mapping[str, Any]], profile: Profile) -> list[dict[str, Any]]:
    """The messages with fields of value null left out; an unknown field or role is refused, never ignored."""
    if not messages:
        raise InputError("messages is empty, expected at least one message; add one from the user")
    checked = [_checked_message(message, f"messages[{i}]", profile) for i, message in enumerate(messages)]
    for i, message in enumerate(checked):
        if message.get("prefix") and (i + 1 < len(checked) or profile not in _EFFORTS):
            raise InputError(f"messages[{i}].prefix is true, expected on the last message of a V4 prompt; remove it")
    return checked


def _checked_message(message: Mapping[str, Any], where: str, profile: Profile) -> dict[str, Any]:
    role = message.get("role")
    if role not in _ROLES[profile]:
        raise InputError(
            f"{where}.role is {role!r}, profile {profile} has {' '.join(_ROLES[profile])}; use one of them"
        )
    given = {name: value for name, value in message.items() if value is not None}
    fields = ("content",) if profile is Profile.PLAIN else _FIELDS[role]
    for name in given.keys() - {"role", *fields}:
        raise InputError(f"{where}.{name} is not a field of a {profile} message with role {role}; remove it")
    _check_content(given.get("content"), f"{where}.content", optional=role == "assistant")
    if not isinstance(given.get("reasoning_content", ""), str):
        raise InputError(f"{where}.reasoning_content is {given['reasoning_content']!r}, expected a string")
    return given


def _check_content(content: object, where: str, *, optional: bool) -> None:
    parts = content if isinstance(content, list) else []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"{where}[{i}] is of type {kind!r}, expected text; remove it, only text is read")
    if not isinstance(content, str | list) and not (optional and content is None):
        raise InputError(f"{where} is {content!r}, expected a string or a list of text parts")


class Parser:
    """A completion in pieces -> events. Accepts whatever a model writes; what opens a call is never shown.

    `thinking` as in `compose`; with `tools` off, calls are content. `continues` says where a `prefix` message
    left off. The end-of-sequence token is not text: whoever samples stops there.
    """

    def __init__(
        self,
        profile: Profile,
        thinking: bool | None = None,
        *,
        tools: bool = True,
        continues: Continues | None = None,
    ) -> None:
        thinks = _thinks(profile, thinking, None)
        self._inner: _Inner
        if profile is Profile.PLAIN:
            self._inner = _PlainParser()
        elif profile is Profile.V32:
            self._inner = chat_v32.Parser(thinking=thinks and continues != "content", tools=tools)
        else:
            self._inner = _RecipeParser(thinks, tools, continues)

    def push(self, text: str) -> list[Event]:
        """What this piece completes; text that may begin a marker is held back."""
        return self._inner.push(text)

    def finish(self) -> list[Event]:
        """What was held back; call once, at the end."""
        return self._inner.finish()


class _Inner(Protocol):
    def push(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


class _PlainParser:
    def push(self, text: str) -> list[Event]:
        return [Event("content", text)] if text else []

    def finish(self) -> list[Event]:
        return []


class _RecipeParser:
    """deepseek-recipe's stream parser, whose chunks of the Chat Completions protocol become events."""

    def __init__(self, thinks: bool, tools: bool, continues: Continues | None) -> None:
        stages = deepseek_recipe.ThinkingInitialStage
        stage = {
            None: stages.ReasoningStart,
            "reasoning": stages.ReasoningContinuation,
            "content": stages.ContentContinuation,
        }[continues]
        options = deepseek_recipe.ParsingOptions(
            parse_tool_calls=tools, thinking_initial_stage=stage if thinks else None
        )
        conversation = deepseek_recipe.Conversation(thinking_mode=thinks)
        request = deepseek_recipe.ConversationRequest(conversation, deepseek_recipe.ModelVersion.DeepseekV4Pro)
        generator = deepseek_recipe.ChatCompletionRequest.chunk_generator(request, "", "")
        self._stream = deepseek_recipe.StreamProcessor(generator, options)
        self._stream.push(deepseek_recipe.InferenceChunk.ready())

    def push(self, text: str) -> list[Event]:
        return _events(self._stream.push(deepseek_recipe.InferenceChunk.text(text)))

    def finish(self) -> list[Event]:
        return _events(self._stream.finish())


def _events(chunks: Iterable[Any]) -> list[Event]:
    choices = [choice for chunk in chunks for choice in json.loads(chunk.to_json())["choices"]]
    return [event for choice in choices for event in _events_of_delta(choice["delta"])]


def _events_of_delta(delta: Mapping[str, Any]) -> Iterator[Event]:
    if delta.get("reasoning_content"):
        yield Event("reasoning", delta["reasoning_content"])
    if delta.get("content"):
        yield Event("content", delta["content"])
    for call in delta.get("tool_calls") or ():
        function = call["function"]
        yield Event("tool_call", function["arguments"], call["index"], call.get("id", ""), function.get("name", ""))


def message_of(events: Iterable[Event]) -> dict[str, Any]:
    """All events of a completion as the assistant message to put behind the conversation."""
    texts = {"reasoning": "", "content": ""}
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.kind == "tool_call":
            function = {"name": event.name, "arguments": ""}
            call = calls.setdefault(event.index, {"id": event.id, "type": "function", "function": function})
            call["function"]["arguments"] += event.text
        else:
            texts[event.kind] += event.text
    message: dict[str, Any] = {"role": "assistant", "content": texts["content"]}
    if texts["reasoning"]:
        message["reasoning_content"] = texts["reasoning"]
    if calls:
        message["tool_calls"] = list(calls.values())
    return message
