"""The demo: what its figures are made of, which models take part, what people read of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tenfold import demo
from tenfold.demo import Task, table
from tenfold.engine import Engine
from tenfold.errors import ContextTooLong, UsageError
from tenfold.store import Store

TOKENS = 3001


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return demo.show(["tiny-v4-flash"], ["tiny-v3.2"], Task(TOKENS, needles=3, seed=1))


def test_every_figure_of_the_one_that_reads(found: dict[str, Any]) -> None:
    one = found["models"]["tiny-v4-flash"]
    assert (one["tokens"], one["stored_tokens"], len(one["answers"]), one["found"]) == (TOKENS, 0, 3, sum(one["right"]))
    session = Engine.load("tiny-v4-flash").session(TOKENS)
    session.feed([5] * TOKENS)
    assert one["kv_bytes"] == session.kv_bytes()
    assert one["kv_bytes_total"] == sum(one["kv_bytes"].values())
    assert one["seconds"] > 0
    assert one["peak_bytes"] is None or 1e8 < one["peak_bytes"] < 4e9
    assert [round(hidden["depth"], 1) for hidden in found["needles"]] == [0.2, 0.5, 0.8]


def test_flops_are_those_an_engine_counts(found: dict[str, Any]) -> None:
    engine = Engine.load("tiny-v4-flash", count=True)
    session = engine.session(TOKENS)
    assert session.need.chunk_tokens >= TOKENS
    session.feed([5] * TOKENS)
    assert found["models"]["tiny-v4-flash"]["flops"] == sum(work.flops for work in engine.counted)


def test_v32_stands_beside_and_holds_what_reading_would(found: dict[str, Any]) -> None:
    v32, v4 = found["models"]["tiny-v3.2"], found["models"]["tiny-v4-flash"]
    assert list(found["models"]) == ["tiny-v3.2", "tiny-v4-flash"]
    assert v32["kv_bytes_total"] == TOKENS * v32["kv_bytes_per_token"]
    assert v4["kv_bytes_per_token"] < v32["kv_bytes_per_token"] / 10
    assert v4["flops"] < v32["flops"]
    assert (v32["answers"], v32["found"], v32["seconds"]) == (None, None, None)


def test_the_table_tells_what_was_read_and_what_only_sampled(
    found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    table.show(found)
    shown = capsys.readouterr().out
    for words in (
        "3,001",
        "of 3",
        "sample",
        "KV bytes, all",
        "GFLOP",
        "memory of the text is",
        "7790",
    ):
        assert words in shown
    assert "store" not in shown


def test_charts_are_drawn_even_of_nothing_found(found: dict[str, Any], tmp_path: Path) -> None:
    table.draw(found, tmp_path / "figures.svg")
    table.draw(found, tmp_path / "figures.png")
    words = [one.text for one in ElementTree.parse(tmp_path / "figures.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {"tiny-v4-flash", "tiny-v3.2", "Needles found, %"} <= set(words)


def test_the_same_haystack_comes_from_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path / "store")
    first, second = (demo.show(["tiny-v4-flash"], [], Task(2000, 2, seed=3, store=store)) for _ in range(2))
    one, two = (each["models"]["tiny-v4-flash"] for each in (first, second))
    assert (one["stored_tokens"], two["stored_tokens"], two["tokens_per_s"]) == (0, 2000, None)
    assert (one["answers"], one["kv_bytes"], one["flops"]) == (two["answers"], two["kv_bytes"], two["flops"])
    table.show(second)
    assert "2,000 of 2,000 tokens came from the store" in capsys.readouterr().out
    other = demo.show(["tiny-v4-flash"], [], Task(2000, 2, seed=4, store=store))
    assert other["models"]["tiny-v4-flash"]["stored_tokens"] < 2000
    store.close()


def test_which_models_read_and_which_stand_beside() -> None:
    assert demo.chosen(None, every=False) == (["tiny-v4-flash"], ["tiny-v3.2", "tiny-v4-pro"])
    assert demo.chosen("tiny-v3.2", every=False) == (["tiny-v3.2"], ["tiny-v4-flash", "tiny-v4-pro"])
    assert demo.chosen(None, every=True) == (["tiny-v3.2", "tiny-v4-flash", "tiny-v4-pro"], [])
    assert demo.chosen("some/folder", every=False) == (["some/folder"], [])
    with pytest.raises(UsageError, match="leave --model away"):
        demo.chosen("tiny-v3.2", every=True)


def test_whatever_reads_holds_what_was_measured_beside(found: dict[str, Any]) -> None:
    both = demo.show(["tiny-v3.2", "tiny-v4-flash"], [], Task(TOKENS, 3, seed=1))
    assert [len(one["answers"]) for one in both["models"].values()] == [3, 3]
    assert both["models"]["tiny-v3.2"]["kv_bytes"] == found["models"]["tiny-v3.2"]["kv_bytes"]
    json.dumps(both)


def test_more_than_the_model_holds_is_refused() -> None:
    with pytest.raises(ContextTooLong, match="2,000,000 tokens do not fit"):
        demo.show(["tiny-v4-flash"], [], Task(2_000_000, 2, seed=1))
