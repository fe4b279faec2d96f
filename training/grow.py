"""An earlier network's weights in a larger shape, so that nothing it learnt is lost. Knows nothing of training.

Layers are matched from the end, those in front that are new write almost nothing at first. Heads get new channels
before their rotated ones; the norms make up for them, so that scores and values stay what they were.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from tenfold import config as configuration
from tenfold.config import DeepseekV4Config, ModelConfig
from tenfold.errors import UsageError
from tenfold.ops import reference
from tenfold.weights import open_weights
from training.model import stack_name

__all__ = ["grown", "loaded"]

QUIET = 0.1  # of its usual size: what a new layer writes, what new channels of keys hold


def loaded(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A checkpoint as training has it: dense float32, the experts of a layer stacked."""
    config = configuration.load(folder)
    opened = open_weights(folder, config)
    stacks: dict[str, list[Tensor]] = {}
    for name in [info.name for info in opened]:
        weight = opened.take(name)
        value = weight.data if weight.data.dtype == torch.int64 else reference.dequantize(weight).float()
        stacks.setdefault(stack_name(name)[0], []).append(value.clone())
    opened.finish()
    return config, {name: torch.stack(parts) if ".experts." in name else parts[0] for name, parts in stacks.items()}


def grown(start: Path, config: ModelConfig, fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """`fresh` first values of `config` with all of the checkpoint `start` in them that has its place there."""
    old_config, old = loaded(start)
    if not isinstance(config, DeepseekV4Config) or not isinstance(old_config, DeepseekV4Config):
        shapes = {name: value.shape for name, value in old.items()}
        if shapes != {name: value.shape for name, value in fresh.items()}:
            raise UsageError(
                f"--start is {start}, whose weights are not those of the model; only V4 networks grow, V3.2 needs a "
                "text model of its own shape: python -m training.train --model tiny-v3.2"
            )
        return old
    new_layers = config.num_hidden_layers - old_config.num_hidden_layers
    found = {}
    for name, value in fresh.items():
        source = _source(name, new_layers)
        mine = old.get(source)
        found[name] = _quiet(name, value) if mine is None else _placed(name, value, mine, old_config, config)
    return found


def _source(name: str, new_layers: int) -> str:
    """The old name of a tensor; the first layer stays the first, new ones stand behind it."""
    if not name.startswith("layers."):
        return name
    _, number, rest = name.split(".", 2)
    if int(number) == 0:
        return name
    return "" if int(number) <= new_layers else f"layers.{int(number) - new_layers}.{rest}"


def _quiet(name: str, value: Tensor) -> Tensor:
    if name.endswith((".wo_b.weight", "w2.weight")):
        return value * QUIET
    if name.endswith(("hc_attn_base", "hc_ffn_base")):
        m = math.isqrt(value.shape[0] + 1) - 1
        value = value.clone()
        value[2 * m :] += 3.0 * torch.eye(m).flatten()  # each stream stays what it was
    return value


def _placed(name: str, fresh: Tensor, old: Tensor, before: DeepseekV4Config, after: DeepseekV4Config) -> Tensor:
    """The old values first in each dimension, new heads, groups and experts behind them."""
    if ".indexer." in name and fresh.shape != old.shape:
        return fresh
    if name.endswith(".experts.w2.weight") and "shared" not in name:
        old = old * (before.routed_scaling_factor / after.routed_scaling_factor)
    if before.head_dim != after.head_dim:
        old = _with_wider_heads(name.split(".attn.")[-1], old, before, after)
    if old.shape == fresh.shape:
        return old
    into = fresh * (QUIET if name.endswith(("wo_b.weight", "wo_a.weight")) else 1.0)
    into[tuple(slice(size) for size in old.shape)] = old
    return into


def _with_wider_heads(part: str, old: Tensor, before: DeepseekV4Config, after: DeepseekV4Config) -> Tensor:
    growth = math.sqrt(after.head_dim / before.head_dim)
    if part == "wq_b.weight":
        return _widened(old, 0, before, after, QUIET)
    if part in ("wkv.weight", "compressor.wkv.weight"):
        return _widened(old, 0, before, after, 3 * QUIET)
    if part == "compressor.wgate.weight":
        return _widened(old, 0, before, after, 1.0)
    if part in ("kv_norm.weight", "compressor.norm.weight"):
        return _widened(old, 0, before, after, None) / growth
    if part == "compressor.ape":
        return _widened(old, 1, before, after, 0.0)
    return _widened(old, 1, before, after, QUIET) if part == "wo_a.weight" else old


def _widened(old: Tensor, dim: int, before: DeepseekV4Config, after: DeepseekV4Config, noise: float | None) -> Tensor:
    """A head's old channels around its new ones, these random (or one) of the old ones' size times `noise`."""
    rope, extra = after.qk_rope_head_dim, after.head_dim - before.head_dim
    plain = before.head_dim - rope
    heads = old.unflatten(dim, (-1, before.head_dim))
    shape = (*heads.shape[: dim + 1], extra, *heads.shape[dim + 2 :])
    generator = torch.Generator().manual_seed(old.numel())
    new = torch.ones(shape)
    if noise is not None:
        new = torch.randn(shape, generator=generator) * (noise * float(old.std()))
    parts = heads.narrow(dim + 1, 0, plain), new, heads.narrow(dim + 1, plain, rope)
    return torch.cat(parts, dim + 1).flatten(dim, dim + 1)
