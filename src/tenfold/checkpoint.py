"""Which tensors a checkpoint of a config holds: names, shapes, formats, and what each counts as.

The loader, the synthesiser and every count of parameters and bytes read this one list (spec 3.1, 3.4).
Knows nothing of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from tenfold.config import DeepseekV4Config, DeepseekV32Config, LayerSpec, ModelConfig
from tenfold.formats import BF16, F32, FP8_BLOCK, FP8_BLOCK_F32, I64, MXFP4, WeightFormat

__all__ = ["TensorSpec", "active_parameters", "canonical_name", "grouped", "is_draft", "parameters", "tensors"]

_LINEAR_V4 = (FP8_BLOCK, FP8_BLOCK_F32, BF16, F32)
_LINEAR_V32 = (FP8_BLOCK_F32, FP8_BLOCK, BF16, F32)
_EXPERT_V4 = (MXFP4, FP8_BLOCK, FP8_BLOCK_F32, BF16, F32)
_HALF = (BF16, F32)
_FULL = (F32, BF16)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One weight: name, logical shape (out, in), accepted formats (the official one first), cost component.

    `active` is the share of it that one token uses: 0 for the embedding table, top-k over experts for experts.
    """

    name: str
    shape: tuple[int, ...]
    formats: tuple[WeightFormat, ...]
    component: str
    active: float = 1.0

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def scale_suffix(self) -> str:
        """What replaces `.weight` in the name of the scale tensor: V4's own word, or V3.2's."""
        return ".weight_scale_inv" if self.formats[0] is FP8_BLOCK_F32 else ".scale"

    @property
    def scale_name(self) -> str:
        return self.name.removesuffix(".weight") + self.scale_suffix


def tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the backbone, in the order of the layers; draft heads are not part of it."""
    return _listed(config, config.n_routed_experts)


def grouped(config: ModelConfig) -> Iterator[tuple[TensorSpec, int]]:
    """`tensors` with expert 0 standing for all routed experts of its layer, and how many tensors each stands for.

    Counts need no more, and V4-Pro has 70,000 tensors.
    """
    for spec in _listed(config, 1):
        yield spec, config.n_routed_experts if spec.component == "moe_routed" else 1


def _listed(config: ModelConfig, experts: int) -> Iterator[TensorSpec]:
    """The tensors with the first `experts` of the routed experts of each layer."""
    if isinstance(config, DeepseekV4Config):
        return _tensors_v4(config, experts)
    assert isinstance(config, DeepseekV32Config)
    return _tensors_v32(config, experts)


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of the backbone by component."""
    totals: dict[str, int] = {}
    for spec, count in grouped(config):
        totals[spec.component] = totals.get(spec.component, 0) + spec.numel * count
    return totals


def active_parameters(config: ModelConfig) -> dict[str, float]:
    """Parameters one token uses, by component: without the input embedding and the experts not chosen."""
    totals: dict[str, float] = {}
    for spec, count in grouped(config):
        totals[spec.component] = totals.get(spec.component, 0.0) + spec.numel * count * spec.active
    return totals


def is_draft(config: ModelConfig, name: str) -> bool:
    """Whether a tensor belongs to the draft head, which is known and left aside: `mtp.*`, V3.2's layer 61."""
    if isinstance(config, DeepseekV4Config):
        return name.startswith("mtp.")
    last = config.num_hidden_layers + config.num_nextn_predict_layers
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return match is not None and config.num_hidden_layers <= int(match.group(1)) < last


