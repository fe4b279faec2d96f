"""What benchmarks/ops.py times: the operations at the shapes of V4-Flash, V4-Pro and V3.2, and who else computes them.

A case holds contenders that give the same result, tenfold first, and what they are judged by: the true result, and
the bytes and operations that no implementation can do without. Knows nothing of clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from kernels.ggml import Ggml, Product
from torch import Tensor

from tenfold import _native
from tenfold.checkpoint import tensors
from tenfold.config import DeepseekV4Config, ModelConfig, preset
from tenfold.formats import BF16, F32, FP8_BLOCK, FP8_BLOCK_F32, MXFP4, RowLayout, WeightFormat
from tenfold.ops import Experts, Rows, Weight, cpu, cpu_rounded, reference
from tenfold.ops.cpu_graph import Recording
from tenfold.quantise import quantize

__all__ = ["Case", "Contender", "cases"]

MODELS = ("v4-flash", "v4-pro", "v3.2")
CACHE_BYTES = 64 << 20
"""Weights of a call take at least so much together, so that no cache keeps them between calls."""
ROWS = (1, 4, 16, 64, 512)
FEW_ROWS = 4
RECORDINGS = cpu.recordings()
"""Whose memory the recorded passes work in: their results are good until the next one runs."""
EXACT, NEAR, ROUNDED = 2e-5, 1e-3, 3e-2
"""Largest error allowed, as a share of the largest number: float32 sums, activations rounded to 11 bits and to 8."""
HEAD_ROWS = 16_160
CONTEXT_ROWS = 1 << 14

Arithmetic = Literal["float32", "int8", "int16"]


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to compute a case: what runs, what it gives (None: what `run` returns), how exact it has to be.

    `num_bytes` is what it reads at least; `library` names a peer's build.
    """

    name: str
    run: Callable[[], object]
    tolerance: float
    arithmetic: Arithmetic
    num_bytes: int
    library: str = ""
    result: Callable[[], Tensor] | None = None
    free: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One operation of one model for n tokens."""

    model: str
    name: str
    n: int
    law: Callable[[], Tensor]
    operations: int
    contenders: tuple[Contender, ...]


def cases(wanted: Callable[[str], bool], ggml_folder: Path | None) -> Iterator[Case]:
    """The cases whose "model name n=N" is wanted, each made when it is reached."""
    ggml = None if ggml_folder is None else Ggml(ggml_folder, _native.num_threads())
    for model in MODELS:
        config = preset(model)
        for name, n, make in (*_linears(config, ggml), *_others(config)):
            if wanted(f"{model} {name} n={n}"):
                case = make()
                yield Case(model, name, n, *case)


Parts = tuple[Callable[[], Tensor], int, tuple[Contender, ...]]
Planned = tuple[str, int, Callable[[], Parts]]


# ---------------------------------------------------------------------------------------------- linear


def _linears(config: ModelConfig, ggml: Ggml | None) -> Iterator[Planned]:
    v4 = isinstance(config, DeepseekV4Config)
    expert, form = ("ffn.experts.0.w1", MXFP4) if v4 else ("mlp.experts.0.gate_proj", FP8_BLOCK_F32)
    projection, dense = ("attn.wo_b", FP8_BLOCK) if v4 else ("self_attn.o_proj", FP8_BLOCK_F32)
    for part, kind in ((expert, form), (projection, dense)):
        shape = _shape(config, part)
        for n in ROWS:
            yield f"linear {part} {kind.name}", n, lambda n=n, s=shape, k=kind: _linear(s, k, n, ggml)
    for n in (1, 4):
        shape = HEAD_ROWS, config.hidden_size
        yield "linear eighth of head bf16", n, lambda n=n, s=shape: _linear(s, BF16, n, None)


def _shape(config: ModelConfig, part: str) -> tuple[int, int]:
    """Of the last layer, where every kind of part is."""
    layer = f"layers.{config.num_hidden_layers - 1}.{part}.weight"
    rows, columns = next(spec.shape for spec in tensors(config) if spec.name.endswith(layer))
    return rows, columns


def _linear(shape: tuple[int, int], form: WeightFormat, n: int, ggml: Ggml | None) -> Parts:
    count = -(-CACHE_BYTES // form.bytes_of(shape))
    weights, x = [_weight(shape, form) for _ in range(count)], torch.randn(n, shape[1])
    dense = [reference.dequantize(weight) for weight in weights]
    stored = count * form.bytes_of(shape)

    def each(product: Callable[[Tensor, Weight], Tensor]) -> Callable[[], Tensor]:
        return _as_run(lambda: torch.stack([product(x, weight) for weight in weights]), n)

    contenders = [Contender("tenfold", each(cpu.linear), EXACT, "float32", stored)]
    if form is MXFP4:
        contenders.append(Contender(_rounded_name(), each(cpu_rounded.linear), ROUNDED, "int8", stored))
    elif _native.isa() == "amx":  # of the tiles' int8 peak a quarter is theirs: half for bf16, half for two parts
        contenders.append(Contender("tenfold two bf16", each(cpu_rounded.linear), EXACT, "int8", stored))
    elif form is not BF16:
        contenders.append(Contender("tenfold int16", each(cpu_rounded.linear), NEAR, "int16", stored))
    contenders.append(
        Contender("torch on float32 weights", _torch_products(x, dense), EXACT, "float32", 4 * count * dense[0].numel())
    )
    if ggml is not None:
        contenders.append(_of_ggml(ggml, weights, x, repacked=False))
        if form is MXFP4:  # ggml repacks no Q8_0 on x86
            contenders.append(_of_ggml(ggml, weights, x, repacked=True))
    return (
        lambda: torch.stack([x.double() @ matrix.double().t() for matrix in dense]),
        2 * n * count * shape[0] * shape[1],
        tuple(contenders),
    )


def _rounded_name() -> str:
    return "tenfold bf16" if _native.isa() == "amx" else "tenfold int8"


def _as_run(run: Callable[[], Tensor], n: int) -> Callable[[], Tensor]:
    """As the engine runs it: the few rows of written tokens in a recorded pass, as ggml runs a graph; more by calls."""
    if n > FEW_ROWS:
        return run
    run()
    recording = RECORDINGS.record(lambda mark: run())
    return partial(_replay, recording, run)


def _replay(recording: Recording, kept: object) -> Tensor:
    """`kept` has what the recording reads."""
    return recording.replay(None)


def _torch_products(x: Tensor, dense: list[Tensor]) -> Callable[[], Tensor]:
    return lambda: torch.stack([x @ matrix.t() for matrix in dense])


def _of_ggml(ggml: Ggml, weights: list[Weight], x: Tensor, repacked: bool) -> Contender:
    product = Product(ggml, weights, x, repacked)
    name = f"ggml {ggml.build} {'MXFP4' if weights[0].format is MXFP4 else 'Q8_0'}{' repacked' if repacked else ''}"
    return Contender(
        name,
        product.run,
        ROUNDED,
        "int8",
        product.num_bytes,
        library=f"ggml {ggml.build}",
        result=product.result,
        free=product.free,
    )


def _weight(shape: tuple[int, int], form: WeightFormat) -> Weight:
    return quantize("w", torch.randn(shape) * shape[1] ** -0.5, form)


# ---------------------------------------------------------------------------------------------- all other operations


def _others(config: ModelConfig) -> Iterator[Planned]:
    chosen = config.num_experts_per_tok
    for n in (1, 16):
        yield f"experts {chosen} + 1 shared", n, lambda n=n: _experts(config, n)
    for n in (1, 64):
        if isinstance(config, DeepseekV4Config):
            window = config.sliding_window
            yield f"attention {window} + {config.index_topk} chosen", n, lambda n=n: _attention(config, n)
            yield "attention window + 8192 of HCA", n, lambda n=n: _attention_hca(config, n)
        else:
            yield f"attention {config.index_topk} chosen", n, lambda n=n: _attention(config, n)
    for n, rows in ((1, 262_144), (64, 32_768)):
        yield f"select {config.index_topk} of {rows}", n, lambda n=n, r=rows: _select(config, n, r)
    if isinstance(config, DeepseekV4Config):
        for n in (1, 512):
            yield "hyper-connection mix and merge", n, lambda n=n: _hyper(config, n)


def _experts(config: ModelConfig, n: int) -> Parts:
    """The chosen of twice as many experts, and the shared one behind them."""
    hidden, inner, chosen = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    v4 = isinstance(config, DeepseekV4Config)
    form, shared_form = (MXFP4, FP8_BLOCK) if v4 else (FP8_BLOCK_F32, FP8_BLOCK_F32)
    shapes = ((inner, hidden), (hidden, inner), (inner, hidden))
    bank = Experts(*(tuple(_weight(shape, form) for _ in range(2 * chosen)) for shape in shapes))
    shared = [_weight(shape, shared_form) for shape in shapes]
    x, weights = torch.randn(n, hidden), torch.rand(n, chosen)
    ids = torch.stack([torch.randperm(2 * chosen)[:chosen] for _ in range(n)])
    limit = config.swiglu_limit if isinstance(config, DeepseekV4Config) else None

    def by(ops: object) -> Callable[[], Tensor]:
        return lambda: (
            ops.experts(x, ids, weights, bank, limit=limit, weigh_first=v4) + ops.feed_forward(x, *shared, limit)
        )

    def ours(ops: object) -> Callable[[], Tensor]:
        return _as_run(by(ops), n)

    used = len(ids.unique())
    num_bytes = sum(used * form.bytes_of(shape) + shared_form.bytes_of(shape) for shape in shapes)
    contenders = [Contender("tenfold", ours(cpu), EXACT, "float32", num_bytes)]
    if v4:
        contenders.append(Contender(_rounded_name(), ours(cpu_rounded), ROUNDED, "int8", num_bytes))
    return by(reference), 2 * n * (chosen + 1) * 3 * hidden * inner, tuple(contenders)


def _rows(layout: RowLayout, count: int) -> Tensor:
    return reference.pack_rows(torch.randn(count, layout.width), layout)


def _attention(config: ModelConfig, n: int) -> Parts:
    """A window, if the model has one, and as many rows as the index chooses, scattered."""
    layer = next(layer for layer in config.layers if layer.attention in ("csa", "dsa"))
    layout = layer.stream("rows").layout
    window = config.sliding_window if isinstance(config, DeepseekV4Config) else 0
    seen = window + config.index_topk
    index = torch.stack([torch.randperm(CONTEXT_ROWS)[:seen].sort().values for _ in range(n)]).int()
    return _attention_over(config, layout, [Rows(_rows(layout, CONTEXT_ROWS), layout, index=index)], n, seen)


def _attention_hca(config: DeepseekV4Config, n: int) -> Parts:
    """Every row of a heavily compressed layer at a million tokens."""
    layout = config.layers[0].stream("window").layout
    seen = config.sliding_window + config.max_position_embeddings // 128
    bounds = torch.zeros(n, dtype=torch.int64), torch.full((n,), seen)
    source = Rows(_rows(layout, seen), layout, start=bounds[0], stop=bounds[1])
    return _attention_over(config, layout, [source], n, seen)


def _attention_over(config: ModelConfig, layout: RowLayout, sources: list[Rows], n: int, seen: int) -> Parts:
    value_dim = config.head_dim if isinstance(config, DeepseekV4Config) else config.kv_lora_rank  # type: ignore[attr-defined]
    heads, scale = config.num_attention_heads, layout.width**-0.5
    q = torch.randn(n, heads, layout.width)
    rows = reference.unpack_rows(sources[0].packed, layout)
    index = sources[0].index

    def eager() -> Tensor:
        """One query after the other, on rows that are unpacked already."""
        out = []
        for place, query in enumerate(q):
            found = rows if index is None else rows[index[place].long()]
            out.append(((query @ found.t()) * scale).softmax(-1) @ found[:, :value_dim])
        return torch.stack(out)

    num_bytes = (seen if index is None else int(index.unique().numel())) * layout.row_bytes
    whole = layout.scale_bytes == 1 and _native.isa() in ("avx2", "avx512")
    ours = Contender(
        "tenfold",
        lambda: cpu.sparse_attention(q, sources, None, scale, value_dim, 0),
        NEAR if whole else EXACT,
        "int16" if whole else "float32",
        num_bytes,
    )
    theirs = Contender(
        "torch eager on float32 rows", eager, EXACT, "float32", num_bytes // layout.row_bytes * 4 * layout.width
    )
    return (
        lambda: reference.sparse_attention(q, sources, None, scale, value_dim, 0),
        2 * n * heads * seen * (layout.width + value_dim),
        (ours, theirs),
    )


def _select(config: ModelConfig, n: int, num_rows: int) -> Parts:
    layer = next(layer for layer in config.layers if layer.attention in ("csa", "dsa"))
    layout = layer.stream("index_keys").layout
    heads, dim, topk = config.index_n_heads, config.index_head_dim, config.index_topk
    keys = _rows(layout, num_rows)
    q = reference.unpack_rows(reference.pack_rows(torch.randn(n, heads, dim), layout), layout)
    weights, visible = torch.randn(n, heads), torch.full((n,), num_rows)
    ours = Contender(
        "tenfold",
        lambda: cpu.select_rows(q, weights, keys, layout, visible, topk),
        EXACT,
        "int8" if layout.code_bits == 4 else "float32",
        num_rows * layout.row_bytes,
    )
    return (
        lambda: reference.select_rows(q, weights, keys, layout, visible, topk),
        2 * n * num_rows * heads * dim,
        (ours,),
    )


def _hyper(config: DeepseekV4Config, n: int) -> Parts:
    m, d = config.hc_mult, config.hidden_size
    outputs = (2 + m) * m
    weights = [Weight(name, (), F32, tensor) for name, tensor in (
        ("fn", torch.randn(outputs, m * d) * (m * d) ** -0.5), ("base", torch.randn(outputs)), ("scale", torch.ones(3)),
        ("norm", torch.ones(d)),
    )]  # fmt: skip
    streams, y = torch.randn(n, m, d), torch.randn(n, d)

    def by(ops: object) -> Callable[[], Tensor]:
        def run() -> Tensor:
            _, post, combination = ops.hc_mix(
                streams,
                *weights,
                norm_eps=config.rms_norm_eps,
                eps=config.hc_eps,
                iterations=config.hc_sinkhorn_iters,
            )
            return ops.hc_merge(streams, y, post, combination)

        return run

    # The weights; the streams read by mix and merge and written by merge; x written, y read.
    num_bytes = 4 * (outputs * m * d + n * d * (3 * m + 2))
    ours = Contender("tenfold", by(cpu), EXACT, "float32", num_bytes)
    return by(reference), 2 * n * d * m * (outputs + 1 + m + 1), (ours,)
