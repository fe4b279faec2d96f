"""Random checkpoints in the official layout, of any size: smaller configs, and their weights streamed to disk.

Knows which values keep a random network healthy; nothing of how a network computes. A tensor's values depend
on the seed and on its name alone, so the three choices of `fmt` write the same network: `bf16` and `f32` hold
exactly what the codes of `official` mean. `write_checkpoint` writes weights of any other origin the same way.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import torch
from torch import Tensor

from tenfold.checkpoint import TensorSpec, tensors
from tenfold.config import DeepseekV4Config, ModelConfig, parse, preset
from tenfold.errors import DoesNotFit, InputError, UsageError
from tenfold.formats import BF16, E2M1_VALUES, F32, FP8_BLOCK, FP8_BLOCK_F32, I64, MXFP4, WeightFormat
from tenfold.ops import Weight
from tenfold.ops.reference import dequantize
from tenfold.quantise import MXFP4_EDGE, scale_values
from tenfold.shards import DTYPE_BITS, INDEX_NAME

__all__ = ["Fmt", "Make", "Progress", "Written", "shrink", "synth", "v32_twin", "write_checkpoint"]

Fmt = Literal["official", "bf16", "f32"]
Make = Callable[[TensorSpec, WeightFormat], Weight]
Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes in all."""

SHARD_BYTES = 5_000_000_000
_PARTIAL = ".partial"
_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: stored tensors (scales counted), files, and bytes of payload."""

    folder: Path
    num_tensors: int
    num_shards: int
    payload_bytes: int


def synth(
    config: ModelConfig,
    folder: Path,
    seed: int = 0,
    fmt: Fmt = "official",
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Written:
    """Writes a random checkpoint of `config` to an empty or new folder; memory holds one tensor at a time."""
    make = _Dice(config, seed).weight
    return write_checkpoint(config, folder, make, fmt=fmt, max_shard_bytes=max_shard_bytes, progress=progress)


# ---------------------------------------------------------------------------------------------- smaller configs

_ALIASES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "experts": "n_routed_experts",
    "vocab": "vocab_size",
}

_PROPORTIONAL = {
    "num_attention_heads": 1,
    "q_lora_rank": 32,
    "o_lora_rank": 32,
    "moe_intermediate_size": 32,
    "intermediate_size": 32,
    "index_n_heads": 16,
}
"""Widths that follow `hidden`, and what they stay a multiple of; 16 index heads keep scores free of ties."""


def v32_twin(config: DeepseekV4Config) -> dict[str, Any]:
    """The config.json of a V3.2 network of the same width, in V3.2's own proportions to V4-Flash."""
    published = preset("v3.2").raw
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "index_n_heads",
            "qk_rope_head_dim", "index_head_dim", "moe_intermediate_size", "n_routed_experts", "n_shared_experts",
            "num_experts_per_tok", "max_position_embeddings")  # fmt: skip
    return {
        **published,
        **{name: getattr(config, name) for name in same},
        "num_key_value_heads": config.num_attention_heads,
        "kv_lora_rank": config.head_dim,
        "qk_nope_head_dim": config.head_dim // 4,
        "v_head_dim": config.head_dim // 4,
        "index_topk": 4 * config.index_topk,
        "intermediate_size": config.moe_intermediate_size * (config.num_experts_per_tok + 1),
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_id),
    }


def shrink(
    source: ModelConfig | str,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    experts: int | None = None,
    vocab: int | None = None,
    **words: int,
) -> ModelConfig:
    """A smaller config of a preset or an official config; `words` are further integer fields of config.json.

    `layers` keeps the first layers of the pattern, and one layer of learned routing among them. `hidden` takes
    heads, ranks and expert widths along in proportion; what is given by name stays as given. Groups and experts
    per token are brought down to what fits.
    """
    config = preset(source) if isinstance(source, str) else source
    raw = {key: value for key, value in config.raw.items() if not key.startswith("dspark_")}
    named = {"layers": layers, "hidden": hidden, "experts": experts, "vocab": vocab}
    given = {_ALIASES[name]: value for name, value in named.items() if value is not None} | words
    _check_words(raw, given)
    if hidden is not None:
        raw |= {
            key: _rounded(raw[key] * hidden / raw["hidden_size"], multiple)
            for key, multiple in _PROPORTIONAL.items()
            if key in raw
        }
    raw |= given
    fit = _fit_v4 if isinstance(config, DeepseekV4Config) else _fit_v32
    return parse(raw | fit(raw, config.raw) | words)


