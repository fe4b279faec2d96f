"""Memory a session takes against its plan, and whether it grows over many reads.

    python benchmarks/memory.py MODEL TOKENS [--runs 21]

Anonymous memory of the process, looked at every 10 ms: what the plan counts. Pages of mapped weights and of libraries
come and go as the system likes and are left out. Results: results/memory.json, by model, tokens and runs.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from array import array
from pathlib import Path

from runs import commit, machine_name

from tenfold import Engine
from tenfold.machine import anonymous_bytes

MOST_MESSAGES, MESSAGE_TOKENS = 8, 128
RESULTS = Path(__file__).parent / "results" / "memory.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens", type=int)
    parser.add_argument("--runs", type=int, default=1)
    options = parser.parse_args()
    engine = Engine.load(options.model, backend="cpu")
    plan_bytes = engine.session(options.tokens).need.total_bytes
    ids = array("i", (3 + place * 7919 % (engine.config.vocab_size - 3) for place in range(options.tokens)))
    peaks = [peak_of(engine, ids) for _ in range(options.runs)]
    found = {
        "machine": machine_name(),
        "commit": commit(),
        "plan_bytes": plan_bytes,
        "peak_bytes": max(peaks),
        "peak_to_plan": round(max(peaks) / plan_bytes, 3),
        "peaks_by_run": peaks,
    }
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[f"{Path(options.model).name}, {options.tokens} tokens, {options.runs} runs"] = found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


def peak_of(engine: Engine, ids: array[int]) -> int:
    """Of one read in a session of its own, whose first messages, up to half of it, leave points to go back to."""
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    session = engine.session(len(ids))
    read = min(MOST_MESSAGES * MESSAGE_TOKENS, len(ids) // 2) // MESSAGE_TOKENS * MESSAGE_TOKENS
    for place in range(0, read, MESSAGE_TOKENS):
        session.feed(ids[place : place + MESSAGE_TOKENS])
    session.feed(ids[read:])
    ended.set()
    watcher.join()
    return peak


if __name__ == "__main__":
    main()
