"""The store's index in SQLite: which segments and points there are, and how they hang together. Reads no files of rows.

Everything here can be rebuilt from the files. Several processes may have it open; what is read and then written
belongs in one `transaction`.
"""

from __future__ import annotations

import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Index", "PointRow", "SegmentRow"]

_BUSY_TIMEOUT_S = 30.0
_BUSY_PAUSE_S = 0.005
_SCHEMA = """
CREATE TABLE IF NOT EXISTS segments (
  key TEXT PRIMARY KEY, digest TEXT NOT NULL, model TEXT NOT NULL, parent TEXT NOT NULL,
  start INTEGER NOT NULL, stop INTEGER NOT NULL, first_token INTEGER NOT NULL, bytes INTEGER NOT NULL,
  hits INTEGER NOT NULL, turn INTEGER NOT NULL, used_s REAL NOT NULL);
CREATE INDEX IF NOT EXISTS children ON segments (parent, start, first_token, digest);
CREATE INDEX IF NOT EXISTS turns ON segments (turn);
CREATE TABLE IF NOT EXISTS points (
  segment TEXT NOT NULL, position INTEGER NOT NULL, kind TEXT NOT NULL, bytes INTEGER NOT NULL,
  PRIMARY KEY (segment, position));
"""
_SEGMENT = "SELECT key, digest, model, parent, start, stop, first_token, bytes, hits, turn, used_s FROM segments"
_POINT = "SELECT segment, position, kind, bytes FROM points"
_SEGMENT_KINDS = (str, str, str, str, int, int, int, int, int, int, float)
_POINT_KINDS = (str, int, str, int)
_KEY = re.compile("([0-9a-f]{64})?")
_AMONG = "IN (SELECT value FROM json_each(?))"


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """One segment. `turn` counts uses in the whole store, whatever the clock says; `used_s` is for people."""

    key: str
    digest: str
    model: str
    parent: str
    start: int
    stop: int
    first_token: int
    bytes: int
    hits: int = 0
    turn: int = 0
    used_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PointRow:
    """One restore point of a segment."""

    segment: str
    position: int
    kind: str
    bytes: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.segment}-{self.position}"


