"""The answer of `tenfold plan` as plain data: does it fit, how long, how dear, and what would fit instead.

Decides nothing about how it is shown.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from tenfold.checkpoint import grouped
from tenfold.config import DeepseekV4Config, ModelConfig
from tenfold.errors import ContextTooLong, UsageError
from tenfold.planner.anatomy import dissect, loaded
from tenfold.planner.clocks import CHUNK_TOKENS, Clock, FleetClock, LocalClock, residual_channels
from tenfold.planner.compare import Compared
from tenfold.planner.machines import Hardware, measured
from tenfold.planner.memory import kv_by_component, kv_bytes, kv_bytes_per_token, kv_fixed_bytes
from tenfold.planner.prices import Price, Workload, hosted_usd
from tenfold.planner.serving import Fleet, usd_per_million
from tenfold.planner.work import step_work

__all__ = ["Terms", "plan", "scratch_bytes", "table_bytes"]


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
    fleet = Fleet(dissect(model.config, loaded), terms.hardware, terms.count, table_bytes(model.config))
    memory = _memory(model, fleet, context)
    found: dict[str, Any] = {
        "model": model.name,
        "context": context,
        "machine": asdict(terms.hardware) | {"count": terms.count},
        "memory": memory,
        "kv_read_bytes": sum(part.kv_bytes for part in step_work(fleet.anatomy, context - 1, 1)),
        "bytes_read": sum(part.bytes_read for part in step_work(fleet.anatomy, context - 1, 1)),
        "time": None,
        "batch": None,
        "money": None,
        "workload": None,
    }
    if memory["mode"] == "does not fit":
        return found
    clock = _clock(model.config, fleet, memory)
    found["time"] = {
        "first_token_s": clock.prefill_s(0, context),
        "tokens_per_s": 1 / clock.decode_s(context),
        "binding": clock.binding(context),
    }
    found["batch"] = _batch(fleet, context) if memory["mode"] == "resident" and terms.hardware.kind != "this" else None
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
    """Activations of a chunk on the way through a layer, float32."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    if isinstance(config, DeepseekV4Config):
        numbers = 3 * config.hc_mult * hidden + 4 * heads * config.head_dim
    else:
        numbers = 4 * hidden + 4 * heads * 576
    numbers += 3 * config.index_n_heads * config.index_head_dim + 4 * config.moe_intermediate_size
    return 4 * numbers * chunk_tokens


def _memory(model: Compared, fleet: Fleet, context: int) -> dict[str, Any]:
    """Per device: weights, session, scratch; whether it fits, and the longest context that does."""
    scratch = scratch_bytes(model.config, 256 if fleet.hardware.kind == "this" else CHUNK_TOKENS)
    usable = fleet.hardware.memory_bytes * (1.0 if fleet.hardware.kind == "this" else 1 - fleet.RESERVE)
    held = kv_bytes(fleet.anatomy, context)
    common = fleet.common_bytes + fleet.resident_bytes
    room = usable - scratch - fleet.weight_bytes_each
    streamable = fleet.hardware.disk_bytes_per_s is not None and fleet.count == 1
    room_streamed = usable - scratch - common - _least_cache(fleet)
    if room >= held:
        mode, left = "resident", room
    elif streamable and room_streamed >= held:
        mode, left = "experts from disk", room_streamed
    else:
        mode, left = "does not fit", max(room, room_streamed) if streamable else room
    missing = fleet.weight_bytes_each + held + scratch
    return {
        "mode": mode,
        "device_bytes": usable,
        "weights": {
            "routed_experts": fleet.expert_bytes / fleet.count,
            "other": fleet.common_bytes,
            "tables": fleet.resident_bytes,
        },
        "weight_bytes_each": fleet.weight_bytes_each,
        "checkpoint_bytes": fleet.common_bytes + fleet.resident_bytes + fleet.expert_bytes,
        "kv_bytes": held,
        "kv_by_component": kv_by_component(fleet.anatomy, context),
        "kv_bytes_per_token": kv_bytes_per_token(fleet.anatomy),
        "kv_disk_bytes": held,
        "restore_point_bytes": kv_fixed_bytes(fleet.anatomy),
        "scratch_bytes": scratch,
        "needed_bytes": missing,
        "streamed_share": _streamed_share(fleet, room_streamed - held) if mode == "experts from disk" else 0.0,
        "longest_context": _longest(model, fleet, left),
        "least_devices": _least_devices(fleet, held + scratch, usable),
    }


def _least_cache(fleet: Fleet) -> float:
    """Room for the experts of one layer while they are in use."""
    return fleet.expert_bytes / max(fleet.anatomy.layers, 1)


def _streamed_share(fleet: Fleet, cache_bytes: float) -> float:
    """The part of the routed experts that has to come from disk each time, with what is left as their cache."""
    return 1 - min(1.0, (cache_bytes + _least_cache(fleet)) / fleet.expert_bytes)


def _longest(model: Compared, fleet: Fleet, room: float) -> int:
    """The longest context whose session fits into `room` bytes; 0 if not even the first token does."""
    low, high = 0, model.config.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if kv_bytes(fleet.anatomy, middle) <= room else (low, middle - 1)
    return low


def _least_devices(fleet: Fleet, session_bytes: float, usable: float) -> int | None:
    """Devices that hold the model with one session each; None where no number does."""
    room = usable - fleet.common_bytes - fleet.resident_bytes - session_bytes
    return math.ceil(fleet.expert_bytes / room) if room > 0 else None


def _clock(config: ModelConfig, fleet: Fleet, memory: dict[str, Any]) -> Clock:
    if fleet.hardware.kind != "this":
        return FleetClock(fleet)
    found = measured()
    assert found is not None, "the hardware was made from it"
    channels = residual_channels(config)
    return LocalClock(fleet.anatomy, found, channels, memory["streamed_share"])


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
    read_s = clock.prefill_s(0, workload.read)
    held, ask_s = workload.read, 0.0
    for _ in range(workload.asks):
        ask_s += clock.prefill_s(held, held + workload.question)
        held += workload.question
        ends = clock.decode_s(held + 1), clock.decode_s(held + workload.answer)
        ask_s += workload.answer * sum(ends) / 2
        held += workload.answer
    hourly = money["usd_per_hour"]
    own = None if hourly is None else (read_s + ask_s) / 3600 * hourly * terms.count / terms.utilisation
    return {
        **asdict(workload),
        "read_s": read_s,
        "ask_s": ask_s,
        "own_usd": own,
        "hosted_usd": None if terms.price is None else hosted_usd(workload, terms.price),
    }
