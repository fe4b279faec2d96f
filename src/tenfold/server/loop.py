"""The engine's loop: jobs go in, events come out, and between them one step after the other.

A stream's token and a part of a prompt run in passes of their own, so that what stops the one leaves the other alone.
Whatever goes wrong with a job ends that job. What was read goes to the store from a second thread; a job's memory is
free once that is done. Knows nothing of processes and sockets.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from tenfold.engine import Engine
from tenfold.errors import DoesNotFit, RunError, TenfoldError, UsageError
from tenfold.scheduler import Plan, Policy, QueueFull, Read, Scheduler
from tenfold.server.task import ReadingPace, Task
from tenfold.server.wire import (
    Admitted,
    Cancel,
    Constraint,
    Event,
    Failed,
    Finished,
    Heartbeat,
    Job,
    Message,
    Queued,
    Shutdown,
    Tokens,
)

__all__ = ["Grammars", "Loop", "policy_of"]

_REST_S = 0.25
_PULSE_EVERY_S = 0.4
_TICK_EVERY_S = 0.05
_QUEUE_EVERY_S = 1.0
_GATHER_S = 0.02
_TYPICAL_CONTEXT = 1 << 16
_LEAST_STREAMED_TOKENS = 4096
_TURN_S = 2.0
_DECODE_SHARE = 0.6
"""Half is promised. Behind a part of a prompt a stream finds the caches cold, and the store takes some time as well."""
_MOST_QUEUED_TOKENS = 1 << 24
_SHUTTING_DOWN = "the server is shutting down; send the request again in a moment"
_log = logging.getLogger(__name__)


class Grammars(Protocol):
    """Turns demands on an output into matchers, as `tenfold.constrain` does."""

    def start(self, demand: Constraint, tenant: str = "") -> Future[Any]:
        """Of a Matcher."""


class _CutShort(BaseException):
    """Ends a pass whose tokens nobody wants any more."""


def policy_of(engine: Engine, queue_jobs: int) -> Policy:
    """What sessions may take together: the budget less what the process has already and what a pass takes.

    Where weights come from disk a pass costs nearly the same for few tokens as for many, so it has many.
    """
    need = engine.need(min(_TYPICAL_CONTEXT, engine.config.max_position_embeddings))
    taken = need.base_bytes + need.residual_bytes + need.scratch_bytes
    memory_bytes = engine.budget.memory_bytes - taken
    policy = Policy(memory_bytes, need.chunk_tokens, decode_share=_DECODE_SHARE, turn_s=_TURN_S, queue_jobs=queue_jobs)
    if engine.budget.streamed:
        return replace(policy, least_chunk_tokens=min(need.chunk_tokens, _LEAST_STREAMED_TOKENS))
    return policy


class Loop:
    """Runs in one thread; `inbox` takes messages, and calls to make, from any. `send` gets events in their order."""

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        send: Callable[[Sequence[Event]], None],
        inbox: queue.SimpleQueue[Message | Callable[[], None]],
        grammars: Grammars | None = None,
    ) -> None:
        self.engine, self.policy, self.inbox, self.grammars = engine, policy, inbox, grammars
        self.scheduler = Scheduler(policy)
        self._reading_cost = engine.reading_cost()
        self.pulse = Heartbeat(0, 0, 0, 0, 0, 0)
        self.steps = 0
        self.closing = False
        self._send = send
        self._unsent: list[Event] = []
        self._completed: list[Callable[[], None]] = []
        self._tasks: dict[str, Task] = {}
        self._ended: dict[str, Task] = {}
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._store_bytes = 0
        self._newcomers = False
        self._pulsed_s = self._queued_s = self._ticked_s = self._sent_s = 0.0

    def run(self) -> None:
        """Until it is told to shut down; what was read is then on its way to the store."""
        while not self.closing:
            self.turn()
        for task in tuple(self._tasks.values()):
            self._end(task, Failed(task.id, "engine", _SHUTTING_DOWN, again=True))
        self._put_away()
        self._flush()

    def settle(self, seconds: float) -> bool:
        """Waits until all that was handed to the store is there; whether it is."""
        deadline = time.monotonic() + seconds
        while self._tasks and time.monotonic() < deadline:
            self._receive(_REST_S)
            self._put_away()
            self._flush()
        return not self._tasks

    def turn(self) -> None:
        """What has come, then one step, or a rest where there is none."""
        self._receive()
        self._put_away()
        for name in self.scheduler.admit():
            self._open(self._tasks[name])
        plan = self.scheduler.plan()
        self._report()
        if plan.decode or plan.reads:
            self._step(plan)
        else:
            self._flush()
            self._receive(_REST_S)

    # ------------------------------------------------------------------------------------------ what comes

    def _receive(self, wait_s: float = 0.0, *, recording: bool = False) -> None:
        """Takes what has come, also within a pass: that may be long. At rest, waits a little for it: who looks at
        the pulse should see that all is well. Where torch may be `recording` a pass, calls wait for its end: what they
        compute would become part of it."""
        self.steps += 1
        if not recording:
            calls, self._completed = self._completed, []
            for call in calls:
                call()
        try:
            message = self.inbox.get(timeout=wait_s) if wait_s else self.inbox.get_nowait()
            while True:
                if recording and callable(message):
                    self._completed.append(message)
                else:
                    self._take(message)
                message = self.inbox.get_nowait()
        except queue.Empty:
            return

    def _has_news(self) -> bool:
        """Whether there may be something to do within a pass: small models tick a thousand times a second."""
        now = time.monotonic()
        if self.inbox.empty() and now - self._ticked_s < _TICK_EVERY_S:
            return False
        self._ticked_s = now
        return True

    def _take(self, message: Message | Callable[[], None]) -> None:
        match message:
            case Job():
                self._submit(message)
            case Cancel():
                if (task := self._tasks.get(message.id)) is not None:
                    self._end(task, Finished(task.id, "cancelled"))
            case Shutdown():
                self.closing = True
            case _ if callable(message):
                message()

    def _submit(self, job: Job) -> None:
        try:
            if self.closing:
                raise RunError(_SHUTTING_DOWN)
            if self._queued_tokens() + len(job.prompt) > _MOST_QUEUED_TOKENS:
                raise QueueFull("the prompts that wait hold as many tokens as they may; try again later")
            if job.constraint is not None and self.grammars is None:
                raise UsageError("this server cannot hold an output to a schema; leave the schema out")
            task = Task.of(job, self.engine)
            need = self.engine.need(task.context)
            self.scheduler.submit(job.id, job.client, len(task.prompt), need.kv_bytes + need.points_bytes)
        except BaseException as exc:
            self._say(_failure(job.id, exc))
        else:
            self._tasks[job.id] = task
            self._newcomers = True

    def _queued_tokens(self) -> int:
        return sum(len(task.prompt) for task in self._tasks.values() if task.session is None)

    # ------------------------------------------------------------------------------------------ beginnings

    def _open(self, task: Task) -> None:
        """Takes a job's memory, looks for its prompt in the store, has its demand compiled."""
        try:
            session = task.open()
            if self.engine.keeper is not None:
                self._wait(task, self._disk.submit(session.resume, task.prompt), self._resumed)
            if task.job.constraint is not None and self.grammars is not None:
                self._wait(task, self.grammars.start(task.job.constraint, task.job.cache), self._compiled)
        except BaseException as exc:
            self._fail(task, exc)
            return
        if task.pending:
            self.scheduler.hold(task.id)
        else:
            self._opened(task)

    def _wait(self, task: Task, future: Future[Any], then: Callable[[Task, Future[Any]], None]) -> None:
        """`then` is called by this loop, not by whoever completes the future."""
        task.pending += 1
        future.add_done_callback(lambda done: self.inbox.put(partial(self._waited, task, done, then)))

    def _waited(self, task: Task, done: Future[Any], then: Callable[[Task, Future[Any]], None]) -> None:
        task.pending -= 1
        if task.over:
            return
        try:
            then(task, done)
        except BaseException as exc:
            self._fail(task, exc)
        else:
            if not task.pending:
                self._opened(task)

    def _resumed(self, task: Task, done: Future[Any]) -> None:
        if (error := done.exception()) is not None:
            _log.warning("the store could not be used for a request: %s; it is read from the start", error)
            task.open()

    def _compiled(self, task: Task, done: Future[Any]) -> None:
        task.matcher = done.result()

    def _opened(self, task: Task) -> None:
        cached = task.live.length
        self.scheduler.resumed(task.id, cached)
        self._say(Admitted(task.id, cached))
        task.pace = ReadingPace.of(task, self._reading_cost, cached)
        if cached == len(task.prompt):
            self._sample(task)

    # ------------------------------------------------------------------------------------------ steps

    def _step(self, plan: Plan) -> None:
        began = time.monotonic()
        self._decode([self._tasks[name] for name in plan.decode])
        seconds = time.monotonic() - began
        if plan.reads:
            self._flush()
        reads = self._read(plan.reads)
        if reads:
            seconds = time.monotonic() - began
        if plan.decode or reads:
            self.scheduler.done(Plan(plan.decode, reads), seconds)

    def _decode(self, tasks: Sequence[Task]) -> None:
        """A token for each; the pass is cut short only if nobody wants any of them."""

        def tick(share: float) -> None:
            if not self._has_news():
                return
            self._receive(recording=True)
            self._report()
            if all(task.over for task in tasks):
                raise _CutShort

        for task in self._pass({task: [task.next_id or 0] for task in tasks if not task.over}, tick):
            if not task.over:
                self._sample(task)
        self._flush(gather=True)

    def _read(self, reads: Sequence[Read]) -> tuple[Read, ...]:
        """The parts of prompts that were read; the pass is cut short if most of its tokens are not wanted any more."""
        parts = {self._tasks[read.job]: read for read in reads if not self._tasks[read.job].over}

        def tick(share: float) -> None:
            if not self._has_news():
                return
            self._receive()
            for task, read in parts.items():
                if task.pace is not None and task.pace.is_due and not task.over:
                    self._say(task.pace.progress(task.id, read.position + int(share * read.num_tokens)))
            self._report()
            unwanted = sum(read.num_tokens for task, read in parts.items() if task.over)
            if self.closing or 2 * unwanted > sum(read.num_tokens for read in parts.values()):
                raise _CutShort

        ids = {task: task.prompt[read.position : read.position + read.num_tokens] for task, read in parts.items()}
        done = self._pass(ids, tick)
        for task in done:
            if not task.over:
                self._has_read(task)
        return tuple(parts[task] for task in done)

    def _has_read(self, task: Task) -> None:
        done, whole = task.live.length, len(task.prompt)
        if task.pace is not None and (task.pace.is_due or done == whole):
            self._say(task.pace.progress(task.id, done))
        if done == whole:
            self._sample(task)
            self._flush()
        if not task.over and (done == whole or (not task.keeping and task.live.is_time_to_keep())):
            self._keep(task)

    def _pass(self, parts: Mapping[Task, Sequence[int]], tick: Callable[[float], None]) -> list[Task]:
        """The tasks whose tokens were added. If a pass goes wrong, each runs alone: who is to blame shows."""
        before = {task: task.live.length for task in parts}
        try:
            self.engine.step({task.live: ids for task, ids in parts.items()}, tick)
        except _CutShort:
            return []
        except BaseException as exc:
            if len(parts) == 1:
                self._fail(next(iter(parts)), exc)
                return []
            done = []
            for task, ids in parts.items():
                done += [task] if task.live.length > before[task] else self._pass({task: ids}, tick)
            return done
        return list(parts)

    def _sample(self, task: Task) -> None:
        try:
            token = None if task.full else task.sample()
        except BaseException as exc:
            self._fail(task, exc)
            return
        if token is not None:
            self._say(Tokens(task.id, (token,)))
        if token is None or task.full:
            self._end(task, Finished(task.id, "length" if task.full else "stop"))

    # ------------------------------------------------------------------------------------------ ends

    def _fail(self, task: Task, error: BaseException) -> None:
        task.sound = False
        self._end(task, _failure(task.id, error))

    def _end(self, task: Task, event: Finished | Failed) -> None:
        """The job's last event; its session may be in the middle of a pass, and is put away behind it."""
        if not task.over:
            task.over = True
            self._say(event)
            self._ended[task.id] = task

    def _put_away(self) -> None:
        """Keeps what the jobs that have ended have read, then frees their memory."""
        for task in [task for task in self._ended.values() if not task.pending]:
            del self._ended[task.id]
            if task.session is not None and task.sound:
                self.scheduler.hold(task.id)
                self._keep(task)
            if not task.keeping:
                self._forget(task)

    def _keep(self, task: Task) -> None:
        keeper = self.engine.keeper
        try:
            task.live.fall_back()
            keep = task.live.keeping("end" if task.live.length >= len(task.prompt) else "auto")
        except BaseException as exc:
            _log.error("what a request has read cannot be kept: %s", type(exc).__name__)
            return
        if keep is None or keeper is None:
            return

        def work() -> int:
            keep()
            return keeper.store.index.total_bytes()

        task.keeping += 1
        self._disk.submit(work).add_done_callback(lambda done: self.inbox.put(partial(self._kept, task, done)))

    def _kept(self, task: Task, done: Future[int]) -> None:
        task.keeping -= 1
        if (error := done.exception()) is not None:
            _log.warning("what a request has read could not be kept: %s", error)
        else:
            self._store_bytes = done.result()
        if task.over and not task.keeping and task.id not in self._ended:
            self._forget(task)

    def _forget(self, task: Task) -> None:
        self.scheduler.end(task.id)
        del self._tasks[task.id]

    # ------------------------------------------------------------------------------------------ what is told

    def _say(self, event: Event) -> None:
        self._unsent.append(event)

    def _flush(self, *, gather: bool = False) -> None:
        """Sends all that is unsent. With `gather`, tokens may wait a moment for the next: to wake the other process and
        have it write to its client costs many times what a token does."""
        now = time.monotonic()
        may_wait = gather and now - self._sent_s < _GATHER_S and all(isinstance(one, Tokens) for one in self._unsent)
        if self._unsent and not may_wait:
            unsent, self._unsent, self._sent_s = self._unsent, [], now
            self._send(_merged(unsent))

    def _report(self) -> None:
        """Places in the queue where they have changed, the figures of the pulse, and all that is unsent."""
        now = time.monotonic()
        if self._newcomers or now - self._queued_s >= _QUEUE_EVERY_S:
            self._queued_s, self._newcomers = now, False
            for ahead, task in enumerate(self._tasks[name] for name in self.scheduler.queue()):
                if task.ahead != ahead and not task.over:
                    task.ahead = ahead
                    self._say(Queued(task.id, ahead))
        if now - self._pulsed_s >= _PULSE_EVERY_S:
            self._pulsed_s = now
            live = [task.session for task in self._tasks.values() if task.session is not None and not task.over]
            kv_bytes = sum(sum(session.kv_bytes().values()) for session in live)
            self.pulse = Heartbeat(self.steps, len(live), len(self.scheduler.queue()), kv_bytes, 0, self._store_bytes)
        self._flush(gather=True)


