"""Fields of requests: what each may hold, in one table per protocol that checks requests and writes the OpenAPI page.

A field that is not in its table is ignored, and logged once: clients send many. A field whose meaning we cannot give
stands in the table as refused, so that nobody believes it was honoured. Knows nothing of engines.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenfold.server.errors import Refusal

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "COUNT_TOKENS",
    "DETOKENIZE",
    "MESSAGES",
    "RESPONSES",
    "TOKENIZE",
    "Field",
    "check",
    "check_logit_bias",
    "schema_of",
]

_log = logging.getLogger("tenfold.serve")
_MOST_UNKNOWN_NAMES = 200  # names are the client's: what is remembered of them is bounded
_unknown: set[str] = set()

MOST_CHOICES = 8
MOST_PROMPTS = 32
MOST_TOOLS = 128
MOST_TOOL_BYTES = 256 << 10
_MOST_BIASES = 1024
_MOST_STOPS = 16
_MOST_STOP_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Field:
    """What a value must be: in words, as a test, as JSON schema. `needed`: a request without it is refused."""

    expected: str
    accepts: Callable[[Any], bool]
    schema: Mapping[str, Any]
    needed: bool = False


def check(body: Mapping[str, Any], table: Mapping[str, Field]) -> dict[str, Any]:
    """The fields of `body` that the table knows, nulls left out. Refuses the first that is not as it says."""
    for name, field in table.items():
        value = body.get(name)
        if value is None:
            if field.needed:
                raise Refusal(400, f"{name} is missing, expected {field.expected}", param=name, code="missing_field")
        elif not field.accepts(value):
            raise Refusal(400, f"{name} is {_shown(value)}, expected {field.expected}", param=name)
    unknown = [name for name in body if name not in table]
    if unknown:
        _log_once(unknown)
    return {name: value for name, value in body.items() if name in table and value is not None}


def schema_of(table: Mapping[str, Field]) -> dict[str, Any]:
    """The JSON schema of a body."""
    needed = [name for name, field in table.items() if field.needed]
    properties = {name: _or_null(field) for name, field in table.items()}
    return {"type": "object", "properties": properties, "required": needed}


def check_logit_bias(bias: Mapping[str, Any], vocab_size: int) -> dict[int, float]:
    """Ids up to the width of the logits, which is not the tokenizer's; what lies beyond is another request's memory."""
    for name, value in bias.items():
        if not (name.isdecimal() and name.isascii() and len(name) < 10 and int(name) < vocab_size):
            raise Refusal(
                400, f"logit_bias names token {_shown(name)}, expected 0 to {vocab_size - 1}", param="logit_bias"
            )
        if not _is_number(value, -100, 100):
            raise Refusal(400, f"logit_bias[{name}] is {_shown(value)}, expected -100 to 100", param="logit_bias")
    return {int(name): float(value) for name, value in bias.items()}


def _shown(value: object) -> str:
    said = repr(value) if isinstance(value, bool | int | float) else json.dumps(value, ensure_ascii=True)
    return said if len(said) <= 60 else said[:57] + "..."


def _log_once(names: Sequence[str]) -> None:
    for name in names:
        short = name[:40]
        if short not in _unknown and len(_unknown) < _MOST_UNKNOWN_NAMES:
            _unknown.add(short)
            _log.info("a field nobody here knows is ignored: %r (said once)", short)


def _or_null(field: Field) -> dict[str, Any]:
    schema = dict(field.schema)
    if field.needed or not schema:
        return schema
    return {"anyOf": [schema, {"type": "null"}]}


# ------------------------------------------------------------------------------------------ kinds


def _is_integer(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _integer(low: int, high: int, *, needed: bool = False) -> Field:
    schema = {"type": "integer", "minimum": low, "maximum": high}
    return Field(f"an integer from {low} to {high}", lambda value: _is_integer(value, low, high), schema, needed)


def _number(low: float, high: float, *, above: bool = False) -> Field:
    schema = {"type": "number", "exclusiveMinimum" if above else "minimum": low, "maximum": high}
    words = f"a number {'above' if above else 'from'} {low:g} to {high:g}"
    return Field(words, lambda value: _is_number(value, low, high) and not (above and value == low), schema)


def _flag() -> Field:
    return Field("true or false", lambda value: isinstance(value, bool), {"type": "boolean"})


def _text(most_chars: int | None = None, *, needed: bool = False) -> Field:
    schema: dict[str, Any] = {"type": "string"}
    words = "a string"
    if most_chars is not None:
        schema["maxLength"] = most_chars
        words += f" of at most {most_chars} characters"
    return Field(
        words, lambda value: isinstance(value, str) and len(value) <= (most_chars or len(value)), schema, needed
    )


def _opaque() -> Field:
    """A name that only ever enters a hash."""
    accepts = lambda value: isinstance(value, str) and len(value.encode()) <= 512  # noqa: E731
    return Field("a string of at most 512 bytes", accepts, {"type": "string", "maxLength": 128})


def _choice(*values: str) -> Field:
    return Field("one of " + ", ".join(values), lambda value: value in values, {"enum": list(values)})


def _object(properties: Mapping[str, Any] | None = None) -> Field:
    return Field("an object", lambda value: isinstance(value, dict), {"type": "object", "properties": properties or {}})


def _list(most: int, item: Mapping[str, Any], *, least: int = 0, needed: bool = False) -> Field:
    schema = {"type": "array", "items": item, "minItems": least, "maxItems": most}
    words = f"a list of at most {most:,}" if not least else f"a list of {least} to {most:,}"
    return Field(words, lambda value: isinstance(value, list) and least <= len(value) <= most, schema, needed)


def _stops() -> Field:
    one = {"type": "string", "minLength": 1, "maxLength": 256}
    schema = {"anyOf": [one, {"type": "array", "items": one, "maxItems": _MOST_STOPS}]}

    def accepts(value: object) -> bool:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or len(stops) > _MOST_STOPS:
            return False
        texts = [stop for stop in stops if isinstance(stop, str) and stop]
        return len(texts) == len(stops) and sum(len(stop.encode()) for stop in texts) <= _MOST_STOP_BYTES

    return Field(
        f"a string or up to {_MOST_STOPS} of them, none empty, {_MOST_STOP_BYTES} bytes in all", accepts, schema
    )


def _tools() -> Field:
    def accepts(value: object) -> bool:
        return isinstance(value, list) and len(value) <= MOST_TOOLS and len(json.dumps(value)) <= MOST_TOOL_BYTES

    schema = {"type": "array", "items": {"type": "object"}, "maxItems": MOST_TOOLS}
    return Field(f"a list of at most {MOST_TOOLS} tools, {MOST_TOOL_BYTES >> 10} kB of JSON in all", accepts, schema)


def _refused(why: str, *harmless: object) -> Field:
    """A field that would change the answer and that we do not have; `harmless` values ask for nothing."""
    allowed = (False, *harmless)

    def accepts(value: object) -> bool:
        return value in ([], {}) or any(value == one and type(value) is type(one) for one in allowed)

    return Field(f"nothing: {why}", accepts, {"enum": [False, *harmless]})


_UNSUPPORTED = "tenfold has no such field; leave it out"
_SEED = _integer(-(2**63), 2**63 - 1)
_MAX_TOKENS = _integer(1, 2**31 - 1)
_BIAS = Field(
    f"an object of at most {_MOST_BIASES} token ids and numbers",
    lambda value: isinstance(value, dict) and len(value) <= _MOST_BIASES,
    {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,4}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": _MOST_BIASES,
    },
)
_STREAM_OPTIONS = _object({"include_usage": {"type": "boolean"}})
_SAMPLING: dict[str, Field] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, above=True),
    "top_k": _integer(-1, 2**31 - 1),  # vLLM's way to say off is -1
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _BIAS,
    "seed": _SEED,
    "ignore_eos": _flag(),
}
_OPENAI: dict[str, Field] = {
    "model": _text(256, needed=True),
    "n": _integer(1, MOST_CHOICES),
    "stop": _stops(),
    "stream": _flag(),
    "stream_options": _STREAM_OPTIONS,
    "max_tokens": _MAX_TOKENS,
    **_SAMPLING,
    "user": _opaque(),
    "user_id": _opaque(),
    "cache_salt": _opaque(),
    "prompt_cache_key": _opaque(),
    "safety_identifier": _opaque(),
    "best_of": _refused(_UNSUPPORTED, 1),
    "use_beam_search": _refused(_UNSUPPORTED),
    "length_penalty": _refused(_UNSUPPORTED, 1, 1.0),
    "min_tokens": _refused(_UNSUPPORTED, 0),
    "stop_token_ids": _refused(_UNSUPPORTED),
    "allowed_token_ids": _refused(_UNSUPPORTED),
    "bad_words": _refused(_UNSUPPORTED),
    "prompt_logprobs": _refused(_UNSUPPORTED),
    "truncate_prompt_tokens": _refused("a prompt is read whole or not at all"),
    "include_stop_str_in_output": _refused(_UNSUPPORTED),
    "kv_transfer_params": _refused(_UNSUPPORTED),
    "guided_json": _refused("use response_format"),
    "guided_regex": _refused("use response_format"),
    "guided_choice": _refused("use response_format"),
    "guided_grammar": _refused("use response_format"),
    "structured_outputs": _refused("use response_format"),
    "logits_processors": _refused(_UNSUPPORTED),
}
_MESSAGE = {
    "type": "object",
    "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": {"type": "string"}},
    "required": ["role", "content"],
}
_MOST_MESSAGES = 100_000
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max")
_TOOL_CHOICE = Field(
    "a name or an object",
    lambda value: isinstance(value, str | dict),
    {"anyOf": [{"type": "string"}, {"type": "object"}]},
)

CHAT: dict[str, Field] = {
    **_OPENAI,
    "messages": _list(_MOST_MESSAGES, _MESSAGE, least=1, needed=True),
    "max_completion_tokens": _MAX_TOKENS,
    "logprobs": _flag(),
    "top_logprobs": _integer(0, 20),
    "tools": _tools(),
    "tool_choice": _TOOL_CHOICE,
    "parallel_tool_calls": _flag(),
    "response_format": _object({"type": {"enum": ["text", "json_object", "json_schema", "regex"]}}),
    "thinking": _object({"type": {"enum": ["enabled", "disabled", "adaptive"]}}),
    "reasoning_effort": _choice(*_EFFORTS),
    "chat_template_kwargs": _object({"thinking": {"type": "boolean"}}),
    "chat_template": _refused("the prompt's grammar is the model's own"),
    "add_generation_prompt": Field("true", lambda value: value is True, {"enum": [True]}),
    "continue_final_message": _refused('mark the last message with "prefix": true'),
    "functions": _refused("use tools"),
    "function_call": _refused("use tool_choice", "auto", "none"),
    "modalities": Field('["text"]', lambda value: value in ([], ["text"]), {"enum": [["text"]]}),
    "audio": _refused("there is only text"),
    "web_search_options": _refused("nothing is fetched from the network"),
    "documents": _refused(_UNSUPPORTED),
    "echo": _refused(_UNSUPPORTED),
}
COMPLETIONS: dict[str, Field] = {
    **_OPENAI,
    "prompt": Field(
        f"a string, a list of token ids, or a list of up to {MOST_PROMPTS} of either",
        lambda value: isinstance(value, str | list),
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 4}]},
        needed=True,
    ),
    "suffix": _text(),
    "echo": _flag(),
    "logprobs": _integer(0, 20),
    "add_special_tokens": _flag(),
}
_ANTHROPIC_MESSAGE = {
    "type": "object",
    "properties": {"role": {"enum": ["user", "assistant"]}, "content": {"type": "string", "minLength": 1}},
    "required": ["role", "content"],
}
COUNT_TOKENS: dict[str, Field] = {
    "model": _text(256, needed=True),
    "messages": _list(_MOST_MESSAGES, _ANTHROPIC_MESSAGE, least=1, needed=True),
    "system": Field(
        "a string or a list of text blocks", lambda value: isinstance(value, str | list), {"type": "string"}
    ),
    "tools": _tools(),
    "tool_choice": _object(),
    "thinking": _object({"type": {"enum": ["enabled", "disabled", "adaptive"]}}),
    "output_config": _object(),
    "output_format": _object(),
    "mcp_servers": _refused("nothing is fetched from the network"),
}
MESSAGES: dict[str, Field] = {
    **COUNT_TOKENS,
    "max_tokens": _integer(1, 2**31 - 1, needed=True),
    "stop_sequences": _list(_MOST_STOPS, {"type": "string", "minLength": 1, "maxLength": 256}),
    "stream": _flag(),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, above=True),
    "top_k": _integer(0, 2**31 - 1),
    "metadata": _object(),
    "container": _refused("there is no place to run code in"),
}
RESPONSES: dict[str, Field] = {
    "model": _text(256, needed=True),
    "input": Field(
        "a string or a list of items",
        lambda value: isinstance(value, str) or (isinstance(value, list) and len(value) <= _MOST_MESSAGES),
        {"type": "string"},
        needed=True,
    ),
    "instructions": _text(),
    "max_output_tokens": _MAX_TOKENS,
    "stream": _flag(),
    "stream_options": _object(),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, above=True),
    "seed": _SEED,
    "tools": _tools(),
    "tool_choice": _TOOL_CHOICE,
    "parallel_tool_calls": _flag(),
    "text": _object(),
    "reasoning": _object({"effort": {"enum": list(_EFFORTS)}}),
    "include": Field(
        "a list without log-probabilities, which are to be had from /v1/chat/completions",
        lambda value: isinstance(value, list) and "message.output_text.logprobs" not in value,
        {"type": "array", "items": {"enum": ["reasoning.encrypted_content"]}},
    ),
    "store": _flag(),
    "metadata": _object(),
    "truncation": _choice("auto", "disabled"),
    "user": _opaque(),
    "user_id": _opaque(),
    "prompt_cache_key": _opaque(),
    "safety_identifier": _opaque(),
    "previous_response_id": _refused("nothing is kept between requests; send the whole input"),
    "conversation": _refused("nothing is kept between requests; send the whole input"),
    "background": _refused("nothing is kept between requests; ask for a stream"),
    "prompt": _refused("there are no stored prompts; send input"),
    "top_logprobs": _refused("log-probabilities are to be had from /v1/chat/completions", 0),
}
TOKENIZE: dict[str, Field] = {
    "model": _text(256),
    "prompt": _text(),
    "messages": _list(_MOST_MESSAGES, _MESSAGE, least=1),
    "tools": _tools(),
    "thinking": _object({"type": {"enum": ["enabled", "disabled"]}}),
    "add_special_tokens": _flag(),
}
DETOKENIZE: dict[str, Field] = {
    "model": _text(256),
    "tokens": _list(1 << 21, {"type": "integer", "minimum": 0, "maximum": 2047}, needed=True),
}
