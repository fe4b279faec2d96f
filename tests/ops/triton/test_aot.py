"""Kernels compiled for GPUs that are not here: shared memory, spills, matrix instructions (see triton_aot.py)."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "triton_aot.py"
SHARED_LIMIT_KB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
TABLE = SCRIPT.parent / "results" / "triton-aot.csv"
PRODUCTS = ("linear", "gate_up", "down", "hyper project", "attention", "index scores")


def compiled(*words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("--json", *words))
    return found


def run(*words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error:TRITON", SCRIPT, *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def known_spills() -> dict[tuple[str, int], int]:
    """Bytes of stack by kernel and architecture, as the table names them: what fills all registers spills a little."""
    with TABLE.open(newline="") as file:
        return {(one["kernel"], int(one["arch"])): int(one["stack_bytes"]) for one in csv.DictReader(file)}


def check(found: list[dict[str, Any]]) -> None:
    assert found
    known = known_spills()
    for one in found:
        assert one["shared_bytes"] <= SHARED_LIMIT_KB[one["arch"]] * 1024, one
        assert one["stack_bytes"] <= known.get((one["kernel"], one["arch"]), 0), one
        if one["kernel"].startswith(PRODUCTS):
            assert one["matrix"], one
            assert one["wide_loads"], one


def test_launches_are_what_was_compiled() -> None:
    """No count is specialised by its value: a new kernel would be compiled in the middle of a text."""
    assert "top-k, writing" in run("--names").splitlines()


def test_a_product_of_a_decode_step() -> None:
    check(compiled("--kernel", "linear fp8, 1 rows, 1 parts", "--arch", "90"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_LIMIT_KB)
def test_every_kernel(arch: int) -> None:
    check(compiled("--arch", str(arch)))
