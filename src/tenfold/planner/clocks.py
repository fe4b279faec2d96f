"""How long one sequence takes on given hardware: reading a prompt, writing a token, and which resource binds.

`FleetClock` is for devices known by their data sheets, `LocalClock` for this machine's own kernels, measured here.
Both answer the same questions. Knows nothing of money.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tenfold.config import DeepseekV4Config, ModelConfig
from tenfold.planner.anatomy import Anatomy
from tenfold.planner.machines import Measured
from tenfold.planner.serving import Fleet
from tenfold.planner.work import Work, roofline_seconds, step_work

__all__ = ["CHUNK_TOKENS", "Clock", "FleetClock", "LocalClock", "as_computed_here", "index_tile", "residual_channels"]


def residual_channels(config: ModelConfig) -> int:
    """Channels of all residual streams of a token."""
    return config.hidden_size * (config.hc_mult if isinstance(config, DeepseekV4Config) else 1)


def index_tile(num_queries: int, heads: int, threads: int) -> int:
    """Queries for which the CPU's indexer unpacks a key once (native/kernels/index.cpp)."""
    return min(64 if heads <= 8 else 16, -(-num_queries // (4 * threads)))


_FEWEST_HEADS = 8
"""From so many on V4's rows are multiplied as they are (native/kernels/attention_blocks.hpp), else as float32."""


def as_computed_here(anatomy: Anatomy) -> Anatomy:
    """The anatomy with attention in the precision of this machine's kernels."""
    as_they_are = all(kind.heads >= _FEWEST_HEADS and kind.key_width == kind.value_width for kind in anatomy.attention)
    return replace(anatomy, attention_precision="fp8rows") if as_they_are else anatomy


CHUNK_TOKENS = 4096
"""Tokens taken through the network at a time, unless a budget says otherwise."""


class Clock(Protocol):
    """Seconds of one sequence."""

    def decode_s(self, context: int) -> float:
        """The token that makes the context `context` long."""

    def prefill_s(self, start: int, stop: int) -> float:
        """Reading tokens [start, stop) of a text."""

    def binding(self, context: int) -> str:
        """What most of a decoded token's time goes to, in words."""


@dataclass(frozen=True, slots=True)
class FleetClock:
    """One sequence on a fleet: it decodes alone, and its prefill is shared by all devices."""

    fleet: Fleet

    def decode_s(self, context: int) -> float:
        return self.fleet.step(context, 1).seconds

    def prefill_s(self, start: int, stop: int) -> float:
        return (self.fleet.prefill_s(stop) - (self.fleet.prefill_s(start) if start else 0.0)) / self.fleet.count

    def binding(self, context: int) -> str:
        return self.fleet.step(context, 1).binding


@dataclass(frozen=True, slots=True)
class LocalClock:
    """This machine: the roofline of each part, a fixed cost per layer and one per token, experts perhaps from disk.

    `streamed_share` is the part of the routed experts that memory does not hold.
    """

    anatomy: Anatomy
    measured: Measured
    channels: int
    chunk_tokens: int = CHUNK_TOKENS
    streamed_share: float = 0.0

    def _step_s(self, position: int, num_tokens: int) -> dict[str, float]:
        """Seconds of a step by what they go to."""
        work = step_work(as_computed_here(self.anatomy), position, num_tokens)
        peaks = self.measured.peaks
        reading = sum(peaks.seconds(w) for w in work if _is_read_bound(w, self.measured))
        layers = self.anatomy.layers
        found = {
            "memory bandwidth": reading,
            "compute": roofline_seconds(work, peaks) - reading + self._keys_s(position, num_tokens, work),
            "fixed cost of layers": layers * self.measured.layer_floor_s
            + num_tokens * layers * self.channels / 1000 * self.measured.token_floor_s,
        }
        if self.streamed_share:
            disk = self.measured.disk_bytes_per_s or self.measured.read_bytes_per_s
            routed = sum(w.weight_bytes for w in work if w.component == "moe_routed")
            found["disk"] = self.streamed_share * routed / disk
        return found

    def _keys_s(self, position: int, num_tokens: int, work: Sequence[Work]) -> float:
        """What index keys take beyond their scores, and beyond being read where that is longer: both go on at once."""
        seconds = 0.0
        for kind in self.anatomy.attention:
            if kind.index_heads:
                shared = index_tile(num_tokens, kind.index_heads, self.measured.threads)
                keys = kind.layers * kind.keys_between(position, position + num_tokens)
                seconds += keys * (self.measured.key_floor_s + self.measured.key_tile_s / shared)
        peaks, scores = self.measured.peaks, [one for one in work if one.component == "indexer_score"]
        read_s = sum(one.bytes_read for one in scores) / peaks.read_bytes_per_s
        scored_s = sum(one.flops / peaks.of(one.precision) for one in scores)
        return max(0.0, seconds - max(0.0, read_s - scored_s))

    def decode_s(self, context: int) -> float:
        return sum(self._step_s(context - 1, 1).values())

    def prefill_s(self, start: int, stop: int) -> float:
        starts = range(start, stop, self.chunk_tokens)
        return sum(sum(self._step_s(p, min(self.chunk_tokens, stop - p)).values()) for p in starts)

    def binding(self, context: int) -> str:
        parts = self._step_s(context - 1, 1)
        return max(parts, key=parts.__getitem__)


def _is_read_bound(work: Work, measured: Measured) -> bool:
    peaks = measured.peaks
    return work.bytes_read / peaks.read_bytes_per_s >= work.flops / peaks.of(work.precision)
