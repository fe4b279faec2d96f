"""How answers end that do not end by themselves: clients that go away, and servers that are told to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.long.clients import Answer, ask, request
from tests.long.engine import JUMPS_S, body, cached_tokens, shifting, words
from tests.long.load import health
from tests.long.served import Served, command, serving
from tests.server.clock import awake_s

from tenfold.store import Store

_FREE_S = 2.0
_ABRUPT = struct.pack("ii", 1, 0)


async def _leave(port: int, dice: random.Random) -> str:
    """One request that is given up at a random point; what had come of it by then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    asked = body(words(dice.choice((5, 50, 500, 4000)), dice.randrange(1000)), 4000, stream=dice.random() < 0.7)
    writer.write(request("/v1/completions", asked))
    got = b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(dice.uniform(0, 2)):
            while piece := await reader.read(65536):
                got += piece
    if dice.random() < 0.5:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABRUPT)
    writer.close()
    return "decode" if b'"text"' in got else "head" if got else "nothing"


def _jobs(served: Served) -> float:
    return served.gauge("vllm:num_requests_running") + served.gauge("vllm:num_requests_waiting")


def disconnects(count: int = 500, at_once: int = 10) -> dict[str, Any]:
    """R11: clients that go away in the queue, while their prompt is read and while tokens come, some abruptly."""
    dice = random.Random(1)
    when: list[str] = []
    slowest, late = 0.0, 0

    with serving("real") as served:
        whole = asyncio.run(ask(served.port, "/v1/completions", body("Once", 8)))
        idle_bytes, files = served.gauge("tenfold:kv_bytes"), served.files()

        async def some() -> list[str]:
            return await asyncio.gather(*(_leave(served.port, dice) for _ in range(at_once)))

        for _ in range(0, count, at_once):
            when += asyncio.run(some())
            began = awake_s()
            while _jobs(served):
                assert awake_s() - began < 60, "what nobody waits for goes on"
                time.sleep(0.05)
            slowest = max(slowest, awake_s() - began)
            late += awake_s() - began > _FREE_S
        time.sleep(1)
        found = {
            "disconnects": len(when),
            **{f"with_{kind}_received": when.count(kind) for kind in ("nothing", "head", "decode")},
            "freed_after_s_most": round(slowest, 2),
            "freed_late": late,
            "kv_bytes_left": served.gauge("tenfold:kv_bytes") - idle_bytes,
            "files_more": served.files() - files,
        }
        again = asyncio.run(ask(served.port, "/v1/completions", body("Once", 8)))
        assert again.text == whole.text, (again, whole)
    assert not late, found
    assert not found["kv_bytes_left"], found
    assert found["files_more"] <= 0, found
    return found


def longest(times: int = 10, tokens: int = 1_000_000) -> dict[str, Any]:
    """R12, R20: a client with the longest prompt goes away while it is read, each time further on; `/health` is asked
    all the while, also when 5 MB are parsed and tokenised."""
    dice = random.Random(12)
    text = words(tokens, 1)
    sent = request("/v1/completions", body(text, 8))
    freed: list[float] = []

    async def jobs(served: Served) -> float:
        return await asyncio.to_thread(_jobs, served)

    async def once(served: Served) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(sent)
        while not await jobs(served):
            await asyncio.sleep(0.02)
        await asyncio.sleep(dice.uniform(0, 2))
        writer.transport.abort()
        began = awake_s()
        while await jobs(served):
            assert awake_s() - began < 60, "what nobody waits for goes on"
            await asyncio.sleep(0.02)
        freed.append(awake_s() - began)

    async def run(served: Served) -> list[float]:
        over = asyncio.Event()
        probing = asyncio.create_task(health(served.port, over))
        for _ in range(times):
            await once(served)
        over.set()
        return sorted(await probing)

    with tempfile.TemporaryDirectory() as folder, serving("real", folder + "/store") as served:
        probes = asyncio.run(run(served))
    found = {
        "prompt_bytes": len(text),
        "prompt_tokens": tokens + 1,
        "cancels": times,
        "freed_after_s_most": round(max(freed), 2),
        "health_probes": len(probes),
        "health_p50_ms": round(1e3 * statistics.median(probes), 1),
        "health_p99_ms": round(1e3 * probes[int(0.99 * len(probes))], 1),
        "health_most_ms": round(1e3 * probes[-1], 1),
    }
    assert found["freed_after_s_most"] < _FREE_S, found
    return found


async def _signalled(
    served: Served, signals: tuple[int, ...], tokens: int, meanwhile: Callable[[], None] = lambda: None
) -> tuple[list[Answer], int, float]:
    """16 streams, a signal under way, perhaps a second one: their ends, the status of a request that came after the
    first, and how long the process lived on after the last."""
    running = [asyncio.create_task(ask(served.port, "/v1/completions", body(words(20, i), tokens))) for i in range(16)]
    while await asyncio.to_thread(served.gauge, "vllm:num_requests_running") < len(running):
        await asyncio.sleep(0.1)
    os.kill(served.process.pid, signals[0])
    await asyncio.sleep(0.2)
    refused = 503
    with contextlib.suppress(OSError):
        refused = (await ask(served.port, "/v1/completions", body("Once", 1))).status
    meanwhile()
    for number in signals[1:]:
        os.kill(served.process.pid, number)
    began = awake_s()
    await asyncio.to_thread(served.process.wait, 300)
    lived = awake_s() - began
    return await asyncio.gather(*running), refused, lived


