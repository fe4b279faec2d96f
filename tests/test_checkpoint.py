"""The list of tensors against the published totals, and against what transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tenfold import config as configuration
from tenfold.checkpoint import active_parameters, canonical_name, is_draft, parameters, tensors
from tenfold.config import PRESETS, ModelConfig, parse, preset
from tenfold.synth import shrink, synth
from tenfold.weights import open_weights


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("v4-flash", 284.33, 13.27), ("v4-pro", 1573.00, 48.85), ("v3.2", 671.88, 37.48)],
)
def test_published_totals(name: str, total: float, active: float) -> None:
    counted = parameters(preset(name))
    counted.pop("hash_table", None)  # ids, not parameters
    assert round(sum(counted.values()) / 1e9, 2) == total
    assert round(sum(active_parameters(preset(name)).values()) / 1e9, 2) == active


def stored_tensors(config: ModelConfig) -> int:
    return sum(1 if spec.formats[0].block is None else 2 for spec in tensors(config))


def test_stored_tensors_and_bytes() -> None:
    """Spec 3.1, without the draft head."""
    assert stored_tensors(preset("v4-flash")) == 67_612
    assert sum(spec.formats[0].bytes_of(spec.shape) for spec in tensors(preset("v4-flash"))) == 156_015_698_140
    assert stored_tensors(preset("v4-pro")) == 142_773


@pytest.mark.parametrize("name", PRESETS)
def test_names_are_unique(name: str) -> None:
    config = preset(name)
    specs = list(tensors(config))
    names = [spec.name for spec in specs]
    names += [spec.scale_name for spec in specs if spec.formats[0].block is not None]
    assert len(set(names)) == len(names)
    assert not any(is_draft(config, tensor) for tensor in names)
    assert all(canonical_name(config, tensor) == tensor for tensor in names)


def test_shapes_of_flash() -> None:
    """A row of the table in spec 3.1 for each kind of tensor."""
    shapes = {spec.name: spec.shape for spec in tensors(preset("v4-flash"))}
    assert shapes["layers.0.hc_attn_fn"] == (24, 16384)
    assert shapes["layers.0.attn.wq_b.weight"] == (32768, 1024)
    assert shapes["layers.0.attn.wo_a.weight"] == (8192, 4096)
    assert shapes["layers.0.ffn.gate.tid2eid"] == (129280, 6)
    assert shapes["layers.2.attn.compressor.ape"] == (4, 1024)
    assert shapes["layers.3.attn.compressor.ape"] == (128, 512)
    assert shapes["layers.2.attn.indexer.wq_b.weight"] == (8192, 1024)
    assert shapes["layers.2.attn.indexer.compressor.wkv.weight"] == (256, 4096)
    assert shapes["layers.3.ffn.gate.bias"] == (256,)
    assert shapes["layers.42.ffn.experts.255.w2.weight"] == (4096, 2048)
    assert "layers.3.attn.indexer.wq_b.weight" not in shapes
    assert "layers.0.attn.compressor.ape" not in shapes
    assert "layers.0.ffn.gate.bias" not in shapes


def test_shapes_of_v32() -> None:
    shapes = {spec.name: spec.shape for spec in tensors(preset("v3.2"))}
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (18432, 7168)
    assert shapes["model.layers.3.mlp.experts.0.down_proj.weight"] == (7168, 2048)
    assert shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert shapes["model.layers.0.self_attn.indexer.k_norm.bias"] == (128,)


def test_scale_names() -> None:
    by_name = {spec.name: spec for spec in tensors(preset("v4-flash"))}
    assert by_name["layers.0.attn.wq_a.weight"].scale_name == "layers.0.attn.wq_a.scale"
    by_name = {spec.name: spec for spec in tensors(preset("v3.2"))}
    name = "model.layers.0.self_attn.o_proj.weight"
    assert by_name[name].scale_name == name + "_scale_inv"


@pytest.mark.parametrize(
    ("model", "name", "draft"),
    [
        ("v4-flash", "mtp.0.attn.wq_a.weight", True),
        ("v4-flash", "mtp.2.markov_head.markov_w1.weight", True),
        ("v4-flash", "layers.42.attn.wq_a.weight", False),
        ("v4-flash", "layers.43.attn.wq_a.weight", False),
        ("v3.2", "model.layers.60.input_layernorm.weight", False),
        ("v3.2", "model.layers.61.eh_proj.weight", True),
        ("v3.2", "model.layers.61.embed_tokens.weight", True),
        ("v3.2", "model.layers.62.eh_proj.weight", False),
        ("v3.2", "model.norm.weight", False),
    ],
)
def test_draft_heads_are_known(model: str, name: str, draft: bool) -> None:
    assert is_draft(preset(model), name) is draft


def test_no_draft_layer_where_the_config_has_none() -> None:
    config = parse(dict(preset("v3.2").raw) | {"num_nextn_predict_layers": 0})
    assert not is_draft(config, "model.layers.61.eh_proj.weight")


@pytest.mark.parametrize(
    ("model", "stored", "official"),
    [
        ("v4-flash", "model.embed_tokens.weight", "embed.weight"),
        ("v4-flash", "lm_head.weight", "head.weight"),
        ("v4-flash", "model.hc_head.hc_fn", "hc_head_fn"),
        ("v4-flash", "model.layers.3.attn.norm.weight", "layers.3.attn.kv_norm.weight"),
        ("v4-flash", "model.mtp.0.norm.weight", "mtp.0.norm.weight"),
        ("v3.2", "model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_names_transformers_writes(model: str, stored: str, official: str) -> None:
    assert canonical_name(preset(model), stored) == official


V4 = {
    "vocab_size": 64,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_hash_layers": 2,
    "sliding_window": 8,
    "compress_ratios": [0, 128, 4, 128, 4, 0],
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": 4,
    "rope_theta": 1e4,
    "compress_rope_theta": 1.6e5,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 256},
    "max_position_embeddings": 4096,
}
V32 = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 8,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 2560,
}


def save(kind: str, fields: dict[str, Any], folder: Path, shard: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.mark.parametrize(("kind", "fields"), [("DeepseekV4", V4), ("DeepseekV32", V32)])
@pytest.mark.parametrize("shard", ["5GB", "500KB"])
def test_a_checkpoint_of_transformers_opens(kind: str, fields: dict[str, Any], shard: str, tmp_path: Path) -> None:
    model = save(kind, fields, tmp_path, shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) is (shard == "5GB")
    config = configuration.load(tmp_path)
    weights = open_weights(tmp_path, config)
    taken = {info.name: weights.take(info.name) for info in weights}
    weights.finish()
    assert len(taken) == len(list(tensors(config)))
    numel = sum(weight.data.numel() for weight in taken.values() if weight.data.is_floating_point())
    assert numel == sum(p.numel() for p in model.state_dict().values() if p.is_floating_point())
    head = taken["head.weight" if kind == "DeepseekV4" else "lm_head.weight"]
    assert torch.equal(head.data, model.lm_head.weight)


def test_an_index_of_transformers_is_read(tmp_path: Path) -> None:
    save("DeepseekV32", V32, tmp_path, "500KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {info.shard for info in open_weights(tmp_path, configuration.load(tmp_path))} == set(
        index["weight_map"].values()
    )


@pytest.mark.parametrize(("kind", "name"), [("DeepseekV4", "v4-flash"), ("DeepseekV32", "v3.2")])
def test_transformers_reads_what_synth_writes(kind: str, name: str, tmp_path: Path) -> None:
    config = shrink(name, layers=4, hidden=64, experts=4, vocab=64, qk_rope_head_dim=16, index_head_dim=32)
    synth(config, tmp_path, fmt="f32")
    model_class = getattr(transformers, f"{kind}ForCausalLM")
    model, report = model_class.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    head = open_weights(tmp_path, config).take("head.weight" if kind == "DeepseekV4" else "lm_head.weight")
    assert torch.equal(head.data, model.lm_head.weight)
