"""`config.json` -> a frozen `ModelConfig` with its layers and streams. Knows nothing of tensors or files of weights.

Field names are the checkpoint's own. Every value is checked; a field that is missing, impossible or unknown is
a `ConfigError` naming it. Presets `v4-flash`, `v4-pro` and `v3.2` hold the published configurations (spec 1).
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from tenfold.errors import ConfigError
from tenfold.formats import RowLayout, index_key_fp4, index_key_fp8, kv_row_v4, kv_row_v32

__all__ = [
    "EMBEDDED",
    "PRESETS",
    "AttentionKind",
    "DeepseekV4Config",
    "DeepseekV32Config",
    "LayerSpec",
    "ModelConfig",
    "RopeSpec",
    "RouterKind",
    "StreamSpec",
    "load",
    "locate",
    "parse",
    "preset",
]

PRESETS = ("v4-flash", "v4-pro", "v3.2")

_EMBEDDED_FOLDER = Path(str(resources.files("tenfold").joinpath("demo")))

EMBEDDED = tuple(sorted(file.parent.name for file in _EMBEDDED_FOLDER.glob("tiny-*/config.json")))
"""Models that ship with the package, weights and all: their folders' names are theirs."""

AttentionKind = Literal["swa", "csa", "hca", "dsa"]
"""Sliding window; compressed sparse (ratio 4); heavily compressed; V3.2's token-level sparse attention."""

RouterKind = Literal["dense", "hash", "learned"]

CSA_RATIO = 4
"""The compression ratio that comes with overlap and an indexer (spec 2.4); any larger one is HCA."""

MAX_LAYERS = 1024
MAX_EXTENT = 1 << 24

# Present in published files, and without influence on what is computed.
_IGNORED = frozenset(
    [
        "architectures",
        "model_type",
        "auto_map",
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "initializer_range",
        "attention_dropout",
        "ep_size",
        "moe_layer_freq",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "pretraining_tp",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "aux_loss_alpha",
        "seq_aux",
        "partial_rotary_factor",
        "qk_head_dim",
    ]
)


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """One rotary table: base, channels rotated, and YaRN's four numbers (`factor` 1 = no YaRN)."""

    theta: float
    dim: int
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """One growing memory of a session: a row of `layout` for every `ratio` tokens, or `fixed_rows` rows for ever.

    `component` is the line it is counted under: window, csa, hca, mla, index_keys or state. Compressor state
    with `overlap` holds the last complete group beside the pending one.
    """

    layer: int
    name: str
    component: str
    layout: RowLayout
    ratio: int = 0
    fixed_rows: int = 0
    overlap: bool = False

    def rows_at(self, tokens: int) -> int:
        """Rows held after `tokens` tokens; rings and state are there from the start."""
        return self.fixed_rows if self.ratio == 0 else tokens // self.ratio

    def bytes_at(self, tokens: int) -> int:
        return self.rows_at(tokens) * self.layout.row_bytes


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer is: attention kind with its compression ratio, router kind, rotary table, streams."""

    index: int
    attention: AttentionKind
    ratio: int
    router: RouterKind
    rope: RopeSpec
    streams: tuple[StreamSpec, ...]

    def stream(self, name: str) -> StreamSpec:
        return next(spec for spec in self.streams if spec.name == name)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """What both architectures share; see `DeepseekV4Config` and `DeepseekV32Config`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    qk_rope_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    rms_norm_eps: float
    max_position_embeddings: int
    num_nextn_predict_layers: int
    weight_block_size: tuple[int, int] | None
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    raw: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)

    @property
    def architecture(self) -> str:
        """deepseek_v4 or deepseek_v32."""
        return str(self.raw["model_type"])

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The layer schedule; model, cache, planner and tests read this one tuple."""
        return tuple(self._layer(index) for index in range(self.num_hidden_layers))

    @abstractmethod
    def _layer(self, index: int) -> LayerSpec: ...

    @cached_property
    def streams(self) -> tuple[StreamSpec, ...]:
        return tuple(spec for layer in self.layers for spec in layer.streams)

    @property
    def draft_head(self) -> Literal["none", "mtp", "dspark"]:
        """Which draft head the checkpoint carries; 0731 and later keep `num_nextn_predict_layers` 1 (spec 8.1)."""
        if any(key.startswith("dspark_") for key in self.raw):
            return "dspark"
        return "mtp" if self.num_nextn_predict_layers else "none"

    def kv_bytes(self, tokens: int) -> dict[str, int]:
        """Bytes of a session's memory after `tokens` tokens, by component (efficiency: KV per sequence)."""
        total: dict[str, int] = {}
        for spec in self.streams:
            total[spec.component] = total.get(spec.component, 0) + spec.bytes_at(tokens)
        return total

    @property
    def kv_bytes_per_token(self) -> float:
        """Marginal bytes a token adds in the long run."""
        return sum(spec.layout.row_bytes / spec.ratio for spec in self.streams if spec.ratio)


