"""Checkpoints that are right in every allowed way, and wrong in every way; nothing is read before it is wanted."""

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tenfold import config as configuration
from tenfold.checkpoint import TensorSpec, tensors
from tenfold.config import ModelConfig
from tenfold.errors import CheckpointError
from tenfold.formats import FP8_BLOCK, FP8_BLOCK_F32, I64, MXFP4, WeightFormat
from tenfold.ops.reference import dequantize
from tenfold.shards import DTYPE_BITS, INDEX_NAME
from tenfold.synth import shrink, synth
from tenfold.weights import Weights, open_weights

SHARD = "model-00001-of-00001.safetensors"
FP8 = "layers.1.attn.wq_a.weight"
FP8_SCALE = "layers.1.attn.wq_a.scale"
FP4 = "layers.2.ffn.experts.1.w2.weight"
FP4_SCALE = "layers.2.ffn.experts.1.w2.scale"
NORM = "layers.0.attn_norm.weight"
IDS = "layers.0.ffn.gate.tid2eid"
BIAS = "layers.2.ffn.gate.bias"


class Raw(NamedTuple):
    """A tensor as it lies in a file."""

    dtype: str
    shape: list[int]
    octets: bytes


Contents = dict[str, Raw]


def parse(path: Path) -> Contents:
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    contents = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        contents[name] = Raw(entry["dtype"], entry["shape"], data[begin:end])
    return contents


def store(path: Path, contents: Contents, padding: int = 0) -> None:
    """Writes tensors in the order given, to a new file, for an old one may be mapped; `padding` shifts the payload."""
    header: dict[str, Any] = {}
    position = 0
    for name, raw in contents.items():
        stop = position + len(raw.octets)
        header[name] = {"dtype": raw.dtype, "shape": raw.shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + padding)
    new = path.with_suffix(".new")
    new.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(raw.octets for raw in contents.values()))
    os.replace(new, path)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    words = {"qk_rope_head_dim": 16, "index_head_dim": 32, "head_dim": 48, "sliding_window": 8, "num_hash_layers": 2}
    return shrink("v4-flash", layers=3, hidden=64, experts=8, vocab=96, **words)


