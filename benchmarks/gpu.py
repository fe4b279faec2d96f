"""The GPU backend on one NVIDIA card, in three runs of under ten minutes each; nothing else may use the card.

    python benchmarks/gpu.py ops           every operation at real widths: correct, then its time and share of the limit
    python benchmarks/gpu.py steps         whole steps of V4-Flash, V4-Pro and V3.2; a chunk read at the start and at 1M
    python benchmarks/gpu.py transformers  the same V4-Flash steps on transformers, in bf16
    ... [--models v4-flash,v3.2] [--sets N] [--minutes 9] [--resume] [--out FOLDER] [--tiny]

`make test-gpu` first. Each run begins with a gate: what is wrong is not timed. After --minutes nothing new is begun;
the same command with --resume goes on with what is missing (a card of another name begins anew).

Weights are random and routed experts shared between layers (`dummies.py`): the whole depth runs on one card, and every
byte that a step would read is read. Limits are measured in the same process: the pace of a copy and of a bf16
product. Predictions stand beside what was found; they were made before any GPU was seen (docs/concepts/gpu.md).
One JSON line a figure goes to FOLDER/gpu-RUN.jsonl as it is found; the table is printed last. --tiny: small shapes, one
round, also in Triton's interpreter (TRITON_INTERPRET=1): only whether everything runs, no figure.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from dummies import Dummies, dummy_engine
from torch import Tensor

from tenfold import config as configuration
from tenfold import ops
from tenfold.config import ModelConfig
from tenfold.decoding import Place
from tenfold.engine import Engine, Session, Snapshot
from tenfold.errors import DoesNotFit
from tenfold.formats import F32, FP8_BLOCK, MXFP4, index_key_fp4, index_key_fp8, kv_row_v4, kv_row_v32
from tenfold.ops import Experts, Ops, Rows, Weight, reference
from tenfold.ops.triton import index
from tenfold.ops.triton import topk as choice
from tenfold.planner.work import step_work
from tenfold.streams import RestorePoint
from tenfold.synth import shrink, synth

MODELS = ("v4-flash", "v4-pro", "v3.2")
SETS = {"v4-flash": (12, 30), "v4-pro": (2, 6), "v3.2": (3, 6)}
"""Sets of routed experts that fit beside the rest on a card of 80 GB and of 140 GB."""
CONTEXTS, BATCHES = (4096, 131072, 1 << 20), (1, 8, 32)
CHUNK = 4096
PREDICTED = {
    ("v4-flash", 4096, 1): "165-180",
    ("v4-flash", 1 << 20, 1): "155-167",
    ("v4-flash", 1 << 20, 32): "580-710",
    ("transformers", 4096, 1): "8-12",
    ("transformers", 1 << 20, 1): "1.4-2 or out of memory",
}
"""Tokens/s on an H100, as written down on 2026-11-23."""
PREDICTED_US = {
    "index scores 1M": "9-12",
    "top-k 1M": "8-12",
    "attention csa": "8",
    "attention hca 1M": "12",
    "linear wq_b fp8 n=1": "13",
    "linear wo_b fp8 n=1": "13",
    "experts + shared n=1": "43",
    "hc_mix n=1": "6-8",
}
TARGET_SHARE = {1: 0.65, 32: 0.75}
"""Of the least time that the measured pace of memory allows, by batch."""
GATE = {"hidden": 512, "layers": 4, "experts": 8, "vocab": 1024}
TINY = {"hidden": 256, "layers": 4, "experts": 8, "vocab": 512}


@dataclass(slots=True)
class Bench:
    """The card, its limits, and where figures go."""

    device: torch.device
    operations: Ops
    tiny: bool
    out: Path
    run: str
    ends_s: float = float("inf")
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    copy_bytes_per_s: float = 0.0
    bf16_flops_per_s: float = 0.0

    def note(self, what: str, **figures: Any) -> None:
        line = {"run": self.run, "what": what, "card": card(self.device), **figures}
        self.found[what] = line
        with self.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = ", ".join(f"{k} {v:,.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
        print(f"{what:<44} {shown}", flush=True)

    @property
    def record(self) -> Path:
        return self.out / f"gpu-{self.run}.jsonl"

    def resume(self) -> None:
        """Takes over what an earlier run found on a card of this name."""
        lines = self.record.read_text(encoding="utf-8").splitlines() if self.record.exists() else []
        for line in map(json.loads, lines):
            if line["card"] == card(self.device) and line["what"] != "limits":
                self.found[line["what"]] = line

    def wants(self, what: str) -> bool:
        """Whether a figure is missing and there is time for it."""
        return what not in self.found and time.monotonic() < self.ends_s

    def table(self) -> None:
        """All that was found, one line each; times in microseconds, share of the limit, what was predicted."""
        print(f"\n{'':<44} {'found':>14} {'share':>7}  predicted")
        for what, line in self.found.items():
            value = line.get("tokens_per_s", line.get("us"))
            unit = "tok/s" if "tokens_per_s" in line else "us"
            shown = f"{value:,.1f} {unit}" if value is not None else str(line.get("result", ""))
            share = f"{line['share_of_limit']:.0%}" if "share_of_limit" in line else ""
            predicted = line.get("predicted") or line.get("predicted_us") or line.get("target_share") or ""
            print(f"{what:<44} {shown:>14} {share:>7}  {predicted}")
        if time.monotonic() >= self.ends_s:
            print("out of time: the same command with --resume goes on from here")

    def seconds(self, call: Callable[[], object], rounds: int = 10, each: int = 20) -> tuple[float, float]:
        """Median and spread (p80 - p20) of a call's time: events around `each` calls, `rounds` times."""
        if self.device.type != "cuda" or self.tiny:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began, 0.0
        for _ in range(3):
            call()
        times = []
        for _ in range(rounds):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(each):
                call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3 / each)
        low, _, _, high = statistics.quantiles(times, n=5)
        return statistics.median(times), high - low

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a graph, so that its launches are not what is timed."""
        if self.device.type != "cuda" or self.tiny:
            return call
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


def card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def main() -> int:
    options = parse()
    _, operations = ops.select("triton", exact=False)
    options.out.mkdir(parents=True, exist_ok=True)
    ends_s = time.monotonic() + 60 * options.minutes
    bench = Bench(ops.device_of(operations), operations, options.tiny, options.out, options.run, ends_s)
    if options.resume:
        bench.resume()
    else:
        bench.record.unlink(missing_ok=True)
    torch.manual_seed(0)
    print("dummy weights, one card, aliased experts; torch", torch.__version__, flush=True)
    with torch.no_grad():
        ceilings(bench)
        if options.run == "ops":
            failed = run_ops(bench)
        elif options.run == "steps":
            failed = run_steps(bench, options.models, options.sets)
        else:
            failed = run_transformers(bench)
    bench.table()
    return failed


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=("ops", "steps", "transformers"))
    parser.add_argument("--models", default=",".join(MODELS), type=lambda text: text.split(","))
    parser.add_argument("--sets", type=int, help="sets of routed experts (default: what fits the card)")
    parser.add_argument("--minutes", type=float, default=9.0, help="after these nothing new is begun (default: 9)")
    parser.add_argument("--resume", action="store_true", help="leave out what an earlier run found")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def ceilings(bench: Bench) -> None:
    """What this card reaches now: a copy's bytes (read and written), a bf16 product's operations."""
    numbers, side = (1 << 16, 128) if bench.tiny else (1 << 30, 8192)
    source = torch.zeros(numbers, device=bench.device)
    target = torch.empty_like(source)
    copy_s, _ = bench.seconds(lambda: target.copy_(source), each=2)
    a = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    product_s, _ = bench.seconds(lambda: a @ a, each=5)
    bench.copy_bytes_per_s, bench.bf16_flops_per_s = 8 * numbers / copy_s, 2 * side**3 / product_s
    bench.note("limits", copy_tb_per_s=bench.copy_bytes_per_s / 1e12, bf16_tflops=bench.bf16_flops_per_s / 1e12)


# ---------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True, slots=True)
class Case:
    """One operation: how to run it, its bytes and operations, and if it is small enough its value in float64."""

    name: str
    call: Callable[[], Tensor]
    num_bytes: float
    flops: float = 0.0
    law: Callable[[], Tensor] | None = None
    bound: float = 4e-3
    seen: Callable[[Tensor], Tensor] = lambda found: found
    """What of the result is compared."""


def run_ops(bench: Bench) -> int:
    wrong = []
    for case in cases(bench):
        if not bench.wants(case.name):
            continue
        error = None
        if case.law is not None:
            found, expected = case.seen(case.call()).double().cpu(), case.law().cpu()
            error = float((found - expected).norm() / expected.norm())
            if not error <= case.bound:
                wrong.append(case.name)
                bench.note(case.name, result="wrong", error=error)
                continue
        median_s, spread_s = bench.seconds(bench.captured(case.call))
        limit_s = max(case.num_bytes / bench.copy_bytes_per_s, case.flops / bench.bf16_flops_per_s)
        bench.note(
            case.name, us=1e6 * median_s, spread_us=1e6 * spread_s, share_of_limit=limit_s / median_s,
            predicted_us=PREDICTED_US.get(case.name.partition(",")[0], ""), error=error,
        )  # fmt: skip
    print("wrong:", ", ".join(wrong) if wrong else "nothing")
    return 1 if wrong else 0


def cases(bench: Bench) -> Iterator[Case]:
    yield from linear_cases(bench)
    yield from expert_cases(bench)
    yield from index_cases(bench)
    yield from attention_cases(bench)
    yield from hyper_cases(bench)


def drawn(bench: Bench, name: str, shape: tuple[int, int], form: Any) -> Weight:
    """A weight of a format, by the same dice as the models'."""
    dice = Dummies(configuration.preset("v4-flash"), bench.device, 1)
    spec = next(iter(dice.specs.values()))
    wanted = type(spec)(name, shape, (form,), "any")
    return bench.operations.prepare(dice._drawn(wanted), True)


