"""The three protocols that deepseek-recipe speaks, as voices: Chat Completions, Messages, Responses.

Chunks are its own; what is added is several choices, usage in every dialect, signs of life and errors. Knows nothing
of connections and engines.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import deepseek_recipe as recipe

from tenfold.server.errors import Refusal, anthropic_body, openai_body
from tenfold.server.language import Choice
from tenfold.server.wire import Progress, Queued, Tokens

__all__ = ["ChatVoice", "MessagesVoice", "ResponsesVoice", "frame", "said_of"]


def frame(data: str, event: str | None = None) -> bytes:
    """One server-sent event."""
    head = "" if event is None else f"event: {event}\n"
    return f"{head}data: {data}\n\n".encode()


def said_of(event: Queued | Progress) -> tuple[str, dict[str, Any]]:
    """The name and fields of a progress frame; the web page reads them."""
    fields = asdict(event)
    del fields["id"]
    return type(event).__name__.lower(), fields


class _Voice(ABC):
    """One choice of one protocol; several where the protocol has them."""

    def __init__(self, choices: Sequence[Choice], answer_id: str, model: str, num_prompt_tokens: int) -> None:
        self.choices, self.id, self.model = choices, answer_id, model
        self.num_prompt_tokens = num_prompt_tokens
        self.cached_tokens = 0
        self.created = int(time.time())

    @property
    def completion_tokens(self) -> int:
        return sum(choice.completion_tokens for choice in self.choices)

    @property
    def reasoning_tokens(self) -> int:
        return sum(choice.reasoning_tokens for choice in self.choices)

    def opening(self) -> bytes:
        return b""

    def admitted(self, index: int, cached_tokens: int) -> bytes:
        self.cached_tokens = max(self.cached_tokens, cached_tokens)
        return self.said(index, self.choices[index].ready(self.num_prompt_tokens, cached_tokens))

    def tokens(self, index: int, tokens: Tokens) -> bytes:
        return self.said(index, self.choices[index].push(tokens.tokens))

    def over(self, index: int) -> bool:
        return self.choices[index].over

    def finished(self, index: int, reason: str) -> bytes:
        return self.said(index, self.choices[index].finish(reason))

    def ending(self) -> bytes:
        return b""

    @abstractmethod
    def said(self, index: int, chunks: Sequence[Any]) -> bytes: ...


class ChatVoice(_Voice):
    """OpenAI's Chat Completions, with DeepSeek's reasoning_content and cache fields."""

    def __init__(
        self,
        choices: Sequence[Choice],
        answer_id: str,
        model: str,
        num_prompt_tokens: int,
        *,
        stream: bool,
        include_usage: bool,
    ) -> None:
        super().__init__(choices, answer_id, model, num_prompt_tokens)
        self._stream, self._include_usage = stream, include_usage
        self._responses = [
            recipe.ChatCompletionResponse(answer_id, model, self.created, num_prompt_tokens, 0) for _ in choices
        ]

    def said(self, index: int, chunks: Sequence[Any]) -> bytes:
        if self._stream:
            return b"".join(self._frame(index, chunk.to_json()) for chunk in chunks)
        for chunk in chunks:
            self._responses[index].accumulate(chunk)
        return b""

    def ending(self) -> bytes:
        said = b""
        if self._include_usage:
            last = {
                "id": self.id,
                "object": "chat.completion.chunk",
                "created": self.created,
                "model": self.model,
                "choices": [],
                "usage": self._usage(),
            }
            said = frame(json.dumps(last, separators=(",", ":")))
        return said + frame("[DONE]")

    def alive(self) -> bytes:
        return b": alive\n\n"

    def progress(self, event: Queued | Progress) -> bytes:
        name, fields = said_of(event)
        return frame(json.dumps(fields), name)

    def error(self, refusal: Refusal) -> bytes:
        return frame(json.dumps(openai_body(refusal)))

    def answer(self) -> dict[str, Any]:
        answers = [json.loads(response.to_json()) for response in self._responses]
        choices = [{**answer["choices"][0], "index": index} for index, answer in enumerate(answers)]
        return {**answers[0], "choices": choices, "usage": self._usage()}

    def _frame(self, index: int, said: str) -> bytes:
        if index:
            said = said.replace('"choices":[{"index":0,', f'"choices":[{{"index":{index},', 1)
        if not said.endswith('"usage":null}'):  # the last chunk of a choice: usage has a chunk of its own
            chunk = json.loads(said)
            chunk["usage"] = None
            said = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
        return frame(said)

    def _usage(self) -> dict[str, Any]:
        prompt, completion, cached = self.num_prompt_tokens, self.completion_tokens, self.cached_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "prompt_cache_hit_tokens": cached,
            "prompt_cache_miss_tokens": prompt - cached,
        }


class MessagesVoice(_Voice):
    """Anthropic's Messages."""

    def __init__(
        self, choice: Choice, answer_id: str, model: str, num_prompt_tokens: int, request_id: str, *, stream: bool
    ) -> None:
        super().__init__([choice], answer_id, model, num_prompt_tokens)
        self._stream, self._request_id = stream, request_id
        self._response: Any = None

    def admitted(self, index: int, cached_tokens: int) -> bytes:
        self._response = recipe.MessagesResponse(
            self.id, self.model, self.created, self.num_prompt_tokens, cached_tokens
        )
        return super().admitted(index, cached_tokens)

    def said(self, index: int, chunks: Sequence[Any]) -> bytes:
        if self._stream:
            name = recipe.MessagesResponse.sse_event_name
            return b"".join(frame(chunk.to_json(), name(chunk)) for chunk in chunks)
        for chunk in chunks:
            self._response.accumulate(chunk)
        return b""

    def alive(self) -> bytes:
        return frame('{"type":"ping"}', "ping")

    def progress(self, event: Queued | Progress) -> bytes:
        name, fields = said_of(event)
        return frame(json.dumps({"type": "ping", name: fields}), "ping")

    def error(self, refusal: Refusal) -> bytes:
        return frame(json.dumps(anthropic_body(refusal, self._request_id)), "error")

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._response.to_json())
        return answer


