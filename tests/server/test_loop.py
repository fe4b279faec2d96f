"""The engine's loop with a real, small model: the library's answers, however many ask, whatever goes wrong beside."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold import Engine, SamplingParams
from tenfold.scheduler import Policy
from tenfold.server.loop import Grammars, Loop, policy_of
from tenfold.server.wire import (
    Admitted,
    Event,
    Failed,
    Finished,
    Job,
    Message,
    Tokens,
)

MEMORY = "1G"
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

    def cached(self, name: str) -> int:
        return next(event.cached_tokens for event in self.of(name) if isinstance(event, Admitted))

    def until(self, met: Callable[[], object], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not met():
            assert time.monotonic() < deadline, "it takes too long"
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


def test_keys_do_not_meet(engine: Engine) -> None:
    desk, prompt = Desk(engine), text(300)
    desk.run(job("a", prompt, cache="a"))
    desk.run(job("b", prompt, cache="b"), job("none", prompt))
    desk.run(job("a2", prompt, cache="a"))
    assert [desk.cached(name) for name in ("a", "b", "none", "a2")] == [0, 0, 0, 300]
