"""Every k-th call to the system fails in turn, SQLite's among them. Run as a program: prints one JSON object.

    python -m tests.store.faults FOLDER STRIDE [PART]

A store is opened, read, written and evicted from while the k-th call that touches its folder fails, for every
STRIDE-th k (parts 0 to STRIDE - 1 together are every k): once, from there on, or with half the bytes. Opening may
then be refused; nothing else may raise, what is found must be the truth byte for byte, and once the disk is well
again the same store stores again.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tests.store.fakes import Feeder, restore
from tests.store.preload import preload

from tenfold.errors import StoreError
from tenfold.store import Store

SOURCE = Path(__file__).with_suffix(".c")
ONCE, FROM_THERE, SHORT = range(3)
WAYS = {
    "EIO once": (errno.EIO, ONCE),
    "EIO from there": (errno.EIO, FROM_THERE),
    "ENOSPC once": (errno.ENOSPC, ONCE),
    "ENOSPC from there": (errno.ENOSPC, FROM_THERE),
    "EMFILE from there": (errno.EMFILE, FROM_THERE),
    "EINTR once": (errno.EINTR, ONCE),
    "half": (0, SHORT),
}


def text(number: int) -> list[int]:
    """Texts share their first 120 tokens."""
    parts = np.random.default_rng(0).integers(0, 999, 120), np.random.default_rng(100 + number).integers(0, 999, 90)
    return [int(token) for part in parts for token in part]


def feed(store: Store, number: int) -> None:
    Feeder(store).feed(text(number), 70)


def use(folder: Path, limit_bytes: int, warned: list[str]) -> Store:
    """All that a store does, from its opening."""
    store = Store(folder, limit_bytes, warn=warned.append)
    for number in (0, 2, 1, 3):
        restore(store, text(number))
        feed(store, number)
    restore(store, text(0))
    return store


def case(folder: Path, limit_bytes: int, arm: Callable[[Path], None], disarm: Callable[[], int]) -> dict[str, int]:
    """What came of one failure."""
    found = {"calls": 0, "refused": 0, "not_again": 0}
    warned: list[str] = []
    store = None
    arm(folder)
    try:
        store = use(folder, limit_bytes, warned)
    except StoreError:
        found["refused"] = 1
    finally:
        found["calls"] = disarm()
    store = store or Store(folder, limit_bytes, warn=warned.append)
    for _ in range(2):  # a store that has been opened anew, too
        feed(store, 4)
        found["not_again"] += restore(store, text(4)).position != len(text(4))
        for number in range(4):
            restore(store, text(number))
        store.close()
        store = Store(folder, limit_bytes, warn=warned.append)
    store.close()
    return found


def main(folder: Path, stride: int, part: int = 0) -> None:
    library = ctypes.CDLL(None)
    files = len(os.listdir("/proc/self/fd"))
    whole = Store(folder / "whole")
    for number in range(3):
        feed(whole, number)
    limit_bytes = int(1.2 * whole.index.total_bytes())
    whole.close()

    def run(k: int, number: int, way: int) -> dict[str, int]:
        copy = folder / "copy"
        shutil.copytree(folder / "whole", copy)
        try:
            return case(
                copy,
                limit_bytes,
                lambda path: library.faults_arm(str(path).encode(), ctypes.c_long(k), number, way),
                library.faults_disarm,
            )
        finally:
            library.faults_disarm()
            shutil.rmtree(copy)

    calls = run(0, 0, ONCE)["calls"]
    total = {"calls": calls, "cases": 0, "refused": 0, "raised": 0, "wrong": 0, "not_again": 0}
    for at, (name, (number, way)) in enumerate(WAYS.items()):
        for k in range(1 + (at + part) % stride, calls + 1, stride):
            total["cases"] += 1
            try:
                found = run(k, number, way)
            except Exception as exc:
                kind = "wrong" if isinstance(exc, AssertionError) else "raised"
                total[kind] += 1
                print(f"{name}, call {k}: {exc!r}", file=sys.stderr)
                continue
            for key in ("refused", "not_again"):
                total[key] += found[key]
            if found["not_again"]:
                print(f"{name}, call {k}: nothing is stored any more", file=sys.stderr)
    total["files_left_open"] = len(os.listdir("/proc/self/fd")) - files
    print(json.dumps(total))


if __name__ == "__main__":
    preload(SOURCE, "faults_arm", "tests.store.faults")
    torch.set_num_threads(1)
    place, *numbers = sys.argv[1:]
    main(Path(place).resolve(), *map(int, numbers))
