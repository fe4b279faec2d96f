"""One job in the engine: its prompt, its session, what it samples, how far it is. Knows nothing of other jobs."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tenfold.engine import Engine, Session
from tenfold.errors import ContextTooLong, InputError, UsageError
from tenfold.sampler import Sampler, SamplingParams
from tenfold.server.wire import Job, Progress, Token

__all__ = ["Matcher", "ReadingPace", "Task"]

_WINDOW_MARKS = 60
_MARK_EVERY_S = 0.5


class Matcher(Protocol):
    """The tokens that may come next, as `tenfold.constrain` works them out."""

    def allowed(self) -> Tensor:
        """bool [vocab]."""

    def advance(self, token: int) -> None: ...


@dataclass(eq=False, slots=True)
class Task:
    """A job from its arrival to the end of its session. `over`: its last event has been sent.

    `pending` counts what has to happen elsewhere before it can start, `keeping` what is being written of it. Of one
    that is not `sound` nothing is kept. `ahead`: the place in the queue that it was told.
    """

    job: Job
    prompt: array[int]
    params: SamplingParams
    engine: Engine
    session: Session | None = None
    matcher: Matcher | None = None
    sampler: Sampler | None = None
    next_id: int | None = None
    sampled: int = 0
    over: bool = False
    pending: int = 0
    keeping: int = 0
    sound: bool = True
    ahead: int | None = None
    pace: ReadingPace | None = None

    @classmethod
    def of(cls, job: Job, engine: Engine) -> Task:
        """Checks everything that can be wrong with a job. Raises UsageError."""
        try:
            params = SamplingParams(**job.sampling)
        except TypeError as exc:
            raise UsageError(f"the sampling parameters cannot be used: {exc}") from None
        params.check_vocabulary(engine.config.vocab_size)
        _check_prompt(job.prompt, engine)
        return cls(Job(job.id, job.client, job.cache, (), {}, job.constraint), array("i", job.prompt), params, engine)

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def most_tokens(self) -> int:
        """How many may be sampled before the model's context is full."""
        return min(self.params.max_tokens, self.engine.config.max_position_embeddings - len(self.prompt))

    @property
    def context(self) -> int:
        return len(self.prompt) + self.most_tokens

    def open(self) -> Session:
        """Takes its memory."""
        self.session = self.engine.session(self.context, self.job.cache)
        self.sampler = Sampler(self.params, self.prompt)
        return self.session

    @property
    def live(self) -> Session:
        assert self.session is not None
        return self.session

    def sample(self) -> Token | None:
        """The next token of the completion; None if it is an end-of-sequence token."""
        assert self.sampler is not None
        allowed = None if self.matcher is None else self.matcher.allowed()
        token = self._choose(self.sampler, allowed)
        held = self.matcher is not None  # behind the end of its grammar there is nothing
        if token.id in self.engine.config.eos_token_id and (held or not self.params.ignore_eos):
            return None
        if self.matcher is not None:
            self.matcher.advance(token.id)
        self.next_id, self.sampled = token.id, self.sampled + 1
        return token

    def _choose(self, sampler: Sampler, allowed: Tensor | None) -> Token:
        if self.params.logprobs is None:
            return Token(sampler.choose(self.live.last_logits, allowed))
        found = sampler.sample(self.live.last_logits, allowed)
        return Token(found.id, found.logprob, found.top)

    @property
    def full(self) -> bool:
        """Whether as much has been sampled as may be."""
        return self.sampled >= self.most_tokens


def _check_prompt(prompt: tuple[int, ...], engine: Engine) -> None:
    most, vocab = engine.config.max_position_embeddings, engine.config.vocab_size
    if not prompt:
        raise InputError("the prompt has no tokens; send some text")
    if len(prompt) > most:
        raise ContextTooLong(f"the prompt has {len(prompt):,} tokens, this model's context {most:,}; shorten it")
    if max(prompt) >= vocab:
        raise InputError(f"token id {max(prompt)} is outside the vocabulary, expected 0 to {vocab - 1}")


@dataclass(slots=True)
class ReadingPace:
    """How fast a prompt has been read lately, in tokens and in multiply-adds: tokens far back in a context cost more,
    by as much as the model says. What others took of the time counts, since they go on taking it."""

    total: int
    work_before: Callable[[int], float]
    _marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_WINDOW_MARKS))

    @classmethod
    def of(cls, task: Task, work_before: Callable[[int], float], done: int) -> ReadingPace:
        pace = cls(len(task.prompt), work_before)
        pace._marks.append((time.monotonic(), done))
        return pace

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._marks[-1][0] >= _MARK_EVERY_S

    def progress(self, job_id: str, done: int) -> Progress:
        now = time.monotonic()
        self._marks.append((now, done))
        then, before = self._marks[0]
        seconds, tokens = max(now - then, 1e-9), done - before
        if tokens <= 0 or done == self.total:
            return Progress(job_id, done, self.total, round(max(0, tokens) / seconds, 2), 0.0 if tokens > 0 else None)
        here = self.work_before(done)
        rate = (here - self.work_before(before)) / seconds
        eta_s = (self.work_before(self.total) - here) / rate
        return Progress(job_id, done, self.total, round(tokens / seconds, 2), round(eta_s, 2))
