"""Times the CPU kernels at the shapes of the real models, after a correctness gate. Nothing else may run meanwhile.

    python benchmarks/ops.py [NAME ...]

Each row: one operation, its median over alternating runs with torch on weights already unpacked to float32 (where
there is such a thing), and the share of a limit measured in the same run: reading memory (GB/s) or a float32 matrix
product (GFLOP/s). Writes benchmarks/results/ops.csv. Peers and whole models are not timed here.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tenfold import _native
from tenfold.formats import BF16, FP8_BLOCK, MXFP4, RowLayout, WeightFormat, index_key_fp4, kv_row_v4, kv_row_v32
from tenfold.machine import this_machine
from tenfold.ops import Experts, Rows, Weight, cpu, reference
from tenfold.quantise import quantize

ROOT = Path(__file__).parent.parent
RUNS = 15
TOLERANCE = 2e-5


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: ours, its reference twin for the gate, torch's way if there is one, bytes and FLOP of a call."""

    name: str
    ours: Callable[[], Tensor]
    law: Callable[[], Tensor]
    torch_way: Callable[[], Tensor] | None
    num_bytes: int
    flop: int


def main() -> int:
    wanted = sys.argv[1:]
    read_gb_s, mm_gflop_s = limits()
    print(
        f"read {read_gb_s:.1f} GB/s, product {mm_gflop_s:.0f} GFLOP/s, {_native.isa()}, {_native.num_threads()} threads"
    )
    rows = []
    for case in cases():
        if wanted and not any(word in case.name for word in wanted):
            continue
        error = gate(case)
        if not error <= TOLERANCE:
            print(f"{case.name}: differs from the reference by {error:.1e}; not timed")
            return 1
        rows.append(measured(case, error, read_gb_s, mm_gflop_s))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    write(rows, read_gb_s, mm_gflop_s)
    return 0


def limits() -> tuple[float, float]:
    """What a sum over 512 MB reads, and what torch's float32 product computes, per second."""
    data, a = torch.ones(1 << 27), torch.ones(2048, 2048)
    read_s, mm_s = median_s(data.sum), median_s(lambda: a @ a)
    return data.nbytes / read_s / 1e9, 2 * 2048**3 / mm_s / 1e9


def median_s(run: Callable[[], object]) -> float:
    run()
    return statistics.median(seconds(run) for _ in range(RUNS))


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def gate(case: Case) -> float:
    """Largest difference from the reference, relative to the largest number; of selected rows, whether they differ.

    Two rows of 1,000 may: sums in another order can swap neighbours at the border.
    """
    found, expected = case.ours(), case.law()
    if found.dtype == torch.int32:
        common = sum(len(set(ours) & set(law)) for ours, law in zip(found.tolist(), expected.tolist(), strict=True))
        return 0.0 if common >= 0.998 * expected.numel() else 1.0
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max())


def measured(case: Case, error: float, read_gb_s: float, mm_gflop_s: float) -> dict[str, str]:
    ours, theirs = [], []
    for _ in range(RUNS):
        ours.append(seconds(case.ours))
        if case.torch_way is not None:
            theirs.append(seconds(case.torch_way))
    low, _, _, high = statistics.quantiles(ours, n=5)
    middle = statistics.median(ours)
    gb_s, gflop_s = case.num_bytes / middle / 1e9, case.flop / middle / 1e9
    return {
        "case": case.name,
        "p20_ms": f"{low * 1e3:.3f}",
        "p50_ms": f"{middle * 1e3:.3f}",
        "p80_ms": f"{high * 1e3:.3f}",
        "gb_s": f"{gb_s:.1f}",
        "read_share": f"{gb_s / read_gb_s:.2f}",
        "gflop_s": f"{gflop_s:.0f}",
        "mm_share": f"{gflop_s / mm_gflop_s:.2f}",
        "times_torch": f"{statistics.median(theirs) / middle:.2f}" if theirs else "",
        "error": f"{error:.1e}",
    }


def cases() -> Iterator[Case]:
    for form, count in ((MXFP4, 7), (FP8_BLOCK, 4), (BF16, 2)):  # so many weights that they cannot stay in the cache
        for n in (1, 4, 64, 512):
            yield linear_case(form, count, n)
    for n in (1, 16):
        yield experts_case(n)
    for n in (1, 64):
        yield attention_case("V4-Flash", n, 64, kv_row_v4(512, 64), 640, 512)
        yield attention_case("V4-Pro", n, 128, kv_row_v4(512, 64), 1152, 512)
        yield attention_case("V3.2", n, 128, kv_row_v32(512, 64), 2048, 512)
    for n, rows in ((1, 262_144), (64, 32_768)):
        yield selection_case(n, rows)


