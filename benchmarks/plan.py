"""What `tenfold plan` predicts for this machine beside what the engine takes: decode and a chunk of prefill.

    python benchmarks/plan.py [FOLDER] [--chunk 2048]        (the embedded model without FOLDER)

`tenfold doctor --measure`'s figures are taken anew in each run; contexts are random rows (`contexts.pretend`), prefill
is one chunk at that depth. Results: results/plan-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

from runs import commit, machine_name

from tenfold import Engine
from tenfold.calibration import calibrate
from tenfold.contexts import pretend
from tenfold.engine import Session
from tenfold.planner.anatomy import dissect, loaded
from tenfold.planner.clocks import LocalClock, residual_channels

CONTEXTS = (1024, 65_536, 1_000_000)
DECODES, DECODE_S, CHUNKS = 15, 2.0, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="tiny-v4-flash")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a chunk of prefill")
    parser.add_argument("--runs", type=int, default=5, help="how often to measure machine and model in turns")
    args = parser.parse_args()
    folder = args.folder
    engine = Engine.load(folder, backend="cpu")
    runs = []
    for _ in range(args.runs):
        measured = calibrate()
        clock = LocalClock(dissect(engine.config, loaded), measured, residual_channels(engine.config))
        runs.append([row for context in CONTEXTS for row in compared(engine, clock, context, args.chunk)])
    rows = [in_the_middle(found) for found in zip(*runs, strict=True)]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    found = {
        "machine": machine_name(),
        "commit": commit(),
        "runs": args.runs,
        "measured": asdict(measured),
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / f"plan-{Path(folder).name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def in_the_middle(rows: tuple[dict[str, object], ...]) -> dict[str, object]:
    """Medians of the runs, and how far the measured times and the ratios of single runs lie apart."""
    found = {key: rows[0][key] for key in ("what", "context")}
    for key in ("measured_ms", "predicted_ms", "predicted_over_measured"):
        values = sorted(float(row[key]) for row in rows)  # type: ignore[arg-type]
        found |= {key: statistics.median(values), f"{key}_range": [values[0], values[-1]]}
    return found


def compared(engine: Engine, clock: LocalClock, context: int, chunk: int) -> list[dict[str, object]]:
    session = engine.session()
    pretend(session, context)
    feed_s(session, 1)  # the first touch of weights and rows is not what is predicted
    times_s: list[float] = []
    while len(times_s) < DECODES or sum(times_s) < DECODE_S:
        times_s.append(feed_s(session, 1))
    decode_s = statistics.median(times_s)
    predicted_s = clock.decode_s(session.length)
    rows = [line("decode", context, decode_s, predicted_s)]
    depth = session.length
    chunk_s = statistics.median(feed_s(session, chunk) for _ in range(CHUNKS))
    middle = depth + (CHUNKS // 2) * chunk
    return [*rows, line(f"chunk of {chunk}", context, chunk_s, clock.prefill_s(middle, middle + chunk))]


def feed_s(session: Session, tokens: int) -> float:
    ids = [3 + i % 500 for i in range(tokens)]
    began = time.perf_counter()
    session.engine.step({session: ids})
    return time.perf_counter() - began


def line(what: str, context: int, measured_s: float, predicted_s: float) -> dict[str, object]:
    return {
        "what": what,
        "context": context,
        "measured_ms": round(1e3 * measured_s, 3),
        "predicted_ms": round(1e3 * predicted_s, 3),
        "predicted_over_measured": round(predicted_s / measured_s, 3),
    }


if __name__ == "__main__":
    main()
