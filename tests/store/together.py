"""Processes that write, read and evict in one store at once. Run as a program: prints one JSON object.

python -m tests.store.together FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from tests.store.fakes import Feeder, restore
from tests.store.kills import CHUNK_TOKENS, WIDE, text

from tenfold.store import Store

TEXTS = 12


def work(folder: Path, first: int, limit_bytes: int | None) -> int:
    """Feeds and restores the same texts as everybody, each in an order of its own; returns the warnings."""
    warned: list[str] = []
    store = Store(folder, limit_bytes, warn=warned.append)
    for number in range(TEXTS):
        tokens = text((number * 5 + first) % TEXTS)
        feeder = Feeder(store, WIDE)
        feeder.feed(tokens, CHUNK_TOKENS)
        restore(store, tokens, WIDE)
    store.close()
    print(*warned, sep="\n", file=sys.stderr, end="")
    return len(warned)


def together(folder: Path, limit_bytes: int | None) -> tuple[int, int]:
    """Two processes at once; how many failed, and how many warned."""
    children = []
    for first in (0, 3):
        child = os.fork()
        if child == 0:
            os._exit(_status(folder, first, limit_bytes))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return sum(code not in (0, 3) for code in codes), codes.count(3)


def _status(folder: Path, first: int, limit_bytes: int | None) -> int:
    try:
        return 3 if work(folder, first, limit_bytes) else 0
    except BaseException as exc:
        print(repr(exc), file=sys.stderr)
        return 4


def main(folder: Path) -> None:
    failed, warnings = together(folder, None)
    store = Store(folder)
    missing = sum(restore(store, text(number), WIDE).position < len(text(number)) for number in range(TEXTS))
    before, total_bytes = len(store.index.segments()), store.index.total_bytes()
    store.close()
    again = together(folder, None)
    store = Store(folder)
    written_again = len(store.index.segments()) - before
    store.close()
    limit_bytes = total_bytes // 3
    evicting = together(folder, limit_bytes)
    warned: list[str] = []
    store = Store(folder, limit_bytes, warn=warned.append)
    wrong = sum(restore(store, text(number), WIDE).position > len(text(number)) for number in range(TEXTS))
    found = {
        "failed": failed + again[0] + evicting[0],
        "wrong": wrong,
        "missing": missing,
        "warnings": warnings + again[1] + evicting[1] + len(warned),
        "written_again": written_again,
        "over_limit": max(0, store.index.total_bytes() - limit_bytes - total_bytes // TEXTS),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
