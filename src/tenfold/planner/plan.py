"""The answer of `tenfold plan` as plain data: does it fit, how long, how dear, and what would fit instead.

Decides nothing about how it is shown.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from tenfold import budget
from tenfold.checkpoint import grouped
from tenfold.config import DeepseekV4Config, DeepseekV32Config, ModelConfig
from tenfold.errors import ContextTooLong, DoesNotFit, UsageError
from tenfold.planner.anatomy import dissect, loaded, official
from tenfold.planner.clocks import CHUNK_TOKENS, Clock, FleetClock, LocalClock, residual_channels
from tenfold.planner.compare import Compared
from tenfold.planner.machines import Hardware, measured
from tenfold.planner.memory import kv_by_component, kv_bytes, kv_bytes_per_token, kv_fixed_bytes
from tenfold.planner.prices import Price, Workload, hosted_usd
from tenfold.planner.serving import Fleet, usd_per_million
from tenfold.planner.work import step_work

__all__ = ["Terms", "plan", "scratch_bytes", "table_bytes"]

_BASE_BYTES = 200_000_000
"""A process with an engine and no session, where it was not measured."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a plan is asked for beside model and context."""

    hardware: Hardware
    count: int = 1
    usd_per_hour: float | None = None
    usd_per_kwh: float = 0.30
    utilisation: float = 1.0
    price: Price | None = None
    workload: Workload | None = None

    def check(self) -> None:
        """Raises UsageError for what no plan can be made of."""
        if self.count < 1:
            raise UsageError(f"--gpus is {self.count}, expected a number from 1; the nearest is 1")
        if not 0 < self.utilisation <= 1:
            raise UsageError(f"--utilisation is {self.utilisation:g}, expected more than 0 and at most 1")
        for option, value in (("--hourly", self.usd_per_hour), ("--power-price", self.usd_per_kwh)):
            if value is not None and not 0 <= value < 1e6:
                raise UsageError(f"{option} is {value:g}, expected dollars from 0; the nearest is {abs(value):g}")


def plan(model: Compared, context: int, terms: Terms) -> dict[str, Any]:
    """Memory, time and money of one model at one context on one kind of hardware."""
    terms.check()
    _check_context(model, max(context, terms.workload.context if terms.workload else 0))
    kept = official if terms.hardware.kind == "gpu" else loaded
    fleet = Fleet(dissect(model.config, kept), terms.hardware, terms.count, table_bytes(model.config))
    here = measured() if terms.hardware.kind == "this" else None
    if terms.hardware.kind == "this":
        fit = _fit_here(model, fleet, context, here.base_bytes if here else _BASE_BYTES)
    else:
        fit = _fit_fleet(model, fleet, context)
    found: dict[str, Any] = {
        "model": model.name,
        "context": context,
        "machine": {name: value or None for name, value in asdict(terms.hardware).items()} | {"count": terms.count},
        "memory": _memory(model, fleet, context, fit),
        "kv_read_bytes": sum(part.kv_bytes for part in step_work(fleet.anatomy, context - 1, 1)),
        "bytes_read": sum(part.bytes_read for part in step_work(fleet.anatomy, context - 1, 1)),
        "time": None,
        "batch": None,
        "money": None,
        "workload": None,
    }
    if fit.mode == "does not fit" or not terms.hardware.is_measured:
        return found
    clock: Clock = FleetClock(fleet)
    if here is not None:
        channels = residual_channels(model.config)
        clock = LocalClock(fleet.anatomy, here, channels, fit.chunk_tokens, fit.streamed_share)
    found["time"] = {
        "first_token_s": clock.prefill_s(0, context),
        "tokens_per_s": 1 / clock.decode_s(context),
        "binding": clock.binding(context),
    }
    found["batch"] = _batch(fleet, context) if here is None else None
    found["money"] = _money(model, found, terms)
    if terms.workload is not None:
        found["workload"] = _workload(clock, terms.workload, found["money"], terms)
    return found


def _check_context(model: Compared, context: int) -> None:
    most = model.config.max_position_embeddings
    if context > most:
        raise ContextTooLong(
            f"{model.name} holds up to {most:,} tokens, not {context:,}; the longest is --context {most}"
        )


def table_bytes(config: ModelConfig) -> int:
    """Embedding and hash tables: held, looked up by row."""
    return sum(loaded(spec).bytes_of(spec.shape) * count for spec, count in grouped(config) if spec.active == 0.0)


