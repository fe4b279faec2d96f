"""Times `tenfold demo` as a user runs it: median of several runs, nothing else running.

    python benchmarks/demo.py [--all] [--context 128K] [--runs 5]

Writes benchmarks/results/demo.json: needles found, seconds, tokens/s, memory, KV bytes and FLOPs by model, machine and
commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

from tenfold import demo
from tenfold.machine import this_machine
from tenfold.planner.prices import parse_tokens

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description="median of several runs of the demo")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--context", default="128K")
    parser.add_argument("--needles", type=int, default=10)
    parser.add_argument("--all", action="store_true")
    asked = parser.parse_args()
    task = demo.Task(parse_tokens(asked.context), asked.needles, seed=1)
    runs = [demo.show(*demo.chosen(None, asked.all), task) for _ in range(asked.runs)]
    found = {"context": task.context, "needles": asked.needles, "runs": asked.runs, "commit": commit()}
    found["models"] = {name: median(runs, name) for name in runs[0]["models"]}
    machine = this_machine()
    found["machine"] = f"{machine.cpu_model}, {machine.usable_cores} cores"
    (ROOT / "benchmarks" / "results" / "demo.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


def median(runs: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The figures of one model; where it read, its seconds as p20, p50 and p80 of the runs."""
    figures = dict(runs[0]["models"][name])
    if figures["answers"] is None:
        speeds = [run["models"][name]["tokens_per_s"] for run in runs]
        return figures | {"tokens_per_s": statistics.median(speeds)}
    seconds = sorted(run["models"][name]["seconds"] for run in runs)
    low, high = seconds[0], seconds[-1]
    if len(seconds) > 1:
        low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
    figures |= {"seconds": statistics.median(seconds), "seconds_p20": round(low, 2), "seconds_p80": round(high, 2)}
    return figures | {"tokens_per_s": round(figures["tokens"] / figures["seconds"], 1)}


def commit() -> str:
    head = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return head.stdout.strip()


if __name__ == "__main__":
    main()
