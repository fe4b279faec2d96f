"""What a session takes is known beforehand, fits what is allowed, or is refused with what would fit."""

from __future__ import annotations

import re

import pytest

from tenfold import config as configuration
from tenfold.budget import Budget, fit, longest, shared_tile_tokens, stream_bytes
from tenfold.errors import DoesNotFit

GIB = 1 << 30
PRESETS = ("v4-flash", "v4-pro", "v3.2")


def budget(gib: float, streamed: bool = False) -> Budget:
    return Budget(int(gib * GIB), base_bytes=GIB // 4, weights_bytes=150 * GIB, streamed=streamed)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("context", [1, 100, 128, 4096, 65_536, 163_840])
@pytest.mark.parametrize("gib", [12, 24, 200])
def test_what_fits_stays_within_the_budget(preset: str, context: int, gib: float) -> None:
    config = configuration.load(preset)
    for streamed in (False, True):
        need = fit(config, context, budget(gib, streamed), exact=False)
        assert need.total_bytes <= gib * GIB
        assert 1 <= need.tile_tokens <= need.chunk_tokens <= 65_536
        assert need.kv_bytes >= sum(config.kv_bytes(context).values())


def test_weights_read_from_disk_want_long_chunks() -> None:
    config = configuration.load("v4-flash")
    assert fit(config, 1 << 20, budget(24, streamed=True)).chunk_tokens == 65_536
    assert fit(config, 1 << 20, budget(24, streamed=False)).chunk_tokens == 4096
    assert fit(config, 1 << 20, budget(8, streamed=True)).chunk_tokens < 65_536


@pytest.mark.parametrize("preset", PRESETS)
def test_a_refusal_names_a_context_and_a_memory_that_fit(preset: str) -> None:
    config = configuration.load(preset)
    most = config.max_position_embeddings
    with pytest.raises(DoesNotFit) as refused:
        fit(config, most, budget(3))
    found = re.search(r"(?:--context (\d+) fits, or )?--memory ([\d.]+)G would do", str(refused.value))
    assert found is not None
    fit(config, most, budget(float(found[2])))
    if found[1]:
        fit(config, int(found[1]), budget(3))


def test_the_longest_context_fits_and_the_next_does_not() -> None:
    config = configuration.load("v4-pro")
    need = longest(config, config.max_position_embeddings, budget(5), False)
    assert 128 <= need.context < config.max_position_embeddings
    with pytest.raises(DoesNotFit):
        fit(config, need.context + 128, budget(5))
    assert longest(config, 1 << 20, budget(20), False).context == 1 << 20


def test_exact_rows_take_more() -> None:
    config = configuration.load("v4-flash")
    assert stream_bytes(config, 1 << 20) == sum(config.kv_bytes(1 << 20).values())
    assert stream_bytes(config, 1 << 20, exact=True) > 3 * stream_bytes(config, 1 << 20)


@pytest.mark.parametrize(("name", "rows"), [("v4-flash", 96), ("v4-pro", 24), ("v3.2", 64)])
def test_experts_take_as_many_tokens_as_there_is_memory_for(name: str, rows: int) -> None:
    """What a tile's attention takes serves for some; more only where it is free, and never beyond the chunk."""
    config = configuration.load(name)
    rich = fit(config, 1 << 13, budget(200))
    assert rich.tile_tokens < rich.wide_tokens <= rich.chunk_tokens
    assert rich.wide_tokens * config.num_experts_per_tok // config.n_routed_experts == rows
    for share in (0.99, 0.96, 0.93, 0.9):
        poor = fit(config, 1 << 13, budget(rich.total_bytes / GIB * share))
        assert poor.total_bytes <= rich.total_bytes * share
        assert poor.tile_tokens <= poor.wide_tokens <= min(rich.wide_tokens, poor.chunk_tokens)
    assert fit(config, 100, budget(200)).wide_tokens == 100


def test_short_sessions_share_a_tile_as_long_as_one_of_theirs_put_together() -> None:
    config = configuration.load("v4-flash")
    short, long = (fit(config, context, budget(200), exact=False) for context in (96, 1 << 20))
    assert shared_tile_tokens([short]) == 96
    assert shared_tile_tokens([short] * 3) == 288
    assert shared_tile_tokens([short] * 100) == long.tile_tokens
    assert shared_tile_tokens([long, short]) == long.tile_tokens
    least = fit(config, 1 << 20, budget(long.total_bytes / GIB * 0.9), exact=False)
    assert least.tile_tokens < long.tile_tokens
    assert shared_tile_tokens([least, *[short] * 100]) == least.tile_tokens
