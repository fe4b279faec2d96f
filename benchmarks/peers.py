"""Whole models side by side: tenfold and its peers on one random V4 checkpoint of 141 M parameters.

    python benchmarks/peers.py --work DIR --peers-python PYTHON [--llama-source DIR] [--rounds 3] [--prefix "CMD"]

The peers live in an environment of their own, whose interpreter is PYTHON: transformers 5.23.0 with torch 2.13.0,
llama-cpp-python 0.3.36 (built from source with GGML_NATIVE=ON and GGML_OPENMP=ON) and flyweight-llm 0.23.1. On a CPU
with AMX that build cannot run this network, since its AMX backend refuses an operation: there GGML_NATIVE was OFF, and
GGML_AVX512, _VBMI, _VNNI and _BF16 ON. Where the machine has AVX-512 the build uses it; --llama-avx2 names a folder
with the same libraries built with GGML_NATIVE=OFF and GGML_AVX2=ON. GGUF files are made once by llama.cpp's converter,
which is in the source package of llama-cpp-python: --llama-source names its folder vendor/llama.cpp. A peer that cannot
be imported is named and left out.

Each task of each engine is a process of its own; engines alternate, rounds go round them. What ran is kept in
DIR/runs.jsonl, so a stopped run goes on where it was; tenfold's runs of another commit are done again. A run during
which others kept the machine busy is repeated. --prefix puts a command before each run, such as a lock.

First the gate: tenfold's logits against transformers' on two prompts. Then medians to DIR/peers.csv, and the chart
beside it, which needs matplotlib; what was kept of each machine stands in benchmarks/results. Memory and contexts: see
benchmarks/peers/common.py and the runners.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tenfold.machine import this_machine

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "peers"
sys.path.insert(0, str(FOLDER))

from chart import draw  # noqa: E402
from checkpoint import write_gguf, write_safetensors  # noqa: E402

K = 1024
LONGEST = 1024 * K - 1024
"""What is called 1M: room for a chunk and some tokens is left below 1,048,576."""
LIMITS = {"tenfold-exact": (1e-4, 0.99), "tenfold-deployed": (0.05, 0.5)}
"""Largest difference of a position's logits, as a share of the largest, and the share of positions within it.

With random weights many choices of experts and rows are nearly ties, which any rounding turns: quantised rows (all
but exact numerics) move about 40 % of the positions of such a network to other experts, with float32 activations too.
"""
GATE_TOKENS = (600, 2500)
MOST_DISTURBED_CPUS = 0.15
TRIES = 3
LONG_S = 60.0
"""A run that takes longer is done once."""
TIMEOUT_S = 180
AVX2 = "AVX2"


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine in one setting: its runner, what it is given, and the tasks it can do in reasonable time."""

    name: str
    runner: str
    module: str
    options: tuple[str, ...] = ()
    tasks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    late_options: tuple[str, ...] = ()

    def arguments(self, tokens: int) -> tuple[str, ...]:
        return self.options + (self.late_options if tokens >= LONGEST else ())


ALL = {
    "prefill": (K, 4 * K, 16 * K),
    "chunk": (64 * K, 256 * K, LONGEST),
    "decode": (K, 16 * K, 64 * K, 256 * K, LONGEST),
    "memory": (K,),
}
WITHOUT_MEMORY = {task: lengths for task, lengths in ALL.items() if task != "memory"}
SHORT = {"prefill": (K, 4 * K), "decode": (K,)}
Q8 = "--dense", "q8", "--kv"
SMALL_CHUNKS = "--ubatch", "64"  # a mask of 512 x 1M would not end within the limit
ENGINES = (
    Engine("tenfold", "run_tenfold.py", "tenfold", tasks=ALL),
    Engine("llama.cpp Q8_0, KV q8_0", "run_llama.py", "llama_cpp", (*Q8, "q8_0"), ALL, SMALL_CHUNKS),
    Engine("llama.cpp Q8_0, KV f16", "run_llama.py", "llama_cpp", (*Q8, "f16"), ALL, SMALL_CHUNKS),
    Engine("llama.cpp AVX2 Q8_0, KV q8_0", "run_llama.py", "llama_cpp", (*Q8, "q8_0"), WITHOUT_MEMORY, SMALL_CHUNKS),
    Engine("llama.cpp AVX2 Q8_0, KV f16", "run_llama.py", "llama_cpp", (*Q8, "f16"), SHORT),
    Engine(
        "llama.cpp BF16, KV q8_0",
        "run_llama.py",
        "llama_cpp",
        ("--dense", "bf16", "--kv", "q8_0"),
        {"prefill": (K, 4 * K), "chunk": (64 * K,), "decode": (K, 64 * K), "memory": (K,)},
    ),
    Engine(
        "transformers f32",
        "run_transformers.py",
        "transformers",
        tasks={**ALL, "chunk": (64 * K,)},  # at 256K one layer's mask and scores take several GB
    ),
    Engine(
        "flyweight Q8_0",
        "run_flyweight.py",
        "flyweight",
        (*Q8, "f16"),
        {**SHORT, "memory": (K,)},
    ),
)
GATED = (
    ("tenfold-exact", "tenfold", ("--numerics", "exact")),
    ("tenfold-deployed", "tenfold", ()),
    ("transformers", "transformers f32", ()),
)


