"""`POST /v1/completions`: plain text goes on, or a hole in it is filled (DeepSeek's `suffix`)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.server import fields
from tenfold.server.answers import speak
from tenfold.server.errors import Refusal, mapped, openai_body
from tenfold.server.language import Language
from tenfold.server.sampling import job_of, new_id, sampling_of
from tenfold.server.service import Call
from tenfold.server.voices import frame, said_of
from tenfold.server.wire import Progress, Queued, Ready, Token, Tokens
from tenfold.stops import StopStrings
from tenfold.tokenizer import Detokenizer

__all__ = ["completions"]

_DEFAULT_MAX_TOKENS = 4096  # DeepSeek's


async def completions(call: Call) -> None:
    body = fields.check(await call.json(), fields.COMPLETIONS)
    service = call.service
    service.check_model(body["model"])
    ready = service.ready()
    _refuse_contradictions(body)
    prompts = await call.apart(_prompts, service.language, body, ready)
    max_tokens = _max_tokens(body, prompts, ready.context)
    sampling = sampling_of(body, ready, max_tokens, body.get("logprobs"))
    count = body.get("n", 1)
    if len(prompts) * count > fields.MOST_PROMPTS:
        raise Refusal(400, f"{len(prompts)} prompts with {count} answers each are too many at once", param="n")
    stops = body.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    choices = [
        _Completion(service.language, stops, prompt if body.get("echo") else (), body.get("logprobs") is not None)
        for prompt in prompts
        for _ in range(count)
    ]
    stream = body.get("stream", False)
    voice = _CompletionsVoice(
        choices,
        service.name,
        sum(map(len, prompts)),
        count,
        include_usage=bool(body.get("stream_options", {}).get("include_usage")),
    )
    jobs = [job_of(call, body, prompt, sampling, index) for prompt in prompts for index in range(count)]
    await speak(call, jobs, voice, stream=stream)


def _refuse_contradictions(body: Mapping[str, Any]) -> None:
    if body.get("echo") and "logprobs" in body:
        raise Refusal(400, "the log-probabilities of a prompt are not known; leave echo or logprobs out", param="echo")
    if body.get("echo") and "suffix" in body:
        raise Refusal(400, "a text with a hole cannot be echoed; leave echo or suffix out", param="echo")


def _prompts(language: Language, body: Mapping[str, Any], ready: Ready) -> list[tuple[int, ...]]:
    with mapped("prompt"):
        if "suffix" in body:
            if not isinstance(body["prompt"], str):
                raise Refusal(400, "with a suffix, expected a string", param="prompt")
            return [tuple(language.encode_hole(body["prompt"], body["suffix"], ready.context))]
        given = body["prompt"]
        several = isinstance(given, list) and bool(given) and all(isinstance(one, str | list) for one in given)
        prompts = given if several else [given]
        if len(prompts) > fields.MOST_PROMPTS:
            raise Refusal(400, f"{len(prompts)} prompts, expected at most {fields.MOST_PROMPTS}", param="prompt")
        bos = body.get("add_special_tokens", True)
        return [_ids(language, one, ready, bos) for one in prompts]


def _ids(language: Language, prompt: object, ready: Ready, bos: bool) -> tuple[int, ...]:
    if isinstance(prompt, str):
        ids = tuple(language.encode(prompt, ready.context, bos=bos))
    elif isinstance(prompt, list) and all(type(one) is int and 0 <= one < ready.vocab_size for one in prompt):
        ids = tuple(prompt)
    else:
        raise Refusal(400, f"expected strings, or token ids from 0 to {ready.vocab_size - 1}", param="prompt")
    if not ids:
        raise Refusal(400, "it is empty, expected at least one token", param="prompt")
    return ids


def _max_tokens(body: Mapping[str, Any], prompts: Sequence[tuple[int, ...]], context: int) -> int:
    longest = max(map(len, prompts))
    asked = body.get("max_tokens")
    if longest + (asked or 1) > context:
        raise Refusal(
            400,
            f"the prompt has {longest:,} tokens and max_tokens is {asked or 1:,}, the context holds {context:,}; "
            "shorten one of them",
            param="max_tokens" if longest < context else "prompt",
            code="context_length_exceeded",
        )
    return int(asked or min(_DEFAULT_MAX_TOKENS, context - longest))


class _Completion:
    """The text of one job."""

    def __init__(self, language: Language, stops: Sequence[str], echo: tuple[int, ...], logprobs: bool) -> None:
        self._tokenizer = language.tokenizer
        self._detokenizer, self._stops = Detokenizer(language.tokenizer), StopStrings(stops)
        self.echoed = language.spoken(echo)
        self._offset = 0
        self._logprobs = logprobs
        self.completion_tokens = 0
        self.text = self.echoed
        self.logprobs: dict[str, list[Any]] | None = _no_logprobs() if logprobs else None
        self.reason: str | None = None

    @property
    def over(self) -> bool:
        return self._stops.matched is not None

    def push(self, tokens: Sequence[Token]) -> tuple[str, dict[str, list[Any]] | None]:
        """The text these tokens complete, and their log-probabilities."""
        text, logprobs = "", _no_logprobs() if self._logprobs else None
        for token in tokens:
            if self.over:
                break
            self.completion_tokens += 1
            piece = self._detokenizer.push(token.id)
            text += self._stops.push(piece)
            if logprobs is not None:
                self._describe(token, logprobs)
            self._offset += len(piece)
        return self._kept(text, logprobs)

    def finish(self, reason: str) -> str:
        """The text held back until now."""
        self.reason = "stop" if self.over or reason != "length" else "length"
        rest = "" if self.over else self._stops.push(self._detokenizer.finish()) + self._stops.finish()
        return self._kept(rest, None)[0]

    def _kept(self, text: str, logprobs: dict[str, list[Any]] | None) -> tuple[str, dict[str, list[Any]] | None]:
        self.text += text
        if logprobs is not None and self.logprobs is not None:
            for name, values in logprobs.items():
                self.logprobs[name] += values
        return text, logprobs

    def _describe(self, token: Token, logprobs: dict[str, list[Any]]) -> None:
        logprobs["tokens"].append(self._spell(token.id))
        logprobs["token_logprobs"].append(token.logprob)
        logprobs["top_logprobs"].append({self._spell(one): logprob for one, logprob in token.top})
        logprobs["text_offset"].append(self._offset)

    def _spell(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])


class _CompletionsVoice:
    def __init__(
        self,
        choices: Sequence[_Completion],
        model: str,
        num_prompt_tokens: int,
        per_prompt: int,
        *,
        include_usage: bool,
    ) -> None:
        self._choices, self._model, self._num_prompt_tokens = choices, model, num_prompt_tokens
        self._per_prompt, self._include_usage = per_prompt, include_usage
        self._id, self._created = new_id("cmpl-"), int(time.time())
        self._cached: dict[int, int] = {}

    def opening(self) -> bytes:
        return b""

    def admitted(self, index: int, cached_tokens: int) -> bytes:
        prompt = index // self._per_prompt
        self._cached[prompt] = max(cached_tokens, self._cached.get(prompt, 0))
        echoed = self._choices[index].echoed
        return self._frame([self._choice(index, echoed)]) if echoed else b""

    def tokens(self, index: int, tokens: Tokens) -> bytes:
        text, logprobs = self._choices[index].push(tokens.tokens)
        return self._frame([self._choice(index, text, logprobs)]) if text or logprobs else b""

    def over(self, index: int) -> bool:
        return self._choices[index].over

    def finished(self, index: int, reason: str) -> bytes:
        rest = self._choices[index].finish(reason)
        return self._frame([self._choice(index, rest, None, self._choices[index].reason)])

    def ending(self) -> bytes:
        usage = self._frame([], self._usage()) if self._include_usage else b""
        return usage + frame("[DONE]")

    def alive(self) -> bytes:
        return b": alive\n\n"

    def progress(self, event: Queued | Progress) -> bytes:
        name, said = said_of(event)
        return frame(json.dumps(said), name)

    def error(self, refusal: Refusal) -> bytes:
        return frame(json.dumps(openai_body(refusal)))

    def answer(self) -> dict[str, Any]:
        choices = [self._choice(index, one.text, one.logprobs, one.reason) for index, one in enumerate(self._choices)]
        return self._object(choices, self._usage())

    def _choice(
        self, index: int, text: str, logprobs: Mapping[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _frame(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        return frame(json.dumps(self._object(choices, usage), ensure_ascii=False, separators=(",", ":")))

    def _object(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": usage,
        }

    def _usage(self) -> dict[str, Any]:
        prompt, cached = self._num_prompt_tokens, sum(self._cached.values())
        completion = sum(choice.completion_tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "prompt_cache_hit_tokens": cached,
            "prompt_cache_miss_tokens": prompt - cached,
        }


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