def _merged(events: Sequence[Event]) -> list[Event]:
    """The same, tokens of a job that nothing else of it comes between in one event."""
    merged: list[Event] = []
    newest: dict[str, int] = {}
    for event in events:
        before = merged[newest[event.id]] if event.id in newest else None
        if isinstance(event, Tokens) and isinstance(before, Tokens):
            merged[newest[event.id]] = Tokens(event.id, before.tokens + event.tokens)
        else:
            newest[event.id] = len(merged)
            merged.append(event)
    return merged


def _failure(job_id: str, error: BaseException) -> Failed:
    """What a job's client is told. Of an error that is not ours only the kind: it may quote the prompt."""
    if isinstance(error, QueueFull):
        return Failed(job_id, "full", str(error), again=True)
    if isinstance(error, UsageError):
        return Failed(job_id, "input", str(error))
    if isinstance(error, DoesNotFit):
        return Failed(job_id, "memory", str(error))
    if isinstance(error, TenfoldError):
        return Failed(job_id, "engine", str(error), again=str(error) == _SHUTTING_DOWN)
    _log.error("a request has failed", exc_info=error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return Failed(job_id, "memory", "there is no memory left for this request; try again later", again=True)
    return Failed(job_id, "engine", f"the engine cannot do this ({type(error).__name__}); its log says more")
