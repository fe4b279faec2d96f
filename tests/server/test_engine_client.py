"""The client of the engine process, against an engine without a model: what dies, stalls, raves or floods."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from tests.server.clock import awake_s

from tenfold.errors import RunError, UsageError
from tenfold.server import engine_client
from tenfold.server.engine_client import EngineProcess
from tenfold.server.wire import Event, Failed, Finished, Job, Queued, Start, Tokens

FAKE = Path(__file__).with_name("fake_worker.py")


class FakeProcess(EngineProcess):
    program = (str(FAKE),)


def job(name: str, do: str = "say", prompt: tuple[int, ...] = (1, 2, 3)) -> Job:
    return Job(name, "c", "", prompt, {"do": do})


@asynccontextmanager
async def engine(model: str = "fake", queue_jobs: int = 2000, **options: Any) -> AsyncIterator[FakeProcess]:
    process = FakeProcess(Start(model, queue_jobs=queue_jobs), **options)
    await process.open()
    try:
        await process.loaded()
        yield process
    finally:
        await process.close()
        assert process._process is None or process._process.returncode is not None


async def events_of(process: EngineProcess, asked: Job) -> list[Event]:
    return [event async for event in process.run(asked)]


async def until(met: Callable[[], object], seconds: float = 20.0) -> float:
    began = awake_s()
    while not met():
        assert awake_s() - began < seconds, "it takes too long"
        await asyncio.sleep(0.01)
    return awake_s() - began


def said(events: list[Event]) -> tuple[int, ...]:
    return tuple(token.id for event in events if isinstance(event, Tokens) for token in event.tokens)


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(cast(Any, work()))


def test_a_thousand_jobs_each_get_their_own() -> None:
    async def work() -> None:
        async with engine() as process:
            jobs = [job(str(n), prompt=tuple(range(n, n + 20))) for n in range(1000)]
            found = await asyncio.gather(*(events_of(process, one) for one in jobs))
            for one, events in zip(jobs, found, strict=True):
                assert said(events) == one.prompt
                assert events[-1] == Finished(one.id, "length")
            assert process._jobs == {}

    run(work)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("do", ["die", "rave", "fall silent", "stand still"])
def test_an_engine_that_dies_or_stalls_ends_its_jobs(do: str, restart: bool) -> None:
    async def work() -> None:
        async with engine(restart=restart, heartbeat_s=0.7, progress_s=0.7) as process:
            waiting = [asyncio.create_task(events_of(process, job(str(n), "queue"))) for n in range(8)]
            await until(lambda: len(process._jobs) == 8)
            began = awake_s()
            await events_of(process, job("bad", do))
            for events in await asyncio.gather(*waiting):
                last = events[-1]
                assert isinstance(last, Failed)
                assert (last.kind, last.again) == ("engine", True)
            assert awake_s() - began < 3.0
            assert not process.alive()
            (refused,) = await events_of(process, job("early"))
            assert isinstance(refused, Failed)
            assert refused.again
            if restart:
                await until(process.alive)
                assert said(await events_of(process, job("again"))) == (1, 2, 3)
            else:
                await process.over
                assert isinstance(process.problem, RunError)

    run(work)


def test_an_engine_that_cannot_be_started_again_at_once_is_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "_FIRST_PAUSE_S", 0.05)

    async def work() -> None:
        async with engine() as process:
            pairs, failed = socket.socketpair, 0

            def none_left() -> tuple[socket.socket, socket.socket]:
                nonlocal failed
                failed += 1
                if failed <= 3:
                    raise OSError(errno.EMFILE, "Too many open files")
                return pairs()

            monkeypatch.setattr(socket, "socketpair", none_left)
            await events_of(process, job("bad", "die"))
            await until(process.alive)
            assert failed == 4
            assert not process.over.done()
            assert said(await events_of(process, job("again"))) == (1, 2, 3)

    run(work)


def test_an_engine_that_can_never_be_started_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left() -> tuple[socket.socket, socket.socket]:
        raise OSError(errno.EMFILE, "Too many open files")

    async def work() -> None:
        process = FakeProcess(Start("fake"))
        monkeypatch.setattr(socket, "socketpair", none_left)
        await process.open()
        with pytest.raises(RunError, match="cannot be started"):
            await process.loaded()

    run(work)


def test_an_engine_that_is_stopped_is_not_alive() -> None:
    async def work() -> None:
        async with engine(heartbeat_s=60.0) as process:
            await until(process.alive)
            assert process._process is not None
            os.kill(process._process.pid, signal.SIGSTOP)
            try:
                assert await until(lambda: not process.alive()) < 5.0
            finally:
                os.kill(process._process.pid, signal.SIGCONT)
            await until(process.alive)

    run(work)


@pytest.mark.parametrize(
    ("model", "error", "words"), [("missing", UsageError, "no such"), ("crashes", RunError, "log")]
)
def test_an_engine_that_cannot_be_loaded_says_why_and_is_not_tried_again(
    model: str, error: type[Exception], words: str
) -> None:
    async def work() -> None:
        with pytest.raises(error, match=words):
            async with engine(model):
                pass

    run(work)


def test_an_engine_that_hangs_while_it_loads_is_ended_and_a_slow_one_is_not() -> None:
    async def work() -> None:
        with pytest.raises(RunError, match="stood still"):
            async with engine("hangs", loading_s=1.0):
                pass
        async with engine("slow", loading_s=1.0) as process:
            assert said(await events_of(process, job("a"))) == (1, 2, 3)

    run(work)


def test_a_reader_that_stands_still_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with engine() as process, aclosing(cast(Any, process.run(job("flood", "flood")))) as slow:
            await anext(slow)
            assert said(await events_of(process, job("other"))) == (1, 2, 3)
            rest = [event async for event in slow]
            assert isinstance(rest[-1], Failed)
            assert "not read" in rest[-1].message
            ids = said(rest)
            assert ids == tuple(range(len(ids)))
            assert len(ids) < 100_000

    run(work)


def test_a_closed_iterator_cancels_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        cancelled: list[str] = []

        async def note(self: EngineProcess, job_id: str) -> None:
            cancelled.append(job_id)

        monkeypatch.setattr(EngineProcess, "cancel", note)
        async with engine() as process:
            async with aclosing(cast(Any, process.run(job("a", "queue")))) as events:
                assert await anext(events) == Queued("a", 0)
            await events_of(process, job("b"))
            assert cancelled == ["a"]
            assert process._jobs == {}

    run(work)


def test_more_than_may_wait_are_refused_at_once() -> None:
    async def work() -> None:
        async with engine(queue_jobs=3) as process:
            waiting = [asyncio.create_task(events_of(process, job(str(n), "queue"))) for n in range(3)]
            await until(lambda: len(process._jobs) == 3)
            began = awake_s()
            (refused,) = await events_of(process, job("more"))
            assert awake_s() - began < 0.2
            assert refused == Failed("more", "full", "3 requests are waiting already; try again later", again=True)
            for task in waiting:
                task.cancel()

    run(work)


def test_what_cannot_be_sent_is_refused() -> None:
    async def work() -> None:
        async with engine() as process:
            for name, bad in (("a", job("a", prompt=(0,) * (3 << 20))), ("b", job("b", prompt=(-1,)))):
                (refused,) = await events_of(process, bad)
                assert isinstance(refused, Failed)
                assert (refused.id, refused.kind) == (name, "input")
            assert said(await events_of(process, job("good"))) == (1, 2, 3)

    run(work)


def test_draining_lets_jobs_finish_and_takes_no_more() -> None:
    async def work() -> None:
        async with engine() as process:
            held = asyncio.create_task(events_of(process, job("held", "queue")))
            await until(lambda: process._jobs)
            began = awake_s()
            closing = asyncio.create_task(process.close(0.5))
            await asyncio.sleep(0)
            (refused,) = await events_of(process, job("late"))
            assert isinstance(refused, Failed)
            await closing
            assert 0.4 <= awake_s() - began < 5.0
            assert isinstance((await held)[-1], Failed)
            assert process._process is not None
            assert process._process.returncode == 0

    run(work)


def test_closing_does_not_wait_for_an_engine_that_is_to_be_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "_FIRST_PAUSE_S", 60.0)

    async def work() -> None:
        async with engine() as process:
            await events_of(process, job("bad", "die"))
            assert process.ready is None
            began = awake_s()
            await process.close(30)
            assert awake_s() - began < 5.0

    run(work)


def test_secrets_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENFOLD_API_KEY", "x")
    monkeypatch.setenv("AWS_REGION", "x")
    monkeypatch.setenv("TENFOLD_ISA", "scalar")

    async def work() -> None:
        async with engine() as process:
            failed = (await events_of(process, job("x", "environment")))[-1]
            assert isinstance(failed, Failed)
            names = failed.message.split()
            assert "PATH" in names
            assert "TENFOLD_ISA" in names
            assert not {"TENFOLD_API_KEY", "AWS_REGION"} & set(names)

    run(work)


def test_a_dead_parent_leaves_no_engine() -> None:
    code = (
        "import asyncio, os, signal\n"
        "from tests.server.test_engine_client import engine\n"
        "async def work():\n"
        "    async with engine() as process:\n"
        "        print(process._process.pid, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(work())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    stat = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = awake_s() + 10
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert awake_s() < deadline, "the engine outlives its parent"
        time.sleep(0.05)
