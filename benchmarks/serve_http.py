"""What HTTP costs: processor time per streamed token of the serving process, and time to the first token, both beside
the library called directly, with the embedded model.

    python benchmarks/serve_http.py

The server runs as users run it (`tenfold serve tiny-v4-flash`, engine in a process of its own, no store). Prompts are
pieces of the embedded document, a new one each time. Library and server take turns, and who is first changes; what the
server takes more is the median of the differences within a turn, since a machine drifts by more than that between
turns. Results: results/serve-http.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
from runs import commit, machine_name

from tenfold import Engine, SamplingParams, config, demo
from tenfold.sampler import Sampler
from tenfold.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results" / "serve-http.json"
MODEL = "tiny-v4-flash"
TURNS = {32: 60, 512: 24}
"""By the tokens of a prompt."""
STREAM_TOKENS, STREAMS = 1000, 4  # the clock of processor time ticks every 10 ms


def main() -> None:
    engine = Engine.load(MODEL, threads=1)
    document = Path(demo.__file__).parent / "document.txt"
    ids = Tokenizer.load(config.locate(MODEL)).encode(document.read_text(encoding="utf-8"))
    with server() as (client, process):
        prompts = {n: iter([[0, *ids[at : at + n - 1]] for at in range(0, len(ids), n)]) for n in TURNS}
        first = {n: first_tokens(engine, client, prompts[n], turns) for n, turns in TURNS.items()}
        steps, streams, costs = [], [], []
        for _ in range(STREAMS):
            steps.append(step_by_library(engine, next(prompts[512])))
            seconds, cost = step_by_server(client, process)
            streams.append(seconds)
            costs.append(cost)
    step, cost = statistics.median(steps), statistics.median(costs)
    found = {
        "first token by tokens of the prompt, ms": first,
        "per token, ms": {"library": quartiles(steps), "server": quartiles(streams)},
        "HTTP process, processor time per token, ms": round(1e3 * cost, 4),
        "HTTP process, share of a decode step, %": round(100 * cost / step, 2),
        "stream_tokens": STREAM_TOKENS,
        "machine": machine_name(),
        "commit": commit(),
        "command": "python benchmarks/serve_http.py",
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


def first_tokens(
    engine: Engine, client: httpx.Client, prompts: Iterator[list[int]], turns: int
) -> dict[str, list[float]]:
    """Quartiles of the library's milliseconds, of the server's, and of the differences within a turn."""
    library: list[float] = []
    served: list[float] = []
    for turn in range(turns + 2):
        if turn % 2:
            library.append(first_by_library(engine, next(prompts)))
        served.append(first_by_server(client, next(prompts)))
        if not turn % 2:
            library.append(first_by_library(engine, next(prompts)))
    library, served = library[2:], served[2:]  # warm by then
    more = [one - other for one, other in zip(served, library, strict=True)]
    return {"library": quartiles(library), "server": quartiles(served), "more": quartiles(more)}


def quartiles(seconds: list[float]) -> list[float]:
    """In milliseconds."""
    return [round(1e3 * value, 3) for value in statistics.quantiles(seconds, n=4)]


def first_by_library(engine: Engine, ids: list[int]) -> float:
    began = time.perf_counter()
    session = engine.session(4096)
    Sampler(SamplingParams(temperature=0)).sample(session.feed(ids))
    return time.perf_counter() - began


def first_by_server(client: httpx.Client, ids: list[int]) -> float:
    body = {"model": MODEL, "prompt": ids, "max_tokens": 1, "temperature": 0, "stream": True}
    began = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as answer:
        for piece in answer.iter_raw():
            if b'"text"' in piece:
                return time.perf_counter() - began
    raise SystemExit("the server sent no token")


def step_by_library(engine: Engine, ids: list[int]) -> float:
    """Seconds per token after the first."""
    session = engine.session(4096)
    session.feed(ids[:64])
    times = []
    for _ in session.generate(SamplingParams(temperature=0, max_tokens=STREAM_TOKENS, ignore_eos=True)):
        times.append(time.perf_counter())
    return (times[-1] - times[0]) / (len(times) - 1)


def step_by_server(client: httpx.Client, process: psutil.Process) -> tuple[float, float]:
    """Seconds per token after the first, and the processor's of the HTTP process per token."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x " * 40}], "max_tokens": STREAM_TOKENS,
            "temperature": 0, "ignore_eos": True, "stream": True}  # fmt: skip
    before, times, tokens = process.cpu_times(), [], 0
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if '"delta":{"content":"' in line and '"finish_reason":null' in line:
                times.append(time.perf_counter())
                tokens += 1
    after = process.cpu_times()
    cost = after.user + after.system - before.user - before.system
    return (times[-1] - times[0]) / (STREAM_TOKENS - 1), cost / STREAM_TOKENS


@contextlib.contextmanager
def server() -> Iterator[tuple[httpx.Client, psutil.Process]]:
    command = [sys.executable, "-m", "tenfold", "serve", MODEL, "--port", "0", "--no-store", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stderr is not None
    try:
        address = re.search(r"http://\S+", process.stderr.readline())
        assert address is not None
        with httpx.Client(base_url=address[0], timeout=60) as client:
            while client.get("/ready").status_code != 200:
                time.sleep(0.1)
            yield client, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    main()