@dataclass(frozen=True, kw_only=True)
class DeepseekV4Config(ModelConfig):
    """V4-Flash and V4-Pro (spec 1.1), any of their checkpoints with this backbone."""

    head_dim: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    num_hash_layers: int
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rope: RopeSpec
    compress_rope: RopeSpec

    def _layer(self, index: int) -> LayerSpec:
        ratio = self.compress_ratios[index]
        attention: AttentionKind = "swa" if ratio == 0 else "csa" if ratio == CSA_RATIO else "hca"
        return LayerSpec(
            index=index,
            attention=attention,
            ratio=ratio,
            router="hash" if index < self.num_hash_layers else "learned",
            rope=self.compress_rope if ratio else self.rope,
            streams=self._streams(index, attention, ratio),
        )

    def _streams(self, layer: int, attention: AttentionKind, ratio: int) -> tuple[StreamSpec, ...]:
        row = kv_row_v4(self.head_dim, self.qk_rope_head_dim)
        window = StreamSpec(layer, "window", "window", row, fixed_rows=self.sliding_window)
        if attention == "swa":
            return (window,)
        rows = StreamSpec(layer, "rows", attention, row, ratio=ratio)
        if attention == "hca":
            state = StreamSpec(layer, "state", "state", _state_row(self.head_dim), fixed_rows=ratio)
            return window, rows, state
        state = _overlap_state(layer, "state", self.head_dim, ratio)
        keys = StreamSpec(layer, "index_keys", "index_keys", index_key_fp4(self.index_head_dim), ratio=ratio)
        return window, rows, state, keys, _overlap_state(layer, "index_state", self.index_head_dim, ratio)


def _overlap_state(layer: int, name: str, dim: int, ratio: int) -> StreamSpec:
    return StreamSpec(layer, name, "state", _state_row(2 * dim), fixed_rows=2 * ratio, overlap=True)


def _state_row(width: int) -> RowLayout:
    """A pending token of the compressor: its values and its gates, float32 (spec 2.11)."""
    return RowLayout("compressor-f32", 2 * width, code_bits=32)


@dataclass(frozen=True, kw_only=True)
class DeepseekV32Config(ModelConfig):
    """V3.2 (spec 1.3)."""

    intermediate_size: int
    first_k_dense_replace: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    n_group: int
    topk_group: int
    rope: RopeSpec
    mscale: float
    mscale_all_dim: float

    def _layer(self, index: int) -> LayerSpec:
        rows = StreamSpec(index, "rows", "mla", kv_row_v32(self.kv_lora_rank, self.qk_rope_head_dim), ratio=1)
        keys = StreamSpec(index, "index_keys", "index_keys", index_key_fp8(self.index_head_dim), ratio=1)
        router: RouterKind = "dense" if index < self.first_k_dense_replace else "learned"
        return LayerSpec(index, "dsa", 1, router, self.rope, (rows, keys))

    @property
    def softmax_scale(self) -> float:
        """(nope + rope)^-1/2 times YaRN's mscale squared; 0.1352338 for V3.2 (spec 5.2)."""
        scale: float = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        if self.rope.factor <= 1.0 or not self.mscale_all_dim:
            return scale
        return scale * (0.1 * self.mscale_all_dim * math.log(self.rope.factor) + 1.0) ** 2


def preset(name: str) -> ModelConfig:
    """One of the published configurations that ship with the package."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    text = resources.files("tenfold").joinpath("presets", f"{name}.json").read_text(encoding="utf-8")
    return parse(json.loads(text))


def locate(source: str | Path) -> Path:
    """Where a model lies: an embedded model by its name, else the path itself."""
    if isinstance(source, str) and source in EMBEDDED:
        return _EMBEDDED_FOLDER / source
    return Path(source)


def load(source: str | Path) -> ModelConfig:
    """The configuration of a preset, an embedded model, a checkpoint folder, or a config.json file."""
    if isinstance(source, str) and source in PRESETS:
        return preset(source)
    path = locate(source)
    try:
        if path.is_dir():
            path = path / "config.json"
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"no config.json at {path}; give a checkpoint folder, an embedded model ({', '.join(EMBEDDED)}), "
            f"or one of the presets {', '.join(PRESETS)}"
        ) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read: {exc}") from exc
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path} is not JSON: {exc}") from exc
    return parse(raw)


def parse(raw: object) -> ModelConfig:
    """A `ModelConfig` from the object of a config.json; transformers' own spelling of the fields is understood."""
    if not isinstance(raw, dict):
        raise ConfigError(f"config.json holds {type(raw).__name__}, expected an object")
    fields = _Fields(_official_words(raw), raw)
    model_type = fields.choice("model_type", ("deepseek_v4", "deepseek_v32"))
    config = _parse_v4(fields) if model_type == "deepseek_v4" else _parse_v32(fields)
    fields.refuse_unknown()
    return config


