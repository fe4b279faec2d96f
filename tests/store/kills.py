"""Writers killed with SIGKILL at random points, and what is found afterwards. Run as a program: prints one JSON object.

    python -m tests.store.kills FOLDER COUNT SEED

A writer feeds texts that follow from their number, and reports each append that has returned. Then the store is opened
anew: nothing temporary may be left, what was reported must be there, and everything that is found must be the
truth, byte for byte. The same kills meet a writer that writes files in place, so that the harness is seen to see.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tests.store.fakes import Feeder, restore, timeline, true_rows

from tenfold.store import Store

Report = Callable[[int, int], int]
Writer = Callable[[Path, int, Report], None]
WIDE = timeline(widen=24)
CHUNK_TOKENS = 600
TEXT_TOKENS = 2400
LONGEST_S = 0.12
"""A writer lives so long at most: a dozen appends."""
_PATIENCE = 10


def text(number: int) -> list[int]:
    """Text `number`; three in a row share their first half."""
    generator = np.random.default_rng(number // 3), np.random.default_rng(1000 + number)
    return [int(token) for one in generator for token in one.integers(0, 5000, TEXT_TOKENS // 2)]


def write_store(folder: Path, first: int, report: Report) -> None:
    """Feeds text after text for ever; the second half of each is cut into chunks of its own."""
    store = Store(folder)
    number = first
    while True:
        feeder, tokens = Feeder(store, WIDE), text(number)
        for start in range(0, len(tokens), CHUNK_TOKENS):
            feeder.feed(tokens[start : start + CHUNK_TOKENS])
            report(number, len(feeder.tokens))
        number += 1


def write_naively(folder: Path, first: int, report: Report) -> None:
    """Files in place, in pieces, without a checksum."""
    folder.mkdir(exist_ok=True)
    number, content = first, naive_content(first)
    while True:
        with (folder / str(number)).open("wb", buffering=0) as file:
            for start in range(0, len(content), 4096):
                file.write(content[start : start + 4096])
        report(number, TEXT_TOKENS)
        number += 1


def naive_content(number: int) -> bytes:
    return b"".join(rows.numpy().tobytes() for rows in true_rows(text(number), WIDE).values())


def killed(write: Writer, folder: Path, first: int, wait_s: float) -> list[tuple[int, int]]:
    """What a writer had reported when it was killed after `wait_s`: (number, tokens) in order."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        write(folder, first, lambda number, count: os.write(writing, f"{number} {count}\n".encode()))
    os.close(writing)
    with os.fdopen(reading, "rb") as reports:
        time.sleep(wait_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lines = reports.read().decode().splitlines()
    return [(int(number), int(count)) for number, count in map(str.split, lines)]


def kills(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Kills `count` writers of the store and as many naive ones; counts what is wrong afterwards.

    More where writers are so starved that they do not finish one append each on average.
    """
    generator = np.random.default_rng(seed)
    found = {"kills": 0, "corrupt": 0, "lost": 0, "temporaries_left": 0, "temporaries_swept": 0, "warnings": 0,
             "reported_appends": 0, "naive_corrupt": 0}  # fmt: skip
    while found["kills"] < count or count * _PATIENCE > found["kills"] >= found["reported_appends"]:
        first = found["kills"] * 1000
        found["kills"] += 1
        reported = killed(write_store, folder / "store", first, generator.uniform(0, LONGEST_S))
        found["reported_appends"] += len(reported)
        found["temporaries_swept"] += len(list((folder / "store").glob("temporary/*")))
        check(folder / "store", first, reported, found)
        naive = killed(write_naively, folder / "naive", first, generator.uniform(0, LONGEST_S))
        written = range(first, naive[-1][0] + 2 if naive else first + 1)
        found["naive_corrupt"] += sum(
            is_torn(folder / "naive" / str(number), naive_content(first)) for number in written
        )
        shutil.rmtree(folder / "naive", ignore_errors=True)
    return found


def check(folder: Path, first: int, reported: list[tuple[int, int]], found: dict[str, int]) -> None:
    """The last reported append of each text must be found, and the text after it, if it is, must be the truth."""
    warned: list[str] = []
    store = Store(folder, warn=warned.append)
    found["temporaries_left"] += len(list((folder / "temporary").iterdir()))
    longest = dict(reported)
    longest.setdefault(reported[-1][0] + 1 if reported else first, 0)
    for number, count in longest.items():
        try:
            position = restore(store, text(number), WIDE).position
        except AssertionError:
            found["corrupt"] += 1
        else:
            found["lost"] += position < count
    found["warnings"] += len(warned)
    store.close()


def is_torn(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() != content


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(kills(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
