"""Bodies: read under a limit of bytes and of time, then parsed as strictly as JSON allows.

What other parsers let through is refused here: NaN, duplicate keys, numbers without bounds, half surrogates, nesting
without end. Knows ASGI's receive; nothing of what a body means.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NoReturn

from tenfold.server.errors import ClientGone, Refusal

__all__ = ["MOST_BODY_BYTES", "check_headers", "parse", "read"]

MOST_BODY_BYTES = 64 << 20
_LEAST_BYTES_PER_S = 1024
_MOST_VALUES = 3_000_000  # a prompt of a million ids fits; a bomb of empty lists does not
_MOST_DEPTH = 200
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


def check_headers(headers: Mapping[str, str], most_bytes: int) -> None:
    """Refuses, before a byte of it is read, a body that is not plain JSON or says that it is too long."""
    kind, _, parameters = headers.get("content-type", "").partition(";")
    charset = parameters.lower().replace(" ", "").replace('"', "")
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        raise Refusal(415, "the body's content-type must be application/json, in UTF-8", code="unsupported_media_type")
    if headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise Refusal(415, "the body must not be compressed; send it as it is", code="unsupported_media_type")
    length = headers.get("content-length")
    if length is not None and (not length.isdecimal() or int(length) > most_bytes):
        raise _too_large(most_bytes)


async def read(receive: Receive, most_bytes: int, grace_s: float, hold: Callable[[int], None]) -> bytes:
    """The whole body. Refuses one that grows past `most_bytes`, or comes slower than 1 kB/s after a grace. `hold` is
    told of each piece that is kept, and may refuse it."""
    pieces: list[bytes] = []
    received, began = 0, time.monotonic()
    while True:
        allowed_s = began + grace_s + received / _LEAST_BYTES_PER_S - time.monotonic()
        try:
            async with asyncio.timeout(max(allowed_s, 0.0)):
                message = await receive()
        except TimeoutError:
            raise Refusal(408, "the body came too slowly", code="timeout", headers={"connection": "close"}) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        received += len(piece)
        if received > most_bytes:
            raise _too_large(most_bytes)
        hold(len(piece))
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` holds."""
    _check_size(body)
    try:
        found = json.loads(
            body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant, parse_float=_number
        )
    except UnicodeDecodeError:
        raise _bad("the body is not UTF-8") from None
    except RecursionError:
        raise _bad("the body is nested too deeply") from None
    except ValueError as exc:  # json's own messages quote nothing of the text
        raise _bad(f"the body is not JSON: {exc}") from None
    if not isinstance(found, dict):
        raise _bad("the body must be a JSON object")
    if b"\\ud" in body or b"\\uD" in body:
        _refuse_half_surrogates(found)
    return found


def _check_size(body: bytes) -> None:
    """Bounds values and nesting; what stands inside strings is left out of the count only where it matters."""
    if _openers(body) <= _MOST_DEPTH and body.count(b",") <= _MOST_VALUES:
        return
    bare = _STRING.sub(b"", body)
    if _openers(bare) + bare.count(b",") > _MOST_VALUES:
        raise _bad("the body holds too many values")
    depth = 0
    for bracket in _BRACKETS.findall(bare):
        depth += 1 if bracket in b"[{" else -1
        if depth > _MOST_DEPTH:
            raise _bad("the body is nested too deeply")


def _openers(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def _refuse_half_surrogates(found: dict[str, Any]) -> None:
    try:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _bad("a string holds half of a surrogate pair, which is no character") from None


def _bad(message: str) -> Refusal:
    return Refusal(400, message, code="invalid_json")


def _too_large(most_bytes: int) -> Refusal:
    return Refusal(
        413, f"the body is larger than {most_bytes:,} bytes", code="too_large", headers={"connection": "close"}
    )
