"""The answer of `tenfold compare` as plain data: models side by side at one context, claims beside what they come to.

Decides nothing about how it is shown.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tenfold import config as configuration
from tenfold.checkpoint import active_parameters, parameters
from tenfold.config import ModelConfig
from tenfold.errors import ContextTooLong, UsageError
from tenfold.planner.anatomy import Anatomy, dissect
from tenfold.planner.attribution import flops_shares, kv_shares
from tenfold.planner.memory import kv_by_component, kv_bytes, kv_bytes_per_token, kv_fixed_bytes
from tenfold.planner.prices import launch_price
from tenfold.planner.variants import UNDONE, all_experts, with_attention_of
from tenfold.planner.work import FP8_EQUIVALENT, NO_FP4, RAW, by_component, step_work, total_flops

__all__ = ["CLAIMED_AT", "CONTEXTS", "Compared", "changed", "compare", "explain", "load"]

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1_000_000, 1_048_576)
"""Lengths of the tables over context."""

CLAIMED_AT = 1_000_000
"""Where the V4 report's figures hold: its figure 1 goes to about a million tokens."""

_CLAIMS = (
    ("v4-pro", "flops", 0.27, "single-token FLOPs at 1M, of V3.2"),
    ("v4-pro", "kv", 0.10, "KV cache at 1M, of V3.2"),
    ("v4-flash", "flops", 0.10, "single-token FLOPs at 1M, of V3.2"),
    ("v4-flash", "kv", 0.07, "KV cache at 1M, of V3.2"),
)


@dataclass(frozen=True, slots=True)
class Compared:
    """A model in the comparison: the name it goes by, its config, its anatomy in published formats."""

    name: str
    config: ModelConfig
    anatomy: Anatomy


def load(source: str, fields: Sequence[str] = ()) -> Compared:
    """A preset, folder or config.json, with NAME=VALUE fields changed."""
    config = configuration.load(source)
    name = source if source in configuration.PRESETS else Path(source).name or source
    if fields:
        config, name = changed(config, fields), f"{name}, {', '.join(fields)}"
    found = dissect(config)
    return Compared(name, config, Anatomy(name, found.matrices, found.attention, found.lookup_bytes))


def changed(config: ModelConfig, fields: Sequence[str]) -> ModelConfig:
    """The config with fields set, as config.json would hold them; fewer layers keep the first of the pattern."""
    raw = dict(config.raw)
    for assignment in fields:
        name, equals, text = assignment.partition("=")
        if not equals or name not in raw:
            near = difflib.get_close_matches(name, raw, 1, cutoff=0.3)
            hint = f"; the nearest field is {near[0]}" if near else ""
            raise UsageError(f"--set is {assignment!r}, expected FIELD=VALUE with a field of config.json{hint}")
        try:
            raw[name] = json.loads(text)
        except ValueError:
            raise UsageError(f"--set is {assignment!r}, expected a number or JSON after the =") from None
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and "compress_ratios" in raw and 0 < layers < config.num_hidden_layers:
        raw["compress_ratios"] = raw["compress_ratios"][:layers]
    return configuration.parse(raw)


def compare(models: Sequence[Compared], context: int) -> dict[str, Any]:
    """Every figure of each model at `context` tokens, and its ratio to the first one's."""
    longest = max(models, key=lambda model: model.config.max_position_embeddings)
    most = longest.config.max_position_embeddings
    if context > most:
        raise ContextTooLong(
            f"--context is {context:,}, beyond every model here; the longest is {longest.name}'s {most:,}"
        )
    rows = [_figures(model, context) for model in models]
    base = rows[0]
    for row in rows:
        row["ratio"] = {
            "flops": row["flops"]["fp8_equivalent"] / base["flops"]["fp8_equivalent"],
            "flops_raw": row["flops"]["raw"] / base["flops"]["raw"],
            "flops_no_fp4": row["flops"]["no_fp4"] / base["flops"]["no_fp4"],
            "prefill": row["prefill_flops"] / base["prefill_flops"],
            "kv": row["kv_bytes"] / base["kv_bytes"],
            "kv_read": row["kv_read_bytes"] / base["kv_read_bytes"],
        }
    return {
        "context": context,
        "against": base["name"],
        "models": rows,
        "claims": _claims(models),
        "definitions": DEFINITIONS,
        "notes": _notes(models, context),
    }


DEFINITIONS = {
    "flops": "one decoded token that makes the context this long; a multiply-add is two FLOPs; weighed by tensor-core "
    "time relative to fp8 (fp8 and fp4 x fp8 1, bf16 and float32 2, fp4 x fp4 0.5)",
    "flops.raw": "the same, every FLOP 1",
    "flops.no_fp4": "the same on hardware without fp4 units (Hopper): the fp4 indexer counts 1",
    "prefill_flops": "all tokens of the context, the head once",
    "kv": "bytes of one session in the deployed layouts, scales included",
    "kv_read": "bytes of the session that one decoded token reads",
    "parameters": "backbone without draft heads; active leaves out the embedding table and the experts not chosen",
    "price": "first list price per million input tokens, cache miss",
}


