"""The full judgement against transformers: random tiny networks of both families, long prompts, decoded tokens.

    python benchmarks/oracle.py [--networks 44] [--first 0] [--results FOLDER]

Writes one line per network and prompt to oracle.csv, and what it ran on to oracle.json; exit code 1 if any of them
is further from the oracle than allowed, or if a pass in one piece differs from token by token by a single bit.
The cases and the comparison are those of tests/models/oracle_cases.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests are no installed package

import torch  # noqa: E402
import transformers  # noqa: E402
from tests.models.oracle_cases import (  # noqa: E402
    LIMIT,
    PROMPTS,
    TIE,
    Case,
    Family,
    Network,
    Outcome,
    judge,
    make_case,
)

from tenfold.machine import this_machine  # noqa: E402

FAMILIES: tuple[Family, ...] = ("v4", "v3.2")
DECODED = 140
FIELDS = (
    "family",
    "seed",
    "prompt_tokens",
    "decoded_tokens",
    "max_difference",
    "max_logit",
    "relative",
    "relative_before_ties",
    "ties",
    "bitwise_in_one_pass",
)


def main() -> int:
    """Judges all networks; the exit code says whether all passed."""
    options = parse()
    torch.set_num_threads(1)  # tiny matrices only lose by a second one
    started_s = time.monotonic()
    rows = list(judge_all(options.networks, options.first, options.backend))
    verdict = summary(rows, options, time.monotonic() - started_s)
    write(options.results, rows, verdict)
    print(json.dumps({key: verdict[key] for key in ("passed", "networks", "comparisons", "worst_relative", "seconds")}))
    return 0 if verdict["passed"] else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares this engine with transformers on random tiny networks.")
    parser.add_argument("--networks", type=int, default=44, help="networks of each family (44)")
    parser.add_argument("--first", type=int, default=0, help="number of the first network (0)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where to write")
    parser.add_argument("--backend", default="reference", help="reference or cpu (reference)")
    return parser.parse_args()


def judge_all(networks: int, first: int, backend: str) -> Iterator[dict[str, Any]]:
    """One row per network and prompt; progress goes to stderr."""
    for family in FAMILIES:
        for seed in range(first, first + networks):
            started_s = time.monotonic()
            case = make_case(family, seed)
            with tempfile.TemporaryDirectory() as folder:
                outcomes = judge(Network.build(case, Path(folder)), PROMPTS, DECODED, backend)
            report(case, outcomes, time.monotonic() - started_s)
            yield from (row(case, outcome) for outcome in outcomes)


def report(case: Case, outcomes: list[Outcome], seconds: float) -> None:
    worst = max(outcome.relative for outcome in outcomes)
    ties = sum(outcome.ties for outcome in outcomes)
    mark = "ok  " if all(passed(outcome) for outcome in outcomes) else "FAIL"
    print(f"{mark} {case.name:8} worst {worst:.1e}  ties {ties:2}  {seconds:5.1f} s", file=sys.stderr, flush=True)


def passed(outcome: Outcome) -> bool:
    return outcome.relative <= LIMIT and outcome.bitwise


def row(case: Case, outcome: Outcome) -> dict[str, Any]:
    values = (
        case.family,
        case.seed,
        outcome.prompt,
        outcome.positions - 1,
        f"{outcome.max_difference:.3e}",
        f"{outcome.max_logit:.4f}",
        f"{outcome.relative:.3e}",
        f"{outcome.relative_unfollowed:.3e}",
        outcome.ties,
        outcome.bitwise,
    )
    return dict(zip(FIELDS, values, strict=True))


def summary(rows: list[dict[str, Any]], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What was run, on what, and how it ended."""
    machine = this_machine()
    worst = {family: max(float(r["relative"]) for r in rows if r["family"] == family) for family in FAMILIES}
    return {
        "passed": all(float(r["relative"]) <= LIMIT and r["bitwise_in_one_pass"] for r in rows),
        "limit": LIMIT,
        "worst_relative": worst,
        "networks": dict.fromkeys(FAMILIES, options.networks),
        "comparisons": len(rows),
        "positions": sum(1 + r["decoded_tokens"] for r in rows),
        "within_limit_before_ties": sum(float(r["relative_before_ties"]) <= LIMIT for r in rows),
        "ties": sum(r["ties"] for r in rows),
        "tie": f"scores of rows or experts within {TIE:g} of the largest; there the oracle's choice was followed",
        "prompts": PROMPTS,
        "decoded": DECODED,
        "backend": options.backend,
        "numerics": "exact, float32",
        "seconds": round(seconds),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": f"{machine.cpu_model}, {machine.usable_cores} cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "configs": "tests/models/oracle_cases.py: make_case(family, seed).words",
    }


def commit() -> str:
    """The commit of this tree, with a plus sign if the engine differs from it."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", "src/*.py", "tests/models"], cwd=ROOT, check=False
    )
    return head.stdout.strip()[:12] + ("+" if changed.returncode else "")


def write(folder: Path, rows: list[dict[str, Any]], verdict: dict[str, Any]) -> None:
    stem = "oracle" if verdict["backend"] == "reference" else f"oracle-{verdict['backend']}"
    with (folder / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    (folder / f"{stem}.json").write_text(json.dumps(verdict, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
