"""Error of rounded activations: products and attention of V4-Flash's shapes against float64. Knows nothing of speed.

    python benchmarks/activations.py

float32 and what deployed numerics make of activations, by instruction set, are the kernels themselves; e4m3 per 128
with a scale that is a power of two is what the official inference multiplies, in float64 but for that rounding, and
queries and shares in bf16 are what its attention does. Errors are norms relative to the result's; the largest single
one is relative to the result's root mean square. Writes benchmarks/results/activations.csv.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import silu

from tenfold import _native
from tenfold.formats import FP8_BLOCK, MXFP4, WeightFormat, kv_row_v4
from tenfold.ops import Rows, Weight, cpu, cpu_attention, cpu_rounded, reference
from tenfold.quantise import quantize, scale_bytes, scale_values

RESULTS = Path(__file__).parent / "results" / "activations.csv"
NUM_ROWS, HIDDEN, INNER, LIMIT = 64, 4096, 2048, 10.0
HEADS, SEEN, SPREADS = 64, 640, (1.0, 3.0, 10.0)
"""Heads of a query, rows it sees, and standard deviations of its scores."""


@dataclass(frozen=True, slots=True)
class Dense:
    """The weights in float64, as the kernels' codes say."""

    w1: Tensor
    w2: Tensor
    w3: Tensor

    def linear(self, x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return rounded(x) @ self.w1.t()

    def expert(self, x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        x = rounded(x)
        gate, up = (x @ self.w1.t()).clamp(max=LIMIT), (x @ self.w3.t()).clamp(-LIMIT, LIMIT)
        return rounded(silu(gate) * up) @ self.w2.t()


def main() -> None:
    torch.manual_seed(1)
    rows = []
    for form in (MXFP4, FP8_BLOCK):
        shapes = ((INNER, HIDDEN), (HIDDEN, INNER), (INNER, HIDDEN))
        weights = [quantize("w", torch.randn(shape) * shape[1] ** -0.5, form) for shape in shapes]
        rows += [row for name, x in inputs() for row in measured(name, x, weights)]
    rows += [row for spread in SPREADS for row in attention_measured(spread)]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(row.values()))


def inputs() -> Iterator[tuple[str, Tensor]]:
    """Of unit size: normal; with one channel of a hundred thirty times as large; a gated product of two normals."""
    normal = torch.randn(NUM_ROWS, HIDDEN)
    outliers = torch.where(torch.rand(HIDDEN) < 0.01, 30.0, 1.0)
    gated = silu(2 * torch.randn(NUM_ROWS, HIDDEN)) * torch.randn(NUM_ROWS, HIDDEN)
    for name, x in (("normal", normal), ("outlier channels", normal * outliers), ("gated", gated)):
        yield name, x / x.square().mean().sqrt()


def measured(name: str, x: Tensor, weights: list[Weight]) -> Iterator[dict[str, str]]:
    w1, w2, w3 = weights
    dense = Dense(*(reference.dequantize(weight).double() for weight in weights))
    ways: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "float32": (partial(cpu.linear, x, w1), partial(cpu.feed_forward, x, w1, w2, w3, LIMIT)),
        "e4m3 per 128": (
            partial(dense.linear, x.double(), rounded_to_e4m3),
            partial(dense.expert, x.double(), rounded_to_e4m3),
        ),
    }
    for activations, isa in roundings(w1.format):
        ways[activations] = (
            partial(cpu_rounded.linear, x, w1, isa=isa),
            partial(cpu_rounded.feed_forward, x, w1, w2, w3, LIMIT, isa=isa),
        )
    laws = dense.linear(x.double(), unrounded), dense.expert(x.double(), unrounded)
    for activations, found in ways.items():
        for operation, run, law in zip(("linear", "expert"), found, laws, strict=True):
            yield line(w1.format.name, operation, name, activations, run(), law)


def attention_measured(spread: float) -> Iterator[dict[str, str]]:
    layout = kv_row_v4(512, 64)
    rows = reference.pack_rows(torch.randn(SEEN, layout.width), layout)
    q, dense = torch.randn(NUM_ROWS, HEADS, layout.width), reference.unpack_rows(rows, layout).double()
    scale = spread / float((q.double() @ dense.t()).std())
    stop = torch.full((NUM_ROWS,), SEEN)
    source = Rows(rows, layout, start=torch.zeros_like(stop), stop=stop)

    def attend(q: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        scores = rounded(q).double() @ dense.t() * scale
        shares = (scores - scores.amax(-1, keepdim=True)).exp()
        return rounded(shares).double() @ dense / shares.sum(-1, keepdim=True)

    law = attend(q.double(), unrounded)
    isas = {"scalar": "float32", "avx2": "int16", "amx": "two bf16"}
    for isa in (isa for isa in isas if isa in _native.available_isas()):
        with patch.object(cpu_attention, "_kernel", partial(_native._kernel, isa_name=isa)):
            found = cpu_attention.sparse_attention(q, [source], None, scale, layout.width, 0)
        yield line("kv rows", "attention", f"scores spread by {spread:g}", isas[isa], found, law)
    yield line("kv rows", "attention", f"scores spread by {spread:g}", "bf16", attend(q, Tensor.bfloat16), law)


def line(weights: str, operation: str, inputs: str, activations: str, found: Tensor, law: Tensor) -> dict[str, str]:
    error = found.double() - law
    return {
        "weights": weights,
        "operation": operation,
        "inputs": inputs,
        "activations": activations,
        "relative_error": f"{float(error.norm() / law.norm()):.2e}",
        "largest_error": f"{float(error.abs().max() / law.square().mean().sqrt()):.2e}",
    }


def roundings(form: WeightFormat) -> Iterator[tuple[str, str]]:
    """What deployed numerics make of activations, and with which instruction set, of those that this CPU has."""
    isas = _native.available_isas()
    yield "int8 per 32" if form is MXFP4 else "int16 per 128", next(isa for isa in isas if isa != "amx")
    if "amx" in isas:
        yield "bf16" if form is MXFP4 else "two bf16", "amx"


def unrounded(x: Tensor) -> Tensor:
    return x


def rounded_to_e4m3(x: Tensor) -> Tensor:
    """float64 [n, in], each 128 of a row rounded to e4m3 under a scale of their own (spec 3.1)."""
    blocks = x.unflatten(1, (-1, 128))
    scale = scale_values(scale_bytes(blocks.abs().amax(2, keepdim=True), 448.0, 1e-4))
    return ((blocks / scale).to(torch.float8_e4m3fn).double() * scale).flatten(1)


if __name__ == "__main__":
    main()
