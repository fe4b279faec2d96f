"""What a model is: layers, parameters, formats, streams and KV bytes, as plain data. Opens no weights itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tenfold.checkpoint import active_parameters, parameters, tensors
from tenfold.config import DeepseekV4Config, ModelConfig

if TYPE_CHECKING:
    from tenfold.weights import TensorInfo

__all__ = ["CONTEXTS", "describe", "formats_of"]

CONTEXTS = (4096, 131072, 1_000_000, 1_048_576)
"""Lengths at which KV bytes are shown unless others are asked for."""


def describe(config: ModelConfig, contexts: Sequence[int] = CONTEXTS) -> dict[str, Any]:
    """Architecture, parameters, streams and KV bytes of a configuration."""
    totals = {name: count for name, count in parameters(config).items() if name != "hash_table"}
    active = {name: count for name, count in active_parameters(config).items() if name != "hash_table"}
    return {
        "architecture": config.architecture,
        "context": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "layer_kinds": dict(Counter(layer.attention for layer in config.layers)),
        "router_kinds": dict(Counter(layer.router for layer in config.layers)),
        "schedule": _schedule(config),
        "experts": {"routed": config.n_routed_experts, "active": config.num_experts_per_tok},
        "draft_head": config.draft_head,
        "parameters": {"total": sum(totals.values()), "active": round(sum(active.values())), "by_component": totals},
        "official_bytes": sum(spec.formats[0].bytes_of(spec.shape) for spec in tensors(config)),
        "streams": _streams(config),
        "kv_bytes_per_token": config.kv_bytes_per_token,
        "kv_bytes": {str(context): config.kv_bytes(context) for context in contexts},
    }


def formats_of(weights: Iterable[TensorInfo]) -> list[dict[str, Any]]:
    """Tensors, parameters and bytes of a checkpoint by stored format."""
    rows: dict[str, dict[str, Any]] = {}
    for info in weights:
        row = rows.setdefault(info.format, {"format": info.format, "tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += _numel(info.shape)
        row["bytes"] += info.num_bytes
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def _numel(shape: Iterable[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def _schedule(config: ModelConfig) -> list[str]:
    """One word a layer: attention kind, with V4 its ratio, and the router."""
    ratios = isinstance(config, DeepseekV4Config)
    return [
        f"{layer.attention}{f'/{layer.ratio}' if ratios and layer.ratio else ''}+{layer.router}"
        for layer in config.layers
    ]


def _streams(config: ModelConfig) -> list[dict[str, Any]]:
    """The kinds of streams: layout, bytes a row, how many layers have one, bytes per token."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for spec in config.streams:
        key = (spec.component, spec.name, spec.layout, spec.ratio, spec.fixed_rows)
        row = rows.setdefault(
            key,
            {
                "component": spec.component,
                "stream": spec.name,
                "layout": spec.layout.name,
                "row_bytes": spec.layout.row_bytes,
                "tokens_per_row": spec.ratio or None,
                "fixed_rows": spec.fixed_rows or None,
                "layers": 0,
            },
        )
        row["layers"] += 1
    return list(rows.values())
