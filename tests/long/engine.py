"""An engine that is killed or stands still under streams; tenants that probe each other; clocks that jump."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.long.clients import Answer, ask
from tests.long.served import KEYS, Served, serving
from tests.store.preload import built

MODEL = "tenfold-test"
CLOCK = Path(__file__).with_name("clock.c")
JUMPS_S = (3600, -3600, 86_400, -86_400)


def body(text: str, tokens: int, **more: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    return {"model": MODEL, "prompt": text, "max_tokens": tokens, "stream": True, **sampling, **more}


def words(count: int, seed: int) -> str:
    dice = random.Random(seed)
    return " ".join(
        dice.choice(("table", "index", "page", "lock", "write", "read", "file", "row")) for _ in range(count)
    )


def cached_tokens(answer: Answer) -> int:
    assert answer.done, answer
    return int(answer.events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"])


async def _struck(served: Served, number: int, streams: int) -> tuple[list[Answer], float, float] | None:
    """Streams under way when the engine gets a signal: their ends, when /ready noticed, when all was well again.

    None if somebody else let a stopped engine go on.
    """
    running = [
        asyncio.create_task(ask(served.port, "/v1/completions", body(words(20, i), 4000))) for i in range(streams)
    ]
    while await asyncio.to_thread(served.gauge, "vllm:num_requests_running") < streams:
        await asyncio.sleep(0.1)
    await asyncio.sleep(random.random())
    victim = served.engine_pid()
    os.kill(victim, number)
    struck = time.monotonic()
    while await asyncio.to_thread(served.ready):
        assert time.monotonic() - struck < 120, "/ready says 200 while the engine is dead"
        await asyncio.sleep(0.02)
    noticed = time.monotonic() - struck
    answers = await asyncio.gather(*running)
    await asyncio.to_thread(served.wait, 300.0)
    return None if served.engine_pid() == victim else (answers, noticed, time.monotonic() - struck)


def _faults(signals: Sequence[int], times: int, streams: int, notice_s: float) -> dict[str, Any]:
    """The signals in turns."""
    ended = untold = repeated = 0
    noticed: list[float] = []
    again: list[float] = []
    with serving("real") as served:
        while len(noticed) < times:
            found = asyncio.run(_struck(served, signals[len(noticed) % len(signals)], streams))
            if found is None:
                repeated += 1
                assert repeated < max(3, times), "the engine goes on and on"
                continue
            answers, notice, well = found
            for answer in answers:
                ended += 1
                # one that had not begun is refused, whole; one that had is cut
                untold += answer.error is None or (answer.done and answer.status == 200)
            noticed.append(notice)
            again.append(well)
        whole = asyncio.run(ask(served.port, "/v1/completions", body("Once", 8)))
        assert whole.done, whole
        orphans = _children_left(served)
    figures = {
        "times": times,
        "repeated": repeated,
        "streams_ended": ended,
        "without_an_error": untold,
        "ready_503_after_s": round(max(noticed), 2),
        "well_again_after_s_median": round(statistics.median(again), 1),
        "orphans": orphans,
    }
    assert not untold, figures
    assert orphans == 0, figures
    assert max(noticed) < notice_s, figures
    return figures


def _children_left(served: Served) -> int:
    return (
        sum(len(file.read_text().split()) for file in Path(f"/proc/{served.process.pid}/task").glob("*/children")) - 1
    )


def killed(times: int = 100) -> dict[str, Any]:
    """R18: the engine ends under eight streams: killed, as by a system without memory, or crashed."""
    return _faults((signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT), times, 8, notice_s=2.0)


def stopped(times: int = 20) -> dict[str, Any]:
    """R18: SIGSTOP: nothing ends, nothing moves."""
    return _faults((signal.SIGSTOP,), times, 8, notice_s=30.0)


def tenancy(probes: int = 1000, length: int = 200, first: int = 0) -> dict[str, Any]:
    """R21: texts of `length` words that one key has read are neither found nor felt by another."""
    folder = tempfile.mkdtemp(prefix="tenfold-long-")
    cached = 0
    fresh: list[float] = []
    other: list[float] = []
    own: list[float] = []

    async def run(served: Served) -> None:
        nonlocal cached
        for i in range(first, first + probes):
            text = words(length, i)
            await ask(served.port, "/v1/completions", body(text, 2), key=KEYS[0])
            hit = await ask(served.port, "/v1/completions", body(text, 2), key=KEYS[0])
            assert cached_tokens(hit) > 0, "a key finds what it has read itself"
            own.append(hit.ttft_s)
            pair = [(text, other), (words(length, 10_000 + i), fresh)]
            random.shuffle(pair)
            for probe, times in pair:
                answer = await ask(served.port, "/v1/completions", body(probe, 2), key=KEYS[1])
                cached += cached_tokens(answer)
                times.append(answer.ttft_s)

    try:
        with serving("real", folder) as served:
            asyncio.run(run(served))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    threshold = statistics.median(fresh + other)
    right = sum(t < threshold for t in other) + sum(t >= threshold for t in fresh)
    found = {
        "probes": probes,
        "words": length,
        "cached_tokens_of_others": cached,
        "classifier_percent": round(100 * right / (2 * probes), 1),
        "ttft_ms_own": round(1e3 * statistics.median(own), 1),
        "ttft_ms_other": round(1e3 * statistics.median(other), 1),
        "ttft_ms_fresh": round(1e3 * statistics.median(fresh), 1),
    }
    assert cached == 0, found
    assert abs(found["classifier_percent"] - 50) <= 5, found
    return found


def shifting(folder: Path) -> tuple[dict[str, str], Callable[[int], None]]:
    """The environment of processes whose time of day is off, and what sets by how many seconds."""
    shift = folder / "shift"
    shift.write_bytes(bytes(8))
    library = built(CLOCK, folder, f'-DSHIFT_FILE="{shift}"')

    def jump(by_s: int) -> None:
        with shift.open("r+b") as file:  # in place: the processes have it mapped
            file.write(by_s.to_bytes(8, sys.byteorder, signed=True))

    return {"LD_PRELOAD": str(library)}, jump


def clock(jumps: int = 16) -> dict[str, Any]:
    """R28: the time of day jumps by an hour and a day, both ways, under streams, for the server and for its engine."""
    with tempfile.TemporaryDirectory() as folder:
        environment, jump = shifting(Path(folder))
        failed = unfound = jumped = 0
        with serving("real", folder + "/store", env=environment) as served:
            engine = served.engine_pid()
            for i in range(jumps):
                by_s = JUMPS_S[i % len(JUMPS_S)]

                async def run(by_s: int) -> list[Answer]:
                    asked = [
                        asyncio.create_task(ask(served.port, "/v1/completions", body(words(300, j), 400)))
                        for j in range(4)
                    ]
                    await asyncio.sleep(0.5)
                    jump(by_s)
                    return await asyncio.gather(*asked)

                answers = asyncio.run(run(by_s))
                failed += sum(not answer.done or answer.error is not None for answer in answers)
                unfound += sum(not cached_tokens(answer) for answer in answers if answer.done) if i else 0
                asyncio.run(ask(served.port, "/v1/completions", body(words(300, 0), 1)))
                jumped += abs(_newest_use_s(Path(folder, "store")) - time.time() - by_s) < 600
                assert served.ready(), "the server thinks its engine is gone"
            assert served.engine_pid() == engine, "the engine was started again"
    found = {
        "jumps": jumps,
        "seen_by_the_engine": jumped,
        "streams": 4 * jumps,
        "failed": failed,
        "prefixes_not_found": unfound,
    }
    assert jumped == jumps, found
    assert not failed, found
    assert not unfound, found
    return found


def _newest_use_s(store: Path) -> float:
    """By the engine's clock."""
    with contextlib.closing(sqlite3.connect(store / "index.sqlite")) as index:
        return float(index.execute("SELECT used_s FROM segments ORDER BY turn DESC LIMIT 1").fetchone()[0])
