"""Clients by the thousand: one asyncio socket each, and exactly what came over it."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

from tests.long.served import KEYS


@dataclass
class Answer:
    """Of one request: its status, the events or the body, whether it ended as it should, and when things came."""

    status: int
    events: list[Any]
    done: bool
    ttft_s: float
    total_s: float
    longest_gap_s: float

    @property
    def text(self) -> str:
        return "".join(choice["text"] for event in self.events for choice in event.get("choices", ()))

    @property
    def error(self) -> Any:
        return next((event["error"] for event in self.events if "error" in event), None)


def request(path: str, body: Any, key: str = KEYS[0]) -> bytes:
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"
    return f"{head}content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n".encode() + text


async def ask(port: int, path: str, body: Any, *, key: str = KEYS[0], read_s: float = 120.0) -> Answer:
    """One request on a connection of its own, read to the end."""
    began = last = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    pieces: list[bytes] = []
    first, gap = 0.0, 0.0
    try:
        writer.write(request(path, body, key))
        while piece := await asyncio.wait_for(reader.read(65536), read_s):
            now = time.monotonic()
            gap, last = max(gap, now - last), now
            if not first and (b"data: {" in piece or (pieces and b"{" in piece)):
                first = now - began
            pieces.append(piece)
    except (ConnectionError, TimeoutError):
        pieces.append(b"")
    finally:
        writer.close()
    head, _, raw = b"".join(pieces).partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head else 0
    whole = b"transfer-encoding: chunked" not in head.lower() or raw.endswith(b"0\r\n\r\n")
    events, done = _events(_unchunked(raw) if b"transfer-encoding: chunked" in head.lower() else raw)
    return Answer(status, events, done and whole, first, time.monotonic() - began, gap)


def _unchunked(raw: bytes) -> bytes:
    body = bytearray()
    while True:
        size, _, rest = raw.partition(b"\r\n")
        if not size or not rest:
            return bytes(body)
        length = int(size, 16)
        body += rest[:length]
        raw = rest[length + 2 :]


def _events(body: bytes) -> tuple[list[Any], bool]:
    if body.lstrip()[:1] == b"{":
        try:
            return [json.loads(body)], True
        except ValueError:
            return [], False
    lines = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line) for line in lines if line != b"[DONE]"], lines[-1:] == [b"[DONE]"] and lines.count(
        b"[DONE]"
    ) == 1
