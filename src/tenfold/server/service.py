"""What all routes share: the served model, its engine, who asks, and how work leaves the event loop.

Knows ASGI's words; nothing of any protocol.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from tenfold.server import body
from tenfold.server.engine_client import Jobs
from tenfold.server.errors import ClientGone, Refusal
from tenfold.server.language import Language
from tenfold.server.metrics import Metrics
from tenfold.server.wire import Failed, Ready

__all__ = ["Call", "Service", "Settings"]

P = ParamSpec("P")
T = TypeVar("T")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_LARGE_BYTES = 64 << 10
"""A larger body is prepared apart from the small ones, which must not wait behind it."""
_TINY_BYTES = 4 << 10
"""A body that is parsed sooner than a thread wakes up."""
_MOST_BODIES = 8
_JSON = [(b"content-type", b"application/json")]


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator can choose about HTTP. Times in seconds."""

    names: tuple[str, ...]
    """What the model is called; the first is what answers say."""
    keepalive_s: float = 10.0
    write_timeout_s: float = 60.0
    drain_s: float = 30.0
    body_bytes: int = body.MOST_BODY_BYTES
    body_grace_s: float = 10.0
    shared_cache: bool = False
    host_names: frozenset[str] | None = None
    """Hosts that requests may name; None: any."""


@dataclass(slots=True)
class Service:
    """One served model."""

    jobs: Jobs
    language: Language
    settings: Settings
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    live: set[asyncio.Queue[Any]] = field(default_factory=set)
    """The queues of the answers under way."""
    held_bytes: int = 0
    """Bytes of the bodies of all requests that are not yet answered."""
    _small: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "small"))
    _large: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "large"))

    @property
    def name(self) -> str:
        return self.settings.names[0]

    def ready(self) -> Ready:
        """The engine's limits. Refuses while it loads, and while the server shuts down."""
        if self.draining:
            raise Refusal(503, "the server is shutting down", code="shutting_down", again=True, retry_after_s=10)
        if self.jobs.ready is None:
            raise Refusal(503, "the model is being loaded", code="loading", again=True, retry_after_s=5)
        return self.jobs.ready

    def check_model(self, model: str | None) -> None:
        if model is not None and model not in self.settings.names:
            shown = model if len(model) <= 60 else model[:57] + "..."
            raise Refusal(
                404,
                f"there is no model {shown!r}; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def retry_after_s(self) -> int:
        """How long a queue of this length has taken to move on lately."""
        pulse = self.jobs.pulse
        waiting = 1 if pulse is None else max(1, pulse.waiting)
        running = 1 if pulse is None else max(1, pulse.running)
        return int(min(120, max(1, self.metrics.mean_job_s() * waiting / running)))

    async def apart(self, num_bytes: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `work` in a thread: tokenising a megabyte takes a second."""
        pool = self._large if num_bytes > _LARGE_BYTES else self._small
        return await asyncio.get_running_loop().run_in_executor(pool, lambda: work(*args, **kwargs))

    def abort(self) -> None:
        """Ends every answer under way with an error."""
        ending = Failed("", "engine", "the server is shutting down; send the request again", again=True)
        for queue in tuple(self.live):
            queue.put_nowait((0, ending))

    def close(self) -> None:
        self._small.shutdown(wait=False, cancel_futures=True)
        self._large.shutdown(wait=False, cancel_futures=True)


@dataclass(slots=True)
class Call:
    """One request on its way: ASGI's three, and what is known of the client. `said` goes into the log's line."""

    scope: Scope
    receive: Receive
    _send: Send
    service: Service
    request_id: str
    key: bytes
    client: str
    headers: dict[str, str]
    said: dict[str, Any] = field(default_factory=dict)
    num_body_bytes: int = 0

    @property
    def path(self) -> str:
        return str(self.scope["path"])

    @property
    def wants_progress(self) -> bool:
        return self.headers.get("x-tenfold-progress") == "1"

    async def json(self) -> dict[str, Any]:
        """The body, checked and parsed."""
        settings = self.service.settings
        body.check_headers(self.headers, settings.body_bytes)
        raw = await body.read(self.receive, settings.body_bytes, settings.body_grace_s, self._hold)
        return body.parse(raw) if len(raw) <= _TINY_BYTES else await self.service.apart(len(raw), body.parse, raw)

    def _hold(self, num_bytes: int) -> None:
        """A thousand connections must not hold a thousand of the largest bodies."""
        service = self.service
        if service.held_bytes + num_bytes > _MOST_BODIES * service.settings.body_bytes:
            sentence = "the server holds as many bytes of requests as it may; send this one again later"
            raise Refusal(503, sentence, code="too_many_bytes", again=True, retry_after_s=service.retry_after_s())
        service.held_bytes += num_bytes
        self.num_body_bytes += num_bytes

    def let_go(self) -> None:
        """The request has been answered."""
        self.service.held_bytes -= self.num_body_bytes
        self.num_body_bytes = 0

    async def apart(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.service.apart(self.num_body_bytes, work, *args, **kwargs)

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, piece: bytes, *, more: bool = True) -> None:
        await self.send({"type": "http.response.body", "body": piece, "more_body": more})

    async def answer(self, found: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """The whole answer at once, as JSON."""
        content = json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()
        extra = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        length = (b"content-length", str(len(content)).encode())
        await self.start(status, [*_JSON, length, *extra])
        await self.write(content, more=False)

    async def send(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError as exc:
            raise ClientGone from exc

    async def gone(self) -> None:
        """Returns once the client has closed the connection."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
