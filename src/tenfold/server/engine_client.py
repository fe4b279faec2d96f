"""The engine process as the HTTP side sees it: start it, give it jobs, hear of them, know how it is.

What comes is sorted into a queue for each job, where what nobody takes is merged: a slow reader holds up nobody. An
engine that dies or stands still ends its jobs with an error and is started again, or not, as configured. Knows frames
and processes; nothing of HTTP and nothing of models.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from tenfold.errors import RunError, TenfoldError, UsageError
from tenfold.server.wire import (
    HEADER_BYTES,
    Admitted,
    Cancel,
    Event,
    Failed,
    Finished,
    Heartbeat,
    Job,
    Message,
    Progress,
    Queued,
    Ready,
    Shutdown,
    Start,
    Token,
    Tokens,
    WireError,
    decode,
    encode,
    frame_sizes,
)

__all__ = ["EngineProcess", "Jobs"]

_LOOK_EVERY_S, _LOADING_LOOK_S = 0.25, 0.05
_FRESH_S, _MOVING_S = 3.0, 10.0
_LEAVE_S = 25.0
_PAGES_AND_TICKS = slice(7, 15)
"""Of /proc/PID/stat behind the name: minflt, cminflt, majflt, cmajflt, utime, stime, cutime, cstime."""
_MOST_UNSENT_BYTES = 64 << 20
_MOST_UNREAD_TOKENS = 1 << 16
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _GOOD_LIFE_S = 0.5, 30.0, 60.0
_INHERITED = ("PATH", "HOME", "USER", "LANG", "LC_", "TZ", "TMPDIR", "XDG_", "LD_", "DYLD_", "VIRTUAL_ENV", "PYTHON",
              "OMP_", "GOMP_", "KMP_", "MKL_", "CUDA_", "TENFOLD_")  # fmt: skip
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_log = logging.getLogger(__name__)


class Jobs(Protocol):
    """What the routes need of an engine; tests give them one without a model."""

    ready: Ready | None
    """None while loading, and while a dead engine is started again."""
    pulse: Heartbeat | None
    """The newest heartbeat."""

    def alive(self) -> bool:
        """Whether the engine makes progress: it is ready, and its heartbeat is at most some seconds old."""

    def run(self, job: Job) -> AsyncIterator[Event]:
        """The job's events; the last is Finished or Failed. Closing the iterator cancels the job."""

    async def cancel(self, job_id: str) -> None:
        """Stops a job; its iterator ends with Finished("cancelled")."""


