"""The HTTP surface, a table of contents: every route, and the gate that all of them stand behind.

The gate gives each request an id, checks where it was sent and whose key it has, and turns whatever goes wrong into
an answer in the protocol's own shape and one line in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Sequence

from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route, Router

from tenfold.server import auth, operations
from tenfold.server.chat_completions import chat_completions
from tenfold.server.completions import completions
from tenfold.server.errors import (
    ClientGone,
    Refusal,
    anthropic_body,
    headers_of,
    is_anthropic,
    openai_body,
    status_of,
)
from tenfold.server.messages import count_tokens, messages
from tenfold.server.responses import not_kept, responses
from tenfold.server.service import Call, Message, Receive, Scope, Send, Service

__all__ = ["Gate", "routes"]

_log = logging.getLogger("tenfold.serve")
_ECHOED_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_LINGER_S = 2.0
_OPEN = ("/health", "/")
_OPEN_FOLDER = "/static/"
_POLLED = ("/health", "/ready", "/status", "/metrics")  # asked every few seconds: logged when they fail
_SAFE = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]

Handler = Callable[[Call], Awaitable[None]]


def routes() -> list[BaseRoute]:
    """Every path that is answered, but the web page's."""
    return [
        *_at(chat_completions, "POST", "/v1/chat/completions", "/chat/completions", "/beta/chat/completions"),
        *_at(completions, "POST", "/v1/completions", "/completions", "/beta/completions"),
        *_at(responses, "POST", "/v1/responses", "/responses"),
        *_at(not_kept, "GET", "/v1/responses/{name}"),
        *_at(messages, "POST", "/v1/messages", "/anthropic/v1/messages"),
        *_at(count_tokens, "POST", "/v1/messages/count_tokens", "/anthropic/v1/messages/count_tokens"),
        *_at(operations.models, "GET", "/v1/models", "/models"),
        *_at(operations.model, "GET", "/v1/models/{name:path}"),
        *_at(operations.tokenize, "POST", "/tokenize"),
        *_at(operations.detokenize, "POST", "/detokenize"),
        *_at(operations.health, "GET", "/health"),
        *_at(operations.ready, "GET", "/ready"),
        *_at(operations.status, "GET", "/status"),
        *_at(operations.metrics, "GET", "/metrics"),
        *_at(operations.version, "GET", "/version"),
        *_at(operations.document, "GET", "/openapi.json"),
    ]


def _at(handler: Handler, method: str, *paths: str) -> list[Route]:
    return [Route(path, _Endpoint(handler, paths[0]), methods=[method]) for path in paths]


class _Endpoint:
    """A handler as the ASGI application that a route leads to."""

    def __init__(self, handler: Handler, name: str) -> None:
        self._handler, self.name = handler, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._handler(scope["tenfold"])


