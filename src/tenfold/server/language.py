"""The text side of a served model: requests of three protocols -> prompt ids, sampled ids -> pieces of an answer.

deepseek-recipe converts the requests and parses what the model writes; V4's grammar is its own, V3.2's comes from
`chat_v32`, a base model reads and writes plain text. Knows no HTTP and no engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import deepseek_recipe as recipe

from tenfold import chat
from tenfold.chat import Profile
from tenfold.server.errors import Refusal, mapped
from tenfold.server.wire import Constraint, Token
from tenfold.stops import StopStrings
from tenfold.tokenizer import Detokenizer, Prompt, Tokenizer

__all__ = ["Asked", "Choice", "Language"]

Protocol = Literal["chat", "messages", "responses"]

_REQUESTS: dict[Protocol, Any] = {
    "chat": recipe.ChatCompletionRequest,
    "messages": recipe.MessagesRequest,
    "responses": recipe.ResponsesRequest,
}
_NAME = "DeepSeek-V4-Pro"  # deepseek-recipe's word for V4's grammar
_BOS = "<｜begin▁of▁sentence｜>"
_END_THINK = "</think>"
_CALL_END = "</｜DSML｜invoke>"
_CALLS_END = "\n</｜DSML｜tool_calls>"
_V32_CALLS, _V4_CALLS = "｜DSML｜function_calls>", "｜DSML｜tool_calls>"
_MOST_BYTES_PER_TOKEN = 16  # text beyond this many bytes per token of context is refused before it is tokenised
_PREVIEW_EFFORTS = {"xhigh": "high", "max": "high", "ultra": "high"}  # in deepseek-recipe's words; all others: low
_KINDS = (
    *(
        "bos",
        "eos",
        "thinking_start",
        "thinking_end",
        "system",
        "user",
        "assistant",
        "latest_reminder",
        "dsml",
        "image",
    ),
    *("ref", "ref_end", "box", "box_end", "point", "point_end", "polygon", "polygon_end"),
)
_UNSPELLABLE = {kind: f"\ue000{kind}\ue001" for kind in _KINDS}  # so that a base model's text is never read as grammar
_NOT_TEXT = ("image", "image_url", "input_image", "input_audio", "audio", "video", "file", "input_file", "document")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request in the model's terms."""

    protocol: Protocol
    request: Any
    """deepseek-recipe's ConversationRequest."""
    prompt: tuple[int, ...]
    thinking: bool
    constraint: Constraint | None
    max_tokens: int
    echo: Any = None
    """What a Responses answer repeats of its request."""
    namespaces: Mapping[str, tuple[str, str]] | None = None

    def generator(self, answer_id: str, model: str) -> Any:
        """The maker of this protocol's chunks."""
        made = _REQUESTS[self.protocol].chunk_generator(self.request, answer_id, model)
        if self.echo is not None:
            made = made.with_namespace_tool_map(dict(self.namespaces or {})).with_echo(self.echo)
        return made


