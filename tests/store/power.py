"""Losses of power at any moment of a writer's life, and what is found afterwards. Prints one JSON object.

    python -m tests.store.power STATES SEED

A writer feeds, evicts, restores and opens a store again while a preloaded library records all that it does to its
files, SQLite's among them. From the record disks are made as they may be when the power comes back (`disk.py` says
how), and each is opened: what is found must be the truth byte for byte; an append that had returned must be found,
unless it may have been evicted since; everything can be stored again; nothing temporary is left. The next writer goes
on where that one ended, or from one of these disks, or starts with nothing. The index is in WAL mode with
synchronous=NORMAL, so that its last commits may be lost: the files bring them back.

The same harness meets a writer that syncs and checks nothing, whose files must be found wrong; and the store on disks
that lie about syncs of files, of folders or of both, where something must be found lost, but nothing wrong.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tests.store.disk import Disk, Entry, File, Folder, Loss, entries
from tests.store.fakes import Feeder, restore, timeline, true_rows
from tests.store.preload import preload

from tenfold.errors import StoreError
from tenfold.store import Store

SOURCE = Path(__file__).with_suffix(".c")
WIDE = timeline(widen=8)
TEXTS, TEXT_TOKENS, SHARED_TOKENS = 5, 210, 120
LIMIT_BYTES = 60_000
"""Less than all texts take."""
LOSSES = 40
"""For each record of a writer."""

Found = dict[str, int]
Lies = Collection[type[File] | type[Folder]]
Say = Callable[[object], None]
Writer = Callable[[Path, random.Random, Say], Callable[[], None]]
Check = Callable[[Path, list[int], Found], None]


@cache
def text(number: int) -> list[int]:
    """Texts share their beginning."""
    lengths = SHARED_TOKENS, TEXT_TOKENS - SHARED_TOKENS
    parts = [
        np.random.default_rng(seed).integers(0, 999, n) for seed, n in zip((0, 100 + number), lengths, strict=True)
    ]
    return [int(token) for part in parts for token in part]


def positions(store: Store) -> list[int]:
    return [store.match(WIDE, text(number)).position for number in range(TEXTS)]


def write_store(folder: Path, dice: random.Random, say: Say) -> Callable[[], None]:
    """A life of a store; says what is stored whenever something may have changed. Returns how to end it."""
    limit_bytes = dice.choice((None, LIMIT_BYTES))
    store = Store(folder, limit_bytes, warn=lambda text: None)
    say(positions(store))
    for _ in range(dice.randint(3, 9)):
        tokens, doing = text(dice.randrange(TEXTS)), dice.random()
        if doing < 0.15:
            store.close()
            store = Store(folder, limit_bytes, warn=lambda text: None)
        elif doing < 0.3:
            restore(store, tokens, WIDE)
        else:
            feeder, chunk = Feeder(store, WIDE), dice.choice((30, 70, TEXT_TOKENS))
            for start in range(0, TEXT_TOKENS, chunk):
                feeder.feed(tokens[start : start + chunk], kind=dice.choice(("auto", "end")))
                say(positions(store))
        say(positions(store))
    if dice.random() < 0.5:
        store.close()
    return store.close


def write_naively(folder: Path, dice: random.Random, say: Say) -> Callable[[], None]:
    """Renames into place, but neither syncs nor checks."""
    for number in range(TEXTS):
        with (folder / "new").open("wb", buffering=0) as file:
            file.write(naive_content(number))
        (folder / "new").rename(folder / str(number))
    return lambda: None


def naive_content(number: int) -> bytes:
    return b"".join(rows.numpy().tobytes() for rows in true_rows(text(number), WIDE).values())


def recorded(folder: Path, dice: random.Random, write: Writer) -> tuple[list[Entry], Callable[[], None]]:
    """What a writer does, and how to end it."""
    library, count = ctypes.CDLL(None), ctypes.c_int64()
    library.power_stop.restype = ctypes.POINTER(ctypes.c_char)
    library.power_start(str(folder).encode())
    try:
        end = write(folder, dice, lambda what: library.power_say(json.dumps(what).encode()))
    finally:
        record = library.power_stop(ctypes.byref(count))
    return entries(ctypes.string_at(record, count.value)), end


def unlike(folder: Path, told: Path) -> int:
    """How many files differ between what was written and what the record tells; all but what is mapped into memory."""
    trees = [
        {
            str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
            for path in root.rglob("*")
            if not path.name.endswith("-shm")
        }
        for root in (folder, told)
    ]
    return sum(trees[0].get(name, 0) != trees[1].get(name, 0) for name in trees[0].keys() | trees[1].keys())


def required(record: list[Entry], at: int) -> list[int]:
    """What must be found of each text after the first `at` entries: as much as was said before and after them.

    Nothing while files are being evicted or thinned out, since what replaces them may not have been written yet.
    """
    said = [number for number, entry in enumerate(record) if entry.what == "!"]
    before = max((number for number in said if number < at), default=None)
    if before is None:
        return [0] * TEXTS
    after = min((number for number in said if number >= at), default=before)
    if any(entry.what == "u" and entry.path.startswith(("segments", "points")) for entry in record[before:after]):
        return [0] * TEXTS
    return [min(pair) for pair in zip(*(json.loads(record[number].data) for number in (before, after)), strict=True)]


def check(folder: Path, least: list[int], found: Found) -> None:
    """Opens a disk after the loss, reads, stores everything again and reads it, and opens it with a limit."""
    warned: list[str] = []
    try:
        store = Store(folder, warn=warned.append)
    except StoreError as exc:
        found["refused"] += 1
        print(exc, file=sys.stderr)
        return
    there = [restore(store, text(number), WIDE).position for number in range(TEXTS)]
    found["lost"] += any(position < count for position, count in zip(there, least, strict=True))
    found["warned"] += bool(warned)
    store.close()
    if not stored_again(folder):
        found["twice"] += 1
        found["not_again"] += not stored_again(folder)
    store = Store(folder, LIMIT_BYTES, warn=warned.append)
    for number in range(TEXTS):
        restore(store, text(number), WIDE)
    found["over_limit"] += store.index.total_bytes() > LIMIT_BYTES
    store.close()
    found["temporaries_left"] += len(list((folder / "temporary").iterdir()))


def stored_again(folder: Path) -> bool:
    """Whether all is found that is fed, at once and after another opening.

    Where a disk lied it may take two times: rows are checked when they are loaded, so that a segment without a point
    may be taken for whole, and only what has been fed behind it shows that it is not.
    """
    store = Store(folder, warn=lambda text: None)
    for number in range(TEXTS):
        Feeder(store, WIDE).feed(text(number))
    found = [restore(store, text(0), WIDE).position]
    store.close()
    store = Store(folder, warn=lambda text: None)
    found += [restore(store, text(number), WIDE).position for number in range(TEXTS)]
    store.close()
    return set(found) == {TEXT_TOKENS}


def check_naive(folder: Path, least: list[int], found: Found) -> None:
    """Whether a file is there that is not what it should be."""
    for number in range(TEXTS):
        path = folder / str(number)
        assert not path.exists() or path.read_bytes() == naive_content(number), path.name


CHECKS: dict[Writer, Check] = {write_store: check, write_naively: check_naive}


def losses(
    folder: Path,
    states: int,
    seed: int,
    write: Writer = write_store,
    lies: Lies = (),
) -> Found:
    """Makes so many disks and looks at each; what was found, by kind."""
    dice = random.Random(seed)
    root = start(folder / "start", lies, dice)
    kinds = ("wrong", "lost", "refused", "raised", "twice", "not_again", "over_limit", "temporaries_left", "warned",
             "unlike")  # fmt: skip
    found = {"states": 0, "records": 0, "operations": 0} | dict.fromkeys(kinds, 0)
    while found["states"] < states:
        root.write(folder / "live")
        record, end = recorded(folder / "live", dice, write)
        found["records"] += 1
        found["operations"] += sum(entry.what in "wtsrum" for entry in record)
        moments = sorted(dice.randint(0, len(record)) for _ in range(min(LOSSES, states - found["states"])))
        disk, done, lost = Disk(root, lies), 0, Folder()
        for moment in moments:
            for entry in record[done:moment]:
                disk.do(entry)
            done = moment
            lost = disk.root.after(Loss.any(dice))
            found["states"] += 1
            looked_at(folder / "lost", lost, required(record, moment), CHECKS[write], dice, found)
        for entry in record[done:]:
            disk.do(entry)
        disk.root.write(folder / "told")
        found["unlike"] += unlike(folder / "live", folder / "told")
        end()
        root = dice.choice((lost, disk.root, start(folder / "start", lies, dice)))
        for name in ("live", "told"):
            shutil.rmtree(folder / name)
    return found


def start(path: Path, lies: Lies, dice: random.Random) -> Folder:
    """Nothing, or only the mark; or what an honest disk holds of an empty store: a mark that is torn is refused."""
    if not lies:
        return dice.choice((Folder(), Folder({"VERSION": [File(b"tenfold store, version 1\n")]})))
    Store(path).close()
    made = Folder.read(path)
    shutil.rmtree(path)
    return made


def looked_at(
    path: Path,
    lost: Folder,
    least: list[int],
    check: Check,
    dice: random.Random,
    found: Found,
) -> None:
    lost.write(path)
    for mapped in path.glob("*-shm"):  # what is mapped into memory is not recorded: it may hold anything
        mapped.write_bytes(dice.randbytes(dice.choice((0, 1, 32768))))
    try:
        check(path, least, found)
    except Exception as exc:
        found["wrong" if isinstance(exc, AssertionError) else "raised"] += 1
        if check is not check_naive:
            print(f"state {found['states']}: {exc!r}", file=sys.stderr)
    finally:
        shutil.rmtree(path)


def main(folder: Path, states: int, seed: int) -> None:
    few = max(LOSSES, states // 20)
    found: dict[str, object] = dict(losses(folder, states, seed))
    found["naive"] = losses(folder, few, seed, write_naively)
    lying: dict[str, Lies] = {"files": [File], "folders": [Folder], "both": [File, Folder]}
    for name, lies in lying.items():
        found[f"lying_about_{name}"] = losses(folder, few, seed, lies=lies)
    print(json.dumps(found))


if __name__ == "__main__":
    preload(SOURCE, "power_start", "tests.store.power")
    torch.set_num_threads(1)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as place:
        main(Path(place).resolve(), int(sys.argv[1]), int(sys.argv[2]))
