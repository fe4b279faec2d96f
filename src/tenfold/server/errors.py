"""What a request is refused with: a status, one sentence, the field it is about, and whether to try again.

Written in OpenAI's shape or in Anthropic's, by the path that was asked. Knows nothing of requests and engines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepseek_recipe

from tenfold.errors import ContextTooLong, TenfoldError
from tenfold.server.wire import Failed

__all__ = [
    "ClientGone",
    "Refusal",
    "anthropic_body",
    "headers_of",
    "is_anthropic",
    "mapped",
    "of_failure",
    "openai_body",
    "status_of",
]

_MOST_CHARS = 500
_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


class ClientGone(Exception):
    """The connection has closed; nobody is there to answer."""


class Refusal(Exception):
    """An answer other than the one asked for. `param` names the field at fault, `code` is for programs; `again` says
    whether the same request may succeed later, `retry_after_s` when."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        again: bool = False,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.again = status, param, code, again
        self.message = message if len(message) <= _MOST_CHARS else message[: _MOST_CHARS - 3] + "..."
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})


def is_anthropic(path: str) -> bool:
    """Whether who asks for `path` reads Anthropic's error shape."""
    return "/v1/messages" in path


def status_of(refusal: Refusal, path: str) -> int:
    """Anthropic's overload is 529, everybody else's 503."""
    return 529 if refusal.status == 503 and is_anthropic(path) else refusal.status


def openai_body(refusal: Refusal) -> dict[str, Any]:
    """The body of an error on every path but Anthropic's."""
    kind = _OPENAI_TYPES.get(refusal.status, "invalid_request_error")
    return {
        "error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code or kind},
    }


def anthropic_body(refusal: Refusal, request_id: str) -> dict[str, Any]:
    """The body of an error on /v1/messages; a field is named in the message."""
    kind = _ANTHROPIC_TYPES.get(529 if refusal.status == 503 else refusal.status, "invalid_request_error")
    message = refusal.message if refusal.param is None else f"{refusal.param}: {refusal.message}"
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def headers_of(refusal: Refusal) -> dict[str, str]:
    """Clients repeat what failed with 408, 409, 429 and 5xx, unless they are told that it is of no use."""
    headers = dict(refusal.headers)
    if refusal.retry_after_s is not None:
        headers["retry-after"] = str(min(max(refusal.retry_after_s, 1), 120))  # openai gives up above 120
    if not refusal.again:
        headers["x-should-retry"] = "false"
    return headers


def of_failure(failed: Failed, retry_after_s: int) -> Refusal:
    """What a job's failure is to its client."""
    again = failed.again
    if failed.kind == "full":
        return Refusal(429, failed.message, code="queue_full", again=True, retry_after_s=retry_after_s)
    if failed.kind == "input":
        return Refusal(400, failed.message, code="invalid_request")
    if failed.kind == "memory" and not again:
        return Refusal(400, failed.message, code="does_not_fit")
    if again:
        return Refusal(503, failed.message, code="unavailable", again=True, retry_after_s=retry_after_s)
    return Refusal(500, failed.message, code="engine_error")


@contextmanager
def mapped(param: str | None = None) -> Iterator[None]:
    """Errors of the block, ours and foreign, become refusals; a Rust panic is no Exception, so the net is wide."""
    try:
        yield
    except (Refusal, ClientGone, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except ContextTooLong as exc:
        raise Refusal(400, str(exc), param=param, code="context_length_exceeded") from exc
    except TenfoldError as exc:
        raise Refusal(400, str(exc), param=param) from exc
    except deepseek_recipe.ConversionError as exc:
        raise Refusal(400, _said(exc), param=param) from exc
    except BaseException as exc:
        raise Refusal(400, str(exc) or type(exc).__name__, param=param) from exc


def _said(exc: Any) -> str:
    """The sentence inside the error body that deepseek-recipe makes."""
    try:
        said = json.loads(exc.body)["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return str(exc)
    return said if isinstance(said, str) else str(exc)
