"""`tenfold bench context`: a model at growing lengths: speed, live KV, bytes on disk, memory against the plan.

`walk` reads one timeline from frontier to frontier, so an interval is timed once; `sample` fills streams with random
rows and reads only what ends at a frontier, for models that would take days. At each frontier some tokens are decoded.
Knows sessions and the store; how it is shown is the caller's.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tenfold.contexts import pretend
from tenfold.engine import Engine, Progress, Session
from tenfold.store import Store
from tenfold.terminal import ReadingClock

__all__ = ["Frontier", "frontiers", "sample", "walk"]

_DECODE_STEPS = 16
_SAMPLE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Frontier:
    """Figures at `context` tokens. Prefill is that of the tokens since the frontier before, or of those sampled.

    `peak_rss_bytes` is the process's so far; `plan_bytes` what was planned before anything was read, mapped weights
    that were touched included. `eta_error` is how far the time predicted after a tenth of the whole read was off, at
    the last frontier alone.
    """

    context: int
    prefill_s: float
    prefill_tps: float
    decode_tps: float
    kv_bytes: int
    stored_bytes: int
    peak_rss_bytes: int
    plan_bytes: int
    eta_error: float | None = None

    def report(self) -> dict[str, float | None]:
        """All of it, for JSON and CSV."""
        return asdict(self)


def frontiers(longest: int) -> list[int]:
    """1K, 4K, 16K, ... and the longest itself."""
    found = [1 << shift for shift in range(10, 22, 2) if 1 << shift < longest]
    return [*found, longest]


def walk(
    engine: Engine, lengths: Sequence[int], ids: Sequence[int] | None = None, progress: Progress | None = None
) -> Iterator[Frontier]:
    """Reads `ids` (default: random tokens) to each length; stores what it reads in a folder that goes afterwards."""
    keeper = engine.keeper
    with tempfile.TemporaryDirectory() as folder:
        if keeper is not None:
            keeper.store = Store(Path(folder))
        ids = array("i", ids or torch.randint(0, engine.config.vocab_size, (lengths[-1],)).tolist())
        session = engine.session(min(lengths[-1] + _DECODE_STEPS, engine.config.max_position_embeddings))
        plan_bytes = _rss_bytes() + session.need.total_bytes - session.need.base_bytes
        clock = ReadingClock(lengths[-1])
        clock.weigh(engine.reading_cost())
        errors = _Predictions(clock)
        for length in lengths:
            done = session.length
            began = time.perf_counter()
            session.feed(ids[done:length], progress=_both(errors.advance, progress, done))
            prefill_s = time.perf_counter() - began
            yield Frontier(
                context=length,
                prefill_s=prefill_s,
                prefill_tps=(length - done) / prefill_s,
                decode_tps=_decode_tps(session, ids),
                kv_bytes=sum(session.kv_bytes().values()),
                stored_bytes=0 if keeper is None else keeper.store.index.total_bytes(),
                peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
                plan_bytes=plan_bytes + engine.budget.weights_bytes,
                eta_error=errors.worst() if length == lengths[-1] else None,
            )
        if keeper is not None:
            keeper.store.close()


def sample(engine: Engine, lengths: Sequence[int], progress: Progress | None = None) -> Iterator[Frontier]:
    """The last tokens before each length, from 1,024 on, read behind random rows; nothing is stored."""
    for length in lengths:
        session = engine.session(length)
        plan_bytes = _rss_bytes() + session.need.total_bytes - session.need.base_bytes + engine.budget.weights_bytes
        ids = torch.randint(0, engine.config.vocab_size, (_SAMPLE_TOKENS,)).tolist()
        pretend(session, length - _DECODE_STEPS - len(ids))
        began = time.perf_counter()
        engine.step({session: ids})
        prefill_s = time.perf_counter() - began
        if progress is not None:
            progress(length)
        yield Frontier(
            context=length,
            prefill_s=prefill_s,
            prefill_tps=len(ids) / prefill_s,
            decode_tps=1 / statistics.median(_step_s(session) for _ in range(_DECODE_STEPS)),
            kv_bytes=sum(session.kv_bytes().values()),
            stored_bytes=0,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
            plan_bytes=plan_bytes,
        )
        del session


class _Predictions:
    """How truthful the time left was, from a tenth of the read on; time spent elsewhere does not count."""

    def __init__(self, clock: ReadingClock) -> None:
        self.clock = clock
        self._totals: list[float] = []

    def advance(self, done: int) -> None:
        self.clock.advance(done)
        if self.clock.eta_s is not None and done >= self.clock.total / 10:
            self._totals.append(self.clock.elapsed_s + self.clock.eta_s)

    def worst(self) -> float | None:
        """The largest share by which a predicted total missed the true one."""
        true = self.clock.elapsed_s
        return max((abs(total / true - 1) for total in self._totals), default=None)


def _both(first: Progress, second: Progress | None, done: int) -> Callable[[int], None]:
    def progress(read: int) -> None:
        first(done + read)
        if second is not None:
            second(done + read)

    return progress


def _decode_tps(session: Session, ids: Sequence[int]) -> float:
    """Decoded tokens a second here, or just before the end where no room is left; the timeline ends as it was."""
    length = session.length
    start = length - max(0, _DECODE_STEPS - (session.context - length))
    session.rewind(start)
    step_s = statistics.median(_step_s(session) for _ in range(_DECODE_STEPS))
    session.rewind(start)
    session.feed(ids[start:length])
    return 1 / step_s


def _step_s(session: Session) -> float:
    began = time.perf_counter()
    session.engine.step({session: [int(session.last_logits.argmax())]})
    return time.perf_counter() - began


def _rss_bytes() -> int:
    """What is resident now, files' pages included."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0