class ResponsesVoice(_Voice):
    """OpenAI's Responses. Its numbered events are its only sign of life: codex does not look at comments."""

    def __init__(self, choice: Choice, answer_id: str, model: str, num_prompt_tokens: int, *, stream: bool) -> None:
        super().__init__([choice], answer_id, model, num_prompt_tokens)
        self._stream = stream
        self._response = recipe.ResponsesResponse(answer_id, model, self.created, num_prompt_tokens, 0)
        self._next = self._added = 0
        self._begun: dict[str, Any] = {}

    def opening(self) -> bytes:
        return self.said(0, self.choices[0].ready(self.num_prompt_tokens))

    def admitted(self, index: int, cached_tokens: int) -> bytes:
        self.cached_tokens = cached_tokens
        return b""

    def said(self, index: int, chunks: Sequence[Any]) -> bytes:
        if self._stream:
            name = recipe.ResponsesResponse.sse_event_name
            return b"".join(self._frame(chunk.to_json(), name(chunk)) for chunk in chunks)
        for chunk in chunks:
            self._response.accumulate(chunk)
        return b""

    def alive(self) -> bytes:
        return self._sign({})

    def progress(self, event: Queued | Progress) -> bytes:
        name, fields = said_of(event)
        return self._sign({name: fields})

    def error(self, refusal: Refusal) -> bytes:
        error = {"code": refusal.code or "server_error", "message": refusal.message}
        failed = {**self._begun, "status": "failed", "error": error}
        event = {"type": "response.failed", "response": failed, "sequence_number": self._next}
        return frame(json.dumps(event, ensure_ascii=False), "response.failed")

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._response.to_json())
        return {**answer, "usage": self._usage()}

    def _frame(self, said: str, name: str | None) -> bytes:
        whole = '"response":{' in said[:80]
        if whole or self._added:
            event = json.loads(said)
            event["sequence_number"] += self._added
            if whole:
                self._complete(event)
            said = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        self._next += 1
        return frame(said, name)

    def _complete(self, event: dict[str, Any]) -> None:
        """The last event has the usage; the first is kept for signs of life."""
        if event["response"].get("usage") is not None:
            event["response"]["usage"] = self._usage()
        elif not self._begun:
            self._begun = event["response"]

    def _sign(self, more: dict[str, Any]) -> bytes:
        event = {"type": "response.in_progress", "response": self._begun, "sequence_number": self._next, **more}
        self._next += 1
        self._added += 1
        return frame(json.dumps(event, ensure_ascii=False), "response.in_progress")

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self.num_prompt_tokens, self.completion_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": prompt + completion,
        }
