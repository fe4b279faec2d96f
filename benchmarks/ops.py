"""Times the CPU kernels at the shapes of the real models, after a correctness gate. Nothing else may run meanwhile.

    python benchmarks/ops.py [WORD ...] [--peers FOLDER]

Takes the cases whose name ("v4-flash linear attn.wo_b fp8 n=64") holds each WORD. Contenders of a case alternate in
one process: tenfold with float32 activations and with those of deployed numerics (int8 where they meet MXFP4, int16
where they meet FP8; with AMX one bf16 number each, two where they meet FP8 and bf16), torch's float32 products on
weights already unpacked, and with --peers ggml, whose libraries are in FOLDER, the folder llama_cpp/lib of an installed
llama-cpp-python. Each has to give the true result first: float64 for products, else the reference.

A row of benchmarks/results/ops.csv is one contender: p20, p50 and p80 of its runs; the bytes it reads and what it
computes, per second; the share of the limit that binds it, which is reading its bytes (at the pace at which a plain
sum reads tenfold's, in turn with the contenders) or doing its arithmetic at the peak measured in the same run; and how
many times faster the fastest of tenfold is. A case that is measured again `beside` the same build of ggml is replaced.
Peers are no packages of this project: benchmarks/peers.py names them.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from kernels.cases import Case, Contender, cases
from quiet import Watch
from torch import Tensor

from tenfold import _native, peaks
from tenfold.machine import this_machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ops.csv"
RUNS = 15
LONGEST_S = 8.0
"""A contender is timed no longer than this, but for three runs."""
PAUSE_S = 0.002
"""Between two runs: threads of another pool go to sleep."""
KEY = ("model", "case", "n", "beside")


def main() -> int:
    options = parse()
    limits = peaks.measure()
    print(f"{_native.isa()}, {_native.num_threads()} threads: {shown(limits)}")
    rows: list[dict[str, str]] = []
    for case in cases(lambda name: all(word in name for word in options.words), options.peers):
        expected = case.law()
        errors = {contender.name: gate(contender, expected) for contender in case.contenders}
        wrong = {c.name: errors[c.name] for c in case.contenders if not errors[c.name] <= c.tolerance}
        if wrong:
            print(f"{case.model} {case.name} n={case.n}: wrong by {wrong}; not timed")
            return 1
        rows += timed(case, errors, limits)
        for contender in case.contenders:
            if contender.free is not None:
                contender.free()
    write(rows, limits)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="parts of the names of the cases wanted (all)")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="where libggml-base.so and libggml-cpu.so are")
    return parser.parse_args()


def shown(limits: peaks.MeasuredPeaks) -> str:
    return (
        f"read {limits.read_bytes_per_s / 1e9:.1f} GB/s, float32 {limits.float32_flops_per_s / 1e9:.0f} Gop/s, "
        f"int8 {limits.int8_ops_per_s / 1e9:.0f} Gop/s"
    )


def gate(contender: Contender, expected: Tensor) -> float:
    """Largest difference from the true result, relative to its largest number; of chosen rows, whether they differ.

    Two rows of 1,000 may: sums in another order can swap neighbours at the border.
    """
    found = contender.run()
    if contender.result is not None:
        found = contender.result()
    assert isinstance(found, Tensor)
    if found.dtype == torch.int32:
        common = sum(len(set(ours) & set(law)) for ours, law in zip(found.tolist(), expected.tolist(), strict=True))
        return 0.0 if common >= 0.998 * expected.numel() else 1.0
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def timed(case: Case, errors: dict[str, float], limits: peaks.MeasuredPeaks) -> list[dict[str, str]]:
    """The rows of a case; contenders take turns."""
    times: dict[str, list[float]] = {contender.name: [] for contender in case.contenders}
    read, reads, watch = reader(case.contenders[0].num_bytes), [], Watch()
    for number in range(RUNS):
        reads.append(seconds(read))
        for contender in case.contenders:
            spent = times[contender.name]
            if number < 3 or sum(spent) < LONGEST_S:
                time.sleep(PAUSE_S)
                spent.append(seconds(contender.run))
    ours_s = min(statistics.median(spent) for name, spent in times.items() if name.startswith("tenfold"))
    disturbed = f"{watch.disturbed_cpus():.2f}"
    beside = " ".join(name for name in dict.fromkeys(each.library for each in case.contenders) if name)
    limits = replace(limits, read_bytes_per_s=case.contenders[0].num_bytes / statistics.median(reads))
    rows = [
        row(case, each, times[each.name], errors[each.name], ours_s, limits)
        | {"disturbed_cpus": disturbed, "beside": beside}
        for each in case.contenders
    ]
    for found in rows:
        print("  ".join(value for value in found.values() if value), flush=True)
    return rows


def reader(num_bytes: int) -> Callable[[], object]:
    """Reads so many bytes of memory: what reading alone takes, as the machine is at that moment."""
    data, checksum = torch.ones(num_bytes, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    kernel = _native._kernel("peak_read", None)
    return lambda: kernel(data.data_ptr(), num_bytes, checksum.data_ptr(), _native.num_threads())


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def row(
    case: Case, contender: Contender, times: list[float], error: float, ours_s: float, limits: peaks.MeasuredPeaks
) -> dict[str, str]:
    low, _, _, high = statistics.quantiles(times, n=5)
    middle = statistics.median(times)
    peaks_by_arithmetic = {
        "float32": limits.float32_flops_per_s,
        "int8": limits.int8_ops_per_s,
        "int16": limits.int16_ops_per_s,
    }
    bounds = {
        "read": contender.num_bytes / limits.read_bytes_per_s,
        contender.arithmetic: case.operations / peaks_by_arithmetic[contender.arithmetic],
    }
    limit = max(bounds, key=lambda name: bounds[name])
    return {
        "model": case.model,
        "case": case.name,
        "n": str(case.n),
        "contender": contender.name,
        "p20_ms": f"{low * 1e3:.3f}",
        "p50_ms": f"{middle * 1e3:.3f}",
        "p80_ms": f"{high * 1e3:.3f}",
        "gb_s": f"{contender.num_bytes / middle / 1e9:.1f}",
        "gop_s": f"{case.operations / middle / 1e9:.0f}",
        "limit": limit,
        "of_limit": f"{bounds[limit] / middle:.2f}",
        "read_gb_s": f"{limits.read_bytes_per_s / 1e9:.1f}",
        "tenfold_faster": f"{middle / ours_s:.2f}",
        "error": f"{error:.1e}",
    }


def write(rows: list[dict[str, str]], limits: peaks.MeasuredPeaks) -> None:
    """The rows behind those that are kept: the older ones of other cases, or beside another build of ggml."""
    if not rows:
        print("no case has such a name; nothing was timed")
        return
    head = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    machine = this_machine()
    where = {
        "machine": f"{machine.cpu_model}, {machine.usable_cores} cores",
        "isa": _native.isa(),
        "commit": head.stdout.strip(),
        "float32_gop_s": f"{limits.float32_flops_per_s / 1e9:.0f}",
        "int8_gop_s": f"{limits.int8_ops_per_s / 1e9:.0f}",
        "int16_gop_s": f"{limits.int16_ops_per_s / 1e9:.0f}",
    }
    fresh = {tuple(found[name] for name in KEY) for found in rows}
    kept: list[dict[str, str]] = []
    if RESULTS.exists():
        with RESULTS.open(encoding="utf-8", newline="") as file:
            kept = [old for old in csv.DictReader(file) if tuple(old.get(name) for name in KEY) not in fresh]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *where], lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + [found | where for found in rows])


if __name__ == "__main__":
    sys.exit(main())
