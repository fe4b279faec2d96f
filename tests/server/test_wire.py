"""Frames: what is written is read again, and nothing else is believed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.server import wire
from tenfold.server.wire import HEADER_BYTES, Job, WireError

MESSAGES = (
    wire.Start("tiny", memory="1G", threads=1, store="somewhere"),
    Job("a", "c", "k", (), {"temperature": 0.5, "logit_bias": {}}),
    Job(
        "a",
        "c",
        "k",
        (0, 1, 2**32 - 1),
        {"seed": 7, "logit_bias": {5: -1.5}},
        wire.Constraint("json", "{}", after_thinking=True),
    ),
    wire.Cancel("a"),
    wire.Shutdown(),
    wire.Ready("tiny", 1 << 20, 2048, 1 << 30, 282_624, 118.8, 788.0, (1, 2)),
    wire.Heartbeat(1, 2, 3, 4, 5, 6),
    wire.Queued("a", 3),
    wire.Admitted("a", 12),
    wire.Progress("a", 1, 10, 5.0, None),
    wire.Tokens("a", (wire.Token(1, -0.5), wire.Token(2, -1.0, ((2, -1.0), (3, -2.0))), wire.Token(3))),
    wire.Finished("a", "stop"),
    wire.Failed("a", "input", "no", again=False),
)


def reread(frame: bytes) -> wire.Message:
    body, payload = wire.frame_sizes(frame[:HEADER_BYTES])
    assert len(frame) == HEADER_BYTES + body + payload
    return wire.decode(frame[HEADER_BYTES : HEADER_BYTES + body], frame[HEADER_BYTES + body :])


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_survive(message: wire.Message) -> None:
    assert reread(wire.encode(message)) == message


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50), st.text(max_size=20))
def test_jobs_survive(prompt: list[int], name: str) -> None:
    job = Job(name, name, name, tuple(prompt), {"logit_bias": {}})
    assert reread(wire.encode(job)) == job


def test_a_million_tokens_fit() -> None:
    job = Job("a", "c", "k", tuple(range(1 << 20)), {"logit_bias": {}})
    assert reread(wire.encode(job)) == job


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_a_foreign_header_is_refused(header: bytes) -> None:
    with pytest.raises(WireError, match="no frame"):
        wire.frame_sizes(header)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'["Job"]',
        b'["Nothing", {}]',
        b'["Cancel", {}]',
        b'["Cancel", {"id": "a", "more": 1}]',
        b'["Cancel", 5]',
        json.dumps(["Tokens", {"id": "a", "tokens": [{}]}]).encode(),
    ],
)
def test_what_holds_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(WireError, match="no message"):
        wire.decode(body, b"")


def test_too_large_a_message_is_refused() -> None:
    with pytest.raises(WireError, match="larger"):
        wire.encode(Job("a", "c", "k", (0,) * (3 << 20), {"logit_bias": {}}))
