"""Times `tenfold demo` as a user runs it: median of several runs, nothing else running.

    python benchmarks/demo.py

Writes benchmarks/results/demo.json: seconds, tokens/s and KV bytes of both architectures, machine and commit.
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

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description="median of several runs of the demo")
    parser.add_argument("--runs", type=int, default=5)
    runs = [demo.show(None, max_tokens=8, seed=1, quiet=True) for _ in range(parser.parse_args().runs)]
    found = {"models": {name: median(runs, name) for name in runs[0]["models"]}}
    found |= {"bits_per_byte": runs[0]["bits_per_byte"], "runs": len(runs), "commit": commit()}
    machine = this_machine()
    found["machine"] = f"{machine.cpu_model}, {machine.usable_cores} cores"
    (ROOT / "benchmarks" / "results" / "demo.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


def median(runs: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The figures of one model, its seconds as p20, p50 and p80 of the runs."""
    figures = dict(runs[0]["models"][name])
    seconds = sorted(run["models"][name]["seconds"] for run in runs)
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
