"""Libraries of ours in front of the system's: built from their C source, and programs of the tests run with them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def built(source: Path, folder: Path, *options: str) -> Path:
    """The library of `source`, made in `folder`."""
    library = folder / f"{source.stem}.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", *options, "-o", str(library), str(source), "-ldl"], check=True)
    return library


def preload(source: Path, symbol: str, module: str) -> None:
    """Returns where the library is loaded; else builds it, runs the program with it and ends as that does."""
    if hasattr(ctypes.CDLL(None), symbol):
        return
    with tempfile.TemporaryDirectory() as folder:
        library = built(source, Path(folder))
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(library)}, check=False).returncode)
