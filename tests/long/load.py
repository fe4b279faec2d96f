"""Many clients at once, and many after another, against a server without a model."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from typing import Any

from tests.long.clients import Answer, ask, request
from tests.long.served import Served, command, serving
from tests.server.clock import awake_s

MODEL = "tenfold-test"


def body(number: int, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": f"say nonce-{number}", "max_tokens": 64, "stream": True, **more}


def fault(answer: Answer, number: int) -> str | None:
    """lost, truncated or crossed; None if it is the client's own, whole."""
    words = answer.text.split()
    if answer.status != 200 or not words:
        return "lost"
    if any(word != f"nonce-{number}" for word in words):
        return "crossed"
    return None if answer.done and len(words) == 8 else "truncated"


async def _slow(port: int, kind: int) -> float:
    """A client that sends a byte a second, of its header or of its body, or that does not read; how long it may."""
    began = time.monotonic()
    with contextlib.suppress(OSError, TimeoutError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        whole = request("/v1/completions", body(0, padding="x" * 4000))
        try:
            async with asyncio.timeout(100):
                if kind == 2:
                    writer.write(request("/v1/completions", body(1)))
                    await asyncio.sleep(20)
                    await reader.read()
                else:
                    head = whole.index(b"\r\n\r\n") + 4
                    writer.write(b"" if kind == 0 else whole[:head])
                    for byte in whole[0 if kind == 0 else head :]:
                        writer.write(bytes([byte]))
                        await writer.drain()
                        if reader.at_eof() or writer.is_closing():
                            break
                        await asyncio.sleep(1)
        finally:
            writer.close()
    return time.monotonic() - began


async def health(port: int, until: asyncio.Event) -> list[float]:
    """How long a probe takes, each on a connection of its own."""
    times = []
    while not until.is_set():
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        assert b" 200 " in await reader.readline(), "/health fails"
        writer.close()
        times.append(time.monotonic() - began)
        await asyncio.sleep(0.05)
    return times


def streams(count: int = 1000, slow: int = 200) -> dict[str, Any]:
    """R14, R15: all streams at once beside slow clients, `/health` probed meanwhile."""

    async def run(served: Served) -> dict[str, Any]:
        over = asyncio.Event()
        probing = asyncio.create_task(health(served.port, over))
        slow_ones = [asyncio.create_task(_slow(served.port, i % 3)) for i in range(slow)]
        await asyncio.sleep(1)
        began = time.monotonic()
        answers = await asyncio.gather(*(ask(served.port, "/v1/completions", body(i)) for i in range(count)))
        seconds = time.monotonic() - began
        lasted = await asyncio.gather(*slow_ones)
        over.set()
        times = await probing
        faults = [fault(answer, i) for i, answer in enumerate(answers)]
        return {
            "streams": count,
            **{name: faults.count(name) for name in ("lost", "truncated", "crossed")},
            "wall_s": round(seconds, 1),
            "slow_clients": slow,
            "slow_open_longest_s": round(max(lasted), 1),
            "health_p50_ms": round(1e3 * statistics.median(times), 1),
            "health_p99_ms": round(1e3 * sorted(times)[int(0.99 * len(times))], 1),
        }

    with serving("echo") as served:
        before = served.rss_bytes()
        found = asyncio.run(run(served))
        found["peak_rss_more_mb"] = round((served.peak_bytes() - before) / 1e6, 1)
        assert (found["lost"], found["truncated"], found["crossed"]) == (0, 0, 0), found
        assert found["slow_open_longest_s"] < 75, found
        return found


_SHARES = {"p50": 0.5, "p99": 0.99}
LEFT_OPEN_S = {"header": 30.0, "body": 60.0, "idle": 75.0}
"""For how long a connection may stay open that sends a byte a second of its header or body, or nothing more."""


async def _kept_open(port: int, kind: str, after_s: float, length: int = 4000) -> float:
    """Seconds until the server closed such a connection."""
    await asyncio.sleep(after_s)
    whole = request("/v1/completions", body(0, padding="x" * length))
    asked = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    head = whole.index(b"\r\n\r\n") + 4
    first, rest = {"header": (b"", whole), "body": (whole[:head], whole[head:]), "idle": (asked, b"")}[kind]
    began = awake_s()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def trickle() -> None:
        for byte in rest:
            await asyncio.sleep(1)
            writer.write(bytes([byte]))

    writer.write(first)
    trickling = asyncio.create_task(trickle())
    try:
        async with asyncio.timeout(1200):  # the machine may stand still meanwhile
            with contextlib.suppress(ConnectionError):
                while await reader.read(65536):
                    pass
    finally:
        trickling.cancel()
        writer.close()
    return awake_s() - began


def slow(count: int = 500) -> dict[str, Any]:
    """R15: so many of each kind, a hundred more each second, against the server as a user starts it, which has room for
    1,200 connections: the oldest silent ones give way. Others are answered meanwhile."""

    async def run(port: int) -> dict[str, Any]:
        over = asyncio.Event()
        probing = asyncio.create_task(health(port, over))
        await asyncio.sleep(10)
        over.set()
        alone, over = sorted(await probing), asyncio.Event()
        kinds = [kind for _ in range(count) for kind in LEFT_OPEN_S]
        slow_ones = [asyncio.create_task(_kept_open(port, kind, i / 100)) for i, kind in enumerate(kinds)]
        probing = asyncio.create_task(health(port, over))
        answers = []
        while not all(one.done() for one in slow_ones):
            asked = {"model": MODEL, "prompt": "Once", "max_tokens": 8, "stream": True}
            answers.append(await ask(port, "/v1/completions", asked))
            await asyncio.sleep(1)
        over.set()
        beside = sorted(await probing)
        open_s = dict.fromkeys(LEFT_OPEN_S, 0.0)
        for kind, one in zip(kinds, slow_ones, strict=True):
            open_s[kind] = max(open_s[kind], await one)
        return {
            "of_each_kind": count,
            **{f"{kind}_open_s_most": round(seconds, 1) for kind, seconds in open_s.items()},
            "answers": len(answers),
            "not_whole": sum(not answer.done for answer in answers),
            "health_probes": len(beside),
            **{f"health_{name}_ms_alone": round(1e3 * alone[int(at * len(alone))], 1) for name, at in _SHARES.items()},
            **{f"health_{name}_ms": round(1e3 * beside[int(at * len(beside))], 1) for name, at in _SHARES.items()},
        }

    with tempfile.TemporaryDirectory() as folder, command(folder, "--no-store", keys=True) as served:
        files = served.files()
        found = asyncio.run(run(served.port))
        time.sleep(1)
        found["files_more"] = served.files() - files
    assert not found["not_whole"], found
    assert all(found[f"{kind}_open_s_most"] < most + 5 for kind, most in LEFT_OPEN_S.items()), found
    assert found["files_more"] <= 0, found
    return found


async def _count_halts(halts: list[float]) -> None:
    """Notes when this process, and with it most likely the whole machine, stood still."""
    while True:
        began = time.monotonic()
        await asyncio.sleep(0.2)
        if time.monotonic() - began > 3:
            halts.append(began)


def soak(count: int = 20_000, at_once: int = 8) -> dict[str, Any]:
    """R19: short mixed requests, a tenth dropped, a tenth bad; memory, files and threads along the way.

    A request under way while the machine stood still may have met a timer of the server: it is counted apart.
    """
    marks: list[tuple[int, int]] = []
    halts: list[float] = []
    excused = 0

    async def one(port: int, number: int, dice: random.Random) -> None:
        how = dice.random()
        if how < 0.1:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request("/v1/completions", body(number))[: dice.randrange(20, 300)])
            await asyncio.sleep(dice.random() * 0.02)
            writer.close()
        elif how < 0.2:
            answer = await ask(port, "/v1/completions", body(number, temperature="hot"))
            assert answer.status == 400, answer
        else:
            answer = await ask(port, "/v1/completions", body(number, stream=dice.random() < 0.5))
            assert answer.status == 200, answer
            assert f"nonce-{number} " in answer.text, answer

    async def run(served: Served) -> None:
        numbers = iter(range(count))
        halting = asyncio.create_task(_count_halts(halts))

        async def worker(seed: int) -> None:
            nonlocal excused
            dice = random.Random(seed)
            for number in numbers:
                before = len(halts)
                try:
                    await one(served.port, number, dice)
                except (AssertionError, OSError):
                    await asyncio.sleep(0.5)
                    if len(halts) == before:
                        raise
                    excused += 1
                if number % 500 == 0:
                    marks.append((number, served.rss_bytes()))

        await asyncio.gather(*map(worker, range(at_once)))
        halting.cancel()

    with serving("echo") as served:
        asyncio.run(run(served))
        time.sleep(2)
        later = [(number, rss) for number, rss in marks if number >= count // 4]
        slope = statistics.linear_regression(*zip(*later, strict=True)).slope * 10_000
        found = {
            "requests": count,
            "halts_of_the_machine": len(halts),
            "failed_in_a_halt": excused,
            "rss_slope_mb_per_10000": round(slope / 1e6, 2),
            "rss_more_mb": round((marks[-1][1] - marks[2][1]) / 1e6, 1),
            "files": served.files(),
            "threads": served.threads(),
            "running_at_end": served.gauge("vllm:num_requests_running"),
        }
        assert found["rss_slope_mb_per_10000"] < 1, found
        assert found["running_at_end"] == 0, found
        return found