@pytest.fixture(scope="module")
def original(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    folder = tmp_path_factory.mktemp("original")
    synth(config, folder)
    return parse(folder / SHARD)


@pytest.fixture
def contents(original: Contents) -> Contents:
    """What the file of a sound checkpoint holds, to be changed."""
    return dict(original)


def opened(folder: Path, config: ModelConfig, contents: Contents, padding: int = 0) -> Weights:
    store(folder / "model.safetensors", contents, padding)
    return open_weights(folder, config)


def error(folder: Path, config: ModelConfig, contents: Contents | None = None) -> str:
    if contents is not None:
        store(folder / "model.safetensors", contents)
    with pytest.raises(CheckpointError) as caught:
        open_weights(folder, config)
    assert caught.value.exit_code == 2
    return str(caught.value)


def values(weights: Weights) -> dict[str, Tensor]:
    taken = [weights.take(info.name) for info in weights]
    weights.finish()
    return {w.name: w.data if w.format is I64 else dequantize(w) for w in taken}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------- what opens


def test_what_take_gives(tmp_path: Path, config: ModelConfig, contents: Contents) -> None:
    weights = opened(tmp_path, config, contents)
    assert len(weights) == len(list(tensors(config)))
    expected = {
        NORM: ("bf16", (64,), torch.bfloat16, (64,), None),
        "hc_head_fn": ("f32", (4, 256), torch.float32, (4, 256), None),
        IDS: ("i64", (96, 6), torch.int64, (96, 6), None),
        FP8: ("fp8", (32, 64), torch.uint8, (32, 64), torch.uint8),
        FP4: ("mxfp4", (64, 32), torch.uint8, (64, 16), torch.uint8),
    }
    for name, (form, shape, dtype, stored, scale_dtype) in expected.items():
        weight = weights.take(name)
        assert (weight.name, weight.format.name, weight.shape) == (name, form, shape)
        assert (weight.data.dtype, tuple(weight.data.shape)) == (dtype, stored)
        assert (None if weight.scale is None else weight.scale.dtype) == scale_dtype
        assert bytes(weight.data.view(torch.uint8).flatten().tolist()) == contents[name].octets


def test_scales_belong_to_their_codes(tmp_path: Path, config: ModelConfig, contents: Contents) -> None:
    weight = opened(tmp_path, config, contents).take(FP4)
    assert weight.scale is not None
    assert bytes(weight.scale.flatten().tolist()) == contents[FP4_SCALE].octets
    assert tuple(weight.scale.shape) == (64, 1)


def test_every_tensor_is_used_exactly_once(tmp_path: Path, config: ModelConfig, contents: Contents) -> None:
    weights = opened(tmp_path, config, contents)
    weights.take(FP8)
    with pytest.raises(CheckpointError, match="was taken before"):
        weights.take(FP8)
    with pytest.raises(CheckpointError, match="is no tensor of this model"):
        weights.take("layers.9.attn.wq_a.weight")
    with pytest.raises(CheckpointError, match=r"is no tensor of this model"):
        weights.take(FP8_SCALE)
    with pytest.raises(CheckpointError, match=rf"every tensor but {len(weights) - 1}: embed\.weight, .*, \.\.\.;"):
        weights.finish()
    for info in weights:
        if info.name != FP8:
            weights.take(info.name)
    weights.finish()


def test_what_there_is_to_tell(tmp_path: Path, config: ModelConfig, contents: Contents) -> None:
    weights = opened(tmp_path, config, contents)
    infos = {info.name: info for info in weights}
    assert list(infos) == [spec.name for spec in tensors(config)]
    assert infos[FP4].format == "mxfp4"
    assert infos[FP4].shape == (64, 32)
    assert infos[FP4].num_bytes == 64 * 16 + 64
    assert infos[FP4].component == "moe_routed"
    assert infos[FP4].shard == "model.safetensors"
    assert sum(info.num_bytes for info in weights) == sum(len(raw.octets) for raw in contents.values())
    assert len(list(weights)) == len(weights)


@pytest.mark.parametrize("dtype", ["U8", "F4"])
def test_other_names_for_packed_nibbles(dtype: str, tmp_path: Path, config: ModelConfig, contents: Contents) -> None:
    expected = values(opened(tmp_path, config, contents))
    for name, raw in contents.items():
        if raw.dtype == "I8":
            shape = [raw.shape[0], raw.shape[1] * (2 if dtype == "F4" else 1)]
            contents[name] = Raw(dtype, shape, raw.octets)
    weights = opened(tmp_path, config, contents)
    assert next(info.format for info in weights if info.name == FP4) == "mxfp4"
    assert same(values(weights), expected)


def recoded(contents: Contents, spec: TensorSpec, form: WeightFormat) -> None:
    """Puts other codes in the place of a weight: fp8 codes of 1 under scales of 2."""
    rows, columns = form.scale_shape(spec.shape) or (0, 0)
    scale = struct.pack("<f", 2.0) if form.scale_dtype == "F32" else bytes([128])
    contents[spec.name] = Raw("F8_E4M3", list(spec.shape), bytes([0x38]) * spec.numel)
    contents[spec.scale_name] = Raw(str(form.scale_dtype), [rows, columns], scale * (rows * columns))


@pytest.mark.parametrize("form", [FP8_BLOCK, FP8_BLOCK_F32], ids=lambda form: form.name)
def test_fp8_experts_of_base_checkpoints(
    form: WeightFormat, tmp_path: Path, config: ModelConfig, contents: Contents
) -> None:
    for spec in tensors(config):
        if MXFP4 in spec.formats:
            recoded(contents, spec, form)
    weight = opened(tmp_path, config, contents).take(FP4)
    assert weight.format is form
    assert weight.scale is not None
    assert weight.scale.dtype == (torch.float32 if form is FP8_BLOCK_F32 else torch.uint8)
    assert torch.equal(dequantize(weight), torch.full((64, 32), 2.0))


def test_v32_with_either_scale(tmp_path: Path) -> None:
    words = {"qk_rope_head_dim": 16, "index_head_dim": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 24}
    config = shrink("v3.2", layers=2, hidden=64, experts=4, vocab=32, **words)
    synth(config, tmp_path / "synth")
    contents = parse(tmp_path / "synth" / SHARD)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert contents[name + "_scale_inv"].dtype == "F32"
    assert opened(tmp_path, config, contents).take(name).format is FP8_BLOCK_F32
    for spec in tensors(config):
        if spec.formats[0] is FP8_BLOCK_F32:
            recoded(contents, spec, FP8_BLOCK)
    assert opened(tmp_path, config, contents).take(name).format is FP8_BLOCK


def test_ids_of_32_bits(tmp_path: Path, config: ModelConfig, contents: Contents) -> None:
    expected = values(opened(tmp_path, config, contents))
    for name, raw in contents.items():
        if raw.dtype == "I64":
            ids = struct.unpack(f"<{len(raw.octets) // 8}q", raw.octets)
            contents[name] = Raw("I32", raw.shape, struct.pack(f"<{len(ids)}i", *ids))
    assert same(values(opened(tmp_path, config, contents)), expected)


@pytest.mark.parametrize("padding", range(1, 8))
def test_tensors_that_lie_unaligned(padding: int, tmp_path: Path, config: ModelConfig, contents: Contents) -> None:
    expected = values(opened(tmp_path, config, contents))
    assert same(values(opened(tmp_path, config, contents, padding)), expected)


def test_only_unaligned_tensors_are_copied(tmp_path: Path, config: ModelConfig, contents: Contents) -> None:
    weights = opened(tmp_path, config, contents, padding=2)
    storages = {weights.take(name).data.untyped_storage().data_ptr() for name in (FP8, FP4, NORM)}
    assert len(storages) == 1
    assert weights.take(BIAS).data.untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize("name", ["mtp.0.attn.wq_a.weight", "mtp.2.markov_head.markov_w1.weight"])
def test_draft_heads_are_left_aside(name: str, tmp_path: Path, config: ModelConfig, contents: Contents) -> None:
    contents[name] = Raw("BF16", [3], bytes(6))
    weights = opened(tmp_path, config, contents)
    assert [tensor.name for tensor in weights.draft] == [name]
    assert name not in {info.name for info in weights}
    with pytest.raises(CheckpointError, match="is no tensor of this model"):
        weights.take(name)


def test_names_with_the_prefix_of_transformers(tmp_path: Path, config: ModelConfig, contents: Contents) -> None:
    expected = values(opened(tmp_path, config, contents))
    assert same(values(opened(tmp_path, config, {"model." + name: raw for name, raw in contents.items()})), expected)


def test_many_shards(tmp_path: Path, config: ModelConfig, original: Contents) -> None:
    synth(config, tmp_path / "many", max_shard_bytes=20_000)
    store(tmp_path / "model.safetensors", original)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 10
    assert same(values(open_weights(tmp_path / "many", config)), values(open_weights(tmp_path, config)))


# ---------------------------------------------------------------------------------------------- what does not


def drop(name: str) -> Callable[[Contents], None]:
    return lambda contents: contents.__delitem__(name)


def put(name: str, dtype: str, shape: list[int]) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        contents[name] = Raw(dtype, shape, bytes(math.prod(shape) * DTYPE_BITS[dtype] // 8))

    return change


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (drop(FP8), f"missing tensors (1): {FP8}"),
        (drop(NORM), f"missing tensors (1): {NORM}"),
        (drop(FP8_SCALE), f"missing scales (1): {FP8_SCALE} for the F8_E4M3 of {FP8}"),
        (drop(FP4_SCALE), f"missing scales (1): {FP4_SCALE} for the I8 of {FP4}"),
        (put("layers.0.rotary.inv_freq", "F32", [3]), "unexpected tensors (1): layers.0.rotary.inv_freq in model."),
        (put("layers.3.attn_norm.weight", "BF16", [64]), "unexpected tensors (1): layers.3.attn_norm.weight"),
        (put("../../etc/passwd", "U8", [1]), "unexpected tensors (1): ../../etc/passwd in"),
        (put("a\0b\x1b", "U8", [1]), r"unexpected tensors (1): 'a\x00b\x1b' in"),
        (put(NORM, "BF16", [63]), f"tensors of the wrong shape (1): {NORM} is [63], expected [64]"),
        (put(NORM, "BF16", [64, 1]), f"{NORM} is [64, 1], expected [64]"),
        (put(FP8, "F8_E4M3", [64, 32]), f"{FP8} is [64, 32], expected [32, 64]"),
        (put(FP4, "I8", [64, 32]), f"{FP4} is [64, 32], expected [64, 16]"),
        (put(FP4, "F4", [64, 16]), f"{FP4} is [64, 16], expected [64, 32]"),
        (put(IDS, "I64", [96, 5]), f"{IDS} is [96, 5], expected [96, 6]"),
        (put(FP8_SCALE, "F8_E8M0", [2, 1]), f"scales of the wrong shape (1): {FP8_SCALE} is [2, 1], expected [1, 1]"),
        (put(FP4_SCALE, "F8_E8M0", [64, 2]), f"{FP4_SCALE} is [64, 2], expected [64, 1]"),
        (put(FP4_SCALE, "F32", [64, 1]), f"scales of the wrong dtype (1): {FP4_SCALE} is F32, expected F8_E8M0"),
        (put(FP8_SCALE, "BF16", [1, 1]), f"{FP8_SCALE} is BF16, expected F8_E8M0 or F32"),
        (put(NORM, "F16", [64]), f"tensors of the wrong dtype (1): {NORM} is F16, which has not the range of bf16"),
        (put(FP8, "F16", [32, 64]), f"{FP8} is F16, which has not the range of bf16, expected F8_E4M3 or BF16 or F32"),
        (put(FP8, "F8_E5M2", [32, 64]), f"{FP8} is F8_E5M2, expected F8_E4M3 or BF16 or F32"),
        (put(FP8, "I8", [32, 32]), f"{FP8} is I8, expected F8_E4M3"),
        (put(IDS, "F32", [96, 6]), f"{IDS} is F32, expected I64 or I32"),
        (put(NORM, "F8_E4M3", [64]), f"{NORM} is F8_E4M3, expected BF16 or F32"),
        (put(FP8, "BF16", [32, 64]), f"unexpected tensors (1): {FP8_SCALE} in"),
        (put("model." + NORM, "BF16", [64]), f"tensors under two names (1): model.{NORM} and {NORM}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_tensor(
    change: Callable[[Contents], None], line: str, tmp_path: Path, config: ModelConfig, contents: Contents
) -> None:
    change(contents)
    message = error(tmp_path, config, contents)
    assert line in message
    assert len(message.splitlines()) == 3, "one wrong tensor is one problem"


def test_all_problems_are_one_error(tmp_path: Path, config: ModelConfig, contents: Contents) -> None:
    for expert in range(8):
        del contents[f"layers.1.ffn.experts.{expert}.w1.weight"]
    put(NORM, "F16", [64])(contents)
    put(FP8, "F8_E4M3", [8, 8])(contents)
    put("stray", "U8", [1])(contents)
    lines = error(tmp_path, config, contents).splitlines()
    assert {line.split(" (")[0].strip() for line in lines[1:-1]} == {
        "tensors of the wrong dtype",
        "missing tensors",
        "tensors of the wrong shape",
        "unexpected tensors",
    }
    assert any(line.startswith("  missing tensors (8): layers.1.ffn.experts.0.w1.weight; ") for line in lines)
    assert any(line.endswith("; and 3 more") for line in lines)


def test_weights_of_another_model(tmp_path: Path, config: ModelConfig, contents: Contents) -> None:
    other = configuration.parse(dict(config.raw) | {"hidden_size": 128})
    message = error(tmp_path, other, contents)
    assert "tensors of the wrong shape" in message
    assert "the config.json that belongs to these weights" in message
    assert len(message) < 3000


def test_a_lost_shard_is_not_reported_tensor_by_tensor(tmp_path: Path, config: ModelConfig) -> None:
    synth(config, tmp_path, max_shard_bytes=50_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    lines = error(tmp_path, config).splitlines()
    assert len(lines) == 4
    assert lines[1] == f"  missing shards (1): {shards[1].name}"
    assert lines[2].startswith(f"  damaged shards (1): {shards[2].name} is truncated")
    (tmp_path / INDEX_NAME).unlink()
    assert "missing tensors" not in error(tmp_path, config)


def test_an_index_that_lies(tmp_path: Path, config: ModelConfig) -> None:
    synth(config, tmp_path)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["weight_map"]["layers.7.new.weight"] = SHARD
    del index["weight_map"][NORM]
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    message = error(tmp_path, config)
    assert f"tensors absent from the shard the index names (1): layers.7.new.weight in {SHARD}" in message
    assert f"tensors the index does not list (1): {NORM} in {SHARD}" in message


@pytest.mark.parametrize(("expert", "shown"), [(8, 8), (-1, -1), (2**40, 2**40)])
def test_expert_ids_out_of_range(
    expert: int, shown: int, tmp_path: Path, config: ModelConfig, contents: Contents
) -> None:
    octets = contents[IDS].octets[:-8] + struct.pack("<q", expert)
    contents[IDS] = contents[IDS]._replace(octets=octets)
    weights = opened(tmp_path, config, contents)
    with pytest.raises(CheckpointError, match=rf"{IDS} names expert {shown}, expected 0 to 7"):
        weights.take(IDS)


def test_a_file_cut_after_it_was_opened(tmp_path: Path, config: ModelConfig, contents: Contents) -> None:
    weights = opened(tmp_path, config, contents)
    assert next(iter(contents)) == IDS  # lies first
    os.truncate(tmp_path / "model.safetensors", 50_000)
    with pytest.raises(CheckpointError, match="was cut shorter while in use"):
        weights.take(FP4)
    assert weights.take(IDS).data.numel() > 0


def test_a_file_replaced_after_it_was_opened(tmp_path: Path, config: ModelConfig, contents: Contents) -> None:
    weights = opened(tmp_path, config, contents)
    (tmp_path / "new").write_bytes(b"")
    os.replace(tmp_path / "new", tmp_path / "model.safetensors")
    assert bytes(weights.take(FP8).data.flatten().tolist()) == contents[FP8].octets


# ---------------------------------------------------------------------------------------------- laziness


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def sparse_checkpoint(folder: Path, config: ModelConfig) -> int:
    """A file of the right size with nothing in it; returns its bytes."""
    header: dict[str, Any] = {}
    position = 0
    for spec in tensors(config):
        form = spec.formats[0]
        parts = [(spec.name, form.dtype, form.stored_shape(spec.shape))]
        if (grid := form.scale_shape(spec.shape)) is not None:
            parts.append((spec.scale_name, str(form.scale_dtype), grid))
        for name, dtype, shape in parts:
            stop = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
            position = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + position)
    return path.stat().st_size


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see memory")
def test_twenty_gigabytes_open_at_once(tmp_path: Path) -> None:
    config = shrink("v4-flash", layers=5)
    assert sparse_checkpoint(tmp_path, config) > 20e9
    before, started = resident_bytes(), time.process_time()
    weights = open_weights(tmp_path, config)
    taken = [weights.take(info.name) for info in weights]
    weights.finish()
    assert time.process_time() - started < 5
    assert resident_bytes() - before < 200e6
    assert sum(weight.data.nbytes for weight in taken) > 18e9
    assert not taken[-1].data.any()


def test_files_are_mapped_for_reading_only(tmp_path: Path, config: ModelConfig, contents: Contents) -> None:
    store(tmp_path / "model.safetensors", contents)
    (tmp_path / "model.safetensors").chmod(0o400)
    weights = open_weights(tmp_path, config)
    assert weights.take(FP8).data.numel() == 32 * 64
