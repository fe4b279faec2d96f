"""The page with a server behind it whose answers are written down beforehand, on a port of 127.0.0.1.

Knows the protocol that the page speaks; has no engine.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tenfold.server import page

STATUS = {
    "model": "tiny-v4-flash",
    "context": 1_048_576,
    "kv_fixed_bytes": 282_624,
    "kv_bytes_per_token": 118.6,
    "v32_kv_bytes_per_token": 1312.0,
    "running": 1,
    "waiting": 0,
    "kv_bytes": 6_191_236,
}

Step = str | float | threading.Event
"""Text is sent, a number is a pause in seconds, an event is waited for."""


def frame(said: dict[str, Any], event: str | None = None) -> str:
    return (f"event: {event}\n" if event else "") + f"data: {json.dumps(said)}\n\n"


def delta(**fields: str) -> str:
    return frame({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})


def words(text: str, count: int = 3) -> list[str]:
    """Text in deltas of a few characters, as tokens come."""
    return [delta(content=text[at : at + count]) for at in range(0, len(text), count)]


def progress(done: int, total: int, tokens_per_s: float = 0.0, eta_s: float | None = None) -> str:
    return frame({"done": done, "total": total, "tokens_per_s": tokens_per_s, "eta_s": eta_s}, "progress")


def ending(prompt: int = 20, completion: int = 10, cached: int = 0, reason: str = "stop") -> str:
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
    return frame(last) + frame({"choices": [], "usage": usage}) + "data: [DONE]\n\n"


@dataclass
class FakeServer:
    """`scripts` are played one a request, the last one again and again; `requests` are what was asked."""

    url: str = ""
    scripts: list[Sequence[Step] | Response] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    cancelled: int = 0
    key: str | None = None

    def play(self, *scripts: Sequence[Step] | Response) -> None:
        self.scripts[:] = scripts

    async def chat(self, request: Request) -> Response:
        self.requests.append(json.loads(await request.body()))
        self.headers.append(dict(request.headers))
        if self._refused(request):
            return JSONResponse({"error": {"message": "This server needs an API key."}}, 401)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        if isinstance(script, Response):
            return script
        return StreamingResponse(self._stream(script), media_type="text/event-stream")

    async def status(self, request: Request) -> Response:
        return JSONResponse({}, 401) if self._refused(request) else JSONResponse(STATUS)

    def _refused(self, request: Request) -> bool:
        return self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}"

    async def _stream(self, script: Sequence[Step]) -> AsyncIterator[str]:
        try:
            for step in script:
                if isinstance(step, str):
                    yield step
                elif isinstance(step, threading.Event):
                    while not step.is_set():
                        await asyncio.sleep(0.01)
                else:
                    await asyncio.sleep(step)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


@contextmanager
def serving() -> Iterator[FakeServer]:
    fake = FakeServer()
    api = [Route("/v1/chat/completions", fake.chat, methods=["POST"]), Route("/status", fake.status)]
    config = uvicorn.Config(
        Starlette(routes=[*page.routes(), *api]), port=0, log_level="error", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the fake server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        fake.url = f"http://127.0.0.1:{port}/"
        yield fake
    finally:
        server.should_exit = True
        thread.join(10)