def scratch_bytes(config: ModelConfig, chunk_tokens: int = CHUNK_TOKENS) -> int:
    """Activations of a chunk on the way through a layer on a device, float32; this machine's come from `budget`."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    if isinstance(config, DeepseekV4Config):
        numbers = 3 * config.hc_mult * hidden + 4 * heads * config.head_dim
    else:
        assert isinstance(config, DeepseekV32Config)
        numbers = 4 * hidden + 4 * heads * (config.kv_lora_rank + config.qk_rope_head_dim)
    numbers += 3 * config.index_n_heads * config.index_head_dim + 4 * config.moe_intermediate_size
    return 4 * numbers * chunk_tokens


@dataclass(frozen=True, slots=True)
class _Fit:
    """Whether and how a session fits. `own_bytes` is all but weights and KV; `streamed_share` that of the experts."""

    mode: str
    usable_bytes: float
    own_bytes: float
    longest_context: int
    chunk_tokens: int = CHUNK_TOKENS
    streamed_share: float = 0.0


def _fit_fleet(model: Compared, fleet: Fleet, context: int) -> _Fit:
    usable, scratch = fleet.hardware.memory_bytes * (1 - fleet.RESERVE), scratch_bytes(model.config)
    room = usable - scratch - fleet.weight_bytes_each
    low, high = 0, model.config.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if kv_bytes(fleet.anatomy, middle) <= room else (low, middle - 1)
    return _Fit("resident" if low >= context else "does not fit", usable, scratch, low)


def _fit_here(model: Compared, fleet: Fleet, context: int, base_bytes: int) -> _Fit:
    """By the engine's own budget. Mapped weights that memory does not hold are read from disk again and again."""
    memory_bytes = int(fleet.hardware.memory_bytes)
    checkpoint_bytes = fleet.common_bytes + fleet.resident_bytes + fleet.expert_bytes
    given = budget.Budget(memory_bytes, base_bytes, checkpoint_bytes, checkpoint_bytes > memory_bytes)
    try:
        longest = budget.longest(model.config, model.config.max_position_embeddings, given, exact=False)
    except DoesNotFit:  # not even 128 tokens
        return _Fit("does not fit", memory_bytes, base_bytes, 0)
    if context > longest.context:
        return _Fit("does not fit", memory_bytes, longest.total_bytes - longest.kv_bytes, longest.context)
    need = budget.fit(model.config, context, given)
    room = memory_bytes - need.total_bytes - fleet.common_bytes - fleet.resident_bytes
    share = 1 - min(1.0, max(0.0, room / fleet.expert_bytes))
    mode = "experts from disk" if share else "resident"
    return _Fit(mode, memory_bytes, need.total_bytes - need.kv_bytes, longest.context, need.chunk_tokens, share)


def _memory(model: Compared, fleet: Fleet, context: int, fit: _Fit) -> dict[str, Any]:
    """Per device: weights, session, the rest; whether it fits, and the longest context that does."""
    held = kv_bytes(fleet.anatomy, context)
    return {
        "mode": fit.mode,
        "device_bytes": fit.usable_bytes,
        "weights": {
            "routed_experts": fleet.expert_bytes / fleet.count,
            "other": fleet.common_bytes,
            "tables": fleet.resident_bytes,
        },
        "checkpoint_bytes": fleet.common_bytes + fleet.resident_bytes + fleet.expert_bytes,
        "kv_bytes": held,
        "kv_by_component": kv_by_component(fleet.anatomy, context),
        "kv_bytes_per_token": kv_bytes_per_token(fleet.anatomy),
        "restore_point_bytes": kv_fixed_bytes(fleet.anatomy),
        "own_bytes": fit.own_bytes,
        "needed_bytes": fleet.weight_bytes_each + held + fit.own_bytes,
        "streamed_share": fit.streamed_share,
        "longest_context": fit.longest_context,
        "least_devices": _least_devices(fleet, held + fit.own_bytes, fit.usable_bytes),
    }


def _least_devices(fleet: Fleet, session_bytes: float, usable: float) -> int | None:
    """Devices that hold the model with one session each; None where no number does."""
    room = usable - fleet.common_bytes - fleet.resident_bytes - session_bytes
    return math.ceil(fleet.expert_bytes / room) if room > 0 else None


def _batch(fleet: Fleet, context: int) -> dict[str, Any]:
    """Many sequences at once, each at 20 tokens/s or more."""
    size = fleet.best_batch(context)
    step = fleet.step(context, size)
    return {
        "sequences_each": size,
        "fit_each": fleet.fit(context),
        "step_s": step.seconds,
        "binding": step.binding,
        "tokens_per_s_each": size / step.seconds,
        "tokens_per_s_user": 1 / step.seconds,
        "device_s_per_token_out": step.seconds / size,
        "device_s_per_token_in": fleet.prefill_s(context) / context,
    }


def _money(model: Compared, found: dict[str, Any], terms: Terms) -> dict[str, Any]:
    hourly, basis = _hourly(terms)
    price = terms.price
    batch, time = found["batch"], found["time"]
    out_s = batch["device_s_per_token_out"] if batch else terms.count / time["tokens_per_s"]
    in_s = batch["device_s_per_token_in"] if batch else terms.count * time["first_token_s"] / found["context"]
    return {
        "usd_per_hour": hourly,
        "basis": basis,
        "utilisation": terms.utilisation,
        "usd_per_million_in": usd_per_million(hourly, in_s, terms.utilisation) if hourly is not None else None,
        "usd_per_million_out": usd_per_million(hourly, out_s, terms.utilisation) if hourly is not None else None,
        "hosted": None if price is None else asdict(replace(price, model=model.name)),
    }


def _hourly(terms: Terms) -> tuple[float | None, str]:
    """Dollars an hour of one device, and what they are."""
    if terms.usd_per_hour is not None:
        return terms.usd_per_hour, "given"
    if terms.hardware.usd_per_hour is not None:
        return terms.hardware.usd_per_hour, "rent on demand"
    if terms.hardware.watts is not None:
        return terms.hardware.watts / 1000 * terms.usd_per_kwh, f"power alone, at {terms.usd_per_kwh:g} $/kWh"
    return None, "n/a"


def _workload(clock: Clock, workload: Workload, money: dict[str, Any], terms: Terms) -> dict[str, Any]:
    """Seconds and dollars of a text read once and asked about, here and hosted."""
    read_s, ask_s = clock.prefill_s(0, workload.read), 0.0
    if workload.asks:
        asked = workload.read + workload.question
        ends = clock.decode_s(asked + 1), clock.decode_s(workload.context)
        ask_s = workload.asks * (clock.prefill_s(workload.read, asked) + workload.answer * sum(ends) / 2)
    hourly = money["usd_per_hour"]
    own = None if hourly is None else (read_s + ask_s) / 3600 * hourly * terms.count / terms.utilisation
    return {
        **asdict(workload),
        "read_s": read_s,
        "ask_s": ask_s,
        "own_usd": own,
        "hosted_usd": None if terms.price is None else hosted_usd(workload, terms.price),
    }
