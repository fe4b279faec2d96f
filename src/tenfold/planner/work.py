"""What a step does: multiply-adds and bytes by component, exactly, from position to position.

One multiply-add is two FLOPs. Counted are matrix products, index scores, attention and the mixing of the residual
streams; softmax, norms, top-k, rotation, pooling and quantisation are not: they are small beside these.
Knows nothing of machines beyond three peaks, and nothing of money.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tenfold.config import ModelConfig
from tenfold.planner.anatomy import Anatomy, AttentionKind, Matrices, Precision, dissect, loaded

__all__ = [
    "FP8_EQUIVALENT",
    "NO_FP4",
    "RAW",
    "Counting",
    "Peaks",
    "Work",
    "by_component",
    "reading_cost",
    "roofline_seconds",
    "step_work",
    "total_flops",
]


@dataclass(frozen=True, slots=True)
class Work:
    """One part of a step: what it multiplies, in which precision, and the bytes it must read.

    `kind` names the kind of layer where a component costs differently in each: csa, hca, swa, dsa.
    """

    component: str
    precision: Precision
    multiply_adds: float
    weight_bytes: float
    kv_bytes: float
    kind: str = ""

    @property
    def flops(self) -> float:
        return 2 * self.multiply_adds

    @property
    def bytes_read(self) -> float:
        return self.weight_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True)
class Counting:
    """How FLOPs are weighed: by precision, with another weight for some components."""

    name: str
    by_precision: Mapping[Precision, float]
    by_component: Mapping[str, float] = field(default_factory=dict)

    def weigh(self, work: Work) -> float:
        """FLOPs of a part of a step, weighed."""
        return work.flops * self.by_component.get(work.component, self.by_precision[work.precision])


RAW = Counting("raw", {"fp8": 1.0, "fp4xfp8": 1.0, "bf16": 1.0, "f32": 1.0, "fp4": 1.0})
FP8_EQUIVALENT = Counting("fp8-equivalent", {"fp8": 1.0, "fp4xfp8": 1.0, "bf16": 2.0, "f32": 2.0, "fp4": 0.5})
"""Each FLOP weighed by its tensor-core time relative to fp8; the definition that gives the published 27 % and 10 %."""
NO_FP4 = Counting("fp8-equivalent without fp4 units", {**FP8_EQUIVALENT.by_precision, "fp4": 1.0})
"""For processors that have no fp4 units (Hopper): the fp4 indexer runs as fp8."""
_INDEX_TIME = {"avx2": 0.2, "avx512": 0.13, "amx": 0.04}
"""Index scores are products of integers: what one of their multiply-adds takes of the time of others, by the
instruction set of the kernels (fitted to reads of a million tokens by the embedded model)."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """What a processor reaches at best. `int8` names the precisions that its kernels multiply as integers.

    `achieved` holds the rates of kernels by precision where they are known and should count instead of the peaks.
    """

    read_bytes_per_s: float
    float32_flops_per_s: float
    int8_ops_per_s: float
    int8: frozenset[Precision] = frozenset({"fp4"})
    achieved: Mapping[Precision, float] = field(default_factory=dict)

    def of(self, precision: Precision) -> float:
        """Operations a second; a multiply-add is two."""
        if precision in self.achieved:
            return self.achieved[precision]
        return self.int8_ops_per_s if precision in self.int8 else self.float32_flops_per_s

    def seconds(self, work: Work) -> float:
        """The least time of one part: reading its bytes or doing its operations, whichever is longer."""
        return max(work.bytes_read / self.read_bytes_per_s, work.flops / self.of(work.precision))


def step_work(
    config: ModelConfig | Anatomy, position: int, num_tokens: int, *, num_logits: int = 1
) -> tuple[Work, ...]:
    """Work of one step that adds `num_tokens` tokens behind `position` tokens, weights as this engine keeps them.

    Multiply-adds are exact and add up: steps [p, m) and [m, q) do together what [p, q) does, but for the head, which
    runs for `num_logits` positions a step. Bytes are the least a step must move: each weight once (of routed experts
    those that evenly spread choices are expected to touch), each row of the session's memory once. An `Anatomy`
    says itself how its weights are kept.
    """
    anatomy = config if isinstance(config, Anatomy) else dissect(config, loaded)
    found = [_linear(part, num_tokens, num_logits) for part in anatomy.matrices]
    for kind in anatomy.attention:
        found += _attention(kind, position, position + num_tokens, anatomy.attention_precision)
    found.append(Work("embed", "bf16", 0, anatomy.lookup_bytes * num_tokens, 0))
    return tuple(found)


def roofline_seconds(work: Iterable[Work], peaks: Peaks) -> float:
    """The least time of a step on such a processor: the sum over its parts of the longer of reading and computing."""
    return sum(peaks.seconds(part) for part in work)


def total_flops(work: Iterable[Work], counting: Counting = FP8_EQUIVALENT) -> float:
    return sum(counting.weigh(part) for part in work)


def reading_cost(config: ModelConfig, kernels: str) -> Callable[[int], float]:
    """What reading the tokens before a position costs, in proportion to the time it takes.

    `kernels` names the instruction set that the CPU's are built for; all others are taken for AVX2.
    """
    anatomy = dissect(config, loaded)
    as_computed = Counting("as computed", {**RAW.by_precision, "fp4": _INDEX_TIME.get(kernels, _INDEX_TIME["avx2"])})
    return lambda position: total_flops(step_work(anatomy, 0, position), as_computed)


def by_component(work: Iterable[Work], counting: Counting = RAW) -> dict[str, float]:
    """FLOPs by component, weighed."""
    found: dict[str, float] = {}
    for part in work:
        found[part.component] = found.get(part.component, 0) + counting.weigh(part)
    return found


def _linear(part: Matrices, num_tokens: int, num_logits: int) -> Work:
    multiply_adds = part.multiply_adds * num_tokens + part.multiply_adds_per_logit * num_logits
    return Work(part.component, part.precision, multiply_adds, part.bytes_read(num_tokens), 0)


def _attention(kind: AttentionKind, start: int, stop: int, precision: Precision) -> Iterable[Work]:
    entries = kind.entries_between(start, stop)
    multiply_adds = kind.layers * entries * kind.entry_multiply_adds
    kv_bytes = kind.layers * kind.rows_read(start, stop) * kind.row_bytes
    yield Work("attn_core", precision, multiply_adds, 0, kv_bytes, kind.name)
    if kind.index_heads:
        multiply_adds = kind.layers * kind.keys_between(start, stop) * kind.key_multiply_adds
        kv_bytes = kind.layers * (stop // kind.ratio) * kind.index_row_bytes
        yield Work("indexer_score", kind.index_precision, multiply_adds, 0, kv_bytes, kind.name)
