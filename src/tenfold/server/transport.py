"""Connections: uvicorn's HTTP protocol with limits on headers, on idleness, and on how many there are.

Bare uvicorn waits for a header or a first byte for ever. Knows bytes and timers; nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from tenfold.server.errors import Refusal, openai_body

__all__ = ["GuardedProtocol", "guarded"]

MOST_HEADER_BYTES = 64 << 10
MOST_HEADERS = 256
HEADER_S = 30.0
IDLE_S = 75.0
MOST_CONNECTIONS = 1200


class _Refused(Exception):
    """Raised into the parser, which stops there."""


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    header_s = HEADER_S
    most_connections = MOST_CONNECTIONS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._refusal: Refusal | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.since = self.loop.time()
        self._begin_header()
        if len(self.connections) > self.most_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._raw_bytes += len(data)
        super().data_received(data)
        # one header line without an end never reaches on_header
        if self._in_header and self._raw_bytes > MOST_HEADER_BYTES and not self.transport.is_closing():
            self._refuse_header()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begin_header()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value) + 4
        if len(self.headers) > MOST_HEADERS or self._header_bytes > MOST_HEADER_BYTES:
            self._refuse_header()
            raise _Refused

    def on_headers_complete(self) -> None:
        self._in_header = False
        self._stop_waiting()
        if not self.url.startswith((b"/", b"*")):
            self._refusal = Refusal(400, "the request's target must be a path", code="bad_request")
            raise _Refused
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Whatever is wrong with a request that has not become one, in JSON like every other error."""
        refusal = self._refusal or Refusal(400, "this is not an HTTP request", code="bad_request")
        content = json.dumps(openai_body(refusal)).encode()
        head = [
            STATUS_LINE[refusal.status],
            b"content-type: application/json\r\nconnection: close\r\nx-should-retry: false\r\n",
            b"x-request-id: %s\r\ncontent-length: %d\r\n\r\n" % (uuid.uuid4().hex.encode(), len(content)),
        ]
        self.transport.write(b"".join(head) + content)
        self.transport.close()

    def _refuse_header(self) -> None:
        sentence = f"the header has more than {MOST_HEADER_BYTES >> 10} kB or {MOST_HEADERS} lines"
        self._refusal = Refusal(431, sentence, code="header_too_large")

    def _begin_header(self) -> None:
        self._in_header, self._header_bytes, self._raw_bytes = True, 0, 0
        self._stop_waiting()
        self._timer = self.loop.call_later(self.header_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        """No header in time. A connection with an answer under way may take its time with the next request."""
        self._timer = None
        if not self.busy and not self.transport.is_closing():
            self.transport.close()

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _make_room(self) -> None:
        """Closes the oldest connection on which nothing happens, or this one."""
        idle = [one for one in self.connections if isinstance(one, GuardedProtocol) and not one.busy]
        oldest = min(idle, key=lambda one: one.since, default=self)
        oldest.transport.abort()
        self.connections.discard(oldest)


def guarded(most_connections: int = MOST_CONNECTIONS, header_s: float = HEADER_S) -> type[Any]:
    """The protocol class with limits of its own."""
    return type("Guarded", (GuardedProtocol,), {"most_connections": most_connections, "header_s": header_s})
