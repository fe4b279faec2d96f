"""The real engine in its own process: right answers; killed and stopped under streams; back with what it had read."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from tests.server.clock import awake_s
from tests.server.kills import kills

from tenfold import Engine, SamplingParams
from tenfold.server.engine_client import EngineProcess
from tenfold.server.wire import Admitted, Event, Failed, Finished, Job, Progress, Start, Tokens

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True}


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as one:
        yield one


@pytest.fixture(scope="module")
def process(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """One engine for all tests here; those that kill it get it back."""
    store = tmp_path_factory.mktemp("serve") / "store"
    start = Start("tiny-v4-flash", memory="3G", threads=1, store=str(store))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")

        async def opened() -> EngineProcess:
            made = EngineProcess(start, heartbeat_s=3.0)
            await made.open()
            return made

        one = runner.run(opened())
        yield one
        runner.run(one.close(5.0))
    assert one._process is not None
    assert one._process.returncode == 0


def text(count: int, seed: int) -> tuple[int, ...]:
    dice = random.Random(seed)
    return tuple(dice.randrange(2, 2000) for _ in range(count))


def job(name: str, prompt: tuple[int, ...], **sampling: Any) -> Job:
    return Job(name, "c", "", prompt, {**GREEDY, **sampling})


async def events_of(process: EngineProcess, asked: Job) -> list[Event]:
    return [event async for event in process.run(asked)]


def said(events: list[Event]) -> list[int]:
    return [token.id for event in events if isinstance(event, Tokens) for token in event.tokens]


def cached(events: list[Event]) -> int:
    return next(event.cached_tokens for event in events if isinstance(event, Admitted))


async def all_is_kept(process: EngineProcess) -> None:
    """The store has not grown for a while."""
    before, since = -1, awake_s()
    while awake_s() - since < 1.5:
        await asyncio.sleep(0.05)
        if process.pulse is None or process.pulse.store_bytes != before:
            before, since = -1 if process.pulse is None else process.pulse.store_bytes, awake_s()


def in_turn(runner: asyncio.Runner, process: EngineProcess, work: Callable[[], Awaitable[None]]) -> None:
    async def ready() -> None:
        await process.loaded()
        await work()

    runner.run(cast(Any, ready()))


def test_many_streams_say_what_the_library_says(runner: asyncio.Runner, process: EngineProcess) -> None:
    engine = Engine.load("tiny-v4-flash", memory="3G", threads=1)

    async def work() -> None:
        jobs = [job(f"many {n}", text(20 + n, n)) for n in range(12)]
        found = await asyncio.gather(*(events_of(process, one) for one in jobs))
        for one, events in zip(jobs, found, strict=True):
            session = engine.session(len(one.prompt) + 16)
            session.feed(one.prompt)
            assert said(events) == [sampled.id for sampled in session.generate(SamplingParams(**GREEDY))]
            assert events[-1] == Finished(one.id, "length")
        assert process.alive()

    in_turn(runner, process, work)


def test_a_long_prompt_is_dropped_within_two_seconds_and_goes_on_where_it_was(
    runner: asyncio.Runner, process: EngineProcess
) -> None:
    prompt = text(60_000, 1)  # its first Progress comes after half a second

    async def work() -> None:
        reached = 0
        async for event in process.run(job("dropped", prompt)):
            match event:
                case Progress() if event.done > 5000 and not reached:
                    reached = event.done
                    began = awake_s()
                    await process.cancel("dropped")
                case Finished():
                    assert event.reason == "cancelled"
                    assert awake_s() - began < 2.0
        while process.pulse is None or process.pulse.running:
            await asyncio.sleep(0.05)
        events = await events_of(process, job("again", prompt[: reached + 1], max_tokens=1))
        assert cached(events) >= reached - 4096

    in_turn(runner, process, work)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_is_lost_under_streams_ends_them_and_comes_back_with_what_it_read(
    runner: asyncio.Runner, process: EngineProcess, how: signal.Signals
) -> None:
    async def work() -> None:
        prompts, heard = [text(200, 50 * int(how) + n) for n in range(8)], list[Event]()

        async def listen(asked: Job) -> Event:
            async for event in process.run(asked):
                heard.append(event)
            return event

        streams = [
            asyncio.create_task(listen(job(f"{how} {n}", one, max_tokens=10**5))) for n, one in enumerate(prompts)
        ]
        while len({event.id for event in heard if isinstance(event, Tokens)}) < 8:
            await asyncio.sleep(0.05)
        await all_is_kept(process)
        assert process._process is not None
        began = awake_s()
        os.kill(process._process.pid, how)
        for last in await asyncio.gather(*streams):
            assert isinstance(last, Failed)
            assert last.again
        assert awake_s() - began < (1.0 if how == signal.SIGKILL else 6.0)
        assert not process.alive()
        await process.loaded()
        assert cached(await events_of(process, job("after", prompts[0]))) == 200

    in_turn(runner, process, work)


def test_answers_are_right_however_often_an_engine_dies(tmp_path: Path) -> None:
    check(kills(tmp_path, 2, seed=1), 2)


@pytest.mark.slow
def test_answers_are_right_after_two_hundred_deaths(tmp_path: Path) -> None:
    check(kills(tmp_path, 200, seed=2), 200)


def check(found: dict[str, int], count: int) -> None:
    assert found["kills"] == count
    assert found["wrong"] == 0
    assert found["temporaries_left"] == 0
    assert found["answers"] > 0
    assert found["resumed"] > 0