def _figures(model: Compared, context: int) -> dict[str, Any]:
    decode = step_work(model.anatomy, context - 1, 1)
    totals = {name: count for name, count in parameters(model.config).items() if name != "hash_table"}
    active = {name: count for name, count in active_parameters(model.config).items() if name != "hash_table"}
    price = launch_price(model.name)
    return {
        "name": model.name,
        "hypothetical": context > model.config.max_position_embeddings,
        "max_context": model.config.max_position_embeddings,
        "parameters": {"total": sum(totals.values()), "active": round(sum(active.values()))},
        "flops": {
            "fp8_equivalent": total_flops(decode, FP8_EQUIVALENT),
            "raw": total_flops(decode, RAW),
            "no_fp4": total_flops(decode, NO_FP4),
            "by_component": _nonzero(by_component(decode, FP8_EQUIVALENT)),
            "raw_by_component": _nonzero(by_component(decode, RAW)),
        },
        "prefill_flops": total_flops(step_work(model.anatomy, 0, context)),
        "kv_bytes": kv_bytes(model.anatomy, context),
        "kv_by_component": kv_by_component(model.anatomy, context),
        "kv_bytes_per_token": kv_bytes_per_token(model.anatomy),
        "kv_fixed_bytes": kv_fixed_bytes(model.anatomy),
        "kv_read_bytes": sum(part.kv_bytes for part in decode),
        "price": None if price is None else asdict(price),
    }


def _nonzero(found: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if value}


def _claims(models: Sequence[Compared]) -> list[dict[str, Any]]:
    """The published ratios of the presets that are compared, beside what the configs come to at 1M."""
    base = next((model for model in models if model.name == "v3.2"), None)
    if base is None:
        return []
    computed = {model.name: _ratios_at_claim(model, base) for model in models}
    return [
        {"model": name, "what": text, "claimed": claimed, "computed": computed[name][key], "at": CLAIMED_AT}
        for name, key, claimed, text in _CLAIMS
        if name in computed
    ]


def _ratios_at_claim(model: Compared, base: Compared) -> dict[str, float]:
    flops = [total_flops(step_work(one.anatomy, CLAIMED_AT - 1, 1)) for one in (model, base)]
    held = [kv_bytes(one.anatomy, CLAIMED_AT) for one in (model, base)]
    return {"flops": flops[0] / flops[1], "kv": held[0] / held[1]}


def _notes(models: Sequence[Compared], context: int) -> list[str]:
    """What is often told wrong, with the figures of the models at hand."""
    notes = []
    base = models[0]
    for model in (one for one in models if context > one.config.max_position_embeddings):
        notes.append(
            f"{model.name} at {context:,} tokens is hypothetical: its context ends at "
            f"{model.config.max_position_embeddings:,}. So is every published comparison at 1M."
        )
    totals = {model.name: sum(parameters(model.config).values()) for model in models}
    active = {model.name: sum(active_parameters(model.config).values()) for model in models}
    sparse = [f"{m.name} {active[m.name] / 1e9:.1f} B of {totals[m.name] / 1e9:.1f} B" for m in models]
    notes.append(f"All of these are mixtures of experts: {', '.join(sparse)} are active.")
    if base.name == "v3.2":
        for model in models[1:]:
            notes.append(_swap_note(model, base, context))
    return notes


def _swap_note(model: Compared, base: Compared, context: int) -> str:
    whole = total_flops(step_work(base.anatomy, context - 1, 1))
    backbone, attention = (
        total_flops(step_work(mixed, context - 1, 1)) / whole
        for mixed in (with_attention_of(model.anatomy, base.anatomy), with_attention_of(base.anatomy, model.anatomy))
    )
    return (
        f"Experts and projections of {model.name} put into {base.name}, attention kept: {100 * backbone:.0f} % of its "
        f"FLOPs. Attention of {model.name} put into {base.name}, the rest kept: {100 * attention:.0f} %. "
        "The KV cache holds nothing of the experts."
    )


def explain(model: Compared, base: Compared, context: int) -> dict[str, Any]:
    """Why `model` is cheaper than `base`: shares of the saving, one thing undone at a time, dense experts."""
    whole = total_flops(step_work(base.anatomy, context - 1, 1))
    base_kv = kv_bytes(base.anatomy, context)
    undone = []
    for name, undo in {"as released": lambda found, _: found, **UNDONE}.items():
        variant = undo(model.anatomy, base.anatomy)
        flops, held = total_flops(step_work(variant, context - 1, 1)), kv_bytes(variant, context)
        undone.append(
            {"variant": name, "flops": flops, "of_flops": flops / whole, "kv_bytes": held, "of_kv": held / base_kv}
        )
    dense = total_flops(step_work(all_experts(model.anatomy), context - 1, 1))
    return {
        "model": model.name,
        "against": base.name,
        "context": context,
        "flops": {
            "from": whole,
            "to": undone[0]["flops"],
            "shares": [asdict(share) for share in flops_shares(base.anatomy, model.anatomy, context)],
        },
        "kv": {
            "from": base_kv,
            "to": undone[0]["kv_bytes"],
            "shares": [asdict(share) for share in kv_shares(base.anatomy, model.anatomy, context)],
        },
        "undone": undone,
        "all_experts_flops": dense,
    }
