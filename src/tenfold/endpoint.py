"""A model behind an OpenAI-compatible server that answers the questions about a haystack.

Each question goes with the whole text before it, the text first, so that a server that keeps prefixes reads it once.
Knows HTTP and needles, nothing of models.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args
from urllib.parse import urlsplit

from tenfold.errors import RunError, UsageError
from tenfold.haystack import Haystack
from tenfold.needle import ANSWER_TOKENS, Fact
from tenfold.needle_grid import Answers
from tenfold.terminal import ReadingClock
from tenfold.tokenizer import Tokenizer

__all__ = ["EndpointReader", "checked_api"]

Api = Literal["chat", "completions"]

_CONNECT_S = 10.0
_ANSWER_S = 6 * 3600.0  # a million tokens on a slow machine
_COMPLETION_TOKENS = 2 * ANSWER_TOKENS  # the server's tokenizer may need more than ours
_CHAT_TOKENS = 1024  # some think before they answer
_MOST_QUOTED = 300


def checked_api(name: str) -> Api:
    """`name` if it is one of the two, else a UsageError."""
    if name not in get_args(Api):
        raise UsageError(f"--api is {name!r}, expected one of {', '.join(get_args(Api))}")
    return cast(Api, name)


class EndpointReader:
    """Asks a server at `url` (with or without /v1); without a `model`, the first it lists.

    `tokenizer` is only a measure: lengths are counted with it, the server counts for itself.

    Raises UsageError for a url that is none, RunError where nobody answers.
    """

    def __init__(self, url: str, model: str | None, tokenizer: Tokenizer, api: Api, api_key: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            self._host = ""
        if parts.scheme not in ("http", "https") or not self._host:
            raise UsageError(f"--endpoint is {url!r}, expected a URL such as http://127.0.0.1:8000/v1")
        self._secure = parts.scheme == "https"
        self._path = parts.path.rstrip("/") or "/v1"
        self._url, self._api, self._api_key = url, api, api_key
        self._tokenizer = tokenizer
        self.encode = tokenizer.encode
        self.name = model or self._first_model()

    @property
    def identity(self) -> str:
        return f"{self._url} {self._api} {self.name}"

    def room_for(self, length: int, facts: Sequence[Fact]) -> int:
        """All of it: what the server's context holds is not known here."""
        return length

    def ask(self, haystack: Haystack, clock: ReadingClock) -> Answers:
        """One request a question. The first takes as long as reading does; `tokens` are as the server counts."""
        text = self._tokenizer.decode(haystack.ids).lstrip("\ufffd")  # the first character may be cut
        texts: list[str] = []
        tokens, times = len(haystack.ids), [time.monotonic()]
        for needle in haystack.needles:
            reply = self._complete(text + needle.fact.question)
            times.append(time.monotonic())
            if not texts:
                tokens = _prompt_tokens(reply) or tokens
                clock.advance(clock.total)
            texts.append(_text_of(reply, self._api, self._url))
        first = times[min(1, len(texts))]
        return Answers(tuple(texts), tokens, 0, first - times[0], times[-1] - first)

    def _complete(self, prompt: str) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.name, "temperature": 0}
        if self._api == "chat":
            body |= {"messages": [{"role": "user", "content": prompt}], "max_tokens": _CHAT_TOKENS}
            return self._call("POST", "/chat/completions", body)
        body |= {"prompt": prompt, "max_tokens": _COMPLETION_TOKENS, "stop": ["\n"]}
        return self._call("POST", "/completions", body)

    def _first_model(self) -> str:
        listed = self._call("GET", "/models").get("data")
        try:
            return str(cast(Any, listed)[0]["id"])
        except (TypeError, KeyError, IndexError):
            raise RunError(f"{self._url} lists no models; name one as MODEL") from None

    def _call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_CONNECT_S)
        try:
            connection.connect()
            connection.sock.settimeout(_ANSWER_S)
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, self._path + path, content, headers)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as exc:
            why = str(exc) or type(exc).__name__
            raise RunError(f"{self._url} cannot be asked: {why}; is the server running?") from None
        finally:
            connection.close()
        if response.status != 200:
            said = answer.decode("utf-8", errors="replace")[:_MOST_QUOTED].strip()
            raise RunError(f"{self._url}{path} answered {response.status}: {said or response.reason}")
        return _object(answer, self._url)


def _object(answer: bytes, url: str) -> dict[str, Any]:
    try:
        parsed = json.loads(answer)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        quoted = answer[:_MOST_QUOTED].decode("utf-8", errors="replace")
        raise RunError(f"{url} answered no JSON object but {quoted!r}; is it an OpenAI-compatible server?")
    return parsed


def _prompt_tokens(reply: dict[str, Any]) -> int | None:
    usage = reply.get("usage")
    counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return counted if isinstance(counted, int) else None


def _text_of(reply: dict[str, Any], api: Api, url: str) -> str:
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] if api == "chat" else choice["text"]
    except (KeyError, IndexError, TypeError):
        raise RunError(f"{url} answered without choices: {str(reply)[:_MOST_QUOTED]}; try the other --api") from None
    return (text or "").strip()
