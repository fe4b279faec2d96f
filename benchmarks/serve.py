"""The engine process under load: what a stream keeps beside a long prompt, what the process costs, how soon it lets go.

    python benchmarks/serve.py                      # tiny-v4-flash, every part
    python benchmarks/serve.py DIR --parts share    # a checkpoint; share, reading, overhead, cancel, crowd, together

share: tokens/s of a stream alone and while a long prompt is read, its longest pause, and how true the ETA was.
reading: the same prompt by itself, in the process and in the library.
overhead: a token and a first token through the process and in the library. cancel: from the cancel to the last event,
and to an engine at rest. crowd: many short jobs at once, with the store and without. together: tokens/s of 1 to 32
streams while all of them write, three turns. Results: results/serve.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from runs import commit, machine_name

from tenfold import Engine, SamplingParams
from tenfold.server.engine_client import EngineProcess
from tenfold.server.wire import Admitted, Finished, Job, Progress, Start, Tokens

RESULTS = Path(__file__).parent / "results" / "serve.json"
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
SHORT_TOKENS, ANSWER_TOKENS = 64, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-v4-flash")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--prompt", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=6.0, help="how long a stream is watched alone")
    options = parser.parse_args()
    every = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    for part in options.parts:
        found = asyncio.run(PARTS[part](options))
        about = {"commit": commit(), "machine": machine_name(), "model": Path(options.model).name}
        every[part] = about | found
        print(json.dumps({part: every[part]}, indent=1))
    RESULTS.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


@asynccontextmanager
async def process(options: argparse.Namespace, *, store: bool) -> AsyncIterator[EngineProcess]:
    with tempfile.TemporaryDirectory() as folder:
        engine = EngineProcess(Start(options.model, store=f"{folder}/store" if store else None))
        await engine.open()
        await engine.loaded()
        try:
            yield engine
        finally:
            await engine.close()


@dataclass
class Heard:
    """What came of a job, and when."""

    admitted_s: float = 0.0
    tokens_s: list[float] = field(default_factory=list)
    progress: list[tuple[float, Progress]] = field(default_factory=list)
    finished_s: float = 0.0

    async def listen(self, engine: EngineProcess, job: Job) -> None:
        async for event in engine.run(job):
            now = time.perf_counter()
            match event:
                case Admitted():
                    self.admitted_s = now
                case Tokens():
                    self.tokens_s += [now] * len(event.tokens)
                case Progress():
                    self.progress.append((now, event))
                case Finished():
                    self.finished_s = now

    def tokens_per_s(self, start_s: float, stop_s: float) -> float:
        return sum(start_s <= at < stop_s for at in self.tokens_s) / (stop_s - start_s)

    def longest_gap_s(self, start_s: float, stop_s: float) -> float:
        times = [start_s, *(at for at in self.tokens_s if start_s <= at < stop_s), stop_s]
        return max(after - before for before, after in pairwise(times))


def prompt(count: int, seed: int) -> tuple[int, ...]:
    dice = random.Random(seed)
    return tuple(dice.randrange(2, 2000) for _ in range(count))


def job(name: str, ids: tuple[int, ...], max_tokens: int, client: str = "a") -> Job:
    return Job(name, client, "", ids, {**GREEDY, "max_tokens": max_tokens})


async def share(options: argparse.Namespace) -> dict[str, Any]:
    async with process(options, store=True) as engine:
        stream, beside = Heard(), Heard()
        running = asyncio.create_task(stream.listen(engine, job("stream", prompt(SHORT_TOKENS, 2), 10**5)))
        while len(stream.tokens_s) < 50:
            await asyncio.sleep(0.05)
        start_s = time.perf_counter()
        await asyncio.sleep(options.seconds)
        alone_tps = stream.tokens_per_s(start_s, time.perf_counter())
        await beside.listen(engine, job("beside", prompt(options.prompt, 3), 1, "b"))
        begun_s, read_s = beside.admitted_s, beside.progress[-1][0]
        await engine.cancel("stream")
        await running
        beside_tps = stream.tokens_per_s(begun_s, read_s)
        return {
            "prompt_tokens": options.prompt,
            "stream_alone_tokens_per_s": round(alone_tps, 1),
            "stream_beside_tokens_per_s": round(beside_tps, 1),
            "share": round(beside_tps / alone_tps, 3),
            "stream_longest_gap_s": round(stream.longest_gap_s(begun_s, read_s), 3),
            "prompt_s": round(read_s - begun_s, 2),
            "eta_over_truth": eta_errors(beside),
        }


async def reading(options: argparse.Namespace) -> dict[str, Any]:
    ids, heard = prompt(options.prompt, 1), Heard()
    async with process(options, store=True) as engine:
        await heard.listen(engine, job("alone", ids, 1))
    session, began = Engine.load(options.model).session(options.prompt), time.perf_counter()
    session.feed(ids)
    return {
        "prompt_tokens": options.prompt,
        "process_with_store_s": round(heard.progress[-1][0] - heard.admitted_s, 2),
        "library_without_store_s": round(time.perf_counter() - began, 2),
        "eta_over_truth": eta_errors(heard),
    }


def eta_errors(heard: Heard) -> dict[str, float]:
    """What was promised at a tenth, a quarter, half of the prompt, relative to what it took from there."""
    end_s, found = heard.progress[-1][0], {}
    for share in (0.1, 0.25, 0.5):
        at_s, said = next((at, one) for at, one in heard.progress if one.done >= share * one.total and one.eta_s)
        found[f"{share:.0%}"] = round((said.eta_s or 0.0) / (end_s - at_s), 2)
    return found


async def overhead(options: argparse.Namespace) -> dict[str, Any]:
    async with process(options, store=False) as engine:
        runs = [Heard() for _ in range(12)]
        begun = []
        for number, heard in enumerate(runs):
            begun.append(time.perf_counter())
            await heard.listen(engine, job(str(number), prompt(SHORT_TOKENS, number), ANSWER_TOKENS))
    first = [heard.tokens_s[0] - start_s for heard, start_s in zip(runs, begun, strict=True)]
    each = [(heard.tokens_s[-1] - heard.tokens_s[0]) / (ANSWER_TOKENS - 1) for heard in runs]
    lone_first, lone_each = library(options)
    served, lone = statistics.median(each), statistics.median(lone_each)
    return {
        "token_ms": round(1e3 * served, 3),
        "token_library_ms": round(1e3 * lone, 3),
        "token_overhead": round(served / lone - 1, 3),
        "first_token_ms": round(1e3 * statistics.median(first), 2),
        "first_token_library_ms": round(1e3 * statistics.median(lone_first), 2),
    }


def library(options: argparse.Namespace) -> tuple[list[float], list[float]]:
    engine, first, each = Engine.load(options.model), [], []
    for number in range(12):
        session, times = engine.session(SHORT_TOKENS + ANSWER_TOKENS), [time.perf_counter()]
        session.feed(prompt(SHORT_TOKENS, number))
        times += [time.perf_counter() for _ in session.generate(SamplingParams(**GREEDY, max_tokens=ANSWER_TOKENS))]
        first.append(times[1] - times[0])
        each.append((times[-1] - times[1]) / (ANSWER_TOKENS - 1))
    return first, each


async def cancel(options: argparse.Namespace) -> dict[str, Any]:
    last, rest = [], []
    async with process(options, store=True) as engine:
        for number in range(8):
            heard = Heard()
            running = asyncio.create_task(heard.listen(engine, job(str(number), prompt(options.prompt, number), 1)))
            await asyncio.sleep(random.Random(number).uniform(1.0, 4.0))
            began = time.perf_counter()
            await engine.cancel(str(number))
            await running
            last.append(heard.finished_s - began)
            while engine.pulse is None or engine.pulse.running:
                await asyncio.sleep(0.02)
            rest.append(time.perf_counter() - began)
    return {
        "cancels": len(last),
        "longest_to_last_event_s": round(max(last), 3),
        "longest_to_rest_s": round(max(rest), 3),
    }


async def crowd(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"jobs": 200, "at_once": 32, "prompt_tokens": SHORT_TOKENS, "answer_tokens": 32}
    for store in (False, True):
        async with process(options, store=store) as engine:
            gate = asyncio.Semaphore(32)

            async def one(number: int, engine: EngineProcess = engine, gate: asyncio.Semaphore = gate) -> None:
                async with gate:
                    await Heard().listen(engine, job(str(number), prompt(SHORT_TOKENS, number), 32))

            began = time.perf_counter()
            await asyncio.gather(*map(one, range(200)))
            seconds = time.perf_counter() - began
        found["with store" if store else "without store"] = {
            "jobs_per_s": round(200 / seconds, 1),
            "tokens_per_s": round(200 * 32 / seconds),
        }
    return found


async def together(options: argparse.Namespace) -> dict[str, Any]:
    counts = [1, 2, 4, 8, 16, 32]
    found: dict[str, list[int]] = {str(count): [] for count in counts}
    async with process(options, store=False) as engine:
        for turn in range(3):
            for count in counts:
                found[str(count)].append(await _writing(engine, f"{turn}-{count}", count, options.seconds / 4))
    return {
        "prompt_tokens": SHORT_TOKENS,
        "tokens_per_s_by_streams": {name: sorted(all_) for name, all_ in found.items()},
    }


async def _writing(engine: EngineProcess, name: str, count: int, seconds: float) -> int:
    """Tokens/s of `count` streams, once each of them writes."""
    streams = [Heard() for _ in range(count)]
    jobs = [job(f"{name}-{number}", prompt(SHORT_TOKENS, number), 10**4) for number in range(count)]
    running = [asyncio.create_task(heard.listen(engine, one)) for heard, one in zip(streams, jobs, strict=True)]
    while min(len(heard.tokens_s) for heard in streams) < 20:
        await asyncio.sleep(0.01)
    start_s = time.perf_counter()
    await asyncio.sleep(seconds)
    stop_s = time.perf_counter()
    for one in jobs:
        await engine.cancel(one.id)
    await asyncio.gather(*running)
    return round(sum(heard.tokens_per_s(start_s, stop_s) for heard in streams))


PARTS = {
    "share": share,
    "reading": reading,
    "overhead": overhead,
    "cancel": cancel,
    "crowd": crowd,
    "together": together,
}


if __name__ == "__main__":
    main()