_TRANSFORMERS_TOP = {
    "model.embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}


def canonical_name(config: ModelConfig, name: str) -> str:
    """The official name of a stored tensor; V4 files written by transformers prefix `model.` (spec 3.3)."""
    if not isinstance(config, DeepseekV4Config):
        return name
    if name in _TRANSFORMERS_TOP:
        return _TRANSFORMERS_TOP[name]
    return name.removeprefix("model.").replace(".attn.norm.weight", ".attn.kv_norm.weight")


def _tensors_v4(c: DeepseekV4Config, experts: int) -> Iterator[TensorSpec]:
    d, n = c.hidden_size, c.hc_mult
    yield TensorSpec("embed.weight", (c.vocab_size, d), _HALF, "embed", active=0.0)
    for layer in c.layers:
        prefix = f"layers.{layer.index}."
        yield TensorSpec(prefix + "attn_norm.weight", (d,), _HALF, "norm")
        yield from _attention_v4(c, layer, prefix + "attn.")
        yield TensorSpec(prefix + "ffn_norm.weight", (d,), _HALF, "norm")
        for site in ("attn", "ffn"):
            yield TensorSpec(f"{prefix}hc_{site}_fn", ((2 + n) * n, n * d), _FULL, "mhc")
            yield TensorSpec(f"{prefix}hc_{site}_base", ((2 + n) * n,), _FULL, "mhc")
            yield TensorSpec(f"{prefix}hc_{site}_scale", (3,), _FULL, "mhc")
        yield from _moe_v4(c, layer, prefix + "ffn.", experts)
    yield TensorSpec("norm.weight", (d,), _HALF, "norm")
    yield TensorSpec("head.weight", (c.vocab_size, d), _HALF, "lm_head")
    yield TensorSpec("hc_head_fn", (n, n * d), _FULL, "mhc")
    yield TensorSpec("hc_head_base", (n,), _FULL, "mhc")
    yield TensorSpec("hc_head_scale", (1,), _FULL, "mhc")


def _attention_v4(c: DeepseekV4Config, layer: LayerSpec, prefix: str) -> Iterator[TensorSpec]:
    d, q, heads, dim = c.hidden_size, c.q_lora_rank, c.num_attention_heads, c.head_dim
    for name, shape in (
        ("wq_a", (q, d)),
        ("wq_b", (heads * dim, q)),
        ("wkv", (dim, d)),
        ("wo_a", (c.o_groups * c.o_lora_rank, heads * dim // c.o_groups)),
        ("wo_b", (d, c.o_groups * c.o_lora_rank)),
    ):
        yield TensorSpec(f"{prefix}{name}.weight", shape, _LINEAR_V4, "attn_proj")
    yield TensorSpec(prefix + "q_norm.weight", (q,), _HALF, "norm")
    yield TensorSpec(prefix + "kv_norm.weight", (dim,), _HALF, "norm")
    yield TensorSpec(prefix + "attn_sink", (heads,), _FULL, "norm")
    if layer.attention in ("csa", "hca"):
        yield from _compressor_v4(c, layer, prefix + "compressor.", dim)
    if layer.attention == "csa":
        index = prefix + "indexer."
        rows = c.index_n_heads * c.index_head_dim
        yield TensorSpec(index + "wq_b.weight", (rows, q), _LINEAR_V4, "indexer_proj")
        yield TensorSpec(index + "weights_proj.weight", (c.index_n_heads, d), _HALF, "indexer_gate")
        yield from _compressor_v4(c, layer, index + "compressor.", c.index_head_dim)


def _compressor_v4(c: DeepseekV4Config, layer: LayerSpec, prefix: str, dim: int) -> Iterator[TensorSpec]:
    width = 2 * dim if layer.attention == "csa" else dim
    yield TensorSpec(prefix + "wkv.weight", (width, c.hidden_size), _HALF, "compressor")
    yield TensorSpec(prefix + "wgate.weight", (width, c.hidden_size), _HALF, "compressor")
    yield TensorSpec(prefix + "norm.weight", (dim,), _HALF, "norm")
    yield TensorSpec(prefix + "ape", (layer.ratio, width), _FULL, "compressor")


def _moe_v4(c: DeepseekV4Config, layer: LayerSpec, prefix: str, listed: int) -> Iterator[TensorSpec]:
    experts, k = c.n_routed_experts, c.num_experts_per_tok
    yield TensorSpec(prefix + "gate.weight", (experts, c.hidden_size), _HALF, "router")
    if layer.router == "hash":
        yield TensorSpec(prefix + "gate.tid2eid", (c.vocab_size, k), (I64,), "hash_table", active=0.0)
    else:
        yield TensorSpec(prefix + "gate.bias", (experts,), _FULL, "router")
    for expert in range(listed):
        yield from _ffn(c, f"{prefix}experts.{expert}.", ("w1", "w2", "w3"), _EXPERT_V4, "moe_routed", k / experts)
    yield from _ffn(c, prefix + "shared_experts.", ("w1", "w2", "w3"), _LINEAR_V4, "moe_shared", 1.0)


def _ffn(
    c: ModelConfig,
    prefix: str,
    names: tuple[str, str, str],
    formats: tuple[WeightFormat, ...],
    component: str,
    active: float,
    width: int | None = None,
) -> Iterator[TensorSpec]:
    """Gate, down and up projection of one feed-forward network."""
    inner = width or c.moe_intermediate_size * (c.n_shared_experts if component == "moe_shared" else 1)
    gate, down, up = names
    for name, shape in (
        (gate, (inner, c.hidden_size)),
        (down, (c.hidden_size, inner)),
        (up, (inner, c.hidden_size)),
    ):
        yield TensorSpec(f"{prefix}{name}.weight", shape, formats, component, active)


_HF_FFN = ("gate_proj", "down_proj", "up_proj")


def _tensors_v32(c: DeepseekV32Config, experts: int) -> Iterator[TensorSpec]:
    d = c.hidden_size
    yield TensorSpec("model.embed_tokens.weight", (c.vocab_size, d), _HALF, "embed", active=0.0)
    for layer in c.layers:
        prefix = f"model.layers.{layer.index}."
        yield TensorSpec(prefix + "input_layernorm.weight", (d,), _HALF, "norm")
        yield from _attention_v32(c, prefix + "self_attn.")
        yield TensorSpec(prefix + "post_attention_layernorm.weight", (d,), _HALF, "norm")
        yield from _mlp_v32(c, layer, prefix + "mlp.", experts)
    yield TensorSpec("model.norm.weight", (d,), _HALF, "norm")
    yield TensorSpec("lm_head.weight", (c.vocab_size, d), _HALF, "lm_head")


def _attention_v32(c: DeepseekV32Config, prefix: str) -> Iterator[TensorSpec]:
    d, q, heads = c.hidden_size, c.q_lora_rank, c.num_attention_heads
    for name, shape in (
        ("q_a_proj", (q, d)),
        ("q_b_proj", (heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), q)),
        ("kv_a_proj_with_mqa", (c.kv_lora_rank + c.qk_rope_head_dim, d)),
        ("kv_b_proj", (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)),
        ("o_proj", (d, heads * c.v_head_dim)),
    ):
        yield TensorSpec(f"{prefix}{name}.weight", shape, _LINEAR_V32, "attn_proj")
    yield TensorSpec(prefix + "q_a_layernorm.weight", (q,), _HALF, "norm")
    yield TensorSpec(prefix + "kv_a_layernorm.weight", (c.kv_lora_rank,), _HALF, "norm")
    index = prefix + "indexer."
    yield TensorSpec(index + "wq_b.weight", (c.index_n_heads * c.index_head_dim, q), _LINEAR_V32, "indexer_proj")
    yield TensorSpec(index + "wk.weight", (c.index_head_dim, d), _LINEAR_V32, "indexer_proj")
    yield TensorSpec(index + "k_norm.weight", (c.index_head_dim,), _FULL, "norm")
    yield TensorSpec(index + "k_norm.bias", (c.index_head_dim,), _FULL, "norm")
    yield TensorSpec(index + "weights_proj.weight", (c.index_n_heads, d), _HALF, "indexer_gate")


def _mlp_v32(c: DeepseekV32Config, layer: LayerSpec, prefix: str, listed: int) -> Iterator[TensorSpec]:
    if layer.router == "dense":
        yield from _ffn(c, prefix, _HF_FFN, _LINEAR_V32, "dense_ffn", 1.0, c.intermediate_size)
        return
    experts = c.n_routed_experts
    yield TensorSpec(prefix + "gate.weight", (experts, c.hidden_size), _HALF, "router")
    yield TensorSpec(prefix + "gate.e_score_correction_bias", (experts,), _FULL, "router")
    share = c.num_experts_per_tok / experts
    for expert in range(listed):
        yield from _ffn(c, f"{prefix}experts.{expert}.", _HF_FFN, _LINEAR_V32, "moe_routed", share)
    yield from _ffn(c, prefix + "shared_experts.", _HF_FFN, _LINEAR_V32, "moe_shared", 1.0)
