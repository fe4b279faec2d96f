"""The disk store: what was once read is kept, each run of tokens once, at the paper's size. Knows nothing of models.

A radix tree of segments. A segment is a run of tokens with the rows it added to every growing stream; a child may
branch off inside its parent. A restore point holds what cannot be rebuilt from rows. Several processes may share a
folder; what cannot be stored is not stored, with one warning, and never an error.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tenfold.errors import StoreError
from tenfold.store.contents import (
    Key,
    Timeline,
    Tokens,
    encode_point,
    encode_segment,
    read_point,
    read_rows,
    read_tokens,
)
from tenfold.store.files import Damaged
from tenfold.store.folder import Folder, default_folder
from tenfold.store.index import Index, PointRow, SegmentRow
from tenfold.store.recovery import adopt
from tenfold.store.thinning import superfluous
from tenfold.store.walk import Link, cut, walk
from tenfold.store.walk import Path as StoredPath

__all__ = ["Link", "Loaded", "Match", "Point", "Store", "StoreDamaged", "Timeline", "cut", "default_folder"]

_READERS = 2
_log = logging.getLogger(__name__)


class StoreDamaged(Exception):
    """What was matched could not be read and has been dropped; match again. Never meant for the user."""


@dataclass(frozen=True, slots=True)
class Point:
    """A stored restore point: after `position` tokens, within a segment; kind "end" or "auto"."""

    segment: str
    position: int
    kind: str


@dataclass(frozen=True, slots=True)
class Match:
    """The longest stored prefix: `matched` tokens are stored, work resumes at `position` (0: from the start).

    `chain` ends at `position`. `reason` says why the match goes no further.
    """

    chain: tuple[Link, ...]
    matched: int
    position: int
    point: Point | None
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """State by stream as it was given to `add_point`, and the float32 logits of the last position."""

    fixed: Mapping[Key, Tensor]
    logits: Tensor


class Store:
    """One folder of stored timelines. `limit_bytes` bounds segments and points; `warn` is told what goes wrong."""

    def __init__(
        self,
        folder: Path,
        limit_bytes: int | None = None,
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        """Raises StoreError if the folder is not a store, not ours, not writable, or of a newer version."""
        self.folder = Folder(folder)
        self.limit_bytes = limit_bytes
        self.warn = warn
        self._trouble = ""
        self._unreadable: set[str] = set()  # for now: no file handles left, or damage, dropped or not
        self._lock = threading.RLock()
        if self.folder.was_open_to_others:
            warn(f"the store {folder} was open to other users; it is yours alone again (mode 0700)")
        self.index = self._open_index()
        self._tidy()

    def _tidy(self) -> None:
        """What a process left undone, or did under a higher limit."""
        try:
            self.folder.sweep()
            self.adopt()
            self._evict(0, ())
        except (OSError, sqlite3.Error) as exc:
            self._trouble_with(f"the store cannot be tidied: {exc}")

    def close(self) -> None:
        self.index.close()

    def _open_index(self) -> Index:
        try:
            return self._sound_index()
        except (OSError, sqlite3.Error) as exc:
            raise StoreError(
                f"the index of the store {self.folder.path} cannot be opened: {exc}; "
                "choose a folder on a local disk that you may write to"
            ) from None

    def _sound_index(self) -> Index:
        try:
            return Index(self.folder.index)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as exc:
            self.warn(f"the index of the store was damaged ({exc}) and is made again from its files")
            for suffix in ("", "-wal", "-shm"):
                Path(f"{self.folder.index}{suffix}").unlink(missing_ok=True)
            return Index(self.folder.index)

    def match(self, timeline: Timeline, ids: Sequence[int] | npt.NDArray[np.integer]) -> Match:
        """The longest stored prefix of `ids` that has a restore point; damage on the way is dropped and reported."""
        try:
            paths = list(walk(self.index, timeline, (), np.asarray(ids, dtype=np.int32), self._read_tokens))
            return max((self._matched(path) for path in paths), key=lambda match: (match.position, match.matched))
        except (OSError, sqlite3.Error) as exc:
            self._trouble_with(f"the store cannot be read: {exc}")
            return Match((), 0, 0, None, f"the store cannot be read: {exc}")

    def _matched(self, path: StoredPath) -> Match:
        stops = {link.key: link.stop for link in path.chain}
        rows = self.index.points_of(stops)
        usable = [row for row in rows if row.position <= stops[row.segment] and row.name not in self._unreadable]
        if not usable:
            return Match((), path.stop, 0, None, path.reason)
        row = usable[-1]
        point = Point(row.segment, row.position, row.kind)
        return Match(cut(path.chain, row.position), path.stop, row.position, point, path.reason)

    def _read_tokens(self, row: SegmentRow) -> Tokens | str:
        if row.key in self._unreadable:
            return f"segment {row.key[:12]} cannot be read"
        try:
            _, tokens = read_tokens(self.folder.segment(row.key), row.key)
        except Damaged as exc:
            self.drop_segment(row.key, exc)
            return f"segment {row.key[:12]} {exc.verdict}"
        return tokens

    def load(self, timeline: Timeline, match: Match, rows: Callable[[Key, int], Tensor]) -> Loaded:
        """Reads a match. `rows(stream, count)` gives contiguous uint8 [count, row_bytes], read into directly.

        Raises StoreDamaged when a file turns out to be damaged or gone: what was read is worthless, match again.
        """
        assert match.point is not None, "a match at position 0 has nothing to load"
        loaded = self._load_point(timeline, match.point)
        streams = {
            (spec.layer, spec.name): rows((spec.layer, spec.name), spec.rows_at(match.position))
            for spec in timeline.growing
        }
        self._load_rows(timeline, match.chain, streams)
        with suppress(sqlite3.Error):  # on a full disk a use is not noted, which harms no answer
            self.index.touch(link.key for link in match.chain)
        return loaded

    def _load_point(self, timeline: Timeline, point: Point) -> Loaded:
        path = self.folder.point(point.segment, point.position)
        try:
            return Loaded(*read_point(path, point.segment, point.position, timeline))
        except Damaged as exc:
            self.drop_point(point.segment, point.position, exc)
            raise StoreDamaged(f"restore point {point.position:,}: {exc}") from exc
        except OSError as exc:
            self._unreadable.add(path.name)
            raise StoreDamaged(f"restore point {point.position:,}: {exc}") from exc

    def _load_rows(self, timeline: Timeline, chain: Sequence[Link], streams: Mapping[Key, Tensor]) -> None:
        """Several segments at once: while one waits for the disk, another is hashed."""

        def load(link: Link) -> None:
            path = self.folder.segment(link.key)
            try:
                read_rows(path, link.key, timeline, link.stop, lambda key, first, n: streams[key][first : first + n])
            except Damaged as exc:
                self.drop_segment(link.key, exc)
                raise StoreDamaged(f"segment {link.key[:12]}: {exc}") from exc
            except OSError as exc:
                self._unreadable.add(link.key)
                raise StoreDamaged(f"segment {link.key[:12]}: {exc}") from exc

        with ThreadPoolExecutor(_READERS) as pool:
            try:
                for _ in pool.map(load, chain):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def append(
        self,
        timeline: Timeline,
        chain: tuple[Link, ...],
        ids: Sequence[int] | npt.NDArray[np.integer],
        rows: Mapping[Key, Tensor],
    ) -> tuple[Link, ...]:
        """Stores the tokens behind `chain` with their rows; returns the longer chain.

        `rows` holds, for each growing stream, the rows of [rows_at(chain's stop), rows_at(that + len(ids))). What
        is stored already is not stored again. Where nothing can be written the chain comes back unchanged; () means
        that what it hangs on has been evicted, and the caller stores from the start again.
        """
        try:
            with self._lock:
                return self._append(timeline, chain, np.asarray(ids, dtype=np.int32), rows)
        except (OSError, sqlite3.Error) as exc:
            self._trouble_with(f"storing pauses: {exc}")
            return chain

    def _append(
        self, timeline: Timeline, chain: tuple[Link, ...], tokens: Tokens, rows: Mapping[Key, Tensor]
    ) -> tuple[Link, ...]:
        if chain and self.index.segment(chain[-1].key) is None:
            return ()
        base = chain[-1].stop if chain else 0
        known = max(walk(self.index, timeline, chain, tokens, self._read_tokens), key=lambda path: path.stop)
        if known.stop - base == len(tokens):
            return known.chain
        if known.chain and self.index.segment(known.chain[-1].key) is None:  # found damaged on the way
            return ()
        missing = {
            (spec.layer, spec.name): rows[spec.layer, spec.name][spec.rows_at(known.stop) - spec.rows_at(base) :]
            for spec in timeline.growing
        }
        link = self._write_segment(timeline, known.chain, tokens[known.stop - base :], missing)
        return chain if link is None else (*known.chain, link) if link.key else ()

    def _write_segment(
        self, timeline: Timeline, chain: tuple[Link, ...], tokens: Tokens, rows: Mapping[Key, Tensor]
    ) -> Link | None:
        """The new segment; None without room for it, an empty link if its parent has gone meanwhile."""
        parent, start = (chain[-1].key, chain[-1].stop) if chain else ("", 0)
        stop = start + len(tokens)
        key, pieces = encode_segment(timeline, parent, start, tokens, rows)
        num_bytes = sum(len(piece) for piece in pieces)
        if not self._make_room(num_bytes, chain):
            return None
        path = self.folder.segment(key)
        self.folder.place(path, pieces)
        row = SegmentRow(key, timeline.digest, timeline.name, parent, start, stop, int(tokens[0]), num_bytes)
        with self.index.transaction():
            if parent and self.index.segment(parent) is None:
                path.unlink(missing_ok=True)
                return Link("", 0, 0)
            if not path.exists():  # evicted by another process, which knew an older copy
                return None
            self.index.add_segment(row)
        self._trouble = ""
        self._unreadable.clear()  # the disk works: what could not be read is tried again
        return Link(key, start, stop)

    def add_point(
        self,
        timeline: Timeline,
        chain: tuple[Link, ...],
        position: int,
        fixed: Mapping[Key, Tensor],
        logits: Tensor,
        kind: str,
    ) -> None:
        """Stores a restore point after `position` tokens of the chain, and thins out automatic ones ("auto").

        `fixed` and `logits` are uint8 or float32. Where it cannot be stored, or the chain does not reach so far,
        nothing happens but a warning for what went wrong.
        """
        assert kind in ("auto", "end"), kind
        key = next((link.key for link in chain if link.start < position <= link.stop), None)
        if key is None:
            return
        try:
            with self._lock:
                self._add_point(timeline, chain, PointRow(key, position, kind, 0), fixed, logits)
                self._thin(chain)
        except (OSError, sqlite3.Error) as exc:
            self._trouble_with(f"storing pauses: {exc}")

    def _add_point(
        self, timeline: Timeline, chain: tuple[Link, ...], row: PointRow, fixed: Mapping[Key, Tensor], logits: Tensor
    ) -> None:
        there = next((one for one in self.index.points_of([row.segment]) if one.position == row.position), None)
        if there is not None:
            if there.kind == "auto" and row.kind == "end":
                self.index.add_point(PointRow(row.segment, row.position, "end", there.bytes))
            return
        pieces = encode_point(timeline, row.segment, row.position, row.kind, fixed, logits)
        num_bytes = sum(len(piece) for piece in pieces)
        if not self._make_room(num_bytes, chain):
            return
        path = self.folder.point(row.segment, row.position)
        self.folder.place(path, pieces)
        with self.index.transaction():
            if self.index.segment(row.segment) is None:
                path.unlink(missing_ok=True)
            elif path.exists():
                self.index.add_point(PointRow(row.segment, row.position, row.kind, num_bytes))
        self._unreadable.discard(path.name)

    def _thin(self, chain: tuple[Link, ...]) -> None:
        """Removes automatic points of the chain that later ones have made superfluous."""
        keys = {link.key for link in chain}
        rows = {row.position: row for row in self.index.points_of(keys)}
        forks = sorted(row.start for row in self.index.children_of(keys) if row.key not in keys)
        auto = sorted(position for position, row in rows.items() if row.kind == "auto")
        fixed = sorted(position for position, row in rows.items() if row.kind != "auto")
        for position in superfluous(auto, fixed, forks):
            with self.index.transaction():
                self._remove_point(rows[position].segment, position)

    def _make_room(self, num_bytes: int, chain: tuple[Link, ...]) -> bool:
        """Whether `num_bytes` may be written; evicts down to the limit, but nothing of `chain`."""
        if not self._evict(num_bytes, {link.key for link in chain}):
            limit = f"{self.limit_bytes:,} bytes"
            self._trouble_with(f"storing pauses: the limit of the store, {limit}, is smaller than this context")
            return False
        if self.folder.room_bytes() < num_bytes:
            self._trouble_with(f"storing pauses: the disk of the store {self.folder.path} is full")
            return False
        return True

    def _evict(self, num_bytes: int, keep: Collection[str]) -> bool:
        """Removes what is missed least until the limit leaves `num_bytes`; whether it does."""
        before = None
        while self.limit_bytes is not None and self.index.total_bytes() + num_bytes > self.limit_bytes:
            leaf = self.index.leaf_to_evict(keep)
            if leaf is None:
                return False
            if leaf == before:
                raise sqlite3.DatabaseError("the index contradicts itself")
            self.remove(leaf.key)
            before = leaf
        return True

    def remove(self, key: str) -> None:
        """Removes a segment with all that hangs on it, files and all."""
        with self.index.transaction():
            self._remove(key)

    def _remove(self, key: str) -> None:
        keys = self.index.subtree(key)
        points = self.index.points_of(keys)
        self.index.remove_segments(keys)
        for row in points:
            self.folder.point(row.segment, row.position).unlink(missing_ok=True)
        for one in reversed(keys):
            self.folder.segment(one).unlink(missing_ok=True)

    def _remove_point(self, segment: str, position: int) -> None:
        self.index.remove_point(segment, position)
        self.folder.point(segment, position).unlink(missing_ok=True)

    def drop_segment(self, key: str, problem: Damaged) -> None:
        """Removes a segment that cannot be used and says so; one that another process has just evicted is no news."""

        def drop() -> None:
            if self.index.segment(key) is not None:
                self.warn(f"segment {key[:12]} of the store {problem.verdict}; dropped, its text is read anew")
                self._remove(key)

        self._drop(key, drop)

    def drop_point(self, segment: str, position: int, problem: Damaged) -> None:
        """Removes a restore point that cannot be used and says so."""

        def drop() -> None:
            if any(row.position == position for row in self.index.points_of([segment])):
                self.warn(f"restore point {position:,} of the store {problem.verdict}; it is dropped")
                self._remove_point(segment, position)

        self._drop(self.folder.point(segment, position).name, drop)

    def _drop(self, name: str, drop: Callable[[], None]) -> None:
        """Waits for whoever is just evicting the same: its file goes before its row."""
        self._unreadable.add(name)  # whatever comes of it, or it might be matched again and again
        try:
            with self.index.transaction():
                drop()
        except (OSError, sqlite3.Error) as exc:
            self._trouble_with(f"damage cannot be removed: {exc}")

    def _trouble_with(self, what: str) -> None:
        """One warning for each kind of trouble, until something has been stored again."""
        if what != self._trouble:
            self._trouble = what
            self.warn(what)

    def adopt(self) -> int:
        """Takes finished files that the index does not know into it, and what was evicted out; returns how many."""
        with self._lock:
            return adopt(self.folder, self.index, self.warn)
