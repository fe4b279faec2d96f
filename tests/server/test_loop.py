"""The engine's loop with a real, small model: the library's answers, however many ask, whatever goes wrong beside."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.server.clock import awake_s
from torch import Tensor

from tenfold import Engine, SamplingParams
from tenfold.engine import Session
from tenfold.errors import InputError, RunError
from tenfold.scheduler import Policy
from tenfold.server import loop
from tenfold.server.loop import Grammars, Loop, policy_of
from tenfold.server.task import Matcher, ReadingPace, Task
from tenfold.server.wire import (
    Admitted,
    Cancel,
    Constraint,
    Event,
    Failed,
    Finished,
    Job,
    Message,
    Progress,
    Queued,
    Shutdown,
    Tokens,
)

MEMORY = "3G"  # of a process in which other tests have run too
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


class Desk:
    """A loop in this thread, and all that it has said."""

    def __init__(self, engine: Engine, policy: Policy | None = None, grammars: Grammars | None = None) -> None:
        self.inbox: queue.SimpleQueue[Message | Callable[[], None]] = queue.SimpleQueue()
        self.said: list[Event] = []
        self.loop = Loop(engine, policy or policy_of(engine, 64), self.said.extend, self.inbox, grammars)

    def put(self, *messages: Message) -> None:
        for message in messages:
            self.inbox.put(message)

    def of(self, name: str) -> list[Event]:
        return [event for event in self.said if event.id == name]

    def ids(self, name: str) -> list[int]:
        return [token.id for event in self.of(name) if isinstance(event, Tokens) for token in event.tokens]

    def last(self, name: str) -> Event | None:
        events = self.of(name)
        assert not any(isinstance(event, Finished | Failed) for event in events[:-1])
        return events[-1] if events and isinstance(events[-1], Finished | Failed) else None

    def read(self, name: str) -> int:
        """How much of its prompt has been read: a Progress comes by the clock, on a fast machine after the whole."""
        task = self.loop._tasks.get(name)
        return 0 if task is None or task.session is None else task.live.length

    def cached(self, name: str) -> int:
        return next(event.cached_tokens for event in self.of(name) if isinstance(event, Admitted))

    def until(self, met: Callable[[], object], seconds: float = 120.0) -> None:
        deadline = awake_s() + seconds
        while not met():
            assert awake_s() < deadline, "it takes too long"
            self.loop.turn()

    def run(self, *jobs: Job) -> None:
        self.put(*jobs)
        self.until(lambda: all(self.last(job.id) for job in jobs))
        self.until(lambda: not self.loop._tasks)


def text(count: int, seed: int = 0) -> tuple[int, ...]:
    dice = random.Random(seed)
    return tuple(dice.randrange(2, 2000) for _ in range(count))


def job(name: str, prompt: tuple[int, ...], cache: str = "", client: str = "c", **sampling: Any) -> Job:
    return Job(name, client, cache, prompt, {**GREEDY, **sampling})


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain() -> Engine:
    return Engine.load("tiny-v4-flash", memory=MEMORY, threads=1)


@pytest.fixture
def engine(plain: Engine, tmp_path: Path) -> Engine:
    return Engine.load("tiny-v4-flash", memory=MEMORY, threads=1, store=tmp_path / "store")


def alone(engine: Engine, asked: Job) -> list[int]:
    """What the library says to the same."""
    session = engine.session(len(asked.prompt) + asked.sampling["max_tokens"])
    session.feed(asked.prompt)
    return [sampled.id for sampled in session.generate(SamplingParams(**asked.sampling))]


def test_many_at_once_each_get_what_the_library_says(plain: Engine) -> None:
    desk = Desk(plain)
    jobs = [
        job(str(n), text(random.Random(n).choice([1, 2, 40, 300]), n), client=str(n % 3), max_tokens=1 + n % 14)
        for n in range(20)
    ]
    jobs += [job(f"s{n}", text(30, n), temperature=1.0, top_p=0.9, seed=n) for n in range(4)]
    desk.run(*jobs)
    for one in jobs:
        assert desk.ids(one.id) == alone(plain, one), one.id
        assert desk.last(one.id) == Finished(one.id, "length")


def test_a_prompt_that_is_read_again_is_not(engine: Engine) -> None:
    desk, prompt = Desk(engine), text(400)
    desk.run(job("first", prompt))
    desk.run(job("again", prompt), job("on", prompt + tuple(desk.ids("first")) + text(9, 1)))
    assert desk.cached("first") == 0
    assert desk.cached("again") == 400
    assert desk.cached("on") == 400 + 11
    assert desk.ids("again") == desk.ids("first")


@pytest.mark.parametrize("stored", [False, True])
def test_tokens_wait_for_each_other_but_the_first_of_a_stream_for_nobody(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    monkeypatch.setattr(loop, "_GATHER_S", 1e9)
    desk, prompt = Desk(engine), text(200, 3)
    if stored:
        desk.run(job("before", prompt, max_tokens=1))
    desk.put(job("running", text(40), max_tokens=1000))
    desk.until(lambda: desk.ids("running"))
    desk.put(job("new", prompt))
    tasks = desk.loop._tasks
    desk.until(lambda: "new" in tasks and tasks["new"].sampled)
    assert len(desk.ids("new")) == 1
    desk.until(lambda: tasks["new"].sampled == 10)
    assert len(desk.ids("new")) == 1
    assert desk.cached("new") == (200 if stored else 0)


def test_nothing_is_computed_within_a_pass_that_may_be_recorded(plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    desk, step, within = Desk(plain), plain.step, [False]
    called: list[bool] = []

    def watched(parts: dict[Session, Any], tick: Callable[[float], None]) -> Any:
        def inside(share: float) -> None:
            desk.inbox.put(lambda: called.append(within[0]))
            within[0] = all(len(ids) == 1 for ids in parts.values())
            tick(share)
            within[0] = False

        return step(parts, inside)

    monkeypatch.setattr(plain, "step", watched)
    desk.run(job("a", text(5)))
    desk.loop.turn()
    assert called
    assert not any(called)


def test_keys_do_not_meet(engine: Engine) -> None:
    desk, prompt = Desk(engine), text(300)
    desk.run(job("a", prompt, cache="a"))
    desk.run(job("b", prompt, cache="b"), job("none", prompt))
    desk.run(job("a2", prompt, cache="a"))
    assert [desk.cached(name) for name in ("a", "b", "none", "a2")] == [0, 0, 0, 300]


def test_what_was_read_is_kept_when_a_job_is_cancelled(engine: Engine) -> None:
    """In the queue, while its prompt is read, while it decodes; and nobody beside it notices."""
    policy = Policy(memory_bytes=policy_of(engine, 64).memory_bytes, chunk_tokens=256, pause_s=1e-3, turn_s=1e-3)
    desk, prompt = Desk(engine, policy), text(1500)
    beside = job("beside", text(50, 1), max_tokens=300)
    desk.put(beside, job("reading", prompt))
    desk.until(lambda: desk.read("reading") > 600)
    reached = desk.read("reading")
    desk.put(Cancel("reading"), Cancel("unknown"), job("decoding", text(90, 2), max_tokens=5000))
    desk.until(lambda: len(desk.ids("decoding")) > 3)
    desk.put(Cancel("decoding"))
    desk.put(job("queued", text(5, 3)), Cancel("queued"))
    desk.until(lambda: all(desk.last(name) for name in ("reading", "decoding", "queued")))
    assert all(desk.last(n) == Finished(n, "cancelled") for n in ("reading", "decoding", "queued"))
    desk.until(lambda: desk.last("beside"))
    assert desk.ids("beside") == alone(engine, beside)
    desk.run(job("reading again", prompt), job("decoding again", text(90, 2) + tuple(desk.ids("decoding"))))
    assert reached - 128 < desk.cached("reading again") < 1500  # restore points lie so far apart
    assert desk.ids("reading again") == alone(engine, job("", prompt))
    assert desk.cached("decoding again") >= 90 + 3
    assert desk.loop._tasks == {}
    assert desk.loop.scheduler._running == {}


def test_a_long_pass_is_cut_short(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its next tick; one that mostly others want goes on."""
    ticks: list[float] = []
    desk, step = Desk(engine), Engine.step

    def slow(self: Engine, batch: Any, tick: Any = None) -> Any:
        def told(share: float) -> None:
            ticks.append(share)
            if len(ticks) == 3:
                desk.put(Cancel("small" if "small" in desk.loop._tasks else "long"))
            tick(share)

        return step(self, batch, told)

    monkeypatch.setattr(Engine, "step", slow)
    desk.put(job("long", text(1500)))
    desk.until(lambda: desk.last("long"))
    assert len(ticks) == 3
    ticks.clear()
    desk.run(job("small", text(4, 1)), job("large", text(25, 2)))
    assert desk.last("small") == Finished("small", "cancelled")
    assert desk.last("large") == Finished("large", "length")
    assert desk.ids("large") == alone(engine, job("", text(25, 2)))