def _check_words(raw: Mapping[str, Any], given: Mapping[str, int]) -> None:
    if "rope_parameters" in raw:
        raise UsageError("this config.json was written by transformers; shrink a preset or an official one")
    integers = sorted(key for key, value in raw.items() if type(value) is int)
    for key in given:
        if key not in integers:
            raise UsageError(f"{key!r} is no integer field of this config; there are {', '.join(integers)}")
    if not 1 <= given.get("num_hidden_layers", 1) <= raw["num_hidden_layers"]:
        layers = given["num_hidden_layers"]
        raise UsageError(f"layers is {layers}, expected 1 to {raw['num_hidden_layers']}, which the pattern has")


def _rounded(value: float, multiple: int) -> int:
    return max(1, round(value / multiple)) * multiple


def _fit_v4(raw: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that follow from others, for `raw` cut from `full`."""
    layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    draft = full["compress_ratios"][full["num_hidden_layers"] :][: raw["num_nextn_predict_layers"]]
    return {
        "compress_ratios": [*full["compress_ratios"][:layers], *draft],
        "num_hash_layers": min(raw["num_hash_layers"], layers - 1),
        "num_experts_per_tok": min(raw["num_experts_per_tok"], raw["n_routed_experts"]),
        "o_groups": _divisor(heads, max(1, heads * full["o_groups"] // full["num_attention_heads"])),
    }


def _fit_v32(raw: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    experts = raw["n_routed_experts"]
    groups = _divisor(experts, max(1, min(raw["n_group"], experts // 2)))
    chosen = min(raw["num_experts_per_tok"], experts)
    return {
        "num_key_value_heads": raw["num_attention_heads"],
        "first_k_dense_replace": min(raw["first_k_dense_replace"], raw["num_hidden_layers"] - 1),
        "num_experts_per_tok": chosen,
        "n_group": groups,
        "topk_group": max(min(full["topk_group"], groups), math.ceil(chosen / (experts // groups))),
    }


def _divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` up to `at_most`."""
    return next(divisor for divisor in range(at_most, 0, -1) if number % divisor == 0)


# ---------------------------------------------------------------------------------------------- random values

_SPREAD = (
    ("norm.weight", 1.0, 0.1),
    ("norm.bias", 0.0, 0.1),
    ("attn_sink", 0.0, 1.0),
    ("_base", 0.0, 0.5),
    ("_scale", 0.7, 0.1),
    ("gate.bias", 0.0, 0.05),
    ("e_score_correction_bias", 0.0, 0.05),
    (".ape", 0.0, 0.5),
    ("embed.weight", 0.0, 1.0),
    ("embed_tokens.weight", 0.0, 1.0),
)
"""Mean and standard deviation by the end of a name; every other tensor has 0 and (inputs)^-1/2."""

_E4M3_NAN, _E4M3_EXPONENT = 0x7F, 0x78


@dataclass(frozen=True, slots=True)
class _Dice:
    """Draws a tensor from the seed and its name."""

    config: ModelConfig
    seed: int

    def weight(self, spec: TensorSpec, form: WeightFormat) -> Weight:
        """The weight in `form`; a plain form of a coded weight holds what the codes mean."""
        if spec.formats[0] is I64:
            return Weight(spec.name, spec.shape, I64, self._distinct_experts(spec))
        coded = _official_format(self.config, spec)
        if coded.block is None or not _fits(spec, coded):
            return Weight(spec.name, spec.shape, form, self._normal(spec).to(_TORCH_DTYPES[form.dtype]))
        weight = self._coded(spec, coded)
        if form is coded:
            return weight
        return Weight(spec.name, spec.shape, form, dequantize(weight).to(_TORCH_DTYPES[form.dtype]))

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def _normal(self, spec: TensorSpec) -> Tensor:
        """Normal numbers that bf16 holds exactly."""
        found = ((mean, std) for end, mean, std in _SPREAD if spec.name.endswith(end))
        mean, std = next(found, (0.0, spec.shape[-1] ** -0.5))
        return torch.empty(spec.shape, dtype=torch.bfloat16).normal_(mean, std, generator=self._generator(spec.name))

    def _coded(self, spec: TensorSpec, form: WeightFormat) -> Weight:
        """Codes drawn evenly under the powers of two that give a variance of 1 / inputs.

        NaN is left out, and so is what would be subnormal: weights that were quantised have hardly any such code, and
        some CPUs take a hundred cycles for each, so that a random network would tell nothing of a real one's speed.
        """
        generator = self._generator(spec.name)
        codes = _octets(prod(form.stored_shape(spec.shape)), generator).view(form.stored_shape(spec.shape))
        if form is not MXFP4:
            codes -= ((codes & _E4M3_NAN) == _E4M3_NAN).to(torch.uint8)
            codes |= ((codes & _E4M3_EXPONENT) == 0).to(torch.uint8) << 3
        grid = form.scale_shape(spec.shape)
        assert grid is not None
        scales = _scales(grid, spec.shape[-1] ** -0.5 / _rms_of_codes(form.bits), generator)
        return Weight(spec.name, spec.shape, form, codes, scale_values(scales) if form is FP8_BLOCK_F32 else scales)

    def _distinct_experts(self, spec: TensorSpec) -> Tensor:
        """tid2eid [vocab, k]: the experts of a token differ."""
        generator, experts = self._generator(spec.name), self.config.n_routed_experts
        table = torch.empty(spec.shape, dtype=torch.int64)
        for rows in table.split(_ROWS_AT_ONCE):
            rows.copy_(torch.rand(len(rows), experts, generator=generator).topk(spec.shape[1]).indices)
        return table


def _octets(count: int, generator: torch.Generator) -> Tensor:
    """`count` even random bytes, drawn eight at a time."""
    words = torch.empty(-(-count // 8), dtype=torch.int64)
    return words.random_(-(2**63), None, generator=generator).view(torch.uint8)[:count]


def _scales(grid: tuple[int, int], factor: float, generator: torch.Generator) -> Tensor:
    """e8m0 bytes of the two powers of two around `factor`, as many of each as bring their mean square to its square."""
    low, count = math.floor(math.log2(factor)), prod(grid)
    share = ((factor / 2.0**low) ** 2 - 1.0) / 3.0
    higher = torch.randperm(count, generator=generator) < round(share * count)
    return higher.view(grid).to(torch.uint8) + (low + 127)


@cache
def _rms_of_codes(bits: int) -> float:
    """Root mean square of evenly drawn codes under scale 1."""
    if bits == 4:
        return math.sqrt(sum(value * value for value in E2M1_VALUES) / len(E2M1_VALUES))
    codes = torch.arange(128, dtype=torch.uint8).clamp(max=_E4M3_NAN - 1)
    codes[:8] += 8  # there are no subnormal ones
    return float(codes.view(torch.float8_e4m3fn).double().square().mean().sqrt())


# ---------------------------------------------------------------------------------------------- files


def write_checkpoint(
    config: ModelConfig,
    folder: Path,
    make: Make,
    *,
    fmt: Fmt = "official",
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Written:
    """Writes config.json, the index and the shards; `make` gives each weight in the format it is asked for.

    Files bear temporary names until all are written, config.json comes last, and a failure leaves nothing. The
    folder must be new or empty.
    """
    if fmt not in get_args(Fmt):
        raise UsageError(f"unknown format {fmt!r}; the formats are {', '.join(get_args(Fmt))}")
    plans = _plan(config, fmt, max_shard_bytes)
    total = sum(plan.payload_bytes for plan in plans)
    names = [plan.name for plan in plans] + [INDEX_NAME, "config.json"]
    with _claimed(folder, total, names):
        done = 0
        for plan in plans:
            for written in _write_shard(folder / (plan.name + _PARTIAL), plan, make):
                done += written
                if progress is not None:
                    progress(done, total)
        for plan in plans:
            os.replace(folder / (plan.name + _PARTIAL), folder / plan.name)
        _write_json(folder / INDEX_NAME, _index(plans, total))
        _write_json(folder / "config.json", _raw_config(config, fmt))
    return Written(folder, sum(len(plan.offsets) for plan in plans), len(plans), total)


@dataclass(frozen=True, slots=True)
class _ShardPlan:
    """One file before it is written: its header, and where in the file each stored tensor starts."""

    name: str
    items: tuple[tuple[TensorSpec, WeightFormat], ...]
    header: bytes
    offsets: dict[str, int]
    payload_bytes: int


def _plan(config: ModelConfig, fmt: Fmt, max_shard_bytes: int) -> list[_ShardPlan]:
    groups: list[list[tuple[TensorSpec, WeightFormat]]] = [[]]
    filled = 0
    for spec in tensors(config):
        form = _format(config, spec, fmt)
        _check_blocks(spec, form)
        num_bytes = form.bytes_of(spec.shape)
        if groups[-1] and filled + num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((spec, form))
        filled += num_bytes
    count = len(groups)
    return [
        _plan_shard(f"model-{number:05d}-of-{count:05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def _plan_shard(name: str, items: list[tuple[TensorSpec, WeightFormat]]) -> _ShardPlan:
    """The widest numbers first and a header of whole 8 bytes, so that every tensor lies aligned."""
    stored = [part for spec, form in items for part in _parts(spec, form)]
    stored.sort(key=lambda part: -DTYPE_BITS[part[1]])
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, starts = 0, {}
    for tensor, dtype, shape in stored:
        stop = position + prod(shape) * DTYPE_BITS[dtype] // 8
        fields[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
        starts[tensor] = position
        position = stop
    text = json.dumps(fields, separators=(",", ":")).encode()
    header = text + b" " * (-len(text) % 8)
    offsets = {tensor: 8 + len(header) + start for tensor, start in starts.items()}
    return _ShardPlan(name, tuple(items), header, offsets, position)


def _parts(spec: TensorSpec, form: WeightFormat) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of the tensors a weight is stored as."""
    yield spec.name, form.dtype, form.stored_shape(spec.shape)
    grid = form.scale_shape(spec.shape)
    if grid is not None and form.scale_dtype is not None:
        yield spec.scale_name, form.scale_dtype, grid


def _official_format(config: ModelConfig, spec: TensorSpec) -> WeightFormat:
    """What the official checkpoint of this config stores; Base checkpoints keep their experts in fp8."""
    form = spec.formats[0]
    return FP8_BLOCK if form is MXFP4 and config.raw.get("expert_dtype") == "fp8" else form


def _format(config: ModelConfig, spec: TensorSpec, fmt: Fmt) -> WeightFormat:
    form = _official_format(config, spec)
    if fmt == "official" or form is I64:
        return form
    if fmt == "f32":
        return F32
    return form if form.block is None else BF16


def _fits(spec: TensorSpec, form: WeightFormat) -> bool:
    """Whether the format can hold the shape: MXFP4 has no partial blocks."""
    return form is not MXFP4 or spec.shape[-1] % MXFP4_EDGE == 0


def _check_blocks(spec: TensorSpec, form: WeightFormat) -> None:
    if not _fits(spec, form):
        raise UsageError(
            f"{spec.name} has {spec.shape[-1]} inputs, expected a multiple of {MXFP4_EDGE} for {form.name}; "
            "change hidden_size or moe_intermediate_size, or write bf16"
        )


def _raw_config(config: ModelConfig, fmt: Fmt) -> dict[str, Any]:
    """The config as it was read, with the fields that say how the weights are stored."""
    raw = {key: value for key, value in config.raw.items() if key not in ("quantization_config", "expert_dtype")}
    raw["dtype" if "dtype" in raw else "torch_dtype"] = "float32" if fmt == "f32" else "bfloat16"
    if fmt == "official":
        raw["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(FP8_BLOCK.block or ()),
            "scale_fmt": "ue8m0",
        }
        if isinstance(config, DeepseekV4Config):
            raw["expert_dtype"] = "fp8" if config.raw.get("expert_dtype") == "fp8" else "fp4"
    return raw


def _index(plans: list[_ShardPlan], total: int) -> dict[str, Any]:
    weight_map = {tensor: plan.name for plan in plans for tensor in plan.offsets}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_shard(path: Path, plan: _ShardPlan, make: Make) -> Iterator[int]:
    """Writes one file, yielding the bytes of each weight as it is written."""
    with path.open("wb") as file:
        file.write(len(plan.header).to_bytes(8, "little") + plan.header)
        for spec, form in plan.items:
            weight = make(spec, form)
            yield sum(
                _put(file, plan.offsets[name], tensor, name, dtype, shape)
                for (name, dtype, shape), tensor in zip(_parts(spec, form), _tensors_of(weight), strict=True)
            )
        file.flush()
        os.fsync(file.fileno())


def _tensors_of(weight: Weight) -> Iterator[Tensor]:
    yield weight.data
    if weight.scale is not None:
        yield weight.scale


def _put(file: BinaryIO, offset: int, tensor: Tensor, name: str, dtype: str, shape: tuple[int, ...]) -> int:
    """Writes a tensor's bytes at `offset`."""
    expected = _TORCH_DTYPES.get(dtype, torch.uint8)
    if tuple(tensor.shape) != shape or tensor.dtype != expected:
        raise InputError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {expected} {list(shape)}")
    tensor = tensor.contiguous()
    file.seek(offset)
    file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return tensor.nbytes


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(path.name + _PARTIAL)
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


@contextmanager
def _claimed(folder: Path, total: int, names: Sequence[str]) -> Iterator[None]:
    """An empty folder with room for `total` bytes; if the block fails, the files called `names` are removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder} is not empty; give a new folder")
        free = shutil.disk_usage(folder).free
        if free < total:
            raise DoesNotFit(f"{folder} has {free} bytes free, and {total} are needed; choose another disk")
        try:
            yield
        except BaseException:
            for name in names:
                (folder / name).unlink(missing_ok=True)
                (folder / (name + _PARTIAL)).unlink(missing_ok=True)
            raise
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise DoesNotFit(f"{folder}: the disk is full; free some space or choose another disk") from exc
        raise InputError(f"{folder} cannot be written: {exc.strerror}; choose another folder") from exc
