"""How soon a long read can be stopped: the longest time between two ticks of a pass, by depth, and what ticks cost.

    python benchmarks/cancel.py DIR --depth 131072

A checkpoint folder as in decode.py; contexts are random rows. The same chunk is read in turns as the engine does
("in parts"), and with attention and selection of a whole tile at once. A cancel that comes at the worst moment
waits for the longest gap. Results: results/cancel.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from array import array
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from contexts import pretend
from decode import touch
from runs import commit, machine_name

from tenfold import Engine, step
from tenfold.engine import Session

RESULTS = Path(__file__).parent / "results" / "cancel.json"
PART_FLOPS = {"in parts": step._PART_FLOPS, "at once": 1 << 62}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    engine = Engine.load(options.folder, backend="cpu")
    touch(engine)
    save(f"depth {options.depth}", measured(engine, options.depth, options.tokens, options.turns))


def measured(engine: Engine, depth: int, tokens: int, turns: int) -> dict[str, Any]:
    """The ids are read by a session of their own first: embeddings come from disk at first use."""
    generator = torch.Generator().manual_seed(0)
    ids = array("i", torch.randint(0, engine.config.vocab_size, (tokens,), generator=generator).tolist())
    engine.session(tokens).feed(ids)
    session = engine.session()
    depth = min(depth, session.context - tokens)
    pretend(session, depth)
    state = session.snapshot()
    found: dict[str, list[list[float]]] = {name: [] for name in PART_FLOPS}
    for _ in range(turns):
        for name, flops in PART_FLOPS.items():
            session.restore(state)
            step._PART_FLOPS = flops
            found[name].append(gaps(session, ids))
    sizes = {"layers": len(engine.config.layers), "tile_tokens": session.need.tile_tokens, "tokens": tokens}
    return sizes | {name: figures(runs, tokens) for name, runs in found.items()}


def gaps(session: Session, ids: array[int]) -> list[float]:
    """Seconds from tick to tick of one pass over `ids`."""
    times = [time.perf_counter()]
    session.engine._run({session: ids}, every=False, tick=lambda share: times.append(time.perf_counter()))
    times.append(time.perf_counter())
    return [after - before for before, after in pairwise(times)]


def figures(runs: list[list[float]], tokens: int) -> dict[str, Any]:
    return {
        "tokens_per_s": round(tokens / statistics.median(map(sum, runs)), 2),
        "longest_gap_s": [round(max(run), 3) for run in runs],
        "median_gap_s": round(statistics.median(gap for run in runs for gap in run), 3),
        "ticks": len(runs[0]) - 1,
    }


def save(name: str, found: dict[str, Any]) -> None:
    found = {"commit": commit(), "machine": machine_name(), **found}
    print(json.dumps({name: found}, indent=1))
    every = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**every, name: found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
