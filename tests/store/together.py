"""Processes that write, read and evict in one store at once. Run as a program: prints one JSON object.

python -m tests.store.together FOLDER           two, each with the same texts
python -m tests.store.together FOLDER SECONDS   four for so long, killed and started again, in a store that is small
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
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


CROWD, LIFE_S, LONGEST_STOP_S = 4, 3.0, 120.0


def mix(folder: Path, seed: int, limit_bytes: int, until_s: float) -> tuple[int, int]:
    """Feeds and restores texts at random until it is time; how many, and how many warnings."""
    warned: list[str] = []
    dice, rounds = random.Random(seed), 0
    store = Store(folder, limit_bytes, warn=warned.append)
    while time.monotonic() < until_s:
        tokens = text(dice.randrange(TEXTS))
        if dice.random() < 0.5:
            Feeder(store, WIDE).feed(tokens, dice.choice((300, CHUNK_TOKENS, 5000)))
        restore(store, tokens, WIDE)
        rounds += 1
    store.close()
    print(*warned, sep="\n", file=sys.stderr, end="")
    return rounds, len(warned)


def crowd(folder: Path, seconds: float) -> dict[str, int]:
    """Each lives some seconds, then is killed and another one comes; the last ones may end."""
    limit_bytes = _bytes_of_all(folder.with_name("measured")) // 2
    until_s, dice, born = time.monotonic() + seconds, random.Random(10), 0
    found = {"rounds": 0, "warnings": 0, "killed": 0, "failed": 0, "stuck": 0}
    reading, writing = os.pipe()
    living: list[int] = []
    while time.monotonic() < until_s:
        while len(living) < CROWD:
            born += 1
            living.append(_born(folder, born, limit_bytes, until_s, writing))
        time.sleep(dice.uniform(0, LIFE_S) / CROWD)
        victim = living.pop(dice.randrange(CROWD))
        os.kill(victim, signal.SIGKILL)
        status = os.waitpid(victim, 0)[1]
        found["killed" if status == signal.SIGKILL else "failed"] += status != 0
    codes = [_code(child) for child in living]
    found["stuck"] = codes.count(None)
    found["failed"] += sum(code not in (0, None) for code in codes)
    os.close(writing)
    with os.fdopen(reading, "rb") as lines:
        for rounds, warnings in (map(int, line.split()) for line in lines):
            found["rounds"] += rounds
            found["warnings"] += warnings
    return found | _left(folder, limit_bytes)


def _born(folder: Path, seed: int, limit_bytes: int, until_s: float, writing: int) -> int:
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, b"%d %d\n" % mix(folder, seed, limit_bytes, until_s))
        except BaseException as exc:
            print(repr(exc), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child


def _code(child: int) -> int | None:
    """How it ended by itself; None if it had to be killed."""
    until_s = time.monotonic() + LONGEST_STOP_S
    while time.monotonic() < until_s:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _left(folder: Path, limit_bytes: int) -> dict[str, int]:
    """What is wrong with what they leave behind; an adopted or unfinished text each may be over the limit."""
    used = sum(path.stat().st_size for kind in ("segments", "points") for path in folder.glob(f"{kind}/*/*"))
    store = Store(folder, limit_bytes)
    for number in range(TEXTS):
        restore(store, text(number), WIDE)
    store.close()
    return {
        "over_limit": max(0, used - limit_bytes - CROWD * 2 * limit_bytes // TEXTS),
        "temporaries_left": len(list((folder / "temporary").iterdir())),
    }


def _bytes_of_all(folder: Path) -> int:
    store = Store(folder)
    for number in range(TEXTS):
        Feeder(store, WIDE).feed(text(number), CHUNK_TOKENS)
    total = store.index.total_bytes()
    store.close()
    return total


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
    if len(sys.argv) > 2:
        print(json.dumps(crowd(Path(sys.argv[1]), float(sys.argv[2]))))
    else:
        main(Path(sys.argv[1]))
