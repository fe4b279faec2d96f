"""What tenfold is for, on any laptop: embedded models find facts in a long text, and what that costs each of them.

The models that are asked read a haystack; others stand beside them for comparison: their memory filled with random
rows, so that only bytes and the speed at that depth are measured. `table` shows what `show` finds.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from tenfold import needle, retrieval, terminal
from tenfold.config import EMBEDDED, ModelConfig
from tenfold.contexts import pretend
from tenfold.engine import Engine, Session
from tenfold.errors import UsageError
from tenfold.haystack import Needle, Straw, build, embedded_document, evenly
from tenfold.machine import peak_bytes, restart_peak
from tenfold.planner import step_work
from tenfold.planner.work import RAW, total_flops
from tenfold.store import Store

__all__ = ["MODEL", "Column", "Task", "chosen", "embedded_document", "show"]

MODEL = "tiny-v4-flash"
_SAMPLE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Task:
    """What every model is asked: a haystack of `context` tokens with `needles` facts."""

    context: int
    needles: int
    seed: int
    text: str | None = None
    store: Store | None = None
    memory: str | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """One model's figures. Of a model that did not read, only some tokens behind random rows are timed: `answers`,
    `right` and `seconds` are None. `flops` is what reading all of it takes, twice the multiply-adds."""

    model: str
    tokens: int
    stored_tokens: int
    answers: tuple[str, ...] | None
    right: tuple[bool, ...] | None
    seconds: float | None
    answer_seconds: float | None
    tokens_per_s: float | None
    peak_bytes: int | None
    kv_bytes: dict[str, int]
    kv_bytes_per_token: float
    flops: float

    def report(self) -> dict[str, Any]:
        """All of it, for JSON."""
        found = None if self.right is None else sum(self.right)
        return {**asdict(self), "found": found, "kv_bytes_total": sum(self.kv_bytes.values())}


def chosen(model: str | None, every: bool) -> tuple[list[str], list[str]]:
    """The models that read, and those that are measured beside them."""
    if every:
        if model is not None:
            raise UsageError(f"--all reads with every embedded model, {', '.join(EMBEDDED)}; leave --model away")
        return list(EMBEDDED), []
    name = model or MODEL
    return [name], [other for other in EMBEDDED if other != name] if name in EMBEDDED else []


def show(models: Sequence[str], beside: Sequence[str], task: Task) -> dict[str, Any]:
    """Lets `models` read and answer, measures those `beside` them, and returns all figures as JSON."""
    columns: list[Column] = []
    needles: tuple[Needle, ...] = ()
    ids = array("i")
    for name in models:
        column, needles, ids = _read(name, task)
        columns.append(column)
    for name in beside:
        columns.append(_sampled(name, task, ids))
    columns.sort(key=lambda column: -column.kv_bytes_per_token)
    return {
        "context": task.context,
        "seed": task.seed,
        "needles": [{**asdict(one.fact), "depth": round(one.depth, 4)} for one in needles],
        "models": {column.model: column.report() for column in columns},
    }


def _read(name: str, task: Task) -> tuple[Column, tuple[Needle, ...], array[int]]:
    """Its figures, what was hidden where, and the ids that it read."""
    with _own_peak() as peak:
        reader = retrieval.open_reader(name, memory=task.memory, threads=task.threads, store=task.store)
        facts = needle.facts(task.seed, task.needles)
        straw = Straw(embedded_document() if task.text is None else task.text, reader.encode)
        plant = list(zip(facts, evenly(len(facts)), strict=True))
        haystack = build(straw, reader.room_for(task.context, facts), plant, task.seed)
        ids = reader.prompt(haystack)
        with terminal.reading(len(ids), f"{reader.name:<14}") as clock:
            answers = reader.ask(haystack, clock)
        read = answers.tokens - answers.stored
        column = Column(
            model=reader.name,
            tokens=answers.tokens,
            stored_tokens=answers.stored,
            answers=answers.texts,
            right=tuple(needle.is_right(fact, text) for fact, text in zip(facts, answers.texts, strict=True)),
            seconds=round(answers.read_s, 3),
            answer_seconds=round(answers.answer_s, 3),
            tokens_per_s=round(read / answers.read_s, 1) if read else None,
            peak_bytes=peak(),
            kv_bytes=reader.session.kv_bytes(),
            kv_bytes_per_token=reader.engine.config.kv_bytes_per_token,
            flops=_flops(reader.engine.config, answers.tokens, reader.session.need.chunk_tokens),
        )
        return column, haystack.needles, ids


def _sampled(name: str, task: Task, ids: Sequence[int]) -> Column:
    """As if it had read all but the last tokens of `ids`, which are timed."""
    with _own_peak() as peak:
        engine = Engine.load(name, memory=task.memory, threads=task.threads)
        session = engine.session(len(ids))
        last = ids[-_SAMPLE_TOKENS:]
        with terminal.reading(len(last), f"{name:<14}") as clock:
            seconds = _feed_behind(session, len(ids) - len(last), last)
            clock.advance(len(last))
        return Column(
            model=name,
            tokens=len(ids),
            stored_tokens=0,
            answers=None,
            right=None,
            seconds=None,
            answer_seconds=None,
            tokens_per_s=round(len(last) / seconds, 1),
            peak_bytes=peak(),
            kv_bytes=session.kv_bytes(),
            kv_bytes_per_token=engine.config.kv_bytes_per_token,
            flops=_flops(engine.config, len(ids), session.need.chunk_tokens),
        )


def _feed_behind(session: Session, length: int, ids: Sequence[int]) -> float:
    if length:
        pretend(session, length)
    vocab = session.engine.config.vocab_size
    began = time.perf_counter()
    session.feed(array("i", (token % vocab for token in ids)))
    return time.perf_counter() - began


def _flops(config: ModelConfig, tokens: int, chunk_tokens: int) -> float:
    """Those of a read from the start, by the formulas that equal the engine's counters; the head runs once a chunk."""
    return total_flops(step_work(config, 0, tokens, num_logits=-(-tokens // chunk_tokens)), RAW)


@contextmanager
def _own_peak() -> Iterator[Callable[[], int | None]]:
    """What it gives tells the peak memory within the block: what models before held is gone. None where unknown."""
    gc.collect()
    known = restart_peak()
    yield lambda: peak_bytes() if known else None