class Index:
    """The tables of one store; usable from several threads."""

    def __init__(self, path: Path) -> None:
        """Raises sqlite3.OperationalError if the disk or another process is in the way, DatabaseError for damage."""
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        self._db.text_factory = lambda text: text.decode(errors="replace")  # damage must not look like a failing disk
        try:
            self._keep_a_log()
            self._db.execute("PRAGMA synchronous=NORMAL")  # a commit lost with the power is found again in the files
            self._db.execute("PRAGMA wal_autocheckpoint=100")  # pages: the log stays small, also on a small disk
            self._db.executescript(_SCHEMA)
            self._db.execute("DELETE FROM points WHERE 0")  # SQLite falls back to reading alone, which would last
            self._check()
        except (sqlite3.Error, UnicodeDecodeError) as exc:
            self._db.close()
            if _is_damage(exc, path):
                raise sqlite3.DatabaseError(str(exc)) from exc
            raise

    def _keep_a_log(self) -> None:
        """SQLite refuses at once, whatever its timeout, where another process turns a new index to its log just now."""
        until_s = time.monotonic() + _BUSY_TIMEOUT_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as exc:
                if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until_s:
                    raise
            time.sleep(_BUSY_PAUSE_S)

    def _check(self) -> None:
        """Raises sqlite3.DatabaseError unless all of it agrees and makes sense: damage would else be met in use."""
        (problem,) = self._all("PRAGMA integrity_check(1)")[0]
        if problem != "ok":
            code = re.search(r"error code=(\d+)", problem)  # of a page that the disk, perhaps, did not give
            damaged = code is None or int(code[1]) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
            kind = sqlite3.DatabaseError if damaged else sqlite3.OperationalError
            raise kind(" ".join(problem.split()))
        for table, kinds, keys in (_SEGMENT, _SEGMENT_KINDS, (0, 3)), (_POINT, _POINT_KINDS, (0,)):
            for row in self._all(table):
                if tuple(map(type, row)) != kinds or not all(_KEY.fullmatch(row[at]) for at in keys):
                    raise sqlite3.DatabaseError(f"a row that makes no sense, {str(row)[:80]}")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and nobody else writes meanwhile."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # some errors have ended it already; one left open would block all others
                    self._db.execute("ROLLBACK")
                raise

    def _all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def segment(self, key: str) -> SegmentRow | None:
        return next((SegmentRow(*row) for row in self._all(_SEGMENT + " WHERE key = ?", key)), None)

    def segments(self) -> list[SegmentRow]:
        """All segments, parents before their children."""
        return [SegmentRow(*row) for row in self._all(_SEGMENT + " ORDER BY start, key")]

    def segment_keys(self) -> list[str]:
        """The same of their keys alone."""
        return [key for (key,) in self._all("SELECT key FROM segments ORDER BY start, key")]

    def children(self, digest: str, parent: str, start: int, first_token: int) -> list[SegmentRow]:
        """Segments that go on from `parent` at `start` with this token; more than one if two processes raced."""
        query = _SEGMENT + " WHERE parent = ? AND start = ? AND first_token = ? AND digest = ?"
        return [SegmentRow(*row) for row in self._all(query, parent, start, first_token, digest)]

    def goes_on(self, digest: str, parent: str, start: int) -> bool:
        """Whether anything follows `parent` at `start`."""
        query = "SELECT 1 FROM segments WHERE parent = ? AND start = ? AND digest = ? LIMIT 1"
        return bool(self._all(query, parent, start, digest))

    def children_of(self, keys: Iterable[str]) -> list[SegmentRow]:
        return [SegmentRow(*row) for row in self._all(f"{_SEGMENT} WHERE parent {_AMONG}", json.dumps(list(keys)))]

    def points_of(self, keys: Iterable[str]) -> list[PointRow]:
        """The points of these segments by position."""
        query = f"{_POINT} WHERE segment {_AMONG} ORDER BY position"
        return [PointRow(*row) for row in self._all(query, json.dumps(list(keys)))]

    def points(self) -> list[PointRow]:
        return [PointRow(*row) for row in self._all(_POINT + " ORDER BY segment, position")]

    def point_names(self) -> list[tuple[str, int]]:
        """Segment and position of each."""
        return [(key, position) for key, position in self._all("SELECT segment, position FROM points")]

    def subtree(self, key: str) -> list[str]:
        """The segment and all that hang on it."""
        query = (
            "WITH RECURSIVE below(key) AS (VALUES (?) UNION SELECT s.key FROM segments s, below b "
            "WHERE s.parent = b.key) SELECT key FROM below"
        )
        return [row[0] for row in self._all(query, key)]

    def leaf_to_evict(self, keep: Iterable[str]) -> SegmentRow | None:
        """The leaf that is missed least: never used again since it was written, then least recently used."""
        query = (
            f"{_SEGMENT} AS leaf WHERE NOT key {_AMONG} AND NOT EXISTS (SELECT 1 FROM segments c "
            "WHERE c.parent = leaf.key) ORDER BY hits > 0, turn, stop DESC LIMIT 1"
        )
        return next((SegmentRow(*row) for row in self._all(query, json.dumps(list(keep)))), None)

    def total_bytes(self) -> int:
        """Bytes of all files of segments and points."""
        query = "SELECT (SELECT total(bytes) FROM segments) + (SELECT total(bytes) FROM points)"
        return int(self._all(query)[0][0])

    def add_segment(self, row: SegmentRow) -> None:
        """Adds a segment as the one used last; one that is there already keeps its history."""
        values = (row.key, row.digest, row.model, row.parent, row.start, row.stop, row.first_token, row.bytes)
        self._all(
            "INSERT OR IGNORE INTO segments VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0, "
            "(SELECT coalesce(max(turn), 0) + 1 FROM segments), ?)",
            *values,
            time.time(),
        )

    def add_point(self, row: PointRow) -> None:
        self._all("INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?)", row.segment, row.position, row.kind, row.bytes)

    def touch(self, keys: Iterable[str]) -> None:
        """Notes one more use of these segments."""
        self._all(
            "UPDATE segments SET hits = hits + 1, used_s = ?, turn = (SELECT max(turn) + 1 FROM segments) "
            f"WHERE key {_AMONG}",
            time.time(),
            json.dumps(list(keys)),
        )

    def remove_segments(self, keys: Iterable[str]) -> None:
        """Takes segments and their points out of the index."""
        among = json.dumps(list(keys))
        self._all(f"DELETE FROM points WHERE segment {_AMONG}", among)
        self._all(f"DELETE FROM segments WHERE key {_AMONG}", among)

    def remove_point(self, segment: str, position: int) -> None:
        self._all("DELETE FROM points WHERE segment = ? AND position = ?", segment, position)


def _is_damage(problem: Exception, path: Path) -> bool:
    """Whether the contents are at fault, and neither the disk nor another process."""
    if not isinstance(problem, sqlite3.OperationalError):
        return True
    code = getattr(problem, "sqlite_errorcode", None)
    return code == sqlite3.SQLITE_ERROR or (code == sqlite3.SQLITE_READONLY and _claims_to_be_newer(path))


def _claims_to_be_newer(path: Path) -> bool:
    """Whether the header names a version for writers that SQLite does not know, so that it will only read."""
    with path.open("rb") as file:
        return file.read(19)[18:] > b"\2"
