"""`tenfold demo` and `tenfold eval needle` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from tenfold import charts, needle_cli
from tenfold.cli import app
from tenfold.needle_grid import Cell, Grid


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def found(*words: object) -> dict[str, Any]:
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    parsed = json.loads(result.stdout)
    assert isinstance(parsed, dict)
    return parsed


def refused(*words: object, code: int = 2) -> str:
    result = call(*words)
    assert result.exit_code == code, (result.exit_code, result.output)
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return result.stderr


# ------------------------------------------------------------------------------------------------ demo


def test_demo_prints_a_table_and_talks_on_stderr(tmp_path: Path) -> None:
    words = ("demo", "--context", "2K", "--needles", 2, "--store", tmp_path / "store")
    result = call(*words, "--plot", tmp_path / "demo.svg")
    assert result.exit_code == 0, result.output
    assert "KV bytes, all" in result.stdout
    assert "2,048 tokens of the SQLite documentation" in result.stderr
    ElementTree.parse(tmp_path / "demo.svg")
    again = found(*words)
    assert again["models"]["tiny-v4-flash"]["stored_tokens"] == 2048
    assert again["context"] == 2048


def test_demo_reads_with_any_folder_and_any_text(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A line.\n\nAnother one, longer than that.\n\n" * 5, encoding="utf-8")
    shown = found("demo", "--model", model, "--context", 1000, "--needles", 1, "--text", text, "--no-store")
    assert list(shown["models"]) == ["tiny"]
    assert shown["models"]["tiny"]["tokens"] == 1000


def test_demo_refuses_what_cannot_be(model: Path, tmp_path: Path) -> None:
    assert "tiny-v4-flash" in refused("demo", "--model", "tiny-v9")
    assert "--context" in refused("demo", "--context", "much")
    assert "do not fit the context" in refused("demo", "--context", "2M", "--no-store")
    assert "hide fewer" in refused("demo", "--context", "1K", "--needles", 200, "--no-store")
    assert "expected 0 to" in refused("demo", "--needles", -1, "--no-store")
    assert "neither in .svg" in refused("demo", "--plot", "figures.pdf")
    assert "cannot be read" in refused("demo", "--text", tmp_path / "absent")
    assert "leave --model away" in refused("demo", "--all", "--model", "tiny-v4-flash")


# ------------------------------------------------------------------------------------------------ eval needle


def test_eval_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "found.json", tmp_path / "heat.svg"
    words = ("eval", "needle", model, "--depths", 2, "--per-cell", 2, "--out", out)
    short = found(*words, "--lengths", "512")
    kept = json.loads(out.read_text("utf-8"))["haystacks"]
    longer = call(*words, "--lengths", "512,1K", "--plot", plot)
    assert longer.exit_code == 0, longer.output
    assert "2 haystacks are answered" in longer.stderr
    assert json.loads(out.read_text("utf-8"))["haystacks"][: len(kept)] == kept
    assert [one["asked"] for one in short["lengths"]] == [4]
    assert [(cell["length"], cell["depth_to"]) for cell in short["cells"]] == [(512, 0.5), (512, 1.0)]
    assert "of 2" in longer.stdout
    words_of_plot = [one.text for one in ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}text")]
    assert {"0-50%", "50-100%", "1K"} <= set(words_of_plot)
    assert "seed 0, now it is 1" in refused(*words, "--lengths", "512", "--seed", 1)


def test_eval_refuses_what_cannot_be(model: Path, tmp_path: Path) -> None:
    assert "give a model, or --endpoint" in refused("eval", "needle")
    assert "--lengths" in refused("eval", "needle", model, "--lengths", "1K,x")
    assert "shortest first" in refused("eval", "needle", model, "--lengths", "2K,1K")
    assert refused("eval", "needle", model, "--lengths", "1K,4K").startswith("error: 4,096 tokens do not fit")
    assert "--depths" in refused("eval", "needle", model, "--depths", 0)
    assert "neither in .svg" in refused("eval", "needle", model, "--plot", "heat.jpg")
    assert "--api" in refused("eval", "needle", "--endpoint", "http://127.0.0.1:9", "--api", "soap")
    assert "is the server running" in refused("eval", "needle", "--endpoint", "http://127.0.0.1:9", code=1)
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    assert "does not hold results" in refused(
        "eval", "needle", model, "--lengths", "512", "--out", tmp_path / "other.json"
    )


def test_the_heat_map_follows_the_theme_and_shows_every_cell(tmp_path: Path) -> None:
    grid = Grid((1024, 4096, 1_000_000), 4, 10, 0)
    cells = [Cell(length, depth, 10, 10 - 3 * depth) for length in grid.lengths[:2] for depth in range(4)]
    for name in ("heat.svg", "heat.png"):
        needle_cli.draw("a < b", grid, cells, tmp_path / name)
    drawn = (tmp_path / "heat.svg").read_text("utf-8")
    root = ElementTree.fromstring(drawn)
    assert "prefers-color-scheme:dark" in drawn
    boxes = [box.get("fill") for box in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert len(boxes) == 12
    assert boxes.count(charts.COLOURS[0]) == 4  # the length that has no answers yet
    assert len(set(boxes)) == 5
    numbers = [one.text for one in root.iter("{http://www.w3.org/2000/svg}text") if one.get("style")]
    assert sorted(numbers, key=str) == sorted(["100", "70", "40", "10"] * 2)
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("tokens", "text"), [(1024, "1K"), (1000, "1,000"), (1_000_000, "1M"), (1 << 20, "1M")])
def test_lengths_are_named(tokens: int, text: str) -> None:
    assert charts.tokens_text(tokens) == text
