"""What every runner shares: the tasks, the tokens, the clock, the memory of this process. Knows no engine.

A runner is started as `run_ENGINE.py WORK TASK TOKENS [--option VALUE ...]`, does one task and prints one line of JSON:

    prefill N   reads N tokens into an empty context: tokens/s
    chunk N     reads 512 tokens behind N others: tokens/s
    decode N    writes tokens behind N others: tokens/s (median of the steps)
    logits N    the logits of N tokens, to WORK/logits/ENGINE-N.npy: of the last one, or of all for the gate's two sides
    memory N    reads N tokens and writes 16: peak RSS, bytes of context per token
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from quiet import Watch

CHUNK_TOKENS = 512
WARM_STEPS, STEPS = 4, 24
STEPS_S = 40.0
"""Writing stops after so long, however few steps it took."""
VOCAB = 8192
TASKS = ("prefill", "chunk", "decode", "logits", "memory")


def arguments(*options: tuple[str, type, object]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("tokens", type=int)
    for name, kind, default in options:
        parser.add_argument(f"--{name}", type=kind, default=default)
    return parser.parse_args()


def random_ids(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCAB, count).tolist()


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def rate(steps: list[float]) -> dict[str, float]:
    """Tokens/s of the median step, and of the slowest and the fastest."""
    return {"tps": 1 / statistics.median(steps), "slowest": 1 / max(steps), "fastest": 1 / min(steps)}


def decode_steps(step: Callable[[], object]) -> dict[str, float]:
    times: list[float] = []
    while len(times) < WARM_STEPS + STEPS and sum(times) < STEPS_S:
        times.append(seconds(step))
    return rate(times[WARM_STEPS:] or times[1:] or times) | {"steps": len(times)}


def memory_mb(field: str = "VmHWM") -> float:
    """VmHWM: the most this process has held; VmRSS: what it holds now."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def save_logits(work: Path, engine: str, tokens: int, logits: np.ndarray) -> dict[str, str]:
    folder = work / "logits"
    folder.mkdir(exist_ok=True)
    path = folder / f"{engine}-{tokens}.npy"
    np.save(path, np.asarray(logits, np.float32))
    return {"logits": path.name}


_watch = Watch()


def report(**values: object) -> None:
    """`disturbed`: CPUs that others kept busy meanwhile."""
    print(json.dumps(values | {"disturbed": round(_watch.disturbed_cpus(), 3)}), flush=True)