class Gate:
    """The ASGI application."""

    def __init__(self, service: Service, keys: auth.Keys, more_routes: Sequence[BaseRoute] = ()) -> None:
        self._service, self._keys = service, keys
        self._router = Router([*routes(), *more_routes], redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        sent = _Sent(send, _request_id(scope))
        began = time.monotonic()
        call: Call | None = None
        try:
            call = self._admitted(scope, receive, sent)
            scope["tenfold"], scope["app"] = call, self  # with an app in it, the router raises what it refuses
            await self._router(scope, receive, sent)
        except ClientGone:
            sent.status = 499
        except Refusal as refusal:
            await _refuse(scope, receive, sent, refusal)
        except HTTPException as exc:
            await _refuse(scope, receive, sent, _of_router(exc))
        except Exception as exc:
            # the text of an error may quote a prompt, so only where it happened is written down
            _log.error("%s in %s", type(exc).__name__, _place(exc))
            await _refuse(
                scope, receive, sent, Refusal(500, "an internal error; it has been logged", code="internal_error")
            )
        finally:
            if call is not None:
                call.let_go()
            self._write_down(scope, sent, call, time.monotonic() - began)

    def _admitted(self, scope: Scope, receive: Receive, sent: _Sent) -> Call:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self._check_host([value.decode("latin-1") for name, value in scope["headers"] if name == b"host"])
        path = str(scope["path"])
        is_open = path in _OPEN or (path.startswith(_OPEN_FOLDER) and ".." not in path)
        key = b"" if is_open else self._keys.check(scope["headers"])
        address = (scope.get("client") or ("",))[0]
        client = auth.client_name(key, address)
        return Call(scope, receive, sent, self._service, sent.request_id, key, client, headers)

    def _check_host(self, given: list[str]) -> None:
        """Another site's name for this machine is how a page of that site would reach us."""
        allowed = self._service.settings.host_names
        if len(given) > 1 or (allowed is not None and (not given or _host_name(given[0]) not in allowed)):
            raise Refusal(400, "the Host header names no host of this server", code="host_not_allowed")

    def _write_down(self, scope: Scope, sent: _Sent, call: Call | None, seconds: float) -> None:
        route = getattr(scope.get("endpoint"), "name", "(other)")  # a path may hold anything
        self._service.metrics.answered(route, sent.status)
        figures = {} if call is None else call.said
        details = "".join(f" {name}={value}" for name, value in figures.items() if value is not None)
        client = "" if call is None else f" client={call.client[:8]}"
        level = logging.DEBUG if route in _POLLED and sent.status == 200 else logging.INFO
        said = (scope["method"], route, sent.status, sent.request_id, client, seconds, details)
        _log.log(level, "%s %s %d id=%s%s s=%.3f%s", *said)


class _Sent:
    """ASGI's send, which remembers whether an answer has begun and gives it its id."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self.request_id = send, request_id
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"x-request-id", self.request_id.encode())]
            given = {name for name, _ in message["headers"]}
            own += [(name, value) for name, value in _SAFE if name not in given]
            message = {**message, "headers": [*message["headers"], *own]}
        await self._send(message)


async def _refuse(scope: Scope, receive: Receive, sent: _Sent, refusal: Refusal) -> None:
    """Answers with an error; an answer that has begun is left unfinished, which closes the connection abruptly."""
    if sent.status:
        return
    path = str(scope["path"])
    body = anthropic_body(refusal, sent.request_id) if is_anthropic(path) else openai_body(refusal)
    content = json.dumps(body, ensure_ascii=False).encode()
    headers = [(name.encode(), value.encode()) for name, value in headers_of(refusal).items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    with contextlib.suppress(OSError):
        await sent({"type": "http.response.start", "status": status_of(refusal, path), "headers": headers})
        await sent({"type": "http.response.body", "body": content, "more_body": True})
        if refusal.status == 413:
            await _let_finish(receive)
        await sent({"type": "http.response.body", "body": b"", "more_body": False})


async def _let_finish(receive: Receive) -> None:
    """Reads on for a moment: a connection closed under a client that still sends loses the answer too."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while (await receive()).get("more_body"):
                pass


def _request_id(scope: Scope) -> str:
    """The client's own if it is harmless; it is shown, never used as a key."""
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
    return given if _ECHOED_ID.fullmatch(given) else uuid.uuid4().hex


def _host_name(host: str) -> str:
    """The name of `name:port` or `[::1]:port`, as it is compared; what is not of this form is nobody's name."""
    found = _HOST.fullmatch(host)
    return found[1].lower() if found else ""


def _of_router(exc: HTTPException) -> Refusal:
    sentence = {404: "there is nothing at this path", 405: "this path does not take that method"}.get(exc.status_code)
    return Refusal(exc.status_code, sentence or "refused", headers=dict(exc.headers or {}))


def _place(exc: BaseException) -> str:
    """The innermost line of ours that an error passed through."""
    frames = [frame for frame in traceback.extract_tb(exc.__traceback__) if "tenfold" in frame.filename]
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "?"
