"""The clock of a long read, and how figures are spelt."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tenfold.terminal import ReadingClock, about, bytes_text, duration_text


def ticking(
    monkeypatch: pytest.MonkeyPatch,
    costs: list[float],
    work: Callable[[int], float] | None = None,
    chunks: int = 8,
    stored: int = 0,
) -> ReadingClock:
    """A clock over 8 chunks of 1000 tokens, of which the first behind those stored took `costs` seconds."""
    now = [0.0]
    # Only the module's own `time`: the threads of other tests go on asking the real one.
    monkeypatch.setattr("tenfold.terminal.time", SimpleNamespace(monotonic=lambda: now[0]))
    clock = ReadingClock(1000 * chunks)
    if work is not None:
        clock.weigh(work)
    if stored:
        clock.begin(1000 * stored)
    for i, seconds in enumerate(costs, stored):
        now[0] += seconds
        clock.advance(1000 * (i + 1))
    return clock


def test_the_eta_knows_that_later_tokens_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [1.0 + 0.5 * i for i in range(8)]
    clock = ticking(monkeypatch, costs[:3])
    assert clock.eta_s == pytest.approx(sum(costs[3:]), rel=1e-6)


def test_it_knows_that_behind_stored_tokens_too(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [1.0 + 0.5 * i for i in range(8)]
    clock = ticking(monkeypatch, costs[3:6], stored=3)
    assert clock.eta_s == pytest.approx(sum(costs[6:]), rel=1e-6)


def test_the_eta_of_even_chunks_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ticking(monkeypatch, [2.0] * 4)
    assert clock.eta_s == pytest.approx(8.0)
    assert clock.tokens_per_s == pytest.approx(500.0)
    assert about(clock) == "500 tokens/s  8.0 s left"


def test_a_bad_while_at_a_tenth_does_not_foretell_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token costs 1 + its place in the read; from the sixth chunk of a hundred on they take half as long again."""
    costs = [1.0 + (i + 0.5) / 100 for i in range(100)]
    slow = [cost * (1.5 if i >= 5 else 1.0) for i, cost in enumerate(costs[:10])]
    clock = ticking(monkeypatch, slow, lambda position: position + position**2 / 2e5, chunks=100)
    assert clock.eta_s is not None
    assert sum(slow) + clock.eta_s == pytest.approx(sum(slow) / sum(costs[:10]) * sum(costs), rel=0.15)


def test_what_was_expected_gives_way_to_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that were said to cost alike cost more and more."""
    costs = [1.0 + 2 * i / 100 for i in range(100)]
    clock = ticking(monkeypatch, costs[:80], float, chunks=100)
    assert clock.eta_s == pytest.approx(sum(costs[80:]), rel=0.15)


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
