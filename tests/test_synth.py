"""Random checkpoints: the same network in each format, healthy values, streamed and crash-safe; smaller configs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold import config as configuration
from tenfold.checkpoint import TensorSpec, tensors
from tenfold.config import PRESETS, DeepseekV4Config, DeepseekV32Config, ModelConfig, preset
from tenfold.errors import ConfigError, DoesNotFit, InputError, UsageError
from tenfold.formats import I64, MXFP4, WeightFormat
from tenfold.ops import Weight
from tenfold.ops.reference import dequantize
from tenfold.shards import INDEX_NAME
from tenfold.synth import Fmt, shrink, synth, write_checkpoint
from tenfold.weights import open_weights


def tiny(name: str, **more: int) -> ModelConfig:
    words = {"qk_rope_head_dim": 16, "index_head_dim": 32, "sliding_window": 8, "index_topk": 4} | more
    if name == "v3.2":
        words.pop("sliding_window")
        words |= {"kv_lora_rank": 32, "qk_nope_head_dim": 24, "v_head_dim": 24}
    else:
        words |= {"head_dim": 48}
    return shrink(name, layers=4, hidden=64, experts=8, vocab=96, **words)


def dense(weight: Weight) -> Tensor:
    return weight.data if weight.format is I64 else dequantize(weight)


def read(folder: Path) -> dict[str, Tensor]:
    """Every weight of a checkpoint, opened and dequantised as the engine would."""
    weights = open_weights(folder, configuration.load(folder))
    values = {info.name: dense(weights.take(info.name)) for info in weights}
    weights.finish()
    return values


@pytest.mark.parametrize("name", PRESETS)
def test_three_formats_are_one_network(name: str, tmp_path: Path) -> None:
    networks = []
    for fmt in ("official", "bf16", "f32"):
        synth(tiny(name), tmp_path / fmt, seed=5, fmt=fmt)
        networks.append(read(tmp_path / fmt))
    official, bf16, f32 = networks
    assert official.keys() == {spec.name for spec in tensors(tiny(name))}
    for tensor, values in official.items():
        assert torch.equal(values, bf16[tensor]), tensor
        assert torch.equal(values, f32[tensor]), tensor


@pytest.mark.parametrize(
    ("name", "fmt", "formats"),
    [
        ("v4-flash", "official", {"mxfp4", "fp8", "bf16", "f32", "i64"}),
        ("v4-flash", "bf16", {"bf16", "f32", "i64"}),
        ("v4-flash", "f32", {"f32", "i64"}),
        ("v3.2", "official", {"fp8-f32scale", "bf16", "f32"}),
        ("v3.2", "f32", {"f32"}),
    ],
)
def test_formats_and_config_agree(name: str, fmt: Fmt, formats: set[str], tmp_path: Path) -> None:
    synth(tiny(name), tmp_path, fmt=fmt)
    config = configuration.load(tmp_path)
    assert {info.format for info in open_weights(tmp_path, config)} == formats
    assert config.layers == tiny(name).layers
    assert (config.weight_block_size == (128, 128)) is (fmt == "official")
    assert config.raw["torch_dtype"] == ("float32" if fmt == "f32" else "bfloat16")


def test_base_checkpoints_have_fp8_experts(tmp_path: Path) -> None:
    config = configuration.parse(dict(tiny("v4-flash").raw) | {"expert_dtype": "fp8"})
    synth(config, tmp_path)
    assert {info.format for info in open_weights(tmp_path, config)} == {"fp8", "bf16", "f32", "i64"}
    assert configuration.load(tmp_path).raw["expert_dtype"] == "fp8"


def test_the_config_comes_back(tmp_path: Path) -> None:
    config = tiny("v4-pro")
    synth(config, tmp_path)
    assert configuration.load(tmp_path) == config
    assert dict(configuration.load(tmp_path).raw) == dict(config.raw)


def test_other_readers_understand_the_files(tmp_path: Path) -> None:
    written = synth(tiny("v4-flash"), tmp_path, max_shard_bytes=100_000)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) == written.num_shards > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == written.payload_bytes
    names: set[str] = set()
    for shard in shards:
        assert (tmp_path / shard).stat().st_size < 200_000
        with safetensors.safe_open(tmp_path / shard, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names |= set(opened.keys())
            assert {index["weight_map"][name] for name in opened.keys()} == {shard}  # noqa: SIM118
    assert names == index["weight_map"].keys()
    assert len(names) == written.num_tensors


def test_every_tensor_lies_aligned(tmp_path: Path) -> None:
    synth(tiny("v4-flash"), tmp_path)
    weights = open_weights(tmp_path, configuration.load(tmp_path))
    taken = [weights.take(info.name) for info in weights]
    mapped = {weight.data.untyped_storage().data_ptr() for weight in taken}
    assert len(mapped) == 1  # views of one file; an unaligned tensor would have been copied


def test_values_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    small = tiny("v4-flash")
    synth(small, tmp_path / "a", seed=1)
    synth(small, tmp_path / "b", seed=1, max_shard_bytes=50_000)
    synth(small, tmp_path / "c", seed=2)
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert all(torch.equal(values, b[name]) for name, values in a.items())
    assert not any(torch.equal(values, c[name]) for name, values in a.items())
    assert not torch.equal(a["layers.0.ffn.experts.0.w1.weight"], a["layers.0.ffn.experts.1.w1.weight"])


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weight]:
    """A network wide enough for statistics."""
    folder = tmp_path_factory.mktemp("wide")
    config = shrink("v4-flash", layers=3, hidden=256, experts=8, vocab=200, head_dim=128)
    synth(config, folder)
    weights = open_weights(folder, config)
    return {info.name: weights.take(info.name) for info in weights}


def test_every_code_but_nan_and_subnormal_ones_appears(codes: dict[str, Weight]) -> None:
    fp8 = torch.cat([w.data.flatten() for w in codes.values() if w.format.name == "fp8"])
    assert fp8.unique().tolist() == [code for code in range(256) if 0x08 <= code & 0x7F < 0x7F]
    mxfp4 = torch.cat([w.data.flatten() for w in codes.values() if w.format is MXFP4])
    assert mxfp4.unique().tolist() == list(range(256))


def test_linears_keep_the_variance(codes: dict[str, Weight]) -> None:
    """Of independent inputs with variance 1; one scale alone can be off by half a binade."""
    linears = [weight for weight in codes.values() if weight.scale is not None]
    for weight in linears[::3]:
        assert weight.scale is not None
        values = dense(weight)
        gain = float(values.square().sum(1).mean())
        assert 0.75 < gain < 1.3 if weight.scale.numel() > 8 else 0.35 < gain < 1.7, weight.name
        assert abs(float(values.mean())) < 0.1 * float(values.std()), weight.name


def test_scales_are_two_neighbours(codes: dict[str, Weight]) -> None:
    scales = codes["layers.0.ffn.experts.0.w1.weight"].scale
    assert scales is not None
    low, high = scales.unique().tolist()
    assert high == low + 1


def test_small_tensors_are_moderate(codes: dict[str, Weight]) -> None:
    for name, weight in codes.items():
        if name.endswith("norm.weight"):
            assert 0.8 < float(dense(weight).mean()) < 1.2, name
        elif name.endswith("gate.bias"):
            assert 0 < float(dense(weight).abs().max()) < 0.3, name
        elif name.endswith("_scale"):
            assert float(dense(weight).min()) > 0.2, name
        elif len(weight.shape) == 1:
            assert 0 < float(dense(weight).abs().max()) < 5, name


def test_a_token_is_sent_to_distinct_experts(codes: dict[str, Weight]) -> None:
    table = codes["layers.0.ffn.gate.tid2eid"].data
    assert table.shape == (200, 6)
    assert all(len(set(row)) == 6 for row in table.tolist())
    assert sorted(table.unique().tolist()) == list(range(8))


# ---------------------------------------------------------------------------------------------- files


class Made(NamedTuple):
    """A `make` for `write_checkpoint`, and the tensors it has handed out."""

    make: Callable[[TensorSpec, WeightFormat], Weight]
    handed_out: list[weakref.ref[Tensor]]


def counting_zeros() -> Made:
    handed_out: list[weakref.ref[Tensor]] = []

    def make(spec: TensorSpec, form: WeightFormat) -> Weight:
        alive = sum(1 for reference in handed_out if reference() is not None)
        assert alive <= 1, f"{alive} tensors are alive while {spec.name} is made"
        dtype = {"I64": torch.int64, "BF16": torch.bfloat16, "F32": torch.float32}.get(form.dtype, torch.uint8)
        data = torch.zeros(form.stored_shape(spec.shape), dtype=dtype)
        handed_out.append(weakref.ref(data))
        grid = form.scale_shape(spec.shape)
        return Weight(spec.name, spec.shape, form, data, None if grid is None else torch.zeros(grid, dtype=torch.uint8))

    return Made(make, handed_out)


def test_memory_holds_a_tensor_at_a_time(tmp_path: Path) -> None:
    config = tiny("v4-flash")
    made = counting_zeros()
    calls: list[tuple[int, int]] = []
    written = write_checkpoint(config, tmp_path, made.make, progress=lambda *call: calls.append(call))
    assert len(made.handed_out) == len(calls) == len(list(tensors(config)))
    assert calls == sorted(calls)
    assert calls[-1] == (written.payload_bytes, written.payload_bytes)
    assert not any(values.any() for values in read(tmp_path).values())


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    def make(spec: TensorSpec, form: WeightFormat) -> Weight:
        return Weight(spec.name, spec.shape, form, torch.zeros(3))

    with pytest.raises(InputError, match=r"embed\.weight.*expected .*bfloat16 \[96, 64\]"):
        write_checkpoint(tiny("v4-flash"), tmp_path / "new", make)
    assert not any((tmp_path / "new").iterdir())


@pytest.mark.parametrize("after", [0, 40, 150])
def test_a_failure_leaves_nothing_behind(after: int, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        steps.append(done)
        if len(steps) > after:
            raise KeyboardInterrupt

    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        synth(tiny("v4-flash"), tmp_path, max_shard_bytes=50_000, progress=stop)
    assert not list(tmp_path.iterdir())


def test_until_the_end_nothing_looks_like_a_checkpoint(tmp_path: Path) -> None:
    def look(done: int, total: int) -> None:
        assert all(path.name.endswith(".partial") for path in tmp_path.iterdir())

    synth(tiny("v4-flash"), tmp_path, max_shard_bytes=50_000, progress=look)
    assert not list(tmp_path.glob("*.partial"))


def test_the_config_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed: list[str] = []
    replace = os.replace

    def noting(source: Path, target: Path) -> None:
        renamed.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noting)
    synth(tiny("v4-flash"), tmp_path)
    assert renamed == ["model-00001-of-00001.safetensors", INDEX_NAME, "config.json"]


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        synth(tiny("v4-flash"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="cannot be written"):
        synth(tiny("v4-flash"), tmp_path / "thesis.tex")


def test_a_disk_too_small_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DoesNotFit, match=r"has 1000 bytes free, and \d+ are needed"):
        synth(tiny("v4-pro"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DoesNotFit, match="disk is full"):
        synth(tiny("v4-flash"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_formats_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="official, bf16, f32"):
        synth(tiny("v4-flash"), tmp_path, fmt="f16")  # type: ignore[arg-type]
    odd = shrink("v4-flash", layers=1, hidden=72, experts=4, vocab=32)
    with pytest.raises(UsageError, match="72 inputs, expected a multiple of 32"):
        synth(odd, tmp_path)
    assert not list(tmp_path.iterdir())
    synth(odd, tmp_path, fmt="bf16")
    assert read(tmp_path)["layers.0.ffn.experts.0.w1.weight"].std() > 0.1


# ---------------------------------------------------------------------------------------------- smaller configs


def test_a_cut_keeps_the_pattern() -> None:
    config = shrink("v4-flash", layers=5)
    full = preset("v4-flash")
    assert isinstance(config, DeepseekV4Config)
    assert config.layers == full.layers[:5]
    assert config.raw["compress_ratios"] == [0, 0, 4, 128, 4, 0]
    assert (config.hidden_size, config.n_routed_experts) == (full.hidden_size, full.n_routed_experts)
    assert shrink("v4-pro", layers=3).raw["compress_ratios"] == [128, 128, 4, 0]


def test_one_layer_of_learned_routing_is_kept() -> None:
    assert [layer.router for layer in shrink("v4-flash", layers=3).layers] == ["hash", "hash", "learned"]
    assert [layer.router for layer in shrink("v4-flash", layers=1).layers] == ["learned"]
    assert [layer.router for layer in shrink("v3.2", layers=2).layers] == ["dense", "learned"]


def test_nothing_asked_is_nothing_changed() -> None:
    for name in PRESETS:
        assert shrink(name) == preset(name)


def test_hidden_takes_the_other_widths_along() -> None:
    config = shrink("v4-flash", hidden=1024)
    assert isinstance(config, DeepseekV4Config)
    assert (config.num_attention_heads, config.o_groups) == (16, 2)
    assert (config.q_lora_rank, config.o_lora_rank, config.moe_intermediate_size) == (256, 256, 512)
    assert (config.index_n_heads, config.head_dim, config.index_topk) == (16, 512, 512)


def test_what_is_given_by_name_stays() -> None:
    config = shrink("v4-flash", hidden=1024, experts=4, num_attention_heads=6, o_groups=3, num_experts_per_tok=2)
    assert isinstance(config, DeepseekV4Config)
    assert (config.num_attention_heads, config.o_groups, config.num_experts_per_tok) == (6, 3, 2)
    assert config.q_lora_rank == 256


def test_groups_of_v32_follow_the_experts() -> None:
    config = shrink("v3.2", experts=6, num_experts_per_tok=5)
    assert isinstance(config, DeepseekV32Config)
    assert (config.n_group, config.topk_group, config.num_experts_per_tok) == (3, 3, 5)


def test_draft_heads_of_later_checkpoints_are_dropped() -> None:
    later = configuration.parse(dict(preset("v4-flash").raw) | {"dspark_block_size": 5})
    assert later.draft_head == "dspark"
    assert shrink(later, layers=4).draft_head == "mtp"


@settings(max_examples=60)
@given(
    st.sampled_from(PRESETS),
    st.integers(1, 43),
    st.integers(1, 40).map(lambda n: 32 * n),
    st.integers(2, 70),
    st.integers(2, 5000),
)
def test_any_size_is_consistent(name: str, layers: int, hidden: int, experts: int, vocab: int) -> None:
    config = shrink(name, layers=layers, hidden=hidden, experts=experts, vocab=vocab)
    assert (config.num_hidden_layers, config.hidden_size) == (layers, hidden)
    assert (config.n_routed_experts, config.vocab_size) == (experts, vocab)
    assert [layer.ratio for layer in config.layers] == [layer.ratio for layer in preset(name).layers[:layers]]
    assert all(spec.shape[-1] % 32 == 0 for spec in tensors(config) if spec.formats[0] is MXFP4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"layers": 44}, "layers is 44, expected 1 to 43"),
        ({"layers": 0}, "layers is 0"),
        ({"heads": 4}, "'heads' is no integer field.*num_attention_heads"),
        ({"rope_scaling": 4}, "'rope_scaling' is no integer field"),
        ({"use_cache": 4}, "'use_cache' is no integer field"),
    ],
)
def test_words_that_do_not_fit(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shrink("v4-flash", **words)


def test_impossible_values_are_named() -> None:
    with pytest.raises(ConfigError, match="head_dim is 64"):
        shrink("v4-flash", head_dim=64)
    with pytest.raises(ConfigError, match="vocab_size is 0"):
        shrink("v4-flash", vocab=0)
    with pytest.raises(ConfigError, match="unknown preset"):
        shrink("v5")


def test_a_config_of_transformers_is_left_alone() -> None:
    raw = dict(preset("v3.2").raw)
    raw["rope_parameters"] = raw.pop("rope_scaling") | {"rope_theta": 10000.0}
    with pytest.raises(UsageError, match="written by transformers"):
        shrink(configuration.parse(raw), layers=2)
