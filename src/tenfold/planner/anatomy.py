"""A config taken apart into what costs: matrices by component, attention by kind of layer, tables that are looked up.

Knows sizes and formats; nothing of positions, machines or money. What-if models are made by `dataclasses.replace`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from tenfold.checkpoint import TensorSpec, grouped
from tenfold.config import DeepseekV4Config, DeepseekV32Config, LayerSpec, ModelConfig
from tenfold.formats import BF16, F32, FP8_BLOCK, FP8_BLOCK_F32, MXFP4, RowLayout, WeightFormat, exact_layout

__all__ = [
    "PRECISIONS",
    "Anatomy",
    "AttentionKind",
    "Matrices",
    "Precision",
    "dissect",
    "loaded",
    "official",
    "unpacked",
]

Precision = Literal["fp8", "fp4xfp8", "bf16", "f32", "fp4", "fp8rows"]
"""What is multiplied with what: fp8 pairs, fp4 weights with fp8 activations, bf16, float32, fp4 pairs; `fp8rows` are
queries and shares with packed rows, where this machine's kernels have a rate of their own for it, else bf16."""

PRECISIONS: dict[str, Precision] = {
    FP8_BLOCK.name: "fp8",
    FP8_BLOCK_F32.name: "fp8",
    MXFP4.name: "fp4xfp8",
    BF16.name: "bf16",
    F32.name: "f32",
}

StorageRule = Callable[[TensorSpec], WeightFormat]


def official(spec: TensorSpec) -> WeightFormat:
    """The format of the published checkpoints."""
    return spec.formats[0]


def loaded(spec: TensorSpec) -> WeightFormat:
    """As this engine keeps a published checkpoint: only V3.2's kv_b_proj, carried over, is unpacked (not on a GPU)."""
    return F32 if spec.name.endswith("kv_b_proj.weight") else spec.formats[0]


def unpacked(spec: TensorSpec) -> WeightFormat:
    """All float32, as the reference backend keeps a small model in memory."""
    return F32 if F32 in spec.formats else spec.formats[0]