def weights_of(form: WeightFormat, count: int, shape: tuple[int, int]) -> list[Weight]:
    return [quantize("w", torch.randn(shape) * shape[1] ** -0.5, form) for _ in range(count)]


def linear_case(form: WeightFormat, count: int, n: int) -> Case:
    shape = (2048, 4096)
    weights, x = weights_of(form, count, shape), torch.randn(n, shape[1])
    dense = [reference.dequantize(weight) for weight in weights]
    return Case(
        f"linear {form.name} {count} x {shape[0]}x{shape[1]} n={n}",
        lambda: torch.stack([cpu.linear(x, weight) for weight in weights]),
        lambda: torch.stack([reference.linear(x, weight) for weight in weights]),
        lambda: torch.stack([x @ matrix.t() for matrix in dense]),
        count * form.bytes_of(shape),
        2 * n * count * shape[0] * shape[1],
    )


def experts_case(n: int) -> Case:
    """V4-Flash's experts: 4096 -> 2048 -> 4096, the six best of twelve."""
    shapes = ((2048, 4096), (4096, 2048), (2048, 4096))
    bank = Experts(*(tuple(weights_of(MXFP4, 12, shape)) for shape in shapes))
    x, weights = torch.randn(n, 4096), torch.rand(n, 6)
    ids = torch.stack([torch.randperm(12)[:6] for _ in range(n)])
    used = len(ids.unique())
    return Case(
        f"experts mxfp4 4096-2048, 6 of 12, n={n}",
        lambda: cpu.experts(x, ids, weights, bank, limit=10.0, weigh_first=True),
        lambda: reference.experts(x, ids, weights, bank, limit=10.0, weigh_first=True),
        None,
        used * sum(MXFP4.bytes_of(shape) for shape in shapes),
        2 * n * 6 * 3 * 4096 * 2048,
    )


def attention_case(model: str, n: int, heads: int, layout: RowLayout, chosen: int, value_dim: int) -> Case:
    packed = reference.pack_rows(torch.randn(16384, layout.width), layout)
    index = torch.stack([torch.randperm(16384)[:chosen].sort().values for _ in range(n)]).int()
    q = torch.randn(n, heads, layout.width)
    sources, scale = [Rows(packed, layout, index=index)], layout.width**-0.5
    rows = reference.unpack_rows(packed, layout)

    def torch_way() -> Tensor:
        """Eager, one query after the other, on rows that are unpacked already."""
        out = []
        for query, places in zip(q, index.long(), strict=True):
            seen = rows[places]
            out.append(((query @ seen.t()) * scale).softmax(-1) @ seen[:, :value_dim])
        return torch.stack(out)

    return Case(
        f"attention {model} {chosen} rows x {heads} heads n={n}",
        lambda: cpu.sparse_attention(q, sources, None, scale, value_dim, 0),
        lambda: reference.sparse_attention(q, sources, None, scale, value_dim, 0),
        torch_way,
        n * chosen * layout.row_bytes,
        2 * n * heads * chosen * (layout.width + value_dim),
    )


def selection_case(n: int, num_rows: int) -> Case:
    layout = index_key_fp4(128)
    keys = reference.pack_rows(torch.randn(num_rows, 128), layout)
    q = reference.unpack_rows(reference.pack_rows(torch.randn(n, 64, 128), layout), layout)
    weights, visible = torch.randn(n, 64), torch.full((n,), num_rows)
    return Case(
        f"select fp4 512 of {num_rows} keys x 64 heads n={n}",
        lambda: cpu.select_rows(q, weights, keys, layout, visible, 512),
        lambda: reference.select_rows(q, weights, keys, layout, visible, 512),
        None,
        num_rows * layout.row_bytes,
        2 * n * num_rows * 64 * 128,
    )


def write(rows: list[dict[str, str]], read_gb_s: float, mm_gflop_s: float) -> None:
    head = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    machine = this_machine()
    where = {
        "machine": f"{machine.cpu_model}, {machine.usable_cores} cores",
        "isa": _native.isa(),
        "commit": head.stdout.strip(),
        "read_gb_s": f"{read_gb_s:.1f}",
        "mm_gflop_s": f"{mm_gflop_s:.0f}",
    }
    with (ROOT / "benchmarks" / "results" / "ops.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *where])
        writer.writeheader()
        writer.writerows(row | where for row in rows)


if __name__ == "__main__":
    sys.exit(main())
