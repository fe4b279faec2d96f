"""Charts and the page: they hold the planner's figures, are well-formed, and load nothing from elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from tenfold import charts, report
from tenfold.charts import Bars, Lines
from tenfold.cli import app
from tenfold.errors import InputError
from tenfold.planner.compare import load
from tenfold.planner.memory import kv_bytes
from tenfold.planner.plan import table_bytes

MODELS = [load(name) for name in ("v3.2", "v4-flash", "v4-pro")]
MILLION = 1_000_000


def test_charts_draw_the_planner_s_figures() -> None:
    kv, flops, shares, _ = charts.comparison(MODELS, MILLION)
    assert isinstance(kv, Lines)
    assert isinstance(flops, Lines)
    assert isinstance(shares, Bars)
    assert kv.x[-1] == MILLION
    assert [values[-1] for _, values in kv.curves] == [kv_bytes(model.anatomy, MILLION) for model in MODELS]
    assert [f"{(values[-1] or 0) / 1e9:.1f}" for _, values in flops.curves] == ["1146.1", "116.6", "310.3"]
    index_share = dict(shares.columns[0][1])["index scores"] / sum(value for _, value in shares.columns[0][1])
    assert f"{index_share:.2f}" == "0.87"


def test_svg_is_well_formed_and_follows_the_theme() -> None:
    drawn = charts.svg(charts.comparison(MODELS, MILLION))
    root = ElementTree.fromstring(drawn)
    assert "prefers-color-scheme:dark" in drawn
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"v3.2", "v4-flash", "v4-pro", "4K", "1M", "100 GB", "1.74"} <= set(words)


def test_higher_is_larger() -> None:
    """Curves are drawn within the frame, and the larger one lies above."""
    drawn = charts.svg([Lines("t", "x", "bytes", [1024, 2048], [("low", [1e3, 2e3]), ("high", [2e5, 4e5])])])
    low, high = (
        re.findall(r'points="([^"]+)" fill="none" stroke="' + colour, drawn)[0] for colour in charts.COLOURS[:2]
    )
    heights = [[float(point.split(",")[1]) for point in points.split()] for points in (low, high)]
    assert heights[1][0] < heights[0][0]
    assert all(0 < y < charts.HEIGHT for points in heights for y in points)


def test_names_in_charts_are_escaped() -> None:
    ElementTree.fromstring(charts.svg([Bars("a < b & c", "share", [("<m>", [("p&q", 1.0)])])]))


@pytest.mark.parametrize("name", ["chart.svg", "chart.png"])
def test_files_are_written(name: str, tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, ["compare", "--plot", str(tmp_path / name), "--json"])
    assert outcome.exit_code == 0, outcome.output
    start = (tmp_path / name).read_bytes()[:8]
    assert start.startswith(b"<svg" if name.endswith("svg") else b"\x89PNG")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"chart\.svg"):
        charts.write([], tmp_path / "chart.pdf")
    with pytest.raises(InputError, match="check the folder"):
        charts.write([], tmp_path / "nowhere" / "chart.svg")


def test_the_page_stands_alone_and_knows_every_model() -> None:
    page = report.page(MODELS, MILLION)
    assert not re.findall(r'(?:src|href)\s*=\s*["\']?(?!#)', page)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"/\*\w+\*/", page), "a place of the template was not filled"
    match = re.search(r"const DATA = (.*);", page)
    assert match is not None
    data = json.loads(match[1])
    assert [model["name"] for model in data["models"]] == [model.name for model in MODELS]
    assert [model["table_bytes"] for model in data["models"]] == [table_bytes(model.config) for model in MODELS]
    assert {"27.08 %", "+435.2"} <= set(re.findall(r"<td>([^<]+)</td>", page))


def test_a_page_of_models_that_nothing_explains(tmp_path: Path) -> None:
    report.write([MODELS[1], MODELS[2]], 4096, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Why v4-pro" not in page
    with pytest.raises(InputError, match="check the folder"):
        report.write(MODELS, 4096, tmp_path / "nowhere" / "r.html")