@dataclass(frozen=True, slots=True)
class Language:
    """A tokenizer and the grammar it is used with."""

    tokenizer: Tokenizer
    profile: Profile
    recipe_tokenizer: Any
    """The same vocabulary as deepseek-recipe has it, for log-probabilities."""

    @property
    def thinks(self) -> bool:
        return self.profile is not Profile.PLAIN

    def ask(self, protocol: Protocol, body: Mapping[str, Any], context: int) -> Asked:
        """Converts a request whose fields have been checked. `thinking` in the body is enabled or disabled."""
        _refuse_all_but_text(body)
        options = recipe.ConversionOptions(
            messages_web_search=recipe.WebSearchBehavior.Drop,  # a tool that is not there is not called
            thinking_max_tokens_upper_bound=2**31 - 1,
            non_thinking_max_tokens_upper_bound=2**31 - 1,
        )
        with mapped(_messages_field(protocol)):
            request = _REQUESTS[protocol]({**body, "model": _NAME})
            echo, namespaces = None, None
            if protocol == "responses":
                echo, namespaces = request.echo(), request.namespace_tool_map(options)
            converted = request.convert(options)
            prompt = tuple(self._prompt_ids(converted.conversation, context))
        self._adapt(converted.parsing_options)
        with mapped(_messages_field(protocol)):
            max_tokens = _max_tokens(converted, len(prompt), context)
        return Asked(
            protocol,
            converted,
            prompt,
            converted.conversation.thinking_mode,
            self._constraint(converted),
            max_tokens,
            echo,
            namespaces,
        )

    def effort(self, asked: str | None) -> str | None:
        """deepseek-recipe's word for a reasoning effort; None leaves its default."""
        if self.profile is Profile.PREVIEW:
            return _PREVIEW_EFFORTS.get(asked or "", "low")
        return asked

    def encode(self, text: str, context: int, *, bos: bool = True) -> list[int]:
        """Ids of plain text, with the token that begins every text if there is one."""
        self._refuse_endless(len(text.encode("utf-8", "surrogatepass")), context)
        ids = self.tokenizer.encode(text)
        first = self.tokenizer.token_to_id(_BOS) if bos else None
        return ids if first is None else [first, *ids]

    def spoken(self, ids: tuple[int, ...]) -> str:
        """The text of a prompt, without the token that begins it."""
        begun = bool(ids) and ids[0] == self.tokenizer.token_to_id(_BOS)
        return self.tokenizer.decode(ids[1:] if begun else ids)

    def encode_hole(self, before: str, after: str, context: int) -> list[int]:
        """The prompt that asks for what stands between two texts."""
        marks = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
        if any(self.tokenizer.token_to_id(mark) is None for mark in marks):
            raise Refusal(400, "this model has not learned to fill holes; leave suffix out", param="suffix")
        self._refuse_endless(len(before.encode()) + len(after.encode()), context)
        text, ranges = "", []
        for part, mark in ((before, marks[1]), (after, marks[2])):
            text += (marks[0] if not text else "") + part
            ranges.append((len(text), len(text) + len(mark)))
            text += mark
        begin = (0, len(marks[0]))
        ids = self.tokenizer.encode_prompt(Prompt(text, (begin, *ranges)))
        first = self.tokenizer.token_to_id(_BOS)
        return ids if first is None else [first, *ids]

    def _prompt_ids(self, conversation: Any, context: int) -> list[int]:
        self._refuse_endless(sum(len(message.content) for message in conversation.messages), context)
        if self.profile in (Profile.PREVIEW, Profile.OFFICIAL):
            return self.tokenizer.encode_prompt(chat.prompt_of(conversation))
        messages = [_message(message) for message in conversation.messages]
        if self.profile is Profile.PLAIN:
            return chat.render_ids(messages, self.profile, self.tokenizer)
        return chat.render_ids(
            messages,
            self.profile,
            self.tokenizer,
            thinking=conversation.thinking_mode,
            tools=[_tool(tool) for tool in conversation.tools],
            response_format=conversation.response_schema,
        )

    def _refuse_endless(self, num_bytes: int, context: int) -> None:
        if num_bytes > _MOST_BYTES_PER_TOKEN * context + 1024:
            raise Refusal(
                400,
                f"the prompt has {num_bytes:,} bytes of text, more than a context of {context:,} tokens can hold",
                code="context_length_exceeded",
            )

    def _adapt(self, parsing: Any) -> None:
        if self.profile is Profile.PLAIN:
            parsing.special_tokens = recipe.SpecialTokens(**_UNSPELLABLE)
            parsing.parse_tool_calls = False
            parsing.parse_json_output = False
        elif self.profile is Profile.V32:
            parsing.starts_in_tool_calls = False

    def _constraint(self, converted: Any) -> Constraint | None:
        found = converted.inference_options.output_constraint
        if found is None:
            return None
        if self.profile is Profile.V32 and found.kind.startswith("tool_call"):
            if found.kind == "tool_call_required":
                raise Refusal(400, "this model cannot be made to call a tool; use auto", param="tool_choice")
            return None
        parsing = converted.parsing_options
        stage = parsing.thinking_initial_stage
        return Constraint(
            found.kind,
            found.schema,
            after_thinking=stage is not None and stage.starts_in_reasoning(),
            in_call=parsing.starts_in_tool_calls,
        )


