"""What the HTTP process and the engine process say to each other: frozen messages in length-prefixed frames.

A frame is 12 bytes (uint32 magic, uint32 bytes of JSON, uint32 bytes of payload; little-endian), the JSON of one
message with its kind, and a payload: the prompt's ids as uint32. No frame runs code when it is read. Sizes are bounded
before anything is allocated. Knows nothing of sockets beyond reading and writing bytes, nothing of engines and of HTTP.
"""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from tenfold.errors import RunError

__all__ = [
    "Admitted",
    "Cancel",
    "Constraint",
    "Event",
    "Failed",
    "Finished",
    "Heartbeat",
    "Job",
    "Message",
    "Progress",
    "Queued",
    "Ready",
    "Shutdown",
    "Start",
    "Token",
    "Tokens",
    "WireError",
    "decode",
    "encode",
    "frame_sizes",
]

_MAGIC = 0x31464E54
_HEADER = struct.Struct("<III")
HEADER_BYTES = _HEADER.size
_MOST_JSON_BYTES = 4 << 20
_MOST_PAYLOAD_BYTES = 8 << 20


class WireError(RunError):
    """What came over the wire is not one of our frames; the connection is of no use any more."""


# ------------------------------------------------------------------------------------------ to the engine


@dataclass(frozen=True, slots=True)
class Start:
    """The first message: what to load. `store` None keeps nothing on disk; at most `queue_jobs` wait."""

    model: str
    backend: str = "auto"
    numerics: Literal["deployed", "exact"] = "deployed"
    memory: str | None = None
    threads: int | None = None
    store: str | None = None
    store_limit_bytes: int | None = None
    queue_jobs: int = 256


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an output must be: `kind` and `schema` as deepseek-recipe's OutputConstraint has them.

    `after_thinking`: the constraint begins behind the end of the reasoning. `in_call`: the prompt has already opened
    the block of tool calls.
    """

    kind: Literal["json", "regex", "tool_call", "tool_call_required"]
    schema: str
    after_thinking: bool = False
    in_call: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """One completion. `client` is for fairness, `cache` for which stored prefixes it may meet ("": those of all who
    have ""); both are hashes, never what a client sent. `sampling` holds the fields of SamplingParams but `stop`, which
    is the text side's."""

    id: str
    client: str
    cache: str
    prompt: tuple[int, ...]
    sampling: Mapping[str, Any]
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a job wherever it is; what it has read is kept. `Finished("cancelled")` follows, or what came before it."""

    id: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Keep what is in flight, then end."""


# ------------------------------------------------------------------------------------------ from the engine


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine has loaded. `limits` in tokens and bytes: context, vocab_size, memory_bytes, chunk_tokens;
    `kv_fixed_bytes` and `kv_bytes_per_token` of this model, `v32_kv_bytes_per_token` of a V3.2 as wide and deep."""

    model: str
    context: int
    vocab_size: int
    memory_bytes: int
    kv_fixed_bytes: int
    kv_bytes_per_token: float
    v32_kv_bytes_per_token: float
    eos_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Every half second. `steps` grows with each turn of the engine's loop, also at rest, and with each part of a
    pass: if it stands still, so does the engine. `running` jobs read or decode; `kv_bytes` are theirs."""

    steps: int
    running: int
    waiting: int
    kv_bytes: int
    rss_bytes: int
    store_bytes: int


