"""The clock of a long read, and how figures are spelt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tenfold.terminal import ReadingClock, about, bytes_text, duration_text


def ticking(monkeypatch: pytest.MonkeyPatch, costs: list[float]) -> ReadingClock:
    """A clock over 8 chunks of 1000 tokens, of which the first took `costs` seconds."""
    now = [0.0]
    # Only the module's own `time`: the threads of other tests go on asking the real one.
    monkeypatch.setattr("tenfold.terminal.time", SimpleNamespace(monotonic=lambda: now[0]))
    clock = ReadingClock(8000)
    for i, seconds in enumerate(costs):
        now[0] += seconds
        clock.advance(1000 * (i + 1))
    return clock


def test_the_eta_knows_that_later_tokens_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [1.0 + 0.5 * i for i in range(8)]
    clock = ticking(monkeypatch, costs[:3])
    assert clock.eta_s == pytest.approx(sum(costs[3:]), rel=1e-6)


def test_the_eta_of_even_chunks_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ticking(monkeypatch, [2.0] * 4)
    assert clock.eta_s == pytest.approx(8.0)
    assert clock.tokens_per_s == pytest.approx(500.0)
    assert about(clock) == "500 tokens/s  8.0 s left"


def test_getting_faster_never_promises_less_than_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ticking(monkeypatch, [9.0, 1.0])
    assert clock.eta_s is not None
    assert clock.eta_s > 0


def test_no_promise_before_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ticking(monkeypatch, []).eta_s is None


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (3_529_664_576, "3.53 GB"), (2e12, "2.00 TB")]
)
def test_bytes_are_decimal(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.96, "10.0 s"), (42, "42 s"), (125, "2 min 05 s"), (7384, "2 h 03 min")]
)
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
