"""tenfold against transformers on one slice of V4-Flash at full width, the largest that transformers holds here.

    python benchmarks/slice.py WORK [--peers-python PYTHON] [--rounds 3] [--prefix "CMD"]

WORK holds the same random network twice: `official` (FP8 and MXFP4, what tenfold maps) and `plain` (bf16, what
transformers loads), made by

    tenfold synth v4-flash WORK/official --layers 4 --experts 16 --set num_nextn_predict_layers=0
    tenfold synth v4-flash WORK/plain --layers 4 --experts 16 --set num_nextn_predict_layers=0 --format bf16

Each task is a process of its own, the engines in turn, the order turned each round (the runners of benchmarks/peers).
Medians: results/slice.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from runs import commit, machine_name

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "slice.csv"
ENGINES = {
    "tenfold": ("run_tenfold.py",),
    "transformers bf16": ("run_transformers.py", "--dtype", "bfloat16"),
    "transformers f32": ("run_transformers.py", "--dtype", "float32"),
}
TASKS = (("prefill", 1024), ("decode", 1024), ("decode", 16 * 1024), ("decode", 64 * 1024))
TIMEOUT_S = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has transformers (this one)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefix", default="", help="command put before each run, such as a lock")
    options = parser.parse_args()
    found: dict[tuple[str, int, str], list[float]] = {}
    for round_number in range(options.rounds):
        for task, tokens in TASKS:
            for engine in list(ENGINES)[:: -1 if round_number % 2 else 1]:
                rate = run(options, engine, task, tokens)
                if rate is not None:
                    found.setdefault((task, tokens, engine), []).append(rate)
    write(found)


def run(options: argparse.Namespace, engine: str, task: str, tokens: int) -> float | None:
    """Tokens/s; None, with the reason said, where the engine gave no result."""
    runner, *extra = ENGINES[engine]
    python = sys.executable if engine == "tenfold" else options.peers_python
    command = [*shlex.split(options.prefix), "timeout", str(TIMEOUT_S), python, str(FOLDER / "peers" / runner)]
    done = subprocess.run(
        [*command, str(options.work), task, str(tokens), *extra], capture_output=True, text=True, check=False
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no word"])[-1]
        print(f"{engine}, {task} at {tokens}: exit code {done.returncode}, {why}")
        return None
    report = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{engine}, {task} at {tokens}: {report['tps']:.2f} tokens/s, disturbed {report['disturbed']}", flush=True)
    return float(report["tps"])


def write(found: dict[tuple[str, int, str], list[float]]) -> None:
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["engine", "task", "tokens", "tokens_per_s", "runs", "machine", "commit"])
        for (task, tokens, engine), rates in found.items():
            median = f"{statistics.median(rates):.3f}"
            writer.writerow([engine, task, tokens, median, len(rates), machine_name(), commit()])


if __name__ == "__main__":
    main()