class _Events:
    """The events of one job that nobody has taken yet: of places and progress the newest, tokens together."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.admitted = self.over = False
        self._events: deque[Event] = deque()
        self._tokens: list[Token] = []
        self._some = asyncio.Event()

    @property
    def unread_tokens(self) -> int:
        return len(self._tokens)

    def put(self, event: Event) -> None:
        if self.over:
            return
        if isinstance(event, Tokens):
            self._tokens += event.tokens
        else:
            self.admitted |= isinstance(event, Admitted)
            self.over = isinstance(event, Finished | Failed)
            if self._events and isinstance(event, Queued | Progress) and type(self._events[-1]) is type(event):
                self._events.pop()
            self._put_behind_tokens(event)
        self._some.set()

    def _put_behind_tokens(self, event: Event) -> None:
        if self.over and self._tokens:
            self._events.append(Tokens(self.job_id, tuple(self._tokens)))
            self._tokens = []
        self._events.append(event)

    async def take(self) -> Event:
        """The oldest event. Tokens come behind all others but the last."""
        await self._some.wait()
        event: Event
        if self._events:
            event = self._events.popleft()
        else:
            event, self._tokens = Tokens(self.job_id, tuple(self._tokens)), []
        if not self._events and not self._tokens:
            self._some.clear()
        return event


class _Link(asyncio.Protocol):
    """The socket to one engine process: bytes to messages and back."""

    def __init__(self, owner: EngineProcess) -> None:
        self._owner = owner
        self._bytes = bytearray()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._bytes += data
        try:
            at = 0
            while len(self._bytes) - at >= HEADER_BYTES:
                body_bytes, payload_bytes = frame_sizes(bytes(self._bytes[at : at + HEADER_BYTES]))
                start = at + HEADER_BYTES
                middle, stop = start + body_bytes, start + body_bytes + payload_bytes
                if len(self._bytes) < stop:
                    break
                self._owner.hear(decode(bytes(self._bytes[start:middle]), bytes(self._bytes[middle:stop])))
                at = stop
            del self._bytes[:at]
        except WireError as exc:
            _log.error("%s", exc)
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def send(self, message: Message) -> None:
        if not self.transport.is_closing():
            self.transport.write(encode(message))

    @property
    def is_full(self) -> bool:
        return self.transport.get_write_buffer_size() > _MOST_UNSENT_BYTES


class EngineProcess:
    """Jobs in a process of their own. `open` starts it, `close` ends it; between them it is watched.

    `heartbeat_s`: so long it may be silent; `progress_s`: so long its steps may stand still; `loading_s`: so long it
    may neither compute nor fetch anything before it is ready, however long that takes. Then it is killed. With
    `restart` it is started again; `over` ends when there will be no engine any more.
    """

    program: Sequence[str] = ("-m", "tenfold.server.worker")

    def __init__(
        self,
        start: Start,
        *,
        restart: bool = True,
        heartbeat_s: float = 10.0,
        progress_s: float = 60.0,
        loading_s: float = 300.0,
    ) -> None:
        self.ready: Ready | None = None
        self.pulse: Heartbeat | None = None
        self.problem: TenfoldError | None = None
        """Why the engine could not be loaded, or why there is none any more."""
        self.over: asyncio.Future[None]
        self._start, self._restart = start, restart
        self._heartbeat_s, self._progress_s, self._loading_s = heartbeat_s, progress_s, loading_s
        self._process: subprocess.Popen[bytes] | None = None
        self._link: _Link | None = None
        self._jobs: dict[str, _Events] = {}
        self._leaving = asyncio.Event()
        self._silent_s = self._still_s = 0.0
        self._idle = asyncio.Event()
        self._idle.set()
        self._supervisor: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------------------------------ life

    async def open(self) -> None:
        """Starts the process, and returns while it loads."""
        self.over = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise())

    async def loaded(self) -> Ready:
        """Waits until the engine is ready. Raises what keeps it from ever being so."""
        while self.ready is None and not self.over.done():
            await asyncio.sleep(_LOADING_LOOK_S)
        if self.ready is None:
            raise self.problem or RunError("the engine has ended; start the server again")
        return self.ready

    async def close(self, drain_s: float = 0.0) -> None:
        """Takes no more jobs, gives those under way `drain_s` seconds, and ends the engine when it has kept all."""
        self._leaving.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._idle.wait()
        if self.ready is None:
            self.kill()
        elif self._link is not None:
            self._link.send(Shutdown())
        if self._supervisor is not None:
            done, _ = await asyncio.wait([self._supervisor], timeout=_LEAVE_S)
            if not done:
                self.kill()
                await self._supervisor

    def kill(self) -> None:
        """Ends the engine at once; what it had not kept is lost."""
        if self._process is not None:
            self._process.kill()

    async def _supervise(self) -> None:
        """One engine after another; none after one that could not even be loaded the first time."""
        pause_s, ever_ready = _FIRST_PAUSE_S, False
        while True:
            began = time.monotonic()
            try:
                ever_ready |= await self._one_life()
            except OSError as exc:  # no descriptors, say, as long as all of them serve clients
                problem = RunError(f"the engine cannot be started: {exc}")
                _log.error("%s", problem)
                if not ever_ready or not self._restart:
                    self.problem = problem
            if self._closing or not self._restart or not ever_ready:
                break
            pause_s = _FIRST_PAUSE_S if time.monotonic() - began > _GOOD_LIFE_S else pause_s
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._leaving.wait()
                    break
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        if self.problem is None and not self._closing:
            self.problem = RunError("the engine has died; its log says more")
        self.over.set_result(None)

    async def _one_life(self) -> bool:
        """From the start of a process to its end; whether it was ready in between."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            with theirs:
                self._process = self._spawn(theirs)
        except OSError:
            ours.close()
            raise
        _, link = await asyncio.get_running_loop().create_connection(lambda: _Link(self), sock=ours)
        self._link = link
        link.send(self._start)
        try:
            await self._watch(link, self._process.pid)
        finally:
            was_ready = self.ready is not None
            self._fail_all()
            self._link = None
            link.transport.abort()
            await self._reap(self._process)
        return was_ready

    def _spawn(self, connection: socket.socket) -> subprocess.Popen[bytes]:
        """A process that has inherited its end of the connection."""
        return subprocess.Popen(
            [sys.executable, "-P", *self.program, str(connection.fileno())],
            pass_fds=[connection.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=_environment(os.environ),
            process_group=0,  # Ctrl-C is for us; the engine hears of it from us
        )

    async def _watch(self, link: _Link, pid: int) -> None:
        """Until the connection ends; kills an engine that is silent or stands still. Only time in which we could
        have heard of it counts."""
        self._silent_s = self._still_s = 0.0
        effort: int | None = None
        while not link.closed.done():
            await asyncio.wait([link.closed], timeout=_LOOK_EVERY_S)
            self._silent_s += _LOOK_EVERY_S
            self._still_s += _LOOK_EVERY_S
            if self.ready is None:
                before, effort = effort, _effort(pid)
                if effort is None or effort != before:
                    self._still_s = 0.0
                elif self._still_s > self._loading_s:
                    self.problem = RunError(
                        f"the engine has stood still for {self._loading_s:.0f} seconds while it loaded the model and "
                        "is killed; see whether the model's disk answers, then start the server again"
                    )
                    _log.error("%s", self.problem)
                    return
            elif self._silent_s > self._heartbeat_s or self._still_s > self._progress_s:
                _log.error("the engine stands still and is killed")
                return

    async def _reap(self, process: subprocess.Popen[bytes]) -> None:
        """The end of a process whose connection has ended; at its own pace only if all is well."""
        if not self._closing:
            process.kill()
        try:
            await asyncio.to_thread(process.wait, _LEAVE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk cannot even be killed
                await asyncio.to_thread(process.wait, _LEAVE_S)

    def _fail_all(self) -> None:
        self.ready = self.pulse = None
        message = "the server is shutting down" if self._closing else "the engine has died"
        for events in tuple(self._jobs.values()):
            events.put(Failed(events.job_id, "engine", f"{message}; send the request again in a moment", again=True))

    @property
    def _closing(self) -> bool:
        return self._leaving.is_set()

    # ------------------------------------------------------------------------------------------ jobs

    def alive(self) -> bool:
        return self.ready is not None and self._silent_s < _FRESH_S and self._still_s < _MOVING_S

    async def run(self, job: Job) -> AsyncIterator[Event]:
        if job.id in self._jobs:
            raise UsageError(f"there is a job {job.id!r} already; give each its own name")
        events = self._jobs[job.id] = _Events(job.id)
        self._idle.clear()
        try:
            if (refusal := self._submit(job)) is not None:
                events.put(refusal)
            while True:
                event = await events.take()
                yield event
                if isinstance(event, Finished | Failed):
                    return
        finally:
            del self._jobs[job.id]
            if not self._jobs:
                self._idle.set()
            if not events.over:
                await self.cancel(job.id)

    async def cancel(self, job_id: str) -> None:
        if self._link is not None:
            self._link.send(Cancel(job_id))

    def _submit(self, job: Job) -> Failed | None:
        """Sends a job to the engine; why not, if that cannot be done."""
        if self._closing:
            return Failed(job.id, "engine", "the server is shutting down; send the request again later", again=True)
        if self._link is None or self.ready is None:
            return Failed(job.id, "engine", "the model is being loaded; send the request again in a moment", again=True)
        waiting = sum(not events.admitted for events in self._jobs.values()) - 1
        if waiting >= self._start.queue_jobs or self._link.is_full:
            return Failed(job.id, "full", f"{waiting:,} requests are waiting already; try again later", again=True)
        try:
            self._link.send(job)
        except (WireError, TypeError, ValueError, OverflowError) as exc:
            return Failed(job.id, "input", f"the request cannot be passed on: {exc}")
        return None

    def hear(self, message: Message) -> None:
        """Takes a message of the engine."""
        match message:
            case Ready():
                self.ready, self.problem = message, None
                self._silent_s = self._still_s = 0.0
            case Heartbeat():
                if self.pulse is None or message.steps != self.pulse.steps:
                    self._still_s = 0.0
                self.pulse, self._silent_s = message, 0.0
            case Failed(id=""):
                self.problem = (UsageError if message.kind == "input" else RunError)(message.message)
            case Queued() | Admitted() | Progress() | Tokens() | Finished() | Failed():
                if (events := self._jobs.get(message.id)) is not None:
                    events.put(message)
                    self._mind_slow(events)

    def _mind_slow(self, events: _Events) -> None:
        """An answer that nobody takes ends, before it fills the memory."""
        if events.unread_tokens > _MOST_UNREAD_TOKENS and not events.over:
            events.put(Failed(events.job_id, "engine", "the answer was not read; read it as it comes", again=True))
            if self._link is not None:
                self._link.send(Cancel(events.job_id))


def _effort(pid: int) -> int | None:
    """What a process and its children have computed and fetched so far, in units that only grow: ticks of the processor
    and pages. None where the system does not tell."""
    try:
        words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return sum(map(int, words[_PAGES_AND_TICKS]))


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    """What an engine needs to find its libraries, and no secrets."""
    return {
        name: value
        for name, value in ours.items()
        if name.startswith(_INHERITED) and not any(word in name.upper() for word in _SECRET)
    }