def signals(times: int = 50) -> dict[str, Any]:
    """R17: SIGTERM or SIGINT under 16 streams: with time enough, with one second, and a second time.

    All on one store: what was read before is found at each next start.
    """
    ways = {
        "in time": ((signal.SIGTERM,), 600, "120"),
        "out of time": ((signal.SIGINT,), 100_000, "1"),
        "twice": ((signal.SIGTERM, signal.SIGTERM), 100_000, "60"),
    }
    counts = {"whole": 0, "told": 0, "refused": 0, "tidy_but_cut": 0, "untold": 0}
    found: dict[str, Any] = {"times": times, "exit_codes": [], "taken_after": 0, "children_left": 0, "not_found": 0}
    longest = dict.fromkeys(ways, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(times):
            name = list(ways)[turn % len(ways)]
            sent, tokens, drain = ways[name]
            with command(folder, "--store", f"{folder}/store", "--drain", drain) as served:
                if turn > 0:
                    first = asyncio.run(ask(served.port, "/v1/completions", body(words(20, 0), 1)))
                    found["not_found"] += not cached_tokens(first)
                engine = served.engine_pid()
                answers, refused, lived = asyncio.run(_signalled(served, sent, tokens))
                found["taken_after"] += refused != 503
                found["exit_codes"].append(served.process.returncode)
                found["children_left"] += Path(f"/proc/{engine}").exists()
                longest[name] = max(longest[name], lived)
                for answer in answers:
                    if answer.status != 200 and answer.error:
                        counts["refused"] += 1  # it had not begun
                    else:
                        kind = "whole" if answer.error is None else "tidy_but_cut"
                        counts[kind if answer.done else "told" if answer.error else "untold"] += 1
    found |= {**counts, **{f"{name}_lived_s_most": round(seconds, 1) for name, seconds in longest.items()}}
    found["exit_codes"] = sorted(set(found["exit_codes"]))
    assert found["exit_codes"] == [0], found
    assert not any(found[key] for key in ("taken_after", "children_left", "not_found", "tidy_but_cut")), found
    assert counts["whole"] >= 16 * len(range(0, times, len(ways))), found
    return found


def clock_at_ends(times: int = 4, texts: int = 8) -> dict[str, Any]:
    """R28: the time of day jumps while a store of four texts evicts, and again while the server drains."""
    found: dict[str, Any] = {"times": times, "exit_codes": [], "lived_s_most": 0.0}
    found |= dict.fromkeys(("stored", "used_last_not_found", "used_first_found", "whole", "taken_after"), 0)

    async def cached(port: int, seed: int) -> int:
        return cached_tokens(await ask(port, "/v1/completions", body(words(300, seed), 8)))

    async def stored(served: Served, by_s: int, jump: Callable[[int], None]) -> None:
        for seed in range(texts):
            if seed == texts // 2:
                jump(by_s)
            await cached(served.port, 1000 * by_s + seed)
        for seed in (texts - 2, texts - 1):
            found["used_last_not_found"] += not await cached(served.port, 1000 * by_s + seed)
        found["used_first_found"] += bool(await cached(served.port, 1000 * by_s))
        found["stored"] += texts

    with tempfile.TemporaryDirectory() as folder:
        environment, jump = shifting(Path(folder))
        with command(folder, "--store", f"{folder}/store", env=environment) as served:
            asyncio.run(cached(served.port, 0))
            served.process.terminate()
            served.process.wait(120)
        with contextlib.closing(Store(Path(folder, "store"))) as store:
            text_bytes = store.index.total_bytes()
        options = ("--store", f"{folder}/store", "--store-limit", str(int(4.5 * text_bytes)), "--drain", "120")
        for turn in range(times):
            by_s = JUMPS_S[turn % len(JUMPS_S)]
            jump(0)
            with command(folder, *options, env=environment) as served:
                asyncio.run(stored(served, by_s, jump))
                meanwhile = partial(jump, 2 * by_s)
                answers, refused, lived = asyncio.run(_signalled(served, (signal.SIGTERM,), 600, meanwhile))
                found["whole"] += sum(answer.done and answer.error is None for answer in answers)
                found["taken_after"] += refused != 503
                found["lived_s_most"] = max(found["lived_s_most"], round(lived, 1))
                found["exit_codes"].append(served.process.returncode)
    found["exit_codes"] = sorted(set(found["exit_codes"]))
    assert not any(found[key] for key in ("used_last_not_found", "used_first_found", "taken_after")), found
    assert found["whole"] == 16 * times, found
    assert found["exit_codes"] == [0], found
    return found
