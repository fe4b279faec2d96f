"""Many sequences on several devices: what fits, how long a step takes, what a token costs.

Attention runs data-parallel, experts are spread over all devices. Four constants turn peaks into seconds; they were
fitted to published points of silicon (geometric mean 0.99, 0.75 to 1.31) and hold for one engine generation, not for
all. Knows no prices of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from tenfold.planner.anatomy import Anatomy
from tenfold.planner.machines import Hardware
from tenfold.planner.memory import kv_bytes
from tenfold.planner.work import Work, step_work

__all__ = ["Fleet", "StepTime", "usd_per_million"]


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step by what they go to; on such devices the three add up."""

    memory_s: float
    compute_s: float
    floor_s: float

    @property
    def seconds(self) -> float:
        return self.memory_s + self.compute_s + self.floor_s

    @property
    def binding(self) -> str:
        """The largest of the three."""
        parts = {"memory bandwidth": self.memory_s, "compute": self.compute_s, "launch floor": self.floor_s}
        return max(parts, key=parts.__getitem__)


@dataclass(frozen=True)
class Fleet:
    """`count` equal devices that hold one model; embedding and tables are held but not streamed.

    `resident_bytes` are those tables. Each device runs its own sequences, so a batch is counted per device.
    """

    anatomy: Anatomy
    hardware: Hardware
    count: int
    resident_bytes: int

    MEMORY_SHARE: ClassVar[float] = 0.60
    COMPUTE_SHARE: ClassVar[float] = 0.35
    PREFILL_SHARE: ClassVar[float] = 0.25
    LAYER_FLOOR_S: ClassVar[float] = 150e-6
    RESERVE: ClassVar[float] = 0.10

    @cached_property
    def expert_bytes(self) -> int:
        return sum(part.weight_bytes for part in self.anatomy.matrices if part.component == "moe_routed")

    @cached_property
    def common_bytes(self) -> int:
        """Weights each device needs a copy of and reads in each step."""
        return self.anatomy.weight_bytes - self.expert_bytes

    @property
    def weight_bytes_each(self) -> float:
        return self.common_bytes + self.resident_bytes + self.expert_bytes / self.count

    @property
    def room_bytes(self) -> float:
        """What a device has for sessions; negative where the weights alone do not fit."""
        return self.hardware.memory_bytes * (1 - self.RESERVE) - self.weight_bytes_each

    def fit(self, context: int) -> int:
        """Sequences of `context` tokens that one device holds."""
        return max(0, int(self.room_bytes // kv_bytes(self.anatomy, context)))

    def step(self, context: int, batch: int) -> StepTime:
        """One decode step of `batch` sequences of `context` tokens on each device."""
        work = step_work(self.anatomy, context - 1, 1)
        share = min((part.share for part in self.anatomy.matrices if part.component == "moe_routed"), default=1.0)
        touched = 1 - (1 - share) ** (batch * self.count)
        read = self.common_bytes + self.expert_bytes * touched / self.count + batch * sum(w.kv_bytes for w in work)
        return StepTime(
            read / (self.MEMORY_SHARE * self.hardware.read_bytes_per_s),
            batch * self._compute_s(work, self.COMPUTE_SHARE),
            self.anatomy.layers * self.LAYER_FLOOR_S,
        )

    def best_batch(self, context: int, slowest_s: float = 0.05) -> int:
        """The most sequences a device can step within `slowest_s` and hold; at least one if one fits."""
        low, high = 1, self.fit(context)
        if not high:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            if self.step(context, middle).seconds <= slowest_s:
                low = middle
            else:
                high = middle - 1
        return low

    def prefill_s(self, context: int) -> float:
        """Device-seconds to read `context` tokens."""
        return self._compute_s(step_work(self.anatomy, 0, context), self.PREFILL_SHARE)

    def _compute_s(self, work: tuple[Work, ...], share: float) -> float:
        return sum(part.flops / (share * self.hardware.peak(part.precision)) for part in work)


def usd_per_million(usd_per_hour: float, seconds_a_token: float, utilisation: float = 1.0) -> float:
    """Dollars for a million tokens at so many device-seconds each; idle hours cost as well."""
    return 1e6 * usd_per_hour / 3600 * seconds_a_token / utilisation