def main() -> int:
    options = parse()
    prepare(options)
    engines = [engine for engine in ENGINES if usable(engine, options)]
    runs = Runs(options.work / "runs.jsonl")
    if not runs.passed_gate():
        if not gate(options, {engine.name: engine for engine in engines}):
            return 1
        runs.add({"task": "gate", "commit": commit()})
    for round_number in range(options.rounds):
        for engine, task, tokens in schedule(engines, options.tasks, round_number):
            measure(options, runs, engine, task, tokens, round_number)
    rows = list(medians(runs, engines))
    write(rows, options.work)
    draw(rows, options.work)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and runs")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers (this one)")
    parser.add_argument("--llama-source", type=Path, help="vendor/llama.cpp of llama-cpp-python's source package")
    parser.add_argument("--llama-avx2", type=Path, help="folder of llama.cpp's libraries built for AVX2 alone")
    parser.add_argument("--engines", nargs="*", default=[], help="words in the names of the engines wanted (all)")
    parser.add_argument("--tasks", nargs="*", default=list(ALL), choices=list(ALL))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefix", default="", help="command put before each run, such as a lock")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    write_safetensors(options.work)
    missing = [name for name in ("q8.gguf", "bf16.gguf") if not (options.work / name).exists()]
    if missing and options.llama_source:
        write_gguf(options.work, options.peers_python, options.llama_source)
    elif missing:
        print(f"no {' and no '.join(missing)}: give --llama-source to make them; engines that read GGUF are left out")


def usable(engine: Engine, options: argparse.Namespace) -> bool:
    if options.engines and not any(word in engine.name for word in options.engines):
        return False
    if AVX2 in engine.name and not options.llama_avx2:
        return False
    if "--dense" in engine.options and not (options.work / f"{engine.options[1]}.gguf").exists():
        return False
    python = interpreter(engine, options)
    found = subprocess.run([python, "-c", f"import {engine.module}"], capture_output=True, check=False)
    if found.returncode:
        print(
            f"{engine.name} is left out: {python} cannot import {engine.module}; see the head of {Path(__file__).name}"
        )
    return not found.returncode


def interpreter(engine: Engine, options: argparse.Namespace) -> str:
    return sys.executable if engine.name == "tenfold" else str(options.peers_python)