def on_host(weight: Weight) -> Weight:
    scale = None if weight.scale is None else weight.scale.cpu()
    return Weight(weight.name, weight.shape, weight.format, weight.data.cpu(), scale)


def dense64(weight: Weight) -> Tensor:
    return reference.dequantize(on_host(weight)).double()


def linear_cases(bench: Bench) -> Iterator[Case]:
    hidden = 256 if bench.tiny else 4096
    shapes = {"wq_b": (8 * hidden, hidden // 4), "wo_b": (hidden, 2 * hidden)}
    for name, shape in shapes.items():
        weight = drawn(bench, f"{name}.weight", shape, FP8_BLOCK)
        dense = dense64(weight)
        for n in (1, 32, 64 if bench.tiny else 4096):
            x = torch.randn(n, shape[1], device=bench.device)
            yield Case(
                f"linear {name} fp8 n={n}",
                lambda x=x, weight=weight: bench.operations.linear(x, weight),
                weight.format.bytes_of(shape) + 4 * n * sum(shape),
                2 * n * shape[0] * shape[1],
                lambda x=x, dense=dense: x.double().cpu() @ dense.t(),
            )


def expert_cases(bench: Bench) -> Iterator[Case]:
    hidden, inner, count, topk = (256, 128, 8, 2) if bench.tiny else (4096, 2048, 256, 6)
    banks = [[drawn(bench, f"{i}.w{j}", (hidden, inner) if j == 2 else (inner, hidden), MXFP4) for i in range(count)]
             for j in (1, 2, 3)]  # fmt: skip
    bank = Experts(*(tuple(weights) for weights in banks))
    shared = Experts(*((drawn(bench, f"s{j}", (hidden, inner) if j == 2 else (inner, hidden), FP8_BLOCK),)
                       for j in (1, 2, 3)))  # fmt: skip
    for n in (1, 8, 32, 64 if bench.tiny else 4096):
        x = torch.randn(n, hidden, device=bench.device)
        ids = torch.rand(n, count, device=bench.device).topk(topk, 1).indices
        weights = torch.rand(n, topk, device=bench.device)
        distinct = int(ids.unique().numel())
        each = 3 * MXFP4.bytes_of((inner, hidden))
        yield Case(
            f"experts + shared n={n}, {distinct} distinct",
            lambda x=x, ids=ids, weights=weights: bench.operations.experts(
                x, ids, weights, bank, limit=10.0, weigh_first=True, shared=shared
            ),
            distinct * each + 3 * FP8_BLOCK.bytes_of((inner, hidden)),
            6 * n * (topk + 1) * hidden * inner,
            (lambda x=x, ids=ids, weights=weights: experts64(x, ids, weights, bank, shared)) if n <= 8 else None,
            1e-2,
        )


def experts64(x: Tensor, ids: Tensor, weights: Tensor, bank: Experts, shared: Experts) -> Tensor:
    def gated(token: Tensor, one: Experts, i: int) -> Tensor:
        gate, up = dense64(one.w1[i]) @ token, dense64(one.w3[i]) @ token
        gate, up = gate.clamp(max=10.0), up.clamp(-10.0, 10.0)
        return dense64(one.w2[i]) @ (gate * gate.sigmoid() * up)

    x, ids, weights = x.double().cpu(), ids.cpu(), weights.double().cpu()
    lines = []
    for token, chosen, share in zip(x, ids.tolist(), weights, strict=True):
        parts = [w * gated(token, bank, i) for i, w in zip(chosen, share, strict=True)]
        lines.append(torch.stack(parts).sum(0) + gated(token, shared, 0))
    return torch.stack(lines)


def packed(bench: Bench, rows: int, layout: Any) -> Tensor:
    """Random rows; beyond a tile the same again in another order, so that no two neighbours are alike for long."""
    tile = bench.operations.pack_rows(torch.randn(min(rows, 8192), layout.width, device=bench.device), layout)
    return tile[torch.randint(0, tile.shape[0], (rows,), device=bench.device)]


def index_cases(bench: Bench) -> Iterator[Case]:
    rows = 256 if bench.tiny else 1 << 18
    for layout, name, heads, topk in ((index_key_fp4(128), "", 64, 512), (index_key_fp8(128), " fp8", 64, 2048)):
        keys = packed(bench, rows, layout)
        topk = 16 if bench.tiny else topk
        for n in (1, 4 if bench.tiny else 64):
            q = bench.operations.unpack_rows(
                bench.operations.pack_rows(torch.randn(n, heads, 128, device=bench.device), layout), layout
            )
            weights = torch.randn(n, heads, device=bench.device) * (128 * heads) ** -0.5
            visible = torch.full((n,), rows, device=bench.device)
            label = f"{name} n={n}" if n > 1 or name else " 1M"
            yield Case(
                f"index scores{label}",
                lambda q=q, w=weights, k=keys, lay=layout, v=visible: index.index_scores(q, w, k, lay, v, rows),
                rows * (layout.row_bytes + 4 * n),
                2 * n * rows * heads * 128,
                lambda q=q, w=weights, k=keys, lay=layout: scores64(bench, q, w, k, lay),
                1e-5,
            )
            scores = index.index_scores(q, weights, keys, layout, visible, rows)
            yield Case(
                f"top-k{label}",
                lambda s=scores, v=visible, k=topk: choice.top_rows(s, v, k),
                4 * n * rows,
                law=lambda s=scores, k=topk: s.topk(k, 1).values.double(),  # of equal scores either may be chosen
                bound=0.0,
                seen=lambda rows, s=scores: s.gather(1, rows.long()).sort(1, descending=True).values,
            )


def scores64(bench: Bench, q: Tensor, weights: Tensor, keys: Tensor, layout: Any) -> Tensor:
    """In float64 on the device, some keys at a time."""
    parts = []
    for first in range(0, keys.shape[0], 8192):
        dense = bench.operations.unpack_rows(keys[first : first + 8192], layout).double()
        scores = (q.double() @ dense.t()).relu_() * weights.double()[:, :, None]
        parts.append(scores.sum(1))
    return torch.cat(parts, 1)


def attention_cases(bench: Bench) -> Iterator[Case]:
    """One query and a chunk of them, of every kind of layer."""
    v4, v32 = kv_row_v4(512, 64), kv_row_v32(512, 64)
    depth = 512 if bench.tiny else 1 << 18
    rows, latents = packed(bench, depth, v4), packed(bench, depth, v32)
    for n in (1, 2 if bench.tiny else 512):
        ring = span(bench, packed(bench, 127 + n, v4), v4, torch.arange(128, 128 + n), 128)
        chosen = Rows(rows, v4, index=picks(bench, n, depth, 32 if bench.tiny else 512))
        every = span(bench, rows[: depth // 32], v4, torch.full((n,), depth // 32), depth // 32)
        latent = Rows(latents, v32, index=picks(bench, n, depth, 64 if bench.tiny else 2048))
        kinds = (
            ("attention window", [ring], 64, 512),
            ("attention csa", [ring, chosen], 64, 512),
            ("attention hca 1M", [ring, every], 64, 512),
            ("attention v3.2", [latent], 128, 512),
        )
        for name, sources, heads, value_dim in kinds:
            yield attention_case(bench, f"{name} n={n}" if n > 1 else name, sources, heads, value_dim, n)


def attention_case(bench: Bench, name: str, sources: list[Rows], heads: int, values: int, n: int) -> Case:
    layout = sources[0].layout
    sink = (
        Weight("sink", (heads,), F32, torch.randn(heads, device=bench.device)) if layout.plain_offset == 448 else None
    )
    turns = (160000.0 ** (-torch.arange(32) / 32)).to(bench.device) if sink is not None else None
    q = torch.randn(n, heads, layout.width, device=bench.device)
    seen = sum(
        128 if source.index is None and source.packed.shape[0] < 128 + n else source.columns for source in sources
    )
    return Case(
        name,
        lambda: bench.operations.sparse_attention(q, sources, sink, layout.width**-0.5, values, 1 << 19, turns),
        n * heads * 4 * (layout.width + values) + (seen * layout.row_bytes if n == 1 else 0),
        2 * n * heads * seen * (layout.width + values),
        (lambda: attention64(bench, q, sources, sink, values, turns)) if n == 1 else None,
    )


def attention64(
    bench: Bench, q: Tensor, sources: list[Rows], sink: Weight | None, values: int, turns: Tensor | None
) -> Tensor:
    """One query in float64: its rows unpacked, a softmax with the sink, and the rotation back."""
    dense = []
    for source in sources:
        if source.index is not None:
            packed_rows = source.packed[source.index[0][source.index[0] >= 0].long()]
        else:
            start, stop = source.bounds
            packed_rows = source.packed[int(start[0]) : int(stop[0])]
        dense.append(bench.operations.unpack_rows(packed_rows.contiguous(), source.layout).double())
    rows = torch.cat(dense)
    logits = q[0].double() @ rows.t() * q.shape[2] ** -0.5
    if sink is not None:
        logits = torch.cat([logits, sink.data.double()[:, None]], 1)
    out = logits.softmax(1)[:, : rows.shape[0]] @ rows[:, :values]
    if turns is None:
        return out[None]
    angle = ((1 << 19) * turns).double()  # float32, as the operation has it
    even, odd = out[:, -64::2], out[:, -63::2]
    turned = torch.stack([even * angle.cos() + odd * angle.sin(), odd * angle.cos() - even * angle.sin()], -1)
    return torch.cat([out[:, :-64], turned.flatten(1)], 1)[None]


def span(bench: Bench, rows: Tensor, layout: Any, stop: Tensor, width: int) -> Rows:
    stop = stop.to(bench.device)
    return Rows(rows, layout, start=(stop - width).clamp(min=0), stop=stop)


def picks(bench: Bench, n: int, depth: int, count: int) -> Tensor:
    return torch.rand(n, depth, device=bench.device).topk(count, 1).indices.sort(1).values.int()


def hyper_cases(bench: Bench) -> Iterator[Case]:
    hidden = 256 if bench.tiny else 4096

    def weight(*shape: int) -> Weight:
        return Weight("w", shape, F32, torch.randn(shape, device=bench.device) * shape[-1] ** -0.5)

    fn, base, scale, norm = weight(24, 4 * hidden), weight(24), weight(3), weight(hidden)
    for n in (1, 32, 64 if bench.tiny else 4096):
        streams, y = torch.randn(n, 4, hidden, device=bench.device), torch.randn(n, hidden, device=bench.device)
        mixed = bench.operations.hc_mix(streams, fn, base, scale, norm, norm_eps=1e-6, eps=1e-6, iterations=20)
        yield Case(
            f"hc_mix n={n}",
            lambda s=streams: bench.operations.hc_mix(s, fn, base, scale, norm, norm_eps=1e-6, eps=1e-6, iterations=20)[
                0
            ],
            4 * (24 * 4 * hidden + 5 * n * hidden),
            law=lambda s=streams: reference.hc_mix(
                s.cpu(), *map(on_host, (fn, base, scale, norm)), norm_eps=1e-6, eps=1e-6, iterations=20
            )[0].double(),
            bound=1e-5,
        )
        yield Case(
            f"hc_merge n={n}",
            lambda s=streams, y=y, m=mixed: bench.operations.hc_merge(s, y, m[1], m[2]),
            4 * 9 * n * hidden,
            law=lambda s=streams, y=y, m=mixed: reference.hc_merge(s.cpu(), y.cpu(), m[1].cpu(), m[2].cpu()).double(),
            bound=1e-6,
        )


# ---------------------------------------------------------------------------------------------- steps


def run_steps(bench: Bench, models: list[str], sets: int | None) -> int:
    wrong = 0
    for name in models:
        if time.monotonic() >= bench.ends_s:
            break
        if not gate(bench, name):
            wrong = 1
            continue
        config = shrink(name, **TINY) if bench.tiny else configuration.preset(name)
        memory = torch.cuda.mem_get_info()[0] if bench.device.type == "cuda" else 8 << 30
        fitting = SETS[name][memory > 100e9]
        engine, operations, dummies = dummy_engine(config, sets or (2 if bench.tiny else fitting), memory * 9 // 10)
        routes = Routes(operations)
        routes.listen()
        bench.note(f"{name} weights", sets=dummies.sets, shared_gb=dummies.bytes_shared / 1e9)
        for context in (64, 256) if bench.tiny else CONTEXTS:
            if context <= config.max_position_embeddings:
                for batch in (1, 3) if bench.tiny else BATCHES:
                    step(bench, name, engine, routes, context, batch)
        for context in (8, 256) if bench.tiny else (CHUNK, min(1 << 20, config.max_position_embeddings)):
            chunk(bench, name, engine, context, 8 if bench.tiny else CHUNK)
        del engine, operations, dummies, routes
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return wrong


def gate(bench: Bench, name: str) -> bool:
    """A narrow network of this architecture, from a file: read in one go and token by token, against the reference."""
    what = f"{name} gate"
    if what in bench.found:
        return bench.found[what]["result"] == "right"
    worst, ids = 0.0, torch.randint(0, 512, (20 if bench.tiny else 300,), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        synth(shrink(name, **(TINY if bench.tiny else GATE)), Path(folder), seed=1)
        ours, law = (Engine.load(folder, backend=backend).session(512) for backend in ("triton", "reference"))
        for part in (ids[:-3], *ids[-3:, None]):
            found, expected = ours.feed(part.tolist()), law.feed(part.tolist())
            worst = max(worst, float((found - expected).norm() / expected.norm()))
    # Activations are rounded to bf16 before each product: over fresh networks 0.01 to 0.02 in V4 and 0.03 in V3.2.
    right = worst <= 0.06
    bench.note(what, result="right" if right else "wrong: not timed", difference=worst)
    return right


def sessions_at(bench: Bench, engine: Engine, context: int, most: int, room: int) -> list[Session]:
    """As many sessions as fit, up to `most`, that look as if they had read all but `room` of the context."""
    found: list[Session] = []
    free = engine.budget.memory_bytes - engine.budget.base_bytes
    for _ in range(most):
        try:
            session = engine.session(context)
        except DoesNotFit:
            break
        need = session.need.total_bytes - session.need.base_bytes
        if found and need > free:
            break
        free -= session.need.kv_bytes + session.need.points_bytes
        fill(bench, session, context - room)
        found.append(session)
    return found


def fill(bench: Bench, session: Session, length: int) -> None:
    """As `contexts.pretend`, made on the device."""
    fixed: dict[tuple[int, str], Tensor] = {}
    for spec in session.streams.specs:
        key = spec.layer, spec.name
        if spec.component == "state":
            fixed[key] = torch.randn(spec.fixed_rows, spec.layout.width, device=bench.device)
        elif spec.fixed_rows:
            fixed[key] = packed(bench, spec.fixed_rows, spec.layout)
        else:
            stream, rows = session.streams.rows(*key), spec.rows_at(length)
            stream.make_room(rows)
            if rows:
                stream.data[:rows] = packed(bench, rows, spec.layout)
    logits = torch.zeros(session.engine.config.vocab_size)
    session.restore(Snapshot(session.engine, (0,) * length, RestorePoint(length, fixed), {}, logits))


@dataclass(slots=True)
class Routes:
    """The experts that tokens of the last pass were sent to, layer by layer, also of one that was replayed."""

    operations: Any
    chosen: list[Tensor] = field(default_factory=list)

    def listen(self) -> None:
        real = self.operations.route

        def route(*arguments: Any, **words: Any) -> tuple[Tensor, Tensor]:
            ids, weights = real(*arguments, **words)
            self.chosen.append(ids)
            return ids, weights

        self.operations.route = route

    def distinct(self, layers: int, tokens: int) -> float:
        """Experts touched in a layer, on average."""
        return statistics.mean(int(ids[:tokens].unique().numel()) for ids in self.chosen[-layers:])


def step(bench: Bench, name: str, engine: Engine, routes: Routes, context: int, batch: int) -> None:
    """Tokens/s of steps at the end of a context; where not all sessions fit, some stand in several places."""
    if not bench.wants(f"{name} {context:,} x {batch}"):
        return
    steps = 2 if bench.tiny else 132
    sessions = sessions_at(bench, engine, context, batch, steps)
    if not sessions:
        bench.note(f"{name} {context:,} x {batch}", result="does not fit this card")
        return
    distinct, times, logits = len(sessions), [], torch.empty(0)
    assert engine.decoder is not None
    for i, tokens in enumerate(torch.randint(0, engine.config.vocab_size, (steps, batch)).tolist()):
        position = context - steps + i
        places = [Place(sessions[j % distinct].streams, token, position) for j, token in enumerate(tokens)]
        began = time.perf_counter()
        logits = engine.decoder.run(places)
        times.append(time.perf_counter() - began)
    assert bool(logits.isfinite().all()), "a logit is not finite"
    median_s = statistics.median(times[-128:])
    num_bytes = step_bytes(engine.config, context, batch)
    layers = sum(layer.router != "dense" for layer in engine.config.layers)
    bench.note(
        f"{name} {context:,} x {batch}",
        tokens_per_s=batch / median_s,
        step_ms=1e3 * median_s,
        worst_ms=1e3 * max(times[-128:]),
        share_of_limit=num_bytes / bench.copy_bytes_per_s / median_s,
        gb_read=num_bytes / 1e9,
        distinct_sessions=distinct,
        distinct_experts=routes.distinct(layers, batch),
        predicted=PREDICTED.get((name, context, batch), ""),
        target_share=TARGET_SHARE.get(batch, ""),
    )


def step_bytes(config: ModelConfig, context: int, batch: int) -> float:
    """Bytes that a step has to read: weights with evenly spread routing, and each session's rows."""
    weights = sum(part.weight_bytes for part in step_work(config, context - 1, batch, num_logits=batch))
    return weights + batch * sum(part.kv_bytes for part in step_work(config, context - 1, 1))


def chunk(bench: Bench, name: str, engine: Engine, context: int, tokens: int) -> None:
    """A chunk read at the end of a context."""
    if not bench.wants(f"{name} chunk of {tokens:,} before {context:,}"):
        return
    sessions = sessions_at(bench, engine, context, 1, tokens)
    if not sessions:
        bench.note(f"{name} chunk of {tokens:,} before {context:,}", result="does not fit this card")
        return
    ids = torch.randint(0, engine.config.vocab_size, (tokens,)).tolist()
    times = []
    for _ in range(1 if bench.tiny else 3):  # the first compiles
        began = time.perf_counter()
        logits = engine.step({sessions[0]: ids})[sessions[0]]
        times.append(time.perf_counter() - began)
        sessions[0].rewind(context - tokens)
    assert bool(logits.isfinite().all()), "a logit is not finite"
    bench.note(f"{name} chunk of {tokens:,} before {context:,}", tokens_per_s=tokens / min(times), chunk_s=min(times))


# ---------------------------------------------------------------------------------------------- transformers


def run_transformers(bench: Bench) -> int:
    """The fairest that fits one card: bf16, every layer, one set of experts for all of them."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = shrink("v4-flash", **TINY) if bench.tiny else configuration.preset("v4-flash")
    words = {key: value for key, value in config.raw.items() if not key.startswith("quantization")}
    theirs = transformers.DeepseekV4Config(**words)
    for experts in ("eager", "grouped_mm") if not bench.tiny else ("eager",):
        theirs._experts_implementation = experts
        model = hollow(theirs, bench)
        for context in (512,) if bench.tiny else CONTEXTS:
            if not bench.wants(f"transformers {experts} {context:,} x 1"):
                continue
            try:
                their_step(bench, model, experts, context)
            except torch.OutOfMemoryError:
                bench.note(f"transformers {experts} {context:,} x 1", result="out of memory")
        del model
        gc.collect()
    return 0


def hollow(config: Any, bench: Bench) -> Any:
    """Their network on the device in bf16, random, the experts of all layers one and the same tensors."""
    import transformers

    with torch.device("meta"):
        model = transformers.DeepseekV4ForCausalLM(config).to(torch.bfloat16).eval()
    first: dict[str, Tensor] = {}
    for path, parameter in list(model.named_parameters()):
        owner, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        alias = path.split(".mlp.", 1)[-1] if ".experts." in path and "shared" not in path else path
        if alias not in first:
            spread = parameter.shape[-1] ** -0.5
            first[alias] = torch.empty(parameter.shape, dtype=torch.bfloat16, device=bench.device).normal_(0, spread)
        setattr(owner, name, torch.nn.Parameter(first[alias], requires_grad=False))
    for path, buffer in list(model.named_buffers()):
        owner, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        made = torch.zeros(buffer.shape, dtype=buffer.dtype, device=bench.device)
        if name.endswith("inv_freq"):
            made = 10000.0 ** -torch.linspace(0, 1, buffer.numel(), device=bench.device)
        elif buffer.dtype == torch.int64:
            made = torch.randint(0, config.n_routed_experts, buffer.shape, device=bench.device)
        setattr(owner, name, made)
    return model


def their_step(bench: Bench, model: Any, experts: str, context: int) -> None:
    import transformers

    cache, basis = transformers.DynamicCache(config=model.config), min(256, context // 2)

    def run(ids: list[int], position: int) -> Tensor:
        places = torch.arange(position, position + len(ids), device=bench.device)[None]
        tokens = torch.tensor([ids], device=bench.device)
        logits: Tensor = model(
            tokens, past_key_values=cache, use_cache=True, position_ids=places, logits_to_keep=1
        ).logits[0, -1]
        return logits

    run(torch.randint(0, model.config.vocab_size, (basis,)).tolist(), 0)
    for layer in cache.layers:
        for name, rows in getattr(layer, "compressed_kv", {}).items():
            if rows is not None:
                shape = 1, context // layer.compress_rate - rows.shape[1], rows.shape[2]
                noise = torch.randn(shape, dtype=rows.dtype, device=bench.device)
                layer.compressed_kv[name] = torch.cat([rows, noise], 1)
                layer.entry_count[name] = layer.compressed_kv[name].shape[1]
        layer.cumulative_length = context
    times = []
    for i in range(2 if bench.tiny else 12):
        began = time.perf_counter()
        run([5], context + i).cpu()
        times.append(time.perf_counter() - began)
    bench.note(
        f"transformers {experts} {context:,} x 1",
        tokens_per_s=1 / statistics.median(times[1:]),
        step_ms=1e3 * statistics.median(times[1:]),
        predicted=PREDICTED.get(("transformers", context, 1), ""),
    )


if __name__ == "__main__":
    sys.exit(main())
