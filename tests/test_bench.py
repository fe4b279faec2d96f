"""The walk over frontiers: what it reports is what the sessions hold, and the charts can be drawn."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from tenfold import Engine
from tenfold.bench import _decode_tps, frontiers, sample, walk
from tenfold.bench_views import draw, name, write_csv


def test_frontiers_grow_fourfold_up_to_the_longest() -> None:
    assert frontiers(100) == [100]
    assert frontiers(1024) == [1024]
    assert frontiers(20_000) == [1024, 4096, 16_384, 20_000]
    assert frontiers(1 << 20) == [1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20]


@pytest.mark.parametrize("keep", [True, False])
def test_a_walk_reports_what_was_held_and_stored(tmp_path: Path, keep: bool) -> None:
    engine = Engine.load("tiny-v4-flash", store=tmp_path / "store" if keep else None)
    reported: list[int] = []
    found = list(walk(engine, [300, 700], progress=reported.append))
    assert [one.context for one in found] == [300, 700]
    assert found[1].kv_bytes == sum(engine.config.kv_bytes(700).values())
    assert all(one.prefill_tps > 0 < one.decode_tps for one in found)
    assert reported[-1] == 700
    assert all((one.stored_bytes > one.context) is keep for one in found)
    assert found[0].plan_bytes == found[1].plan_bytes > 0
    write_csv({"tiny": found}, tmp_path / "f.csv")
    with (tmp_path / "f.csv").open(encoding="utf-8") as file:
        assert [row["context"] for row in csv.DictReader(file)] == ["300", "700"]
    draw({"tiny": found}, tmp_path / "f.svg")
    drawn = (tmp_path / "f.svg").read_text(encoding="utf-8")
    assert "tiny" in drawn
    assert ("On disk" in drawn) is keep


@pytest.mark.parametrize("length", [40, 60, 64])
def test_decoding_at_the_end_of_a_full_context_leaves_the_timeline_as_it_was(length: int) -> None:
    session = Engine.load("tiny-v4-flash").session(64)
    ids = list(range(100, 100 + length))
    logits = session.feed(ids).clone()
    assert _decode_tps(session, ids) > 0
    assert session.tokens == tuple(ids)
    assert torch.equal(session.last_logits, logits)


def test_samples_hold_what_the_whole_would_and_share_a_chart(tmp_path: Path) -> None:
    engine = Engine.load("tiny-v4-flash")
    found = list(sample(engine, [1024, 5000]))
    assert [one.kv_bytes for one in found] == [sum(engine.config.kv_bytes(length).values()) for length in (1024, 5000)]
    assert all(one.prefill_tps > 0 < one.decode_tps for one in found)
    draw({name("a/long"): found, name("short"): found[:1]}, tmp_path / "f.svg")
    drawn = (tmp_path / "f.svg").read_text(encoding="utf-8")
    assert ">long<" in drawn
    assert drawn.count("<polyline") > 0
