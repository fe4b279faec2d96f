"""Runs a module of the tests again with a library of ours, built from its C source, in front of the system's."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def preload(source: Path, symbol: str, module: str) -> None:
    """Returns where the library is loaded; else builds it, runs the program with it and ends as that does."""
    if hasattr(ctypes.CDLL(None), symbol):
        return
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / f"{source.stem}.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(built), str(source), "-ldl"], check=True)
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(built)}, check=False).returncode)
