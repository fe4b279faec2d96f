"""The planner against an engine that counts what it does: every component of every step is equal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tenfold import Engine
from tenfold.config import DeepseekV4Config, ModelConfig
from tenfold.errors import UsageError
from tenfold.formats import BF16
from tenfold.planner import Anatomy, Work, dissect, step_work
from tenfold.planner.anatomy import loaded, unpacked
from tenfold.synth import shrink, synth

SHAPES: dict[str, dict[str, int]] = {
    "plain": {"index_topk": 4},
    "wide": {"hidden": 128, "index_topk": 33, "num_attention_heads": 8, "index_n_heads": 5, "num_experts_per_tok": 3},
    "deep": {"layers": 7, "index_topk": 17, "experts": 12, "num_experts_per_tok": 4, "vocab": 130},
    "own": {"index_topk": 9, "moe_intermediate_size": 96, "n_shared_experts": 2, "q_lora_rank": 48},
}
PASSES = (1, 1, 2, 1, 126, 3, 200)
"""Tokens of the passes after one another; 334 in all, past windows and two groups of 128."""


def shrunk(family: str, shape: str) -> ModelConfig:
    words = {"layers": 4, "hidden": 64, "experts": 8, "vocab": 96, "qk_rope_head_dim": 16, "index_head_dim": 32}
    words |= {"kv_lora_rank": 32, "qk_nope_head_dim": 24, "v_head_dim": 20} if family == "v3.2" else {}
    words |= {"head_dim": 48, "sliding_window": 8, "hc_mult": 3} if family != "v3.2" else {}
    given: dict[str, Any] = words | SHAPES[shape]
    return shrink(family, **given)


def totals(work: Iterable[Work]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Multiply-adds, weight bytes and KV bytes by component and precision; kinds of layers together."""
    found: dict[tuple[str, str], tuple[float, float, float]] = {}
    for part in work:
        key = (part.component, part.precision)
        before = found.get(key, (0, 0, 0))
        amounts = part.multiply_adds, part.weight_bytes, part.kv_bytes
        found[key] = (before[0] + amounts[0], before[1] + amounts[1], before[2] + amounts[2])
    return {key: amounts for key, amounts in found.items() if any(amounts)}


def without_routed_bytes(found: dict[tuple[str, str], tuple[float, float, float]]) -> dict[Any, Any]:
    return {
        key: (amounts[0], None, amounts[2]) if key[0] == "moe_routed" else amounts for key, amounts in found.items()
    }


def read_share(found: dict[tuple[str, str], tuple[float, float, float]], anatomy: Anatomy) -> float:
    """The part of the routed experts that a pass read."""
    whole = sum(part.weight_bytes for part in anatomy.matrices if part.component == "moe_routed")
    return sum(amounts[1] for key, amounts in found.items() if key[0] == "moe_routed") / whole


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["v4-flash", "v4-pro", "v3.2"])
def test_planner_and_counters_agree(family: str, shape: str, tmp_path: Path) -> None:
    config = shrunk(family, shape)
    synth(config, tmp_path / "model", seed=3)
    engine = Engine.load(tmp_path / "model", backend="cpu", count=True)
    session, position = engine.session(1000), 0
    share = config.num_experts_per_tok / config.n_routed_experts
    for num_tokens in PASSES:
        session.feed([(7 * t) % config.vocab_size for t in range(position, position + num_tokens)])
        counted, planned = totals(engine.counted), totals(step_work(engine.config, position, num_tokens))
        idle = _idle_norm_bytes(engine.config, position, position + num_tokens)
        position += num_tokens
        counted["norm", "bf16"] = (0, counted["norm", "bf16"][1] + idle, 0)
        if num_tokens == 1 and _choices_are_distinct(config):
            assert counted == planned, position
        else:
            assert without_routed_bytes(counted) == without_routed_bytes(planned), position
            least = share if _choices_are_distinct(config) else 1 / config.n_routed_experts
            assert least <= read_share(counted, dissect(engine.config, loaded)) <= 1.0


def _idle_norm_bytes(config: ModelConfig, start: int, stop: int) -> int:
    """Norms of compressors that complete no entry in this pass: the planner counts them, the engine leaves them be."""
    widths = [
        spec.layout.width
        for spec in config.streams
        if isinstance(config, DeepseekV4Config) and spec.ratio and stop // spec.ratio == start // spec.ratio
    ]
    return BF16.bytes_of((sum(widths),))


def _choices_are_distinct(config: ModelConfig) -> bool:
    """Hash routing of a random checkpoint may name an expert twice."""
    return not isinstance(config, DeepseekV4Config) or not config.num_hash_layers


def test_small_models_unpacked_by_the_reference_count_four_bytes(tmp_path: Path) -> None:
    config = shrunk("v3.2", "plain")
    synth(config, tmp_path / "model")
    engine = Engine.load(tmp_path / "model", backend="reference", numerics="exact", count=True)
    engine.session().feed([5])
    anatomy = dissect(config, unpacked, exact=True)
    assert totals(engine.counted) == totals(step_work(anatomy, 0, 1))


def test_a_batch_shares_its_weights_and_adds_its_tokens(tmp_path: Path) -> None:
    config = shrunk("v4-pro", "plain")
    synth(config, tmp_path / "model")
    engine = Engine.load(tmp_path / "model", backend="cpu", count=True)
    first, second = engine.session(), engine.session()
    first.feed([3] * 40)
    engine.step({first: [1, 2], second: [4]})
    apart = [totals(step_work(config, 40, 2)), totals(step_work(config, 0, 1))]
    for key, (multiply_adds, weight_bytes, kv_bytes) in totals(engine.counted).items():
        both = [found.get(key, (0, 0, 0)) for found in apart]
        assert multiply_adds == both[0][0] + both[1][0], key
        assert kv_bytes == both[0][2] + both[1][2], key
        assert key[0] in ("moe_routed", "embed", "norm") or weight_bytes == both[0][1], key


def test_an_engine_counts_only_when_asked() -> None:
    with pytest.raises(UsageError, match="count=True"):
        _ = Engine.load("tiny-v4-flash").counted
