"""A disk that may lose its power: what was done to a folder, and what of it may be there afterwards. Knows no store.

What holds for sure is what a file held when it was last synced, and the names of a folder when the folder was. Of what
came later any part may hold: each write or none of it or some of its sectors, whatever order they were made in, the
longer file with other bytes in it; each name as it was at the sync or at any time since, a renamed file under both its
names or under none. One thing is assumed, by SQLite as well: a write leaves the bytes beside it alone.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_ENTRY = struct.Struct("<5q")
_SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)
_GRAINS = (512, 4096, 1 << 40)
LONG_AGO_S = 1_000_000


@dataclass(frozen=True)
class Entry:
    """One line of the record that `power.c` makes: o(pen), w(rite), t(runcate), s(ync), r(ename), u(nlink), m(kdir)."""

    what: str
    fd: int
    at: int
    path: str
    data: bytes


def entries(record: bytes) -> list[Entry]:
    found, at = [], 0
    while at < len(record):
        what, fd, number, path_bytes, data_bytes = _ENTRY.unpack_from(record, at)
        middle = at + _ENTRY.size + path_bytes
        path = record[at + _ENTRY.size : middle].decode()
        at = middle + data_bytes
        found.append(Entry(chr(what), fd, number, path.strip("/"), record[middle:at]))
    return found


@dataclass(frozen=True)
class Loss:
    """How one loss of power goes: which share holds of what was not synced, in which pieces, what fills holes."""

    dice: random.Random
    share: float
    named_share: float
    grain: int
    noisy: bool

    @classmethod
    def any(cls, dice: random.Random) -> Loss:
        return cls(dice, dice.choice(_SHARES), dice.choice(_SHARES), dice.choice(_GRAINS), dice.random() < 0.5)

    def content(self, content: bytearray, at: int, data: bytes | None) -> None:
        """Does to a file what may be left of one write, or of cutting it at `at`."""
        for start, piece in _pieces(at, data, self.grain):
            if self.dice.random() < self.share:
                _write(content, start, piece)
            elif piece is not None and self.dice.random() < 0.3 and (beyond := start + len(piece) - len(content)) > 0:
                content += self.dice.randbytes(beyond) if self.noisy else bytes(beyond)


def _pieces(at: int, data: bytes | None, grain: int) -> Iterator[tuple[int, bytes | None]]:
    if data is None:
        yield at, None
        return
    start = at
    while start < at + len(data):
        stop = min((start // grain + 1) * grain, at + len(data))
        yield start, data[start - at : stop - at]
        start = stop


def _write(content: bytearray, at: int, data: bytes | None) -> None:
    content += bytes(max(0, at - len(content)))
    if data is None:
        del content[at:]
    else:
        content[at : at + len(data)] = data


@dataclass(eq=False)
class File:
    """What was synced, and what was done since: bytes written at a place, or None for a new length."""

    synced: bytes = b""
    since: list[tuple[int, bytes | None]] = field(default_factory=list)

    def whole(self) -> bytes:
        content = bytearray(self.synced)
        for at, data in self.since:
            _write(content, at, data)
        return bytes(content)

    def sync(self) -> None:
        self.synced, self.since = self.whole(), []

    def after(self, loss: Loss) -> File:
        content = bytearray(self.synced)
        for at, data in self.since:
            loss.content(content, at, data)
        return File(bytes(content))


@dataclass(eq=False)
class Folder:
    """For each name what it stood for at the last sync (None: nothing), and each thing it has stood for since."""

    names: dict[str, list[File | Folder | None]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Folder:
        """A real folder, all of it synced."""
        return cls({one.name: [cls.read(one) if one.is_dir() else File(one.read_bytes())] for one in path.iterdir()})

    def now(self, name: str) -> File | Folder | None:
        return self.names.get(name, [None])[-1]

    def give(self, name: str, what: File | Folder | None) -> None:
        self.names.setdefault(name, [None]).append(what)

    def sync(self) -> None:
        self.names = {name: [meant[-1]] for name, meant in self.names.items() if meant[-1] is not None}

    def after(self, loss: Loss) -> Folder:
        """What is there when the power is back; nothing of it can get lost any more."""
        left = Folder()
        for name, meant in self.names.items():
            what = meant[-1] if loss.dice.random() < loss.named_share else loss.dice.choice(meant)
            if what is not None:
                left.names[name] = [what.after(loss)]
        return left

    def write(self, path: Path) -> None:
        """Makes it a real folder, of an age at which nobody takes its files for new ones."""
        path.mkdir(mode=0o700)
        for name in self.names:
            what = self.now(name)
            if isinstance(what, Folder):
                what.write(path / name)
            elif what is not None:
                (path / name).write_bytes(what.whole())
                os.utime(path / name, (LONG_AGO_S, LONG_AGO_S))


class Disk:
    """A folder to which the entries of a record are done again; it lies about syncs of the kinds in `lies`."""

    def __init__(self, root: Folder, lies: Collection[type[File] | type[Folder]] = ()) -> None:
        self.root, self.lies = root, lies
        self._open: dict[int, File | Folder] = {}

    def do(self, entry: Entry) -> None:
        parent, _, name = entry.path.rpartition("/")
        what = self._open.get(entry.fd)
        if entry.what == "o":
            self._open[entry.fd] = self._opened(entry, self._folder(parent), name)
        elif entry.what == "s" and what is not None and type(what) not in self.lies:
            what.sync()
        elif entry.what in "wt" and isinstance(what, File):
            what.since.append((entry.at, entry.data if entry.what == "w" else None))
        elif entry.what == "m":
            self._folder(parent).give(name, Folder())
        elif entry.what == "u":
            self._folder(parent).give(name, None)
        elif entry.what == "r":
            moved = self._folder(parent).now(name)
            self._folder(parent).give(name, None)
            to, _, new = entry.data.decode().strip("/").rpartition("/")
            self._folder(to).give(new, moved)

    def _opened(self, entry: Entry, parent: Folder, name: str) -> File | Folder:
        what = parent.now(name) if name else self.root
        if what is None:
            what = File()
            parent.give(name, what)
        if entry.at and isinstance(what, File):
            what.since.append((0, None))
        return what

    def _folder(self, path: str) -> Folder:
        folder = self.root
        for name in filter(None, path.split("/")):
            found = folder.now(name)
            assert isinstance(found, Folder), path
            folder = found
        return folder
