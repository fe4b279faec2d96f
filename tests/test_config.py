"""Presets, every field of config.json one by one, and anything at all in its place."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold import config
from tenfold.config import (
    EMBEDDED,
    PRESETS,
    DeepseekV4Config,
    DeepseekV32Config,
    ModelConfig,
    load,
    locate,
    parse,
    preset,
)
from tenfold.errors import ConfigError

# Fields that change nothing, and fields whose absence has one meaning (spec 1.1).
WITHOUT_INFLUENCE = {
    "architectures",
    "attention_dropout",
    "ep_size",
    "initializer_range",
    "moe_layer_freq",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
OPTIONAL = {
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "expert_dtype",
    "hidden_act",
    "num_nextn_predict_layers",
    "quantization_config",
}
ROPE_FIELDS = ("factor", "original_max_position_embeddings")

CASES = [(name, field) for name in PRESETS for field in preset(name).raw]
USED = [(name, field) for name, field in CASES if field not in WITHOUT_INFLUENCE]


def raw(name: str) -> dict[str, Any]:
    return copy.deepcopy(dict(preset(name).raw))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_what_it_was_read_from(name: str) -> None:
    config = preset(name)
    assert parse(dict(config.raw)) == config
    for field in ("hidden_size", "num_hidden_layers", "index_topk", "vocab_size", "moe_intermediate_size"):
        assert getattr(config, field) == config.raw[field]
    assert len(config.layers) == config.num_hidden_layers
    assert [layer.index for layer in config.layers] == list(range(config.num_hidden_layers))


def kinds(config: ModelConfig) -> dict[str, int]:
    found = [layer.attention for layer in config.layers]
    return {kind: found.count(kind) for kind in dict.fromkeys(found)}


def routers(config: ModelConfig) -> list[str]:
    return [layer.router for layer in config.layers]


def test_the_layers_of_flash() -> None:
    config = preset("v4-flash")
    assert isinstance(config, DeepseekV4Config)
    assert kinds(config) == {"swa": 2, "csa": 21, "hca": 20}
    assert [layer.attention for layer in config.layers[:4]] == ["swa", "swa", "csa", "hca"]
    assert routers(config) == ["hash"] * 3 + ["learned"] * 40
    assert [layer.rope.theta for layer in config.layers[1:4]] == [10000.0, 160000.0, 160000.0]
    assert config.draft_head == "mtp"


def test_the_layers_of_pro() -> None:
    config = preset("v4-pro")
    assert isinstance(config, DeepseekV4Config)
    assert kinds(config) == {"hca": 31, "csa": 30}
    assert [layer.ratio for layer in config.layers[:4]] == [128, 128, 4, 128]
    assert config.layers[-1].attention == "csa"


def test_the_layers_of_v32() -> None:
    config = preset("v3.2")
    assert isinstance(config, DeepseekV32Config)
    assert kinds(config) == {"dsa": 61}
    assert routers(config) == ["dense"] * 3 + ["learned"] * 58
    assert math.isclose(config.softmax_scale, 0.1352338, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("name", "per_token", "at_a_million"),
    [("v4-flash", 3514.25, 3.530), ("v4-pro", 5031.4375, 5.055), ("v3.2", 48068.0, 48.068)],
)
def test_kv_bytes(name: str, per_token: float, at_a_million: float) -> None:
    config = preset(name)
    assert config.kv_bytes_per_token == per_token
    assert round(sum(config.kv_bytes(1_000_000).values()) / 1e9, 3) == at_a_million
    assert sum(config.kv_bytes(1_000_000).values()) == sum(s.bytes_at(1_000_000) for s in config.streams)


def test_kv_bytes_grow_by_whole_rows() -> None:
    config = preset("v4-flash")
    before, after = config.kv_bytes(127), config.kv_bytes(128)
    assert after["csa"] - before["csa"] == 21 * 584
    assert after["index_keys"] - before["index_keys"] == 21 * 68
    assert after["hca"] - before["hca"] == 20 * 584
    assert (after["window"], after["state"]) == (before["window"], before["state"]) == (43 * 128 * 584, 12206080)


@pytest.mark.parametrize(("name", "field"), USED)
def test_a_missing_field_is_named(name: str, field: str) -> None:
    fields = raw(name)
    del fields[field]
    if field in OPTIONAL:
        assert parse(fields).hidden_size == fields["hidden_size"]
    else:
        with pytest.raises(ConfigError, match=field):
            parse(fields)


@pytest.mark.parametrize(("name", "field"), USED)
def test_a_wrong_value_is_named(name: str, field: str) -> None:
    fields = raw(name)
    wrong: list[object] = ["banana", -1, math.nan, {}, 10**30, [[0]], not fields[field]]
    if field != "eos_token_id":  # a list of no end tokens is possible
        wrong.append([])
    for value in wrong:
        with pytest.raises(ConfigError, match=field):
            parse(fields | {field: value})


@pytest.mark.parametrize("name", PRESETS)
def test_null_is_no_value(name: str) -> None:
    with pytest.raises(ConfigError, match="hidden_size"):
        parse(raw(name) | {"hidden_size": None})


@pytest.mark.parametrize("name", PRESETS)
def test_an_unknown_field_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"kv_quantum, vision_tower"):
        parse(raw(name) | {"vision_tower": {}, "kv_quantum": 3})


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("field", ROPE_FIELDS)
def test_the_fields_of_yarn(name: str, field: str) -> None:
    fields = raw(name)
    del fields["rope_scaling"][field]
    with pytest.raises(ConfigError, match=field):
        parse(fields)
    for wrong in ("x", -1, math.nan, None):
        with pytest.raises(ConfigError, match=rf"rope_scaling\.{field}"):
            parse(raw(name) | {"rope_scaling": {**raw(name)["rope_scaling"], field: wrong}})


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("head_dim", 64, "head_dim"),
        ("o_groups", 7, "o_groups"),
        ("num_experts_per_tok", 257, "num_experts_per_tok"),
        ("index_head_dim", 96, "index_head_dim"),
        ("compress_ratios", [0, 0, 4], "compress_ratios"),
        ("compress_ratios", [3] * 44, "compress_ratios"),
        ("compress_ratios", [4] * 44, "compress_ratios"),
        ("num_key_value_heads", 2, "num_key_value_heads"),
        ("scoring_func", "softmax", "scoring_func"),
        ("model_type", "deepseek_v41", "model_type"),
        ("quantization_config", {"quant_method": "gptq"}, "quantization_config"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size"),
        ("rope_scaling", {"type": "linear", "factor": 2}, "rope_scaling"),
    ],
)
def test_values_v4_cannot_have(field: str, value: object, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(raw("v4-flash") | {field: value})


@pytest.mark.parametrize("change", [{"n_group": 7}, {"n_group": 256}, {"topk_group": 9}, {"scoring_func": "x"}])
def test_values_v32_cannot_have(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        parse(raw("v3.2") | change)


def dspark(name: str, stages: int = 3) -> dict[str, Any]:
    """The config.json of 0731 and 0813 (spec 8.1): extra keys, and a zero for each stage of the draft head."""
    fields = raw(name)
    layers = fields["num_hidden_layers"]
    return fields | {
        "compress_ratios": [*fields["compress_ratios"][:layers], *[0] * stages],
        "dspark_block_size": 5,
        "dspark_noise_token_id": 128799,
        "dspark_target_layer_ids": [layers - 3, layers - 2, layers - 1],
        "dspark_markov_rank": 256,
    }


@pytest.mark.parametrize(("name", "ratios"), [("v4-flash", 46), ("v4-pro", 64)])
def test_later_checkpoints_have_the_same_backbone(name: str, ratios: int) -> None:
    fields = dspark(name)
    assert len(fields["compress_ratios"]) == ratios
    config = parse(fields)
    assert config.layers == preset(name).layers
    assert config.draft_head == "dspark"


def test_no_draft_head() -> None:
    assert parse(raw("v4-flash") | {"num_nextn_predict_layers": 0}).draft_head == "none"


def transformers_words() -> dict[str, Any]:
    """V4 in the words transformers 5 writes (spec 3.3): types of layers instead of ratios."""
    fields = raw("v4-flash")
    fields |= {
        "num_hidden_layers": 4,
        "layer_types": [
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "rope_parameters": {"main": {"rope_type": "default"}, "compress": fields.pop("rope_scaling")},
    }
    del fields["compress_ratios"], fields["num_hash_layers"]
    return fields


def test_transformers_words_mean_the_same() -> None:
    config = parse(transformers_words())
    assert isinstance(config, DeepseekV4Config)
    assert config.compress_ratios == (0, 128, 4, 128)
    assert config.num_hash_layers == 2
    assert config.compress_rope.factor == 16.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_types": ["full_attention"] * 4}, "full_attention"),
        ({"layer_types": "sliding_attention"}, "layer_types"),
        ({"compress_rates": {"compressed_sparse_attention": 8}}, "compress_rates"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe", "moe"]}, "mlp_layer_types"),
        ({"rope_parameters": None}, "rope_parameters"),
    ],
)
def test_transformers_words_that_v4_does_not_have(change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(transformers_words() | change)


def test_load_reads_presets_folders_and_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw("v4-pro")))
    assert load("v4-pro") == load(tmp_path) == load(path) == load(str(path)) == preset("v4-pro")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no config.json"), (b"{", "not JSON"), (b"[]", "list"), (b"\xff", "cannot be read"), (b"", "not JSON")],
)
def test_load_of_a_bad_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_deep_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="not JSON"):
        load(tmp_path)


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match=r"v4-flash, v4-pro, v3\.2"):
        preset("v5")


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["deepseek_v4", "deepseek_v32", "yarn", "fp8", "sliding_attention", "hash_moe"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
TRANSFORMERS_FIELDS = ("rope_parameters", "layer_types", "mlp_layer_types", "compress_rates", "head_dim")


def attempt(fields: object) -> None:
    """Whatever the value, the answer is a config whose layers can be listed, or a ConfigError."""
    try:
        config = parse(fields)
    except ConfigError:
        return
    assert len(config.layers) == config.num_hidden_layers
    assert config.kv_bytes_per_token >= 0


@settings(max_examples=100)
@given(ANYTHING)
def test_anything_is_a_config_or_a_config_error(value: object) -> None:
    attempt(value)


@settings(max_examples=400)
@given(st.sampled_from(PRESETS), st.data())
def test_a_preset_with_anything_in_some_fields(name: str, data: st.DataObject) -> None:
    fields = raw(name)
    keys = st.sampled_from([*sorted(fields), *TRANSFORMERS_FIELDS, "model_type"])
    changes = data.draw(st.dictionaries(keys, ANYTHING, min_size=1, max_size=3))
    attempt(fields | changes)
    scaling = data.draw(st.dictionaries(st.sampled_from(sorted(fields["rope_scaling"])), ANYTHING, max_size=2))
    attempt(fields | {"rope_scaling": fields["rope_scaling"] | scaling})


def test_the_folders_of_embedded_models_are_their_names() -> None:
    folders = sorted(path.name for path in Path(config.__file__).with_name("demo").glob("tiny-*") if path.is_dir())
    assert list(EMBEDDED) == folders
    assert "tiny-v4-flash" in folders
    for name in folders:
        assert locate(name).name == name
        assert load(name).max_position_embeddings >= 1 << 20
    with pytest.raises(ConfigError, match=", ".join(folders)):
        load("tiny-v5")