class Choice:
    """The text of one job: sampled tokens in, chunks of its protocol out.

    `over` once a stop string has come, or a second call begins that was not asked for: the job can be cancelled.
    """

    def __init__(
        self,
        asked: Asked,
        language: Language,
        answer_id: str,
        model: str,
        *,
        logprobs: bool = False,
        one_call: bool = False,
    ) -> None:
        tokenizer = language.recipe_tokenizer if logprobs else None
        self._processor = recipe.StreamProcessor(
            asked.generator(answer_id, model), asked.request.parsing_options, tokenizer
        )
        self._logprobs = logprobs
        self._detokenizer = Detokenizer(language.tokenizer)
        self._rename = _Renamer(_V32_CALLS, _V4_CALLS) if language.profile is Profile.V32 else None
        self._calls = StopStrings([_CALL_END]) if one_call and not logprobs else None
        stage = asked.request.parsing_options.thinking_initial_stage
        self._reasons = stage is not None and stage.starts_in_reasoning()
        self._tail = ""
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.over = False

    def ready(self, prompt_tokens: int = 0, cached_tokens: int = 0) -> list[Any]:
        """The chunks that open an answer."""
        usage = recipe.PromptUsage(prompt_tokens=prompt_tokens, prompt_cache_hit_tokens=cached_tokens)
        return list(self._processor.push(recipe.InferenceChunk.ready(prompt_usage=usage)))

    def push(self, tokens: Iterable[Token]) -> list[Any]:
        """What these tokens complete. What comes after the end is not looked at."""
        chunks: list[Any] = []
        for token in tokens:
            if self.over:
                break
            text = self._detokenizer.push(token.id)
            self._count(text)
            if self._logprobs:
                assert token.logprob is not None  # the job asked for it
                probable = [(token.logprob, list(token.top))]
                chunks += self._processor.push(recipe.InferenceChunk.tokens([token.id], probable))
            else:
                chunks += self._say(text, 1)
            self.over = self.over or self._processor.finished
        return chunks

    def finish(self, reason: str) -> list[Any]:
        """The chunks that end an answer; `reason` as the engine gave it."""
        chunks: list[Any] = []
        if not self._processor.finished:
            if not self._logprobs and not self.over:
                chunks += self._say(self._detokenizer.finish(), 0, last=True)
            if not self._processor.finished:
                ends = recipe.InferenceFinishReason
                length = reason == "length" and not self.over
                chunks += self._processor.push(recipe.InferenceChunk.finish(ends.Length if length else ends.Stop))
        return chunks + list(self._processor.finish())

    def _say(self, text: str, count: int, *, last: bool = False) -> list[Any]:
        if self._rename is not None:
            text = self._rename.push(text) + (self._rename.finish() if last else "")
        if self._calls is not None:
            text = self._calls.push(text) + (self._calls.finish() if last else "")
            if self._calls.matched is not None:
                self.over = True
                text += _CALL_END + _CALLS_END
        return list(self._processor.push(recipe.InferenceChunk.text(text, count))) if text or count else []

    def _count(self, text: str) -> None:
        self.completion_tokens += 1
        if self._reasons:
            self.reasoning_tokens += 1
            self._tail = self._tail[-len(_END_THINK) :] + text
            self._reasons = _END_THINK not in self._tail


class _Renamer:
    """Replaces one word by another in a text that comes in pieces."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new, self._held = old, new, ""

    def push(self, text: str) -> str:
        text = (self._held + text).replace(self._old, self._new)
        kept = next((n for n in range(min(len(self._old) - 1, len(text)), 0, -1) if self._old.startswith(text[-n:])), 0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def _messages_field(protocol: Protocol) -> str:
    return "input" if protocol == "responses" else "messages"


def _max_tokens(converted: Any, num_prompt_tokens: int, context: int) -> int:
    try:
        return int(converted.resolve_max_tokens(num_prompt_tokens, context))
    except recipe.ConversionError as exc:
        asked = converted.inference_options.max_tokens
        more = f" and max_tokens is {asked:,}" if asked else ""
        raise Refusal(
            400,
            f"the prompt has {num_prompt_tokens:,} tokens{more}, the context holds {context:,}; shorten one of them",
            code="context_length_exceeded",
        ) from exc


def _refuse_all_but_text(body: Mapping[str, Any]) -> None:
    """Images and files would be replaced by a note that they were there; nothing is ever fetched."""
    for field in ("messages", "input", "system"):
        items = body.get(field)
        for i, item in enumerate(items if isinstance(items, list) else ()):
            _refuse_parts(item, f"{field}[{i}]", 3)


def _refuse_parts(item: object, where: str, depth: int) -> None:
    if not isinstance(item, dict):
        return
    if item.get("type") in _NOT_TEXT:
        raise Refusal(400, f"it is of type {item['type']}, and only text is read; remove it", param=where)
    inner = item.get("content")
    if depth and isinstance(inner, list):
        for i, part in enumerate(inner):
            _refuse_parts(part, f"{where}.content[{i}]", depth - 1)


def _message(message: Any) -> dict[str, Any]:
    """A message of deepseek-recipe in OpenAI's form."""
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.role == "assistant":
        said["reasoning_content"] = message.reasoning_content
        said["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls or ()
        ] or None
        said["prefix"] = message.prefix or None
    if message.role == "tool":
        said["tool_call_id"] = message.tool_call_id
    return {name: value for name, value in said.items() if value is not None}


def _tool(tool: Any) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}