def run(options: argparse.Namespace, engine: Engine, task: str, tokens: int, *extra: str) -> dict[str, object]:
    """One process; its line of JSON, or {"failed": why}."""
    command = [
        *shlex.split(options.prefix),
        *("timeout", str(TIMEOUT_S)),
        *(interpreter(engine, options), str(FOLDER / engine.runner), str(options.work), task, str(tokens)),
        *engine.arguments(tokens),
        *(("--lib", str(options.llama_avx2)) if AVX2 in engine.name else ()),
        *extra,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": f"no result in {TIMEOUT_S} s" if done.returncode == 124 else lines[-1]}
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def gate(options: argparse.Namespace, engines: dict[str, Engine]) -> bool:
    """Whether tenfold's logits are transformers'; nothing is timed otherwise. Without transformers it says so."""
    if "tenfold" not in engines:
        return True
    if "transformers f32" not in engines:
        print("no transformers to compare with: the gate is left out", file=sys.stderr)
        return True
    for tokens in GATE_TOKENS:
        found = {}
        for name, engine, extra in GATED:
            path = options.work / "logits" / f"{name}-{tokens}.npy"
            if name != "transformers" or not path.exists():
                done = run(options, engines[engine], "logits", tokens, *extra)
                if "failed" in done:
                    print(f"gate: {name} failed: {done['failed']}")
                    return False
            found[name] = np.load(path).astype(np.float64)
        expected = found["transformers"]
        for name, (limit, share) in LIMITS.items():
            errors = np.abs(found[name] - expected).max(1) / np.abs(expected).max(1)
            within = float((errors <= limit).mean())
            middle = float(np.median(errors))
            told = f"{tokens} positions: median {middle:.1e}, {within:.1%} within {limit:.0e}"
            print(f"gate: {name} against transformers, {told}")
            if not within >= share:
                return False
    return True


def schedule(engines: list[Engine], tasks: list[str], round_number: int) -> Iterator[tuple[Engine, str, int]]:
    """Task by task, the engines in turn, each round in the other direction."""
    for task in tasks:
        for tokens in ALL[task]:
            for engine in engines if round_number % 2 == 0 else engines[::-1]:
                if tokens in engine.tasks.get(task, ()):
                    yield engine, task, tokens


class Runs:
    """What ran so far, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.lines: list[dict[str, object]] = [json.loads(line) for line in lines]

    def add(self, line: dict[str, object]) -> None:
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def passed_gate(self) -> bool:
        return any(line["task"] == "gate" and line["commit"] == commit() for line in self.lines)

    def of(self, engine: Engine, task: str, tokens: int) -> list[dict[str, object]]:
        wanted = {"engine": engine.name, "task": task, "tokens": tokens}
        if engine.name == "tenfold":
            wanted["commit"] = commit()
        return [line for line in self.lines if wanted.items() <= line.items()]


def measure(options: argparse.Namespace, runs: Runs, engine: Engine, task: str, tokens: int, number: int) -> None:
    done = runs.of(engine, task, tokens)
    if len(done) > number or any("failed" in line or line.get("long") for line in done):
        return
    for _ in range(TRIES):
        found = run(options, engine, task, tokens)
        if "failed" in found or float(str(found["disturbed"])) <= MOST_DISTURBED_CPUS:
            break
    tps = float(str(found.get("tps", 0.0)))
    long = task == "prefill" and 0 < tps < tokens / LONG_S
    line = {"engine": engine.name, "task": task, "tokens": tokens, "commit": commit(), "long": long} | found
    runs.add(line)
    print(json.dumps(line), flush=True)


def commit() -> str:
    head = subprocess.run(
        ["git", "log", "-1", "--format=%h", "--abbrev=12", "--", "src", "native"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return head.stdout.strip()


def medians(runs: Runs, engines: list[Engine]) -> Iterator[dict[str, str]]:
    for task, lengths in ALL.items():
        for tokens in lengths:
            for engine in engines:
                good = [line for line in runs.of(engine, task, tokens) if "failed" not in line]
                if good:
                    yield summary(engine, task, tokens, good)


def summary(engine: Engine, task: str, tokens: int, lines: list[dict[str, object]]) -> dict[str, str]:
    def middle(name: str, digits: int = 1) -> str:
        values = [float(str(line[name])) for line in lines if name in line]
        return f"{statistics.median(values):.{digits}f}" if values else ""

    rates = [float(str(line["tps"])) for line in lines if "tps" in line]
    machine = this_machine()
    return {
        "engine": engine.name,
        "task": task,
        "tokens": str(tokens),
        "tokens_per_s": middle("tps", 2),
        "slowest": f"{min(rates):.2f}" if rates else "",
        "fastest": f"{max(rates):.2f}" if rates else "",
        "runs": str(len(lines)),
        "most_disturbed_cpus": f"{max(float(str(line['disturbed'])) for line in lines):.2f}",
        "bytes_per_token": middle("bytes_per_token"),
        "peak_mb": middle("short_peak_mb" if "short_peak_mb" in lines[0] else "peak_mb", 0) if task == "memory" else "",
        "torch_mb": middle("torch_mb", 0) if task == "memory" else "",
        "version": str(lines[-1]["version"]),
        "commit": str(lines[-1]["commit"]) if engine.name == "tenfold" else "",
        "machine": f"{machine.cpu_model}, {machine.usable_cores} cores",
    }


def write(rows: list[dict[str, str]], folder: Path) -> None:
    with (folder / "peers.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
