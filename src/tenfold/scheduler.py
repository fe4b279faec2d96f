"""Which tokens run next: streams decode in every step, prompts are read in the time that leaves.

A prompt is read in chunks as long as they may be: a stream keeps `decode_share` of its tokens/s, and waits `pause_s`
for a chunk at most. What steps cost is measured as they run. Clients get equal shares of the reading time. Knows
nothing of models, memory or time: it is told bytes, and after each step the seconds it took; same calls, same plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tenfold.errors import DoesNotFit, RunError, UsageError

__all__ = ["Plan", "Policy", "QueueFull", "Read", "Scheduler"]

_NEWEST_WEIGHT = 0.3
_MOST_STEPS_UNMEASURED = 8
_SHALLOW_BITS = 10


class QueueFull(RunError):
    """As many jobs wait as may; a later try may find room."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What is promised. `least_chunk_tokens` are read at once even where that takes longer than `pause_s` (fewer would
    make poor use of the weights read for them; the share of the streams holds all the same). Without streams a
    chunk takes about `turn_s`, so that nobody who arrives waits longer."""

    memory_bytes: int
    chunk_tokens: int = 4096
    least_chunk_tokens: int = 32
    decode_share: float = 0.5
    pause_s: float = 0.25
    turn_s: float = 5.0
    queue_jobs: int = 256


@dataclass(frozen=True, slots=True)
class Read:
    """The next `num_tokens` of a job's prompt, from `position`."""

    job: str
    position: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: each job of `decode` adds a token, each of `reads` a part of its prompt. Empty: nothing to do."""

    decode: tuple[str, ...]
    reads: tuple[Read, ...]

    @property
    def read_tokens(self) -> int:
        return sum(read.num_tokens for read in self.reads)

    @property
    def depth(self) -> int:
        """Where the tokens read lie in their contexts, on average."""
        middles = sum(read.num_tokens * (read.position + read.num_tokens // 2) for read in self.reads)
        return middles // max(1, self.read_tokens)


@dataclass(slots=True)
class _Client:
    """`read_s` seconds of reading so far; who has had least is next. `clock_s`: what each of its jobs has had."""

    read_s: float
    clock_s: float = 0.0
    running: int = 0


@dataclass(slots=True)
class _Job:
    name: str
    number: int
    client: str
    position: int
    prompt_tokens: int
    memory_bytes: int
    read_s: float = 0.0
    held: bool = False

    @property
    def reads(self) -> bool:
        return self.position < self.prompt_tokens


@dataclass(slots=True)
class _Costs:
    """Moving averages of what was measured: steps that only decode, by streams; tokens read, by chunk and depth."""

    decode_s: dict[int, float] = field(default_factory=dict)
    token_s: dict[tuple[int, int], float] = field(default_factory=dict)

    def decoded(self, streams: int, seconds: float) -> None:
        self.decode_s[streams] = _averaged(self.decode_s.get(streams), seconds)

    def read(self, num_tokens: int, depth: int, seconds: float) -> None:
        key = _scale(num_tokens, depth)
        self.token_s[key] = _averaged(self.token_s.get(key), seconds / num_tokens)

    def knows(self, depth: int) -> bool:
        """Whether something was read about as deep; attention makes deep tokens many times as expensive."""
        deep = _scale(1, depth)[1]
        return any(abs(seen - deep) <= 1 for _, seen in self.token_s)

    def reading_s(self, num_tokens: int, depth: int) -> float:
        """What reading is expected to add to a step: from the nearest depth, then the nearest chunk, that was seen."""
        bits, deep = _scale(num_tokens, depth)
        nearest = min(self.token_s, key=lambda k: (abs(k[1] - deep), abs(k[0] - bits), k), default=None)
        return 0.0 if nearest is None else num_tokens * self.token_s[nearest]


class Scheduler:
    """Jobs wait in a bounded queue, are admitted when their memory fits, read their prompts, and decode until `end`.

    In turns: `admit`, `plan`, the step itself, `done`. The other calls may come between any two of them.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._waiting: dict[str, _Job] = {}
        self._running: dict[str, _Job] = {}
        self._clients: dict[str, _Client] = {}
        self._next: _Job | None = None
        self._costs = _Costs()
        self._number = 0
        self._clock_s = 0.0  # what each client that had prompts to read has had: where newcomers begin
        self._credit_s = 0.0
        self._wanted = (0, 0)
        self._unmeasured = 0

    # ------------------------------------------------------------------------------------------ jobs

    def submit(self, job: str, client: str, prompt_tokens: int, memory_bytes: int) -> None:
        """Queues a job: `prompt_tokens` >= 1 to read, then to decode; `memory_bytes` from admission to end."""
        if job in self._waiting or job in self._running or prompt_tokens < 1:
            raise UsageError(f"job {job!r} with {prompt_tokens} tokens: expected a new name and at least one token")
        if memory_bytes > self.policy.memory_bytes:
            raise DoesNotFit(
                f"the request needs {memory_bytes:,} bytes of memory and all requests together have "
                f"{self.policy.memory_bytes:,}; ask for a shorter context"
            )
        if len(self._waiting) >= self.policy.queue_jobs:
            raise QueueFull(f"{len(self._waiting):,} requests are waiting, the most there may be; try again later")
        self._clients.setdefault(client, _Client(self._clock_s))
        self._waiting[job] = _Job(job, self._number, client, 0, prompt_tokens, memory_bytes)
        self._number += 1

    def hold(self, job: str) -> None:
        """An admitted job takes part in no step, until it is `resumed`; its memory stays its own."""
        self._running[job].held = True

    def resumed(self, job: str, position: int) -> None:
        """The first `position` tokens of a job just admitted need not be read: they were in the store."""
        found = self._running[job]
        if found.position or not 0 <= position <= found.prompt_tokens:
            raise UsageError(f"job {job!r} is at {found.position} of {found.prompt_tokens}, cannot go to {position}")
        found.position, found.held = position, False

    def end(self, job: str) -> None:
        """The job is finished, failed or cancelled, wherever it is; unknown names are those of jobs ended before."""
        self._waiting.pop(job, None)
        ran = self._running.pop(job, None)
        if ran is not None:
            self._clients[ran.client].running -= 1
        busy = {other.client for jobs in (self._waiting, self._running) for other in jobs.values()}
        self._clients = {name: client for name, client in self._clients.items() if name in busy}

    def queue(self) -> list[str]:
        """The jobs that wait, in the order in which they are expected to be admitted."""
        return [waiting.name for waiting in self._queue()]

    def admit(self) -> list[str]:
        """The jobs that start now. The head of the queue is not overtaken by smaller ones, or it might never start."""
        admitted = []
        used = sum(job.memory_bytes for job in self._running.values())
        while self._waiting:
            self._next = job = next(self._queue())
            if used + job.memory_bytes > self.policy.memory_bytes:
                break
            client = self._clients[job.client]
            del self._waiting[job.name]
            self._running[job.name] = job
            if not client.running:
                client.read_s = max(client.read_s, self._clock_s)
            client.running, job.read_s = client.running + 1, client.clock_s
            used += job.memory_bytes
            admitted.append(job.name)
        return admitted

    def _queue(self) -> Iterator[_Job]:
        """Waiting jobs, first those of clients that have least running; who was found to be next stays next."""
        ahead = {name: client.running for name, client in self._clients.items()}
        places = []
        for job in self._waiting.values():
            places.append((job is not self._next, ahead[job.client], self._clients[job.client].read_s, job.number, job))
            ahead[job.client] += 1
        return (place[-1] for place in sorted(places, key=lambda place: place[:-1]))

    # ------------------------------------------------------------------------------------------ steps

    def plan(self) -> Plan:
        """The next step, of the jobs admitted."""
        ready = [job for job in self._running.values() if not job.held]
        decode = tuple(job.name for job in ready if not job.reads)
        prompts = sorted((job for job in ready if job.reads), key=self._turn)
        if not prompts:
            return Plan(decode, ())
        depth, left = prompts[0].position, sum(job.prompt_tokens - job.position for job in prompts)
        if not decode:
            return Plan((), self._reads(prompts, self._chunk(left, depth, self.policy.turn_s)))
        solo_s = self._costs.decode_s.get(len(decode))
        if solo_s is None or self._unmeasured >= _MOST_STEPS_UNMEASURED:
            return Plan(decode, ())
        chunk = self._chunk(left, depth, max(self.policy.pause_s, solo_s * self._extra))
        self._wanted = (chunk, depth)
        if self._costs.reading_s(chunk, depth) > self._credit_s + solo_s * self._extra:
            return Plan(decode, ())
        return Plan(decode, self._reads(prompts, chunk))

    def done(self, plan: Plan, seconds: float) -> None:
        """The step was run in `seconds`: what it read counts, what it cost is learned. Jobs may have ended since."""
        streams, tokens = len(plan.decode), plan.read_tokens
        if streams and not tokens:
            self._costs.decoded(streams, seconds)
            self._unmeasured = 0
        solo_s = self._costs.decode_s[streams] if streams else 0.0
        reading_s = max(0.0, seconds - solo_s)
        if tokens >= self.policy.least_chunk_tokens:  # a shorter one would say too much of its fixed cost
            self._costs.read(tokens, plan.depth, reading_s)
        self._unmeasured += bool(tokens)
        self._account(solo_s * self._extra - (reading_s if tokens else 0.0), plan)
        for read in plan.reads:
            self._advance(read, reading_s * read.num_tokens / tokens)

    @property
    def _extra(self) -> float:
        """Seconds of reading for each second of decoding."""
        return 1 / self.policy.decode_share - 1

    def _account(self, gain_s: float, plan: Plan) -> None:
        """Credit is reading time the streams can spare; it is saved for one chunk, no more, or all would stand still
        while a long saving is spent. Debt stays until it is paid, or until nobody is left to pay."""
        if not plan.decode:
            self._credit_s = 0.0
            return
        self._credit_s = min(self._credit_s + gain_s, max(self.policy.pause_s, self._costs.reading_s(*self._wanted)))

    def _advance(self, read: Read, seconds: float) -> None:
        job = self._running.get(read.job)
        if job is None:
            return
        client = self._clients[job.client]
        reading = [other for other in self._running.values() if other.reads]
        self._clock_s += seconds / len({other.client for other in reading})
        client.clock_s += seconds / sum(other.client == job.client for other in reading)
        client.read_s += seconds
        job.read_s += seconds
        job.position += read.num_tokens

    def _turn(self, job: _Job) -> tuple[float, str, float, int]:
        return self._clients[job.client].read_s, job.client, job.read_s, job.number

    def _chunk(self, left: int, depth: int, limit_s: float) -> int:
        """The longest chunk, doubled from the least, that is expected to stay within the limit."""
        chunk, most = self.policy.least_chunk_tokens, min(left, self.policy.chunk_tokens)
        if self._costs.knows(depth):
            while chunk < most and self._costs.reading_s(min(2 * chunk, most), depth) <= limit_s:
                chunk *= 2
        return min(chunk, most)

    def _reads(self, prompts: list[_Job], chunk: int) -> tuple[Read, ...]:
        """The chunk goes to the prompts in turn; what a short one leaves, the next one gets."""
        reads = []
        for job in prompts:
            num_tokens = min(chunk, job.prompt_tokens - job.position)
            if num_tokens:
                reads.append(Read(job.name, job.position, num_tokens))
                chunk -= num_tokens
        return tuple(reads)


def _averaged(before: float | None, newest: float) -> float:
    return newest if before is None else before + _NEWEST_WEIGHT * (newest - before)


def _scale(num_tokens: int, depth: int) -> tuple[int, int]:
    """Chunks and depths that cost about the same a token."""
    return num_tokens.bit_length(), max(_SHALLOW_BITS, depth.bit_length())
