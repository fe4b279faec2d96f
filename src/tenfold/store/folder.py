"""The store's folder: whose it is, where files lie, how one appears all at once or not at all. Knows no contents.

A file is written under a temporary name, synced and renamed; its writer holds a lock on it meanwhile, so that what a
dead process left behind can be told from what a living one is writing, also across containers.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tenfold.errors import StoreError
from tenfold.machine import cache_folder
from tenfold.store import files

__all__ = ["Folder", "default_folder"]

_MARK = "tenfold store, version "
_VERSION = 1
_NAME = {"segments": re.compile("[0-9a-f]{64}"), "points": re.compile("[0-9a-f]{64}-[1-9][0-9]{0,11}")}
_FRESH_S = 10.0
_RESERVE_SHARE = 100
_LEAST_RESERVE_BYTES, _MOST_RESERVE_BYTES = 2 << 20, 1 << 30


def default_folder() -> Path:
    """The store in the user's cache folder."""
    return cache_folder() / "store"


class Folder:
    """An opened folder: made if missing, refused if it is not a store that this user may write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.was_open_to_others = False
        try:
            self._open()
        except OSError as exc:
            raise StoreError(
                f"the store {path} cannot be used: {exc.strerror or exc}; choose a folder that you may write to"
            ) from None

    def _open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = self.path.stat()
        if status.st_uid != os.geteuid():
            raise StoreError(
                f"the store {self.path} belongs to user {status.st_uid}, not to you; choose a folder of your own"
            )
        if not os.access(self.path, os.W_OK | os.X_OK | os.R_OK):
            raise StoreError(f"the store {self.path} is not writable; choose a folder that you may write to")
        mark = self.path / "VERSION"
        if mark.is_file():
            self._check_version(mark)
        elif any(self.path.iterdir()) and not self._is_being_made():
            raise StoreError(f"{self.path} holds other files than a store's; choose an empty folder")
        if status.st_mode & 0o077:
            self.was_open_to_others = mark.is_file()
            self.path.chmod(0o700)  # what was read may be private
        for name in ("segments", "points", "temporary"):
            (self.path / name).mkdir(exist_ok=True, mode=0o700)
        if not mark.is_file():
            self.place(mark, [f"{_MARK}{_VERSION}\n".encode()])

    def _is_being_made(self) -> bool:
        """Whether another process is just making this store, or died while it did."""
        return {child.name for child in self.path.iterdir()} <= {"segments", "points", "temporary", "VERSION"}

    def _check_version(self, mark: Path) -> None:
        text = mark.read_text(encoding="utf-8", errors="replace").strip()
        version = text.removeprefix(_MARK)
        if version == text or not version.isdigit():
            raise StoreError(f"{self.path} holds a VERSION that is not a store's; choose an empty folder")
        if int(version) != _VERSION:
            raise StoreError(
                f"the store {self.path} is of version {version}, this tenfold reads version {_VERSION}; "
                "choose another folder, or update tenfold"
            )

    @property
    def index(self) -> Path:
        return self.path / "index.sqlite"

    def segment(self, key: str) -> Path:
        return self.path / "segments" / key[:2] / key

    def point(self, key: str, position: int) -> Path:
        return self.path / "points" / key[:2] / f"{key}-{position}"

    def found(self, kind: str) -> set[str]:
        """The names of the files in "segments" or "points"; what has no name of ours is left alone."""
        shelves = [shelf for shelf in _entries(self.path / kind) if shelf.is_dir(follow_symlinks=False)]
        return {
            entry.name
            for shelf in shelves
            for entry in _entries(shelf)
            if _NAME[kind].fullmatch(entry.name) and entry.name.startswith(shelf.name)
        }

    def room_bytes(self) -> int:
        """Bytes that may be written: what is free less a hundredth of the disk, 2 MiB to 1 GiB, which others need."""
        status = os.statvfs(self.path)
        reserve = status.f_blocks * status.f_frsize // _RESERVE_SHARE
        return status.f_bavail * status.f_frsize - min(max(reserve, _LEAST_RESERVE_BYTES), _MOST_RESERVE_BYTES)

    def place(self, path: Path, pieces: Iterable[bytes | memoryview]) -> None:
        """Writes a file so that it is there whole and on the disk, or not at all; raises OSError."""
        with self.temporary(pieces) as written:
            self.finish(written, path)

    @contextmanager
    def temporary(self, pieces: Iterable[bytes | memoryview]) -> Iterator[Path]:
        """A file written and synced under a temporary name; gone afterwards unless it was given its own."""
        path = self.path / "temporary" / f"{os.getpid()}-{secrets.token_hex(8)}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            files.write_all(fd, pieces)
            os.fsync(fd)
            yield path
        finally:
            try:
                path.unlink(missing_ok=True)
            finally:
                os.close(fd)

    def finish(self, written: Path, path: Path) -> None:
        """Gives a temporary file its name, on the disk as well."""
        self._make_shelf(path.parent)
        written.rename(path)
        _sync_folder(path.parent)

    def _make_shelf(self, shelf: Path) -> None:
        if not shelf.is_dir():
            shelf.mkdir(exist_ok=True, mode=0o700)
            _sync_folder(shelf.parent)

    def sweep(self) -> int:
        """Removes the temporary files of processes that are gone; returns how many."""
        swept = 0
        for entry in _entries(self.path / "temporary"):
            if _is_abandoned(Path(entry.path)):
                Path(entry.path).unlink(missing_ok=True)
                swept += 1
        return swept


def _entries(folder: Path | os.DirEntry[str]) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from list(entries)
    except FileNotFoundError:
        return


def _is_abandoned(path: Path) -> bool:
    """Nobody holds the lock, and nobody is between making the file and locking it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # a link or what else does not belong here
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        age_s = time.time() - os.fstat(fd).st_mtime
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return not _is_alive(path.name.partition("-")[0]) or not -_FRESH_S < age_s < _FRESH_S


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    return True


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
