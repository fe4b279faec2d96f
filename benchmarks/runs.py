"""What a result is worth nothing without: the commit and the machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tenfold.machine import this_machine

__all__ = ["commit", "machine_name"]

_ROOT = Path(__file__).parents[1]


def commit() -> str:
    """The commit of this tree, with a plus sign if the engine or its kernels differ from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + "+" * bool(_git("status", "--porcelain", "--", "src", "native"))


def machine_name() -> str:
    machine = this_machine()
    return f"{machine.cpu_model}, {machine.usable_cores} cores"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True, check=False).stdout.strip()
