"""The scheduler under a simulated clock: streams keep their share, clients theirs, and every prompt is read once."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tenfold.errors import DoesNotFit, UsageError
from tenfold.scheduler import Plan, Policy, QueueFull, Scheduler

POLICY = Policy(memory_bytes=100)


@dataclass(frozen=True)
class Costs:
    """Seconds of a step: a fixed part, streams, and tokens read, which cost more with depth."""

    step_s: float = 2e-3
    stream_s: float = 2e-3
    read_s: float = 1e-3
    token_s: float = 4e-4
    deep_token_s: float = 2e-9

    def decoding_s(self, plan: Plan) -> float:
        return self.step_s + len(plan.decode) * self.stream_s if plan.decode else 0.0

    def reading_s(self, plan: Plan) -> float:
        tokens = sum(r.num_tokens * (self.token_s + r.position * self.deep_token_s) for r in plan.reads)
        return self.read_s + tokens if plan.reads else 0.0


@dataclass
class World:
    """Runs what the scheduler plans; a stream decodes `wishes` tokens and ends."""

    scheduler: Scheduler
    costs: Costs = field(default_factory=Costs)
    now_s: float = 0.0
    wishes: dict[str, int] = field(default_factory=dict)
    read: Counter[str] = field(default_factory=Counter)
    decoded: Counter[str] = field(default_factory=Counter)
    ended: dict[str, float] = field(default_factory=dict)
    steps: list[tuple[float, float]] = field(default_factory=list)

    def submit(self, job: str, client: str, prompt: int, wish: int, memory: int = 1) -> None:
        self.scheduler.submit(job, client, prompt, memory)
        self.wishes[job] = wish

    def step(self) -> Plan:
        self.scheduler.admit()
        plan = self.scheduler.plan()
        decoding_s, reading_s = self.costs.decoding_s(plan), self.costs.reading_s(plan)
        self.now_s += decoding_s + reading_s
        if plan.decode:
            self.steps.append((decoding_s, reading_s))
        self.scheduler.done(plan, decoding_s + reading_s)
        for read in plan.reads:
            assert self.read[read.job] == read.position
            self.read[read.job] += read.num_tokens
        for job in plan.decode:
            self.decoded[job] += 1
            if self.decoded[job] >= self.wishes[job]:
                self.scheduler.end(job)
                self.ended[job] = self.now_s
        return plan

    def run(self, most_steps: int = 100_000) -> None:
        for _ in range(most_steps):
            plan = self.step()
            if not plan.decode and not plan.reads:
                return
        raise AssertionError(f"not at rest after {most_steps} steps")


def world(costs: Costs | None = None, **policy: float) -> World:
    return World(Scheduler(Policy(memory_bytes=100, **policy)), costs or Costs())  # type: ignore[arg-type]


def worst_excess_s(steps: list[tuple[float, float]], extra: float) -> float:
    """The most seconds of reading above `extra` seconds for each second of decoding, over any run of steps."""
    worst = running = 0.0
    for decoding_s, reading_s in steps:
        running = max(0.0, running + reading_s - extra * decoding_s)
        worst = max(worst, running)
    return worst


def test_nothing_to_do_is_an_empty_plan() -> None:
    scheduler = Scheduler(POLICY)
    assert scheduler.admit() == []
    assert scheduler.plan() == Plan((), ())


def test_a_stream_keeps_half_of_its_speed_while_a_long_prompt_is_read() -> None:
    """And the prompt gets nearly all of the other half."""
    run = world()
    run.submit("stream", "a", 10, 10**9)
    while not run.decoded["stream"]:
        run.step()
    run.submit("document", "b", 100_000, 1)
    start_s, before = run.now_s, run.decoded["stream"]
    while run.read["document"] < 100_000:
        run.step()
    seconds = run.now_s - start_s
    solo_s = run.costs.step_s + run.costs.stream_s
    kept = (run.decoded["stream"] - before) * solo_s / seconds
    assert 0.499 <= kept <= 0.56  # up to one chunk ahead at the end
    assert max(reading_s for _, reading_s in run.steps) <= 1.1 * POLICY.pause_s


def test_without_streams_chunks_grow_to_a_turn() -> None:
    run = world(Costs(token_s=5e-3, deep_token_s=0.0), turn_s=5.0)
    run.submit("document", "a", 20_000, 1)
    chunks = [run.step().read_tokens for _ in range(12)]
    assert chunks == [32] + [512] * 11


def test_the_least_chunk_is_read_even_where_it_takes_longer_than_a_pause() -> None:
    """A model so slow that 32 tokens take 8 s: fewer at once would cost as much and bring less."""
    run = world(Costs(step_s=0.5, stream_s=0.1, read_s=4.0, token_s=0.125))
    run.submit("stream", "a", 1, 10**9)
    while not run.decoded["stream"]:
        run.step()
    run.submit("document", "b", 320, 1)
    run.steps.clear()
    while run.read["document"] < 320:
        run.step()
    chunks = sorted({round(reading_s) for _, reading_s in run.steps})
    assert chunks == [0, 8]
    assert worst_excess_s(run.steps, 1.0) <= 2 * 8.0
    assert sum(d for d, _ in run.steps) <= 1.25 * sum(r for _, r in run.steps)


costs = st.builds(
    Costs,
    step_s=st.floats(1e-3, 0.5),
    stream_s=st.floats(1e-4, 0.1),
    read_s=st.floats(0, 0.5),
    token_s=st.floats(1e-5, 5e-2),
    deep_token_s=st.floats(0, 1e-6),
)
jobs = st.lists(
    st.tuples(st.integers(0, 60), st.sampled_from("abc"), st.integers(1, 5000), st.integers(1, 60)),
    min_size=1,
    max_size=20,
)


@settings(max_examples=150)
@given(costs=costs, jobs=jobs, share=st.floats(0.2, 0.9))
def test_whatever_steps_cost_the_share_is_kept_and_everybody_is_served(
    costs: Costs, jobs: list[tuple[int, str, int, int]], share: float
) -> None:
    run = world(costs, decode_share=share)
    for step in range(61):
        for number, (when, client, prompt, wish) in enumerate(jobs):
            if when == step:
                run.submit(str(number), client, prompt, wish)
        run.step()
    run.run()
    assert {job: run.decoded[job] for job in run.wishes} == run.wishes
    assert {job: run.read[job] for job in run.wishes} == {str(n): job[2] for n, job in enumerate(jobs)}
    longest_s = max((reading_s for _, reading_s in run.steps), default=0.0)
    assert worst_excess_s(run.steps, 1 / share - 1) <= 2 * max(longest_s, POLICY.pause_s)


@given(prompts=st.lists(st.integers(1, 30_000), min_size=1, max_size=12), lone=st.integers(40_000, 80_000))
def test_a_client_gets_its_share_whatever_the_other_asks(prompts: list[int], lone: int) -> None:
    """While both have prompts to read, their reading times differ by no more than two turns."""
    run = world(turn_s=0.5)
    for number, prompt in enumerate(prompts):
        run.submit(f"many {number}", "many", prompt, 1)
    run.submit("one", "one", lone, 1)
    seconds = {"one": 0.0, "many": 0.0}
    total = sum(prompts)
    while run.read["one"] < lone and sum(run.read.values()) - run.read["one"] < total:
        plan = run.step()
        for read in plan.reads:
            seconds["one" if read.job == "one" else "many"] += run.costs.reading_s(Plan((), (read,)))
        assert abs(seconds["one"] - seconds["many"]) <= 1.25


def test_an_old_prompt_is_read_however_many_newcomers_there_are() -> None:
    for newcomer in ("a", "{}"):  # of the same client, of ever new clients
        run = world(turn_s=0.1)
        run.submit("old", "a", 5000, 1, memory=10)
        for number in range(2000):
            with suppress(QueueFull):
                run.submit(f"new {number}", newcomer.format(number), 900, 1, memory=10)
            run.step()
            if "old" in run.ended:
                break
        assert len(run.ended) < len(run.wishes)
        assert "old" in run.ended


def test_a_large_job_is_not_overtaken_for_ever() -> None:
    """Though its client has a stream running and all who come later have none."""
    run = world()
    run.submit("stream", "b", 10, 10**9, memory=10)
    run.submit("first", "a", 10, 50, memory=60)
    run.step()
    run.submit("large", "b", 10, 1, memory=90)
    run.step()
    for number in range(100):
        run.submit(f"small {number}", f"client {number}", 10, 5, memory=10)
        run.step()
    assert set(run.ended) == {"first", "large"} | {f"small {n}" for n in range(100) if f"small {n}" in run.ended}
    assert run.ended["large"] <= min(when for job, when in run.ended.items() if job != "first")


def test_where_nothing_was_read_yet_the_least_chunk_tells_what_it_costs() -> None:
    run = world(Costs(deep_token_s=2e-8))
    run.submit("stream", "a", 10, 10**9)
    run.submit("shallow", "a", 5000, 1)
    while "shallow" not in run.ended:
        run.step()
    assert max(reading_s for _, reading_s in run.steps) > 0.15
    run.submit("deep", "b", 1_000_000, 1)
    run.scheduler.admit()
    run.scheduler.resumed("deep", 990_000)
    run.read["deep"] = 990_000
    run.steps.clear()
    chunks = [read.num_tokens for _ in range(1000) for read in run.step().reads]
    assert chunks[0] == 32
    assert max(reading_s for _, reading_s in run.steps) <= 1.1 * max(POLICY.pause_s, 32 * 0.0206)


def test_the_speed_of_streams_is_measured_again_and_again() -> None:
    """A machine that was busy and is no longer: half of the new speed is what is kept."""
    run = world(Costs(step_s=0.5, read_s=0.0))
    run.submit("stream", "a", 10, 10**9)
    run.submit("document", "b", 10**6, 1)
    for quick in (False, True):
        run.costs = run.costs if not quick else Costs(step_s=0.005, read_s=0.0)
        for _ in range(400):
            run.step()
    decoding_s, reading_s = (sum(column) for column in zip(*run.steps[-300:], strict=True))
    assert 0.45 <= decoding_s / (decoding_s + reading_s) <= 0.6


def test_short_prompts_share_a_chunk() -> None:
    run = world()
    for number in range(10):
        run.submit(str(number), "a", 20, 5)
    assert [read.num_tokens for read in run.step().reads] == [20, 12]
    run.run()
    assert len(run.ended) == 10


def test_the_queue_is_bounded_fair_and_tells_places() -> None:
    scheduler = Scheduler(Policy(memory_bytes=10, queue_jobs=4))
    scheduler.submit("running", "a", 5, 10)
    assert scheduler.admit() == ["running"]
    for number in range(3):
        scheduler.submit(f"a{number}", "a", 5, 10)
    scheduler.submit("b", "b", 5, 10)
    with pytest.raises(QueueFull, match="4 requests are waiting"):
        scheduler.submit("one more", "c", 5, 10)
    assert scheduler.queue() == ["b", "a0", "a1", "a2"]
    scheduler.end("b")
    assert scheduler.queue()[0] == "a0"
    scheduler.end("running")
    assert scheduler.admit() == ["a0"]


def test_what_can_never_run_is_refused_at_once() -> None:
    scheduler = Scheduler(POLICY)
    with pytest.raises(DoesNotFit, match="needs 101 bytes"):
        scheduler.submit("x", "a", 5, 101)
    with pytest.raises(UsageError):
        scheduler.submit("x", "a", 0, 1)
    scheduler.submit("x", "a", 5, 1)
    with pytest.raises(UsageError):
        scheduler.submit("x", "a", 5, 1)


def test_what_the_store_had_is_not_read() -> None:
    run = world()
    run.submit("x", "a", 5000, 3)
    run.submit("y", "a", 700, 3)
    run.scheduler.admit()
    run.scheduler.resumed("x", 4990)
    run.scheduler.resumed("y", 700)
    run.read["x"] = 4990
    plan = run.step()
    assert plan.decode == ("y",)
    with pytest.raises(UsageError):
        run.scheduler.resumed("x", 5001)
    run.run()
    assert run.read["x"] == 5000
    assert run.decoded == {"x": 3, "y": 3}


def test_who_is_held_keeps_its_memory_and_takes_part_in_no_step() -> None:
    scheduler = Scheduler(Policy(memory_bytes=10))
    for name in ("x", "y"):
        scheduler.submit(name, "a", 20, 6)
    assert scheduler.admit() == ["x"]
    scheduler.hold("x")
    assert scheduler.plan() == Plan((), ())
    assert scheduler.admit() == []
    scheduler.resumed("x", 15)
    assert [(read.job, read.position) for read in scheduler.plan().reads] == [("x", 15)]
    scheduler.hold("x")
    scheduler.end("x")
    assert scheduler.admit() == ["y"]


class Anything(RuleBasedStateMachine):
    """Jobs come, are cancelled and end between any two calls, also while a step runs."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(Policy(memory_bytes=100, queue_jobs=6))
        self.prompts: dict[str, int] = {}
        self.read = Counter[str]()
        self.memory: dict[str, int] = {}
        self.alive: set[str] = set()
        self.started: set[str] = set()
        self.held: set[str] = set()
        self.plan: Plan | None = None

    @rule(client=st.sampled_from("abc"), prompt=st.integers(1, 3000), memory=st.integers(1, 100))
    def submit(self, client: str, prompt: int, memory: int) -> None:
        name = str(len(self.prompts))
        waiting = len(self.alive - self.started)
        try:
            self.scheduler.submit(name, client, prompt, memory)
        except QueueFull:
            assert waiting == 6
            return
        assert waiting < 6
        self.prompts[name], self.memory[name] = prompt, memory
        self.alive.add(name)

    @rule(data=st.data())
    @precondition(lambda self: self.alive)
    def end(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        self.scheduler.end(name)
        self.scheduler.end(name)
        self.alive.discard(name)

    @rule()
    def admit(self) -> None:
        self.started.update(self.scheduler.admit())

    @rule(data=st.data())
    @precondition(lambda self: self.alive & self.started)
    def hold(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive & self.started)))
        self.scheduler.hold(name)
        self.held.add(name)

    @rule()
    @precondition(lambda self: self.plan is None)
    def begin(self) -> None:
        self.plan = plan = self.scheduler.plan()
        running = (self.alive & self.started) - self.held
        assert {*plan.decode, *(read.job for read in plan.reads)} <= running
        assert set(plan.decode) == {job for job in running if self.read[job] == self.prompts[job]}
        for read in plan.reads:
            assert read.position == self.read[read.job]
            assert 1 <= read.num_tokens <= self.prompts[read.job] - read.position
        assert plan.decode or plan.reads or not running

    @rule(seconds=st.floats(0, 100))
    @precondition(lambda self: self.plan is not None)
    def finish(self, seconds: float) -> None:
        assert self.plan is not None
        self.scheduler.done(self.plan, seconds)
        for read in self.plan.reads:
            self.read[read.job] += read.num_tokens
        self.plan = None

    @invariant()
    def memory_is_kept_and_queued_jobs_have_a_place(self) -> None:
        assert sum(self.memory[job] for job in self.alive & self.started) <= 100
        assert sorted(self.scheduler.queue()) == sorted(self.alive - self.started)


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60, stateful_step_count=40)