class _Panic(BaseException):
    """As some libraries written in Rust raise."""


@pytest.mark.parametrize("error", [_Panic("at /secret"), RuntimeError("at /secret"), MemoryError()])
def test_what_goes_wrong_in_a_pass_ends_the_one_job(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    desk, step = Desk(engine), Engine.step

    def faulty(self: Engine, batch: Any, tick: Any = None) -> Any:
        if any(666 in ids for ids in batch.values()):
            step(self, {session: ids[:1] for session, ids in batch.items()}, lambda share: _raise(error))
        return step(self, batch, tick)

    monkeypatch.setattr(Engine, "step", faulty)
    good = [job(str(n), text(40 + n, n), max_tokens=30) for n in range(4)]
    desk.run(*good, job("bad", (5, 666, 7)))
    failed = desk.last("bad")
    assert isinstance(failed, Failed)
    assert failed.kind == ("memory" if isinstance(error, MemoryError) else "engine")
    assert "secret" not in failed.message
    monkeypatch.undo()
    for one in good:
        assert desk.ids(one.id) == alone(engine, one)


def _raise(error: BaseException) -> None:
    raise error


def test_impossible_logits_end_the_job_and_are_not_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    desk, prompt = Desk(engine), text(200)
    real = Task.sample
    monkeypatch.setattr(
        Task, "sample", lambda self: real(self) if self.id != "bad" else _raise(RunError("the logits contain nan"))
    )
    desk.run(job("bad", prompt), job("good", text(20, 1)))
    assert desk.last("bad") == Failed("bad", "engine", "the logits contain nan")
    desk.run(job("again", prompt))
    assert desk.cached("again") == 0


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (job("x", ()), "no tokens"),
        (job("x", (1, 2048)), "token id 2048 is outside the vocabulary, expected 0 to 2047"),
        (job("x", (5,) * ((1 << 20) + 1)), "1,048,577 tokens"),
        (job("x", (5,), temperature=-1), "temperature is -1"),
        (job("x", (5,), temperature="hot"), "temperature is 'hot'"),
        (job("x", (5,), wishes=3), "wishes"),
        (job("x", (5,), logit_bias={2048: 1.0}), "logit_bias names token 2048"),
        (job("x", (5,), max_tokens=0), "max_tokens is 0"),
        (job("x", (5,), seed=2**64), "seed is"),
        (job("x", (5,), logprobs=21), "logprobs is 21"),
        (Job("x", "c", "", (5,), {}, Constraint("json", "{}")), "schema"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_cannot_work_is_refused(plain: Engine, bad: Job, words: str) -> None:
    desk = Desk(plain)
    desk.run(bad)
    (failed,) = desk.of("x")
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.again) == ("input", False)
    assert words in failed.message
    assert len(failed.message) < 400


def test_what_does_not_fit_waits_or_is_refused(plain: Engine) -> None:
    need = plain.need(30_000)  # longer than it takes to be told one's place again
    one = need.kv_bytes + need.points_bytes
    desk = Desk(plain, Policy(memory_bytes=one, queue_jobs=2))
    desk.put(job("large", text(5), max_tokens=10**6), job("first", text(1600), max_tokens=28_400))
    desk.until(lambda: desk.of("first"))
    desk.put(*(job(str(n), text(1600, n), max_tokens=28_400) for n in range(3)))
    desk.until(lambda: desk.last("2"))
    assert [desk.last(n) and (desk.last(n).kind, desk.last(n).again) for n in ("large", "2")] == [  # type: ignore[union-attr]
        ("memory", False),
        ("full", True),
    ]
    desk.until(lambda: desk.of("1"))
    assert desk.of("0") == [Queued("0", 0)]
    assert desk.of("1") == [Queued("1", 1)]
    desk.put(Cancel("first"))
    desk.until(lambda: Admitted("0", 0) in desk.of("0") and Queued("1", 0) in desk.of("1"))


def test_the_end_of_a_context_ends_a_completion(plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(plain.config, max_position_embeddings=50)
    engine = Engine(config, plain.model, backend="x", exact=False, budget=plain.budget)
    desk = Desk(engine)
    desk.run(job("some", text(45)), job("none", text(50)))
    assert len(desk.ids("some")) == 5
    assert desk.ids("none") == []
    assert desk.last("some") == Finished("some", "length")
    assert desk.last("none") == Finished("none", "length")


def test_an_end_of_sequence_token_stops(plain: Engine) -> None:
    desk = Desk(plain)
    desk.run(job("x", text(9), ignore_eos=False, logit_bias={1: 100.0}))
    assert desk.ids("x") == []
    assert desk.last("x") == Finished("x", "stop")


class _OnlyTens:
    """A demand for tokens that are multiples of ten."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def allowed(self) -> Tensor:
        return torch.arange(2048) % 10 == 0

    def advance(self, token: int) -> None:
        self.seen.append(token)


class _Compiler:
    def __init__(self) -> None:
        self.futures: dict[str, Future[Matcher]] = {}

    def start(self, demand: Constraint, tenant: str = "") -> Future[Matcher]:
        self.futures[demand.schema] = Future()
        return self.futures[demand.schema]


def test_an_output_is_held_to_its_demand_once_that_is_compiled(engine: Engine) -> None:
    compiler, only = _Compiler(), _OnlyTens()
    desk = Desk(engine, grammars=compiler)
    for name in ("good", "bad"):
        desk.put(Job(name, "c", "", text(20), GREEDY, Constraint("json", name)))
    desk.put(job("free", text(20)))
    desk.until(lambda: desk.last("free"))
    assert not desk.of("good")
    compiler.futures["bad"].set_exception(InputError("the schema is no schema"))
    compiler.futures["good"].set_result(only)
    desk.until(lambda: desk.last("good") and desk.last("bad"))
    assert desk.last("bad") == Failed("bad", "input", "the schema is no schema")
    assert desk.ids("good") == only.seen
    assert len(only.seen) == 12
    assert all(token % 10 == 0 for token in only.seen)


def test_shutting_down_ends_all_and_keeps_what_was_read(engine: Engine) -> None:
    policy = Policy(memory_bytes=policy_of(engine, 64).memory_bytes, chunk_tokens=256, turn_s=1e-3)
    desk, prompt = Desk(engine, policy), text(1500)
    desk.put(job("reading", prompt))
    desk.until(lambda: desk.read("reading") > 600)
    reached = desk.read("reading")
    desk.put(Shutdown(), job("late", text(3)))
    desk.loop.run()
    for name in ("reading", "late"):
        failed = desk.last(name)
        assert isinstance(failed, Failed)
        assert failed.again
    assert desk.loop.settle(20)
    again = Desk(engine)
    again.run(job("again", prompt))
    assert again.cached("again") > reached - 128  # restore points lie so far apart


def test_a_disk_that_does_not_answer_holds_up_nobody_else(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    desk, resume = Desk(engine), Session.resume

    def waits(self: Session, ids: Any) -> Any:
        answers.wait(30)
        return resume(self, ids)

    desk.put(job("running", text(30), max_tokens=10**5))
    desk.until(lambda: len(desk.ids("running")) > 1)
    monkeypatch.setattr(Session, "resume", waits)
    desk.put(job("waiting", text(9, 1)), job("gone", text(9, 2)))
    before = len(desk.ids("running"))
    desk.until(lambda: len(desk.ids("running")) > before + 5)
    assert not desk.of("waiting")
    desk.put(Cancel("gone"))
    desk.until(lambda: desk.last("gone"))
    answers.set()
    desk.until(lambda: desk.last("waiting"))
    assert desk.ids("waiting") == alone(engine, job("", text(9, 1)))
    desk.put(Cancel("running"))
    desk.until(lambda: not desk.loop._tasks)


def test_a_store_in_trouble_changes_no_answer(plain: Engine, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Session, "resume", broken)
    monkeypatch.setattr("tenfold.keeping.Keeper.keep", broken)
    desk = Desk(engine)
    desk.run(job("x", text(40)))
    assert desk.ids("x") == alone(plain, job("", text(40)))


def test_the_time_a_prompt_still_needs_follows_from_the_work_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of which each costs as much as its position says: 3 of 4 parts are left at half of the way."""
    clock = iter([0.0, 10.0, 30.0])
    # Only the module's own `time`: other threads go on asking the real one.
    monkeypatch.setattr("tenfold.server.task.time", SimpleNamespace(monotonic=lambda: next(clock)))
    pace = ReadingPace(100, lambda position: position**2)
    pace._marks.append((next(clock), 0))
    assert pace.progress("x", 0) == Progress("x", 0, 100, 0.0, None)
    assert pace.progress("x", 50) == Progress("x", 50, 100, round(50 / 30, 2), 90.0)