@dataclass(frozen=True, slots=True)
class Queued:
    """The job waits; `ahead` others are expected to start first."""

    id: str
    ahead: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """The job starts: `cached_tokens` of its prompt need not be read."""

    id: str
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` tokens of the prompt have been read; `eta_s` None while unknown."""

    id: str
    done: int
    total: int
    tokens_per_s: float
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled token; where log-probabilities were asked for its own, and in `top` the likeliest as (id, logprob)."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Tokens:
    """The next tokens of a completion; an end-of-sequence token is not among them."""

    id: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a job that went well, or was cancelled."""

    id: str
    reason: Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a job that went wrong; with the id "", why the engine could not be loaded. `kind` is input (it
    can never work), full (the queue is), memory (it does not fit), or engine; `again` says whether the same request may
    succeed later."""

    id: str
    kind: Literal["input", "full", "memory", "engine"]
    message: str
    again: bool = False


Event = Queued | Admitted | Progress | Tokens | Finished | Failed
Message = Start | Job | Cancel | Shutdown | Ready | Heartbeat | Event
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        Start,
        Job,
        Cancel,
        Shutdown,
        Ready,
        Heartbeat,
        Queued,
        Admitted,
        Progress,
        Tokens,
        Finished,
        Failed,
    )
}


# ------------------------------------------------------------------------------------------ frames


def encode(message: Message) -> bytes:
    """One frame. Raises WireError if the message is larger than frames may be."""
    said, payload = {one.name: getattr(message, one.name) for one in fields(message)}, b""
    if isinstance(message, Job):
        payload = _little(array("I", said.pop("prompt"))).tobytes()
        said["constraint"] = None if message.constraint is None else asdict(message.constraint)
    elif isinstance(message, Tokens):
        said["tokens"] = [(token.id, token.logprob, token.top) for token in message.tokens]
    body = json.dumps([type(message).__name__, said], separators=(",", ":")).encode()
    if len(body) > _MOST_JSON_BYTES or len(payload) > _MOST_PAYLOAD_BYTES:
        raise WireError(f"a message of {len(body):,} + {len(payload):,} bytes is larger than frames may be")
    return _HEADER.pack(_MAGIC, len(body), len(payload)) + body + payload


def frame_sizes(header: bytes) -> tuple[int, int]:
    """Bytes of JSON and of payload that follow a header of `HEADER_BYTES`. Raises WireError."""
    magic, body_bytes, payload_bytes = _HEADER.unpack(header)
    if magic != _MAGIC or body_bytes > _MOST_JSON_BYTES or payload_bytes > _MOST_PAYLOAD_BYTES or payload_bytes % 4:
        raise WireError("the connection to the engine carries something that is no frame; it is closed")
    return body_bytes, payload_bytes


def decode(body: bytes, payload: bytes) -> Message:
    """The message of a frame. Raises WireError for what `encode` would not have written."""
    try:
        kind, said = json.loads(body)
        made: Message = _BUILDERS.get(kind, _plain)(kind, said, payload)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise WireError(f"a frame holds no message: {type(exc).__name__}; the connection is closed") from exc
    return made


def _plain(kind: str, said: dict[str, Any], payload: bytes) -> Message:
    cls = _KINDS[kind]
    if set(said) != {one.name for one in fields(cls)}:
        raise ValueError(kind)
    if cls is Ready:
        said["eos_ids"] = tuple(said["eos_ids"])
    message: Message = cls(**said)
    return message


def _job(kind: str, said: dict[str, Any], payload: bytes) -> Job:
    ids = array("I")
    ids.frombytes(payload)
    constraint = said.pop("constraint")
    # JSON has no integer keys
    bias = {int(token): value for token, value in said["sampling"].get("logit_bias", {}).items()}
    sampling = {**said.pop("sampling"), "logit_bias": bias}
    return Job(
        **said,
        prompt=tuple(_little(ids)),
        sampling=sampling,
        constraint=None if constraint is None else Constraint(**constraint),
    )


def _tokens(kind: str, said: dict[str, Any], payload: bytes) -> Tokens:
    tokens = tuple(Token(number, logprob, tuple(map(tuple, top))) for number, logprob, top in said["tokens"])
    return Tokens(said["id"], tokens)


_BUILDERS: dict[str, Callable[[str, dict[str, Any], bytes], Message]] = {"Job": _job, "Tokens": _tokens}


def _little(ids: array[int]) -> array[int]:
    if sys.byteorder == "big":
        ids.byteswap()
    return ids
