"""A slice of a model at full width: decode and prefill at growing contexts, as a share of the machine's limit.

The slice is a checkpoint folder, for V4-Flash made by

    tenfold synth v4-flash DIR --layers 8 --experts 64        (10.2 GB, 8 of 43 layers, a step reads what V4's would)

Contexts are random rows (`contexts.pretend`). The bound is the planner's: over all parts of a step the longer of
reading its bytes and doing its operations, at the peaks measured in the same run: of float32 multiply-adds or of those
of the integers or the tiles that take their place. Results: results/decode.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from runs import commit, machine_name

from tenfold import Engine, _native
from tenfold.contexts import pretend
from tenfold.engine import Session
from tenfold.peaks import MeasuredPeaks, measure
from tenfold.planner import Peaks, roofline_seconds, step_work
from tenfold.planner.anatomy import Anatomy, Precision, dissect, loaded
from tenfold.planner.clocks import as_computed_here

RESULTS = Path(__file__).parent / "results" / "decode.csv"
CONTEXTS = (1024, 16 * 1024, 128 * 1024, 1024 * 1024)
CHUNK_TOKENS = 2048
DECODE_STEPS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--numerics", choices=("deployed", "exact"), default="deployed")
    parser.add_argument("--no-prefill", action="store_true")
    options = parser.parse_args()
    engine = Engine.load(options.folder, backend="cpu", numerics=options.numerics)
    touch(engine)
    rows = []
    for context in options.contexts:
        for row in measured(engine, context, prefill=not options.no_prefill):
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
    write(rows)


def measured(engine: Engine, context: int, prefill: bool) -> Iterator[dict[str, str]]:
    """Decode behind `context` tokens, then one chunk; the last tokens of the model's context are kept free for them."""
    session = engine.session()
    depth = min(context, session.context - CHUNK_TOKENS - 2 * DECODE_STEPS)
    pretend(session, depth)
    generator = torch.Generator().manual_seed(depth)
    times = [step_s(session, 1, generator) for _ in range(DECODE_STEPS)][2:]
    yield line(engine, context, 1, depth + DECODE_STEPS // 2, times)
    if prefill:
        yield line(engine, context, CHUNK_TOKENS, session.length, [step_s(session, CHUNK_TOKENS, generator)])


def touch(engine: Engine) -> None:
    """Reads every weight once: a page of a mapped file costs a fault at its first use."""
    for block in engine.model.blocks:
        for weights in (block.ffn.experts.w1, block.ffn.experts.w2, block.ffn.experts.w3):
            for weight in weights:
                weight.data.view(torch.uint8).flatten()[::4096].sum()
    session = engine.session()
    session.feed(list(range(256)))


def step_s(session: Session, tokens: int, generator: torch.Generator) -> float:
    ids = torch.randint(0, session.engine.config.vocab_size, (tokens,), generator=generator).tolist()
    return seconds(lambda: session.engine.step({session: ids}))


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def line(engine: Engine, context: int, tokens: int, position: int, times: list[float]) -> dict[str, str]:
    peaks = peaks_now(engine)
    median = statistics.median(times)
    bound = roofline_seconds(step_work(anatomy(engine), position, tokens), peaks)
    low, high = (statistics.quantiles(times, n=5)[i] for i in (0, 3)) if len(times) > 1 else (median, median)
    return {
        "engine": "tenfold",
        "layers": str(len(engine.config.layers)),
        "numerics": "exact" if engine.exact else "deployed",
        "context": str(context),
        "tokens": str(tokens),
        "p20_ms": f"{low * 1e3:.2f}",
        "p50_ms": f"{median * 1e3:.2f}",
        "p80_ms": f"{high * 1e3:.2f}",
        "tokens_per_s": f"{tokens / median:.2f}",
        "bound_ms": f"{bound * 1e3:.2f}",
        "share_of_bound": f"{bound / median:.2f}",
        "read_gb_s": f"{peaks.read_bytes_per_s / 1e9:.1f}",
        "float32_gflop_s": f"{peaks.float32_flops_per_s / 1e9:.0f}",
        "int8_gop_s": f"{peaks.int8_ops_per_s / 1e9:.0f}",
        "machine": machine_name(),
        "commit": commit(),
    }


def anatomy(engine: Engine) -> Anatomy:
    found = dissect(engine.config, loaded)
    return found if engine.exact else as_computed_here(found)


def peaks_now(engine: Engine) -> Peaks:
    found = measure(data=engine.model.head.data)  # mapped from the checkpoint, as all weights are
    return peaks_of(found, exact=engine.exact, tiles=_native.isa() == "amx")


def peaks_of(found: MeasuredPeaks, *, exact: bool, tiles: bool) -> Peaks:
    """A tile's instruction takes half as many bf16 numbers as bytes; of activations that meet MXFP4 one such number is
    multiplied, of those that meet FP8 or bf16 and of queries two. Without tiles FP8 and V4's rows are multiplied in 16
    bits."""
    rates = found.read_bytes_per_s, found.float32_flops_per_s, found.int8_ops_per_s
    if exact:
        return Peaks(*rates, int8=frozenset())
    once = found.int8_ops_per_s / 2
    achieved: dict[Precision, float] = {"fp8": found.int16_ops_per_s, "fp8rows": found.int16_ops_per_s}
    if tiles:
        achieved = {"fp4xfp8": once, "fp8": once / 2, "fp8rows": once / 2, "bf16": once / 2}
    return Peaks(*rates, int8=frozenset({"fp4", "fp4xfp8"}), achieved=achieved)


def write(rows: list[dict[str, str]]) -> None:
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
