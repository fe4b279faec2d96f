"""`tenfold doctor --measure`: figures come from what was timed, are kept, and plans use them. No speed is judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tenfold import calibration, peaks
from tenfold import config as configuration
from tenfold.cli import app
from tenfold.peaks import MeasuredPeaks
from tenfold.planner import machines
from tenfold.planner.clocks import index_tile


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks beyond any machine, few runs, a small file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(peaks, "measure", lambda: MeasuredPeaks(1e15, 1e17, 1e17, 1e17))
    for name, value in {
        "_CONTEXT": 130,
        "_DECODES": 3,
        "_CHUNKS": 1,
        "_CHUNK_TOKENS": 64,
        "_KEYS": 1 << 14,
        "_QUERIES": 32,
        "_WIDTH": 128,
        "_ROWS": 4,
        "_CALLS": 1,
    }.items():
        monkeypatch.setattr(calibration, name, value)
    monkeypatch.setattr(calibration, "_DISK_BYTES", 1 << 22)
    monkeypatch.setattr(calibration, "_product_flops_per_s", lambda rounded: 1e17)
    monkeypatch.setattr(calibration, "_int8_product_ops_per_s", lambda: 1e17)
    monkeypatch.setattr(calibration, "_attention_ops_per_s", lambda: 1e17)


@pytest.mark.usefixtures("quick")
def test_doctor_measures_and_keeps() -> None:
    outcome = CliRunner().invoke(app, ["doctor", "--measure", "--json"])
    found = json.loads(outcome.stdout)["measured"]
    kept = machines.measured()
    assert kept is not None
    assert found["kept_in"] == str(machines.measured_path())
    assert kept.read_bytes_per_s == found["read_bytes_per_s"] == 1e15
    assert kept.disk_bytes_per_s is None or kept.disk_bytes_per_s > 0
    # With such speeds all the time of a step is fixed cost.
    assert kept.layer_floor_s > 0
    assert kept.index_ops_per_s > 0
    assert kept.key_floor_s >= 0
    assert kept.key_tile_s >= 0
    assert kept.token_floor_s >= 0
    plan = CliRunner().invoke(app, ["plan", "tiny-v4-flash", "--context", "4K", "--json"])
    time = json.loads(plan.stdout)["time"]
    assert time["tokens_per_s"] <= 1 / (4 * kept.layer_floor_s)


@pytest.mark.usefixtures("quick")
def test_figures_are_shown_with_their_units() -> None:
    text = CliRunner().invoke(app, ["doctor", "--measure"]).stdout
    assert "1,000,000.0 GB/s" in text
    assert "machine.json" in text


@pytest.mark.usefixtures("quick")
def test_the_file_that_was_read_is_gone(tmp_path: Path) -> None:
    calibration.calibrate()
    assert not list(tmp_path.rglob("disk-*"))


def test_kernel_rates_are_operations_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel runs on small operands and is said to take two seconds."""
    for name, value in {"_WIDTH": 128, "_ROWS": 4}.items():
        monkeypatch.setattr(calibration, name, value)

    def two_seconds(run: Callable[[], object]) -> float:
        run()
        return 2.0

    monkeypatch.setattr(calibration, "_median_s", two_seconds)
    assert calibration._product_flops_per_s(rounded=True) == 2 * 4 * 128 * 128 / 2.0
    assert calibration._int8_product_ops_per_s() == 3 * 2 * 4 * 128 * 128 / 2.0
    assert calibration._attention_ops_per_s() == 2 * 64 * 64 * 640 * (512 + 512) / 2.0


def test_the_index_is_taken_apart_as_it_was_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times made from known costs give the costs back."""
    ops_per_s, floor_s, tile_s, threads = 2e11, 3e-10, 5e-9, 2

    def made_up(queries: int, num_keys: int, heads: int, dim: int, topk: int) -> float:
        shared = index_tile(queries, heads, threads)
        return queries * num_keys * (2 * heads * dim / ops_per_s + floor_s + tile_s / shared)

    monkeypatch.setattr(calibration, "_select_s", made_up)
    figures: dict[str, Any] = {field.name: 0 for field in fields(machines.Measured)} | {"threads": threads}
    found = calibration._with_index(machines.Measured(**figures), configuration.load("tiny-v4-flash"))
    assert found.index_ops_per_s == pytest.approx(ops_per_s)
    assert found.key_floor_s == pytest.approx(floor_s)
    assert found.key_tile_s == pytest.approx(tile_s)


@pytest.mark.parametrize(
    ("queries", "heads", "threads", "shared"),
    [
        (1, 64, 2, 1),
        (8, 64, 2, 1),
        (9, 64, 2, 2),
        (128, 9, 2, 16),
        (5000, 64, 2, 16),
        (5000, 8, 2, 64),
        (130, 2, 2, 17),
    ],
)
def test_queries_that_share_an_unpacked_key(queries: int, heads: int, threads: int, shared: int) -> None:
    assert index_tile(queries, heads, threads) == shared