class _Fields:
    """Reads fields of a config with checks, and remembers which were read."""

    def __init__(self, fields: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
        self.fields = fields
        self.raw = raw
        self.read: set[str] = set()

    def value(self, name: str, default: object = ...) -> Any:
        self.read.add(name)
        if name not in self.fields or (self.fields[name] is None and default is not ...):
            if default is ...:
                raise ConfigError(f"config.json has no field {name!r}, which the model needs")
            return default
        return self.fields[name]

    def integer(self, name: str, low: int = 1, high: int = MAX_EXTENT, default: object = ...) -> int:
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"config.json: {name} is {value!r}, expected an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float = 0.0, high: float = 1e12, default: object = ...) -> float:
        return _number(f"config.json: {name}", self.value(name, default), low, high)

    def choice(self, name: str, allowed: tuple[object, ...], default: object = ...) -> Any:
        value = self.value(name, default)
        if not any(value == item and type(value) is type(item) for item in allowed):  # True is not 1
            expected = " or ".join(repr(item) for item in allowed)
            raise ConfigError(f"config.json: {name} is {value!r}, expected {expected}")
        return value

    def refuse_unknown(self) -> None:
        unknown = sorted(
            name for name in self.fields if name not in self.read | _IGNORED and not name.startswith("dspark_")
        )
        if unknown:
            raise ConfigError(
                f"config.json has fields this engine does not know: {', '.join(unknown)}; "
                "they may change the model, so it is not loaded"
            )


def _number(what: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{what} is {value!r}, expected a number from {low:g} to {high:g}")
    return float(value)


def _shared(fields: _Fields) -> dict[str, Any]:
    """The fields of `ModelConfig`, and checks of those that allow one value only."""
    fields.choice("hidden_act", ("silu",), "silu")
    fields.choice("attention_bias", (False,), False)
    fields.choice("mlp_bias", (False,), False)
    fields.choice("tie_word_embeddings", (False,))
    fields.choice("norm_topk_prob", (True,))
    fields.choice("topk_method", ("noaux_tc",))
    fields.choice("expert_dtype", ("fp4", "fp8", "bf16", None), None)
    rope_dim = fields.integer("qk_rope_head_dim", 2, 1 << 16)
    index_dim = fields.integer("index_head_dim", 32, 1 << 12)
    if index_dim & (index_dim - 1) or index_dim < rope_dim or rope_dim % 2:
        raise ConfigError(
            f"config.json: index_head_dim is {index_dim} with qk_rope_head_dim {rope_dim}, "
            "expected a power of two (for the Hadamard transform) not below an even qk_rope_head_dim"
        )
    experts = fields.integer("n_routed_experts", 1, 1 << 16)
    return {
        "vocab_size": fields.integer("vocab_size", 1, 1 << 24),
        "hidden_size": fields.integer("hidden_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers", 1, MAX_LAYERS),
        "num_attention_heads": fields.integer("num_attention_heads", 1, 1 << 14),
        "q_lora_rank": fields.integer("q_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "index_n_heads": fields.integer("index_n_heads", 1, 1 << 14),
        "index_head_dim": index_dim,
        "index_topk": fields.integer("index_topk"),
        "moe_intermediate_size": fields.integer("moe_intermediate_size"),
        "n_routed_experts": experts,
        "n_shared_experts": fields.integer("n_shared_experts", 1, 64),
        "num_experts_per_tok": fields.integer("num_experts_per_tok", 1, experts),
        "routed_scaling_factor": fields.number("routed_scaling_factor", 1e-6, 1e6),
        "rms_norm_eps": fields.number("rms_norm_eps", 0.0, 1.0),
        "max_position_embeddings": fields.integer("max_position_embeddings", 1, 1 << 40),
        "num_nextn_predict_layers": fields.integer("num_nextn_predict_layers", 0, 64, default=0),
        "weight_block_size": _weight_block_size(fields),
        "bos_token_id": None if fields.value("bos_token_id", None) is None else fields.integer("bos_token_id", 0),
        "eos_token_id": _token_ids(fields.value("eos_token_id", ())),
        "raw": dict(fields.raw),
    }


def _token_ids(value: object) -> tuple[int, ...]:
    ids = value if isinstance(value, list | tuple) else (value,)
    if not all(type(item) is int and 0 <= item < MAX_EXTENT for item in ids):
        raise ConfigError(f"config.json: eos_token_id is {value!r}, expected a token id or a list of them")
    return tuple(ids)


def _weight_block_size(fields: _Fields) -> tuple[int, int] | None:
    """Block of the fp8 scales, None where the checkpoint is not quantised."""
    quantisation = fields.value("quantization_config", None)
    if quantisation is None:
        return None
    if not isinstance(quantisation, dict) or quantisation.get("quant_method") != "fp8":
        raise ConfigError(f"config.json: quantization_config is {quantisation!r}, expected quant_method 'fp8'")
    if quantisation.get("weight_block_size") != [128, 128]:
        block = quantisation.get("weight_block_size")
        raise ConfigError(f"config.json: weight_block_size is {block!r}, expected [128, 128]")
    return 128, 128


def _yarn(fields: _Fields, theta: float, dim: int) -> RopeSpec:
    scaling = fields.value("rope_scaling")
    if not isinstance(scaling, dict) or scaling.get("type", scaling.get("rope_type")) != "yarn":
        raise ConfigError(f"config.json: rope_scaling is {scaling!r}, expected an object of type 'yarn'")
    missing = [key for key in ("factor", "original_max_position_embeddings") if key not in scaling]
    if missing:
        raise ConfigError(f"config.json: rope_scaling has no {' and no '.join(missing)}")
    original = _number(
        "config.json: rope_scaling.original_max_position_embeddings",
        scaling["original_max_position_embeddings"],
        1,
        1e12,
    )
    return RopeSpec(
        theta=theta,
        dim=dim,
        factor=_number("config.json: rope_scaling.factor", scaling["factor"], 1.0, 1e6),
        original_max_position_embeddings=int(original),
        beta_fast=_number("config.json: rope_scaling.beta_fast", scaling.get("beta_fast", 32), 1e-3, 1e6),
        beta_slow=_number("config.json: rope_scaling.beta_slow", scaling.get("beta_slow", 1), 1e-3, 1e6),
    )


def _parse_v4(fields: _Fields) -> DeepseekV4Config:
    shared = _shared(fields)
    fields.choice("num_key_value_heads", (1,))
    fields.choice("scoring_func", ("sqrtsoftplus",))
    head_dim, rope_dim = fields.integer("head_dim", 2), shared["qk_rope_head_dim"]
    if head_dim <= rope_dim:
        raise ConfigError(f"config.json: head_dim is {head_dim}, expected more than qk_rope_head_dim {rope_dim}")
    groups, heads = fields.integer("o_groups"), shared["num_attention_heads"]
    if heads % groups:
        raise ConfigError(f"config.json: o_groups is {groups}, expected a divisor of num_attention_heads {heads}")
    rope = RopeSpec(fields.number("rope_theta", 1.0), rope_dim)
    return DeepseekV4Config(
        **shared,
        head_dim=head_dim,
        o_groups=groups,
        o_lora_rank=fields.integer("o_lora_rank"),
        sliding_window=fields.integer("sliding_window"),
        compress_ratios=_compress_ratios(fields, shared["num_hidden_layers"]),
        num_hash_layers=fields.integer("num_hash_layers", 0, MAX_LAYERS),
        swiglu_limit=fields.number("swiglu_limit", 1e-6),
        hc_mult=fields.integer("hc_mult", 1, 64),
        hc_sinkhorn_iters=fields.integer("hc_sinkhorn_iters", 1, 1000),
        hc_eps=fields.number("hc_eps", 0.0, 1.0),
        rope=rope,
        compress_rope=_yarn(fields, fields.number("compress_rope_theta", 1.0), rope_dim),
    )


def _compress_ratios(fields: _Fields, num_layers: int) -> tuple[int, ...]:
    """One ratio a layer; the zeros behind them belong to the draft head (spec 1.1, 8.1)."""
    ratios = fields.value("compress_ratios")
    if not isinstance(ratios, list) or not all(isinstance(r, int) and not isinstance(r, bool) for r in ratios):
        raise ConfigError(f"config.json: compress_ratios is {ratios!r}, expected a list of integers")
    if len(ratios) < num_layers or any(ratios[num_layers:]):
        raise ConfigError(
            f"config.json: compress_ratios has {len(ratios)} entries for {num_layers} layers; "
            "expected one for each layer, then zeros for the draft head"
        )
    wrong = sorted({r for r in ratios if r not in (0, CSA_RATIO) and not CSA_RATIO < r <= 65536})
    if wrong:
        raise ConfigError(f"config.json: compress_ratios holds {wrong}, expected 0, 4 or more than 4 (128)")
    return tuple(ratios[:num_layers])


def _parse_v32(fields: _Fields) -> DeepseekV32Config:
    shared = _shared(fields)
    fields.choice("scoring_func", ("sigmoid",))
    fields.integer("num_key_value_heads", 1, 1 << 14)
    groups, experts = fields.integer("n_group"), shared["n_routed_experts"]
    if experts % groups or experts // groups < 2:
        raise ConfigError(
            f"config.json: n_group is {groups}, expected a divisor of n_routed_experts {experts} "
            "that leaves at least 2 experts a group"
        )
    topk_group = fields.integer("topk_group", 1, groups)
    if shared["num_experts_per_tok"] > topk_group * (experts // groups):
        raise ConfigError(
            f"config.json: topk_group is {topk_group}, too few for num_experts_per_tok {shared['num_experts_per_tok']}"
        )
    scaling = fields.value("rope_scaling")
    mscales = scaling if isinstance(scaling, dict) else {}
    if mscales.get("mscale", 1.0) != mscales.get("mscale_all_dim", 0.0):  # cos and sin would be scaled as well
        raise ConfigError(
            f"config.json: rope_scaling has mscale {mscales.get('mscale', 1.0)!r} and mscale_all_dim "
            f"{mscales.get('mscale_all_dim', 0.0)!r}, expected the same number, which is all that V3.2 uses"
        )
    return DeepseekV32Config(
        **shared,
        intermediate_size=fields.integer("intermediate_size"),
        first_k_dense_replace=fields.integer("first_k_dense_replace", 0, MAX_LAYERS),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
        n_group=groups,
        topk_group=topk_group,
        rope=_yarn(fields, fields.number("rope_theta", 1.0), shared["qk_rope_head_dim"]),
        mscale=_number("config.json: rope_scaling.mscale", mscales.get("mscale", 1.0), 0.0, 100.0),
        mscale_all_dim=_number(
            "config.json: rope_scaling.mscale_all_dim", mscales.get("mscale_all_dim", 0.0), 0.0, 100.0
        ),
    )


_TRANSFORMERS_LAYERS = {
    "sliding_attention": 0,
    "compressed_sparse_attention": CSA_RATIO,
    "heavily_compressed_attention": 128,
}


def _official_words(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields in the checkpoint's own words; a config written by transformers 5 is translated (spec 3.3)."""
    if "rope_parameters" not in raw:
        return raw
    fields = dict(raw)
    rope = _pop(fields, "rope_parameters", dict, {})
    layer_types = _pop(fields, "layer_types", list, None)
    mlp_types = _pop(fields, "mlp_layer_types", list, [])
    fields.setdefault("topk_method", "noaux_tc")
    if fields.get("model_type") == "deepseek_v32":
        fields.pop("head_dim", None)
        fields.setdefault("scoring_func", "sigmoid")
        fields.setdefault("rope_theta", rope.get("rope_theta"))
        fields["rope_scaling"] = rope
        return fields
    rates = _pop(fields, "compress_rates", dict, {})
    if "compress_ratios" not in fields and layer_types is not None:
        fields["compress_ratios"] = [_ratio(kind, rates) for kind in layer_types]
    hashed = mlp_types.count("hash_moe")
    if mlp_types[:hashed] != ["hash_moe"] * hashed:
        raise ConfigError("config.json: mlp_layer_types has hash_moe behind moe, expected it in the first layers")
    fields.setdefault("num_hash_layers", hashed)
    fields["rope_scaling"] = rope.get("compress")
    return fields


def _pop(fields: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = fields.pop(name, default)
    if value is not default and not isinstance(value, kind):
        raise ConfigError(f"config.json: {name} is {value!r}, expected {kind.__name__}")
    return value


def _ratio(kind: object, rates: Mapping[str, Any]) -> Any:
    """The compression ratio of one of transformers' layer types."""
    if not isinstance(kind, str) or kind not in _TRANSFORMERS_LAYERS:
        raise ConfigError(f"config.json: layer_types holds {kind!r}, which V4 does not have")
    usual = _TRANSFORMERS_LAYERS[kind]
    ratio = rates.get(kind, usual)
    if usual <= CSA_RATIO and ratio != usual:  # the ratio alone says what a layer is (see CSA_RATIO)
        raise ConfigError(f"config.json: compress_rates gives {kind} {ratio!r}, expected {usual}")
    return ratio
