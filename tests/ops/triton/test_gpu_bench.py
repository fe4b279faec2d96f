"""benchmarks/gpu.py at tiny sizes in the interpreter: only that every part of it still runs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.ops.triton.card import DEVICE

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("ops",), ("linear wq_b fp8 n=1", "top-k 1M", "attention v3.2", "hc_merge n=32")),
        (("steps", "--models", "v4-flash"), ("v4-flash 64 x 1", "v4-flash 256 x 3", "v4-flash chunk of 8 before 256")),
        (("steps", "--models", "v3.2"), ("v3.2 64 x 1", "v3.2 256 x 3", "v3.2 chunk of 8 before 256")),
        (("transformers",), ("transformers eager 512 x 1",)),
    ],
    ids=["ops", "v4-flash", "v3.2", "transformers"],
)
def test_every_part_runs(words: tuple[str, ...], wanted: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *words, "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = (tmp_path / f"gpu-{words[0]}.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line)["what"] for line in lines]
    assert set(wanted) <= set(found), found


def test_what_was_found_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is out of time is left for the next run."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    gpu: Any = importlib.import_module("gpu")

    def bench(ends_s: float = float("inf")) -> Any:
        return gpu.Bench(DEVICE, None, True, tmp_path, "ops", ends_s)

    first = bench()
    first.note("limits", copy_tb_per_s=1.0)
    first.note("linear", us=12.0, share_of_limit=0.5, predicted_us="13")
    second = bench()
    second.resume()
    assert [second.wants(what) for what in ("limits", "linear", "attention")] == [True, False, True]
    late = bench(ends_s=0.0)
    late.resume()
    assert not late.wants("attention")
    capsys.readouterr()
    late.table()
    table = capsys.readouterr().out
    assert "12.0 us     50%  13" in table
    assert "--resume" in table
    other = (tmp_path / "gpu-ops.jsonl").read_text(encoding="utf-8").replace("interpreter", "another card")
    (tmp_path / "gpu-ops.jsonl").write_text(other, encoding="utf-8")
    third = bench()
    third.resume()
    assert third.wants("linear")