@dataclass(frozen=True, slots=True)
class Matrices:
    """All matrices of one component and format, over all layers.

    `multiply_adds` is what one token needs, `multiply_adds_per_logit` what each position with logits adds. `share` is
    the part of `weight_bytes` one token reads: top-k over experts for routed experts, else 1.
    """

    component: str
    precision: Precision
    multiply_adds: int
    weight_bytes: int
    share: float = 1.0
    multiply_adds_per_logit: int = 0

    def bytes_read(self, num_tokens: int) -> int:
        """Bytes a step of `num_tokens` tokens reads once; with routed experts what evenly spread choices expect."""
        return round(self.weight_bytes * (1.0 - (1.0 - self.share) ** num_tokens))


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """Layers that attend alike: the last `window` rows, and of the rows made of `ratio` tokens the best `topk`.

    `ratio` 0 is no compressed rows, `topk` None is all of them. With `index_heads` 0 nothing is scored. An entry
    costs heads * (key_width + value_width) multiply-adds, a scored key index_heads * index_dim.
    """

    name: str
    layers: float
    window: int
    ratio: int
    topk: int | None
    heads: int
    key_width: int
    value_width: int
    row_bytes: int
    index_heads: int = 0
    index_dim: int = 0
    index_row_bytes: int = 0
    index_precision: Precision = "fp4"
    state_bytes: int = 0

    @property
    def entry_multiply_adds(self) -> int:
        return self.heads * (self.key_width + self.value_width)

    @property
    def key_multiply_adds(self) -> int:
        return self.index_heads * self.index_dim

    def entries_between(self, start: int, stop: int) -> int:
        """Entries attended in one layer by the tokens that arrive after `start` tokens, up to `stop`."""
        window = _sum_capped(stop, 1, self.window) - _sum_capped(start, 1, self.window)
        if not self.ratio:
            return window
        return window + _sum_capped(stop, self.ratio, self.topk) - _sum_capped(start, self.ratio, self.topk)

    def keys_between(self, start: int, stop: int) -> int:
        """Index keys scored in one layer by the same tokens: every key visible to each, whether or not all are kept."""
        return _sum_capped(stop, self.ratio, None) - _sum_capped(start, self.ratio, None)

    def rows_read(self, start: int, stop: int) -> int:
        """Rows of one layer that a step from `start` to `stop` tokens reads at least once.

        Selected rows are counted as if no two queries shared one, up to all that are visible.
        """
        window = min(start, self.window - 1) + stop - start if self.window else 0
        if not self.ratio:
            return window
        chosen = _sum_capped(stop, self.ratio, self.topk) - _sum_capped(start, self.ratio, self.topk)
        return window + min(stop // self.ratio, chosen)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A model as the planner sees it. `lookup_bytes` are the table rows one token reads: embedding, hash routing."""

    name: str
    matrices: tuple[Matrices, ...]
    attention: tuple[AttentionKind, ...]
    lookup_bytes: int
    attention_precision: Precision = "bf16"

    @property
    def layers(self) -> float:
        return sum(kind.layers for kind in self.attention)

    @property
    def weight_bytes(self) -> int:
        """All matrices and vectors; the embedding and hash tables are not among them."""
        return sum(part.weight_bytes for part in self.matrices)


def dissect(config: ModelConfig, storage: StorageRule = official, *, exact: bool = False) -> Anatomy:
    """The anatomy of a config with weights stored by `storage`; `exact` keeps rows in float32 (numerics="exact")."""
    parts: dict[tuple[str, Precision, float], Matrices] = {}
    lookup_bytes = 0
    for spec, count in grouped(config):
        form = storage(spec)
        if spec.active == 0.0:
            lookup_bytes += form.bytes_of((1, spec.shape[-1])) if form.block is None else 0
            continue
        key = (spec.component, PRECISIONS[form.name], spec.active)
        found = parts.get(key) or _start(config, *key)
        used = config.num_experts_per_tok if spec.component == "moe_routed" else 1
        macs = spec.numel * used if _is_multiplied(spec) else 0
        late = spec.name.startswith(_BEHIND_THE_LAYERS)
        parts[key] = replace(
            found,
            multiply_adds=found.multiply_adds + (0 if late else macs),
            multiply_adds_per_logit=found.multiply_adds_per_logit + (macs if late else 0),
            weight_bytes=found.weight_bytes + form.bytes_of(spec.shape) * count,
        )
    return Anatomy(config.architecture, tuple(parts.values()), _attention(config, exact), lookup_bytes)


_BEHIND_THE_LAYERS = ("head.", "hc_head_", "lm_head.")
"""What runs only at positions whose logits are wanted."""


def _start(config: ModelConfig, component: str, precision: Precision, share: float) -> Matrices:
    """A component before its matrices are counted; hyper-connections also mix streams, which needs no matrix.

    They collapse, spread and recombine the streams at two sites a layer, and collapse them once before the head.
    """
    if component != "mhc":
        return Matrices(component, precision, 0, 0, share)
    assert isinstance(config, DeepseekV4Config)
    streams, hidden = config.hc_mult, config.hidden_size
    mixing = config.num_hidden_layers * 2 * hidden * (2 * streams + streams**2)
    return Matrices(component, precision, mixing, 0, share, multiply_adds_per_logit=streams * hidden)


def _is_multiplied(spec: TensorSpec) -> bool:
    return len(spec.shape) == 2 and spec.name.endswith((".weight", "_fn"))


def _attention(config: ModelConfig, exact: bool) -> tuple[AttentionKind, ...]:
    """One `AttentionKind` for each distinct kind of layer, in the order they first appear."""
    counts: dict[AttentionKind, int] = {}
    for layer in config.layers:
        kind = _kind(config, layer, exact)
        counts[kind] = counts.get(kind, 0) + 1
    return tuple(replace(kind, layers=count) for kind, count in counts.items())


def _kind(config: ModelConfig, layer: LayerSpec, exact: bool) -> AttentionKind:
    streams = {spec.name: _row_bytes(spec.layout, exact) for spec in layer.streams}
    state = sum(spec.bytes_at(0) for spec in layer.streams if spec.component == "state")
    indexed = "index_keys" in streams
    if isinstance(config, DeepseekV4Config):
        key_width = value_width = config.head_dim
        window, fp4 = config.sliding_window, not exact
    else:
        assert isinstance(config, DeepseekV32Config)
        key_width, value_width = config.kv_lora_rank + config.qk_rope_head_dim, config.kv_lora_rank
        window, fp4 = 0, False
    return AttentionKind(
        name=layer.attention,
        layers=1,
        window=window,
        ratio=layer.ratio,
        topk=config.index_topk if indexed else None,
        heads=config.num_attention_heads,
        key_width=key_width,
        value_width=value_width,
        row_bytes=streams.get("rows", streams.get("window", 0)),
        index_heads=config.index_n_heads if indexed else 0,
        index_dim=config.index_head_dim if indexed else 0,
        index_row_bytes=streams.get("index_keys", 0),
        index_precision="fp4" if fp4 else "f32" if exact else "fp8",
        state_bytes=state,
    )


def _sum_capped(tokens: int, ratio: int, cap: int | None) -> int:
    """Sum over t = 1 .. tokens of min(floor(t / ratio), cap), in closed form."""
    if cap is None:
        groups, rest = divmod(tokens, ratio)
        return ratio * groups * (groups - 1) // 2 + groups * (rest + 1)
    rising = min(tokens, max(cap * ratio - 1, 0))
    return _sum_capped(rising, ratio, None) + cap * (tokens - rising)


def _row_bytes(layout: RowLayout, exact: bool) -> int:
    return (exact_layout(layout) if exact else layout).row_bytes
