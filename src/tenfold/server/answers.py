"""Answers under way: jobs of the engine become bytes for a client, streamed or at once, and never silence.

A voice says things in its protocol; what is here says when: a sign of life before any silence is too long, an error
and an abrupt end where an answer breaks off, and the jobs cancelled as soon as nobody listens. Knows no protocol.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Literal, Protocol, cast

from tenfold.server.errors import ClientGone, Refusal, of_failure, openai_body
from tenfold.server.metrics import Times
from tenfold.server.service import Call
from tenfold.server.wire import Admitted, Event, Failed, Finished, Job, Progress, Queued, Tokens

__all__ = ["Voice", "speak"]

_Word = Literal["gone", "silent"]
_PROGRESS_S = 0.25
_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_JSON = [(b"content-type", b"application/json")]


class Voice(Protocol):
    """How one protocol says things. Indices are those of the jobs."""

    def opening(self) -> bytes:
        """The first bytes of a stream, before anything is known."""

    def admitted(self, index: int, cached_tokens: int) -> bytes: ...

    def tokens(self, index: int, tokens: Tokens) -> bytes: ...

    def over(self, index: int) -> bool:
        """Whether nothing more is wanted of a job that still runs."""

    def finished(self, index: int, reason: str) -> bytes: ...

    def ending(self) -> bytes:
        """The last bytes of a stream, once all jobs have finished."""

    def alive(self) -> bytes:
        """A sign of life."""

    def progress(self, event: Queued | Progress) -> bytes: ...

    def error(self, refusal: Refusal) -> bytes: ...

    def answer(self) -> dict[str, Any]:
        """All of it, where no stream was asked for."""


async def speak(call: Call, jobs: Sequence[Job], voice: Voice, *, stream: bool) -> None:
    """Runs the jobs and answers the client. Raises Refusal while the status can still be chosen, or ClientGone."""
    answer = _Answer(call, jobs, voice, stream)
    try:
        await answer.run()
    except ClientGone:
        answer.note("gone")
        raise
    except asyncio.CancelledError:
        answer.note("gone")
        if answer.is_stuck:
            raise ClientGone from None
        raise
    finally:
        answer.count()


class _Answer:
    def __init__(self, call: Call, jobs: Sequence[Job], voice: Voice, stream: bool) -> None:
        self.call, self.jobs, self.voice, self.stream = call, jobs, voice, stream
        self.queue: asyncio.Queue[tuple[int, Event | _Word]] = asyncio.Queue()
        began = time.monotonic()
        self.times = [Times(began, prompt_tokens=len(job.prompt)) for job in jobs]
        self.unfinished = set(range(len(jobs)))
        self.unheard = set(self.unfinished)
        self.tasks: list[asyncio.Task[None]] = []
        self.started = False
        self.unsent = b""
        self.spoke = self.progressed = began
        self.writing_since: float | None = None
        self.is_stuck = False

    async def run(self) -> None:
        self.unsent = self.voice.opening()
        async with self._running():
            while self.unfinished:
                await self._say(await self._heard())
        self._describe()
        if self.stream:
            await self._write(self.unsent + self.voice.ending(), more=False)
        elif self.started:
            await self._write(json.dumps(self.voice.answer(), ensure_ascii=False).encode(), more=False)
        else:
            await self.call.answer(self.voice.answer())

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        """The jobs, and an ear for the end of the connection; all of it ends with the block."""
        live = self.call.service.live
        self.tasks = [asyncio.create_task(self._pump(index, job)) for index, job in enumerate(self.jobs)]
        self.tasks.append(asyncio.create_task(self._listen()))
        self.tasks.append(asyncio.create_task(self._watch(asyncio.current_task())))
        live.add(self.queue)
        try:
            yield
        finally:
            live.discard(self.queue)
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _pump(self, index: int, job: Job) -> None:
        try:
            events = cast(AsyncGenerator[Event, None], self.call.service.jobs.run(job))
            async with aclosing(events):  # closing it cancels the job
                async for event in events:
                    self.queue.put_nowait((index, event))
        except Exception as exc:
            self.queue.put_nowait(
                (index, Failed(job.id, "engine", f"the engine failed: {type(exc).__name__}", again=True))
            )

    async def _listen(self) -> None:
        await self.call.gone()
        self.queue.put_nowait((0, "gone"))

    async def _watch(self, speaker: asyncio.Task[None] | None) -> None:
        """One timer for an answer, not two for each token: looks whether it has been silent, or its client deaf."""
        settings = self.call.service.settings
        while True:
            await asyncio.sleep(settings.keepalive_s / 4)
            now = time.monotonic()
            if self.writing_since is not None and now - self.writing_since > settings.write_timeout_s:
                self.is_stuck = True
                assert speaker is not None
                speaker.cancel()
                return
            if now - self.spoke >= settings.keepalive_s and self.queue.empty():
                self.queue.put_nowait((0, "silent"))

    async def _heard(self) -> list[tuple[int, Event | _Word]]:
        """All that has come since the last time; waits for some."""
        heard = [await self.queue.get()]
        while not self.queue.empty():
            heard.append(self.queue.get_nowait())
        return heard

    async def _say(self, heard: list[tuple[int, Event | _Word]]) -> None:
        for index, event in heard:
            if event == "gone":
                raise ClientGone
            if isinstance(event, str):
                continue
            self.unheard.discard(index)
            if isinstance(event, Failed):
                await self._break_off(event)
            else:
                self.unsent += self._said_of(index, event)
        silent = time.monotonic() - self.spoke >= self.call.service.settings.keepalive_s
        if not self.stream:
            self.unsent = b"\n" if silent else b""  # white space before a JSON object is no part of it
        elif silent and not self.unsent:
            self.unsent = self.voice.alive()
        # until every job has been heard of, the status may still become an error's
        if self.unsent and (silent or not self.unheard):
            unsent, self.unsent = self.unsent, b""
            await self._write(unsent)

    def _said_of(self, index: int, event: Event) -> bytes:
        times, now = self.times[index], time.monotonic()
        if index not in self.unfinished:
            return b""
        match event:
            case Tokens():
                times.first = times.first or now
                times.last = now
                times.completion_tokens += len(event.tokens)
                said = self.voice.tokens(index, event)
                return said + self._end(index, "stop") if self.voice.over(index) else said
            case Admitted():
                times.admitted, times.cached_tokens = now, event.cached_tokens
                total = times.prompt_tokens
                first = self._progress(Progress(event.id, event.cached_tokens, total, 0.0, None), now, always=True)
                return first + self.voice.admitted(index, event.cached_tokens)
            case Queued():
                return self._progress(event, now, always=True)
            case Progress():
                return self._progress(event, now, always=event.done == event.total)
            case Finished():
                return self._end(index, event.reason)
        return b""

    def _end(self, index: int, reason: str) -> bytes:
        self.unfinished.discard(index)
        self.times[index].reason = reason
        self.tasks[index].cancel()
        unasked = self.times[index].admitted is None
        return (self.voice.admitted(index, 0) if unasked else b"") + self.voice.finished(index, reason)

    def _progress(self, event: Queued | Progress, now: float, *, always: bool) -> bytes:
        if not self.stream or not self.call.wants_progress or (not always and now - self.progressed < _PROGRESS_S):
            return b""
        self.progressed = now
        return self.voice.progress(event)

    async def _break_off(self, failed: Failed) -> None:
        """An error where an answer can no longer be completed; after the first byte never a tidy end."""
        refusal = of_failure(failed, self.call.service.retry_after_s())
        self.note("error")
        self._describe()
        if self.started:
            last = self.voice.error(refusal) if self.stream else json.dumps(openai_body(refusal)).encode()
            await self._write(self.unsent + last)
        raise refusal

    async def _write(self, piece: bytes, *, more: bool = True) -> None:
        self.spoke = self.writing_since = time.monotonic()
        if not self.started:
            self.started = True
            await self.call.start(200, _STREAM if self.stream else _JSON)
        await self.call.write(piece, more=more)
        self.writing_since = None

    def note(self, reason: str) -> None:
        for index in self.unfinished:
            self.times[index].reason = reason

    def count(self) -> None:
        now = time.monotonic()
        for times in self.times:
            self.call.service.metrics.finished(times, now)

    def _describe(self) -> None:
        """For the line in the log: numbers only."""
        first = self.times[0]
        self.call.said |= {
            "prompt": first.prompt_tokens,
            "cached": first.cached_tokens,
            "completion": sum(times.completion_tokens for times in self.times),
            "ttft_s": _rounded(first.ttft_s),
            "tps": _rounded(first.tokens_per_s),
            "finish": ",".join(times.reason for times in self.times),
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
