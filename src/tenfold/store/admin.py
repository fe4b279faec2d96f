"""Looking after a store: list, show, verify, prune, export, import. Knows nothing of terminals.

A context is a leaf of the tree, named by its key; any unambiguous beginning of a key will do.
"""

from __future__ import annotations

import re
import sqlite3
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from tenfold.errors import StoreError, UsageError
from tenfold.store import Store, default_folder
from tenfold.store.contents import verify_file
from tenfold.store.files import Damaged
from tenfold.store.index import PointRow, SegmentRow
from tenfold.store.recovery import enter_point, enter_segment, point_row, segment_row

__all__ = ["contexts", "export_context", "import_contexts", "opened", "parse_age", "prune", "show", "verify"]

_MEMBER = re.compile(r"(segments)/([0-9a-f]{64})|(points)/([0-9a-f]{64})-([1-9][0-9]{0,11})")
_ID_DIGITS = 12
_COPY_BYTES = 4 << 20


@contextmanager
def opened(folder: Path | None, warn: Callable[[str], None], *, make: bool = False) -> Iterator[Store]:
    """The store in `folder` (default: the user's); one that is not there is an error unless it may be made."""
    path = default_folder() if folder is None else folder
    if not make and not path.exists():
        raise StoreError(f"there is no store at {path}; give --store DIR, or read something first")
    store = Store(path, warn=warn)
    try:
        yield store
    except sqlite3.Error as exc:
        raise StoreError(f"the index of the store {path} cannot be used: {exc}; is another program busy?") from None
    finally:
        store.close()


def parse_age(text: str) -> float:
    """Seconds from "30d", "12h" or "8w"."""
    match = re.fullmatch(r"(\d{1,6})\s*([hdw])", text.strip())
    if match is None:
        raise UsageError(f"--older is {text!r}, expected a number of hours, days or weeks such as 12h, 30d or 8w")
    return int(match[1]) * {"h": 3600.0, "d": 86400.0, "w": 604800.0}[match[2]]


def contexts(store: Store) -> list[dict[str, Any]]:
    """One entry a context, the one used last first. Bytes count what it shares with others as well."""
    rows = {row.key: row for row in store.index.segments()}
    parents = {row.parent for row in rows.values()}
    leaves = sorted((row for row in rows.values() if row.key not in parents), key=lambda row: -row.turn)
    return [_entry(store, row) for row in leaves]


def _entry(store: Store, leaf: SegmentRow) -> dict[str, Any]:
    chain = _chain(store, leaf)
    points = _points(store, chain)
    return {
        "id": leaf.key[:_ID_DIGITS],
        "model": leaf.model,
        "tokens": leaf.stop,
        "bytes": sum(row.bytes for row in chain) + sum(row.bytes for row in points),
        "points": len(points),
        "used_s": leaf.used_s,
        "hits": max(row.hits for row in chain),
    }


def _chain(store: Store, row: SegmentRow) -> list[SegmentRow]:
    """From the root to `row`."""
    chain = [row]
    while chain[-1].parent and (parent := store.index.segment(chain[-1].parent)) is not None:
        chain.append(parent)
    return chain[::-1]


def _stops(chain: list[SegmentRow]) -> dict[str, int]:
    """How far each segment of a chain is used: up to where the next one starts."""
    stops = {row.key: after.start for row, after in pairwise(chain)}
    return {**stops, chain[-1].key: chain[-1].stop}


def _points(store: Store, chain: list[SegmentRow]) -> list[PointRow]:
    stops = _stops(chain)
    return [row for row in store.index.points_of(stops) if row.position <= stops[row.segment]]


def _find(store: Store, beginning: str) -> SegmentRow:
    """The segment whose key begins so."""
    rows = store.index.segments()
    found = [row for row in rows if row.key.startswith(beginning.lower())]
    if len(found) == 1 and beginning:
        return found[0]
    what = f"{len(found)} stored contexts begin" if found else "no stored context begins"
    raise StoreError(f"{what} with {beginning!r}; `tenfold store list` shows them all")


def show(store: Store, beginning: str) -> dict[str, Any]:
    """A context with its segments and restore points."""
    row = _find(store, beginning)
    chain = _chain(store, row)
    stops = _stops(chain)
    return {
        **_entry(store, row),
        "key": row.key,
        "digest": row.digest,
        "segments": [
            {"key": one.key, "start": one.start, "stop": stops[one.key], "bytes": one.bytes, "hits": one.hits}
            for one in chain
        ],
        "restore_points": [
            {"position": one.position, "kind": one.kind, "bytes": one.bytes} for one in _points(store, chain)
        ],
    }


def verify(store: Store) -> dict[str, Any]:
    """Reads every file whole; drops what is damaged or missing with what hangs on it, and adopts what has no row."""
    found: dict[str, Any] = {"adopted": store.adopt(), "files": 0, "bytes": 0, "damaged": []}
    for segment in store.index.segments():
        if store.index.segment(segment.key) is None:  # hung on one that was damaged
            continue
        problem = _problem(store.folder.segment(segment.key), segment)
        found["files"] += 1
        found["bytes"] += segment.bytes
        if problem:
            found["damaged"].append({"file": f"segments/{segment.key}", "problem": str(problem)})
            store.drop_segment(segment.key, problem)
    for point in store.index.points():
        problem = _problem(store.folder.point(point.segment, point.position), point)
        found["files"] += 1
        found["bytes"] += point.bytes
        if problem:
            found["damaged"].append({"file": f"points/{point.name}", "problem": str(problem)})
            store.drop_point(point.segment, point.position, problem)
    return found


def _problem(path: Path, row: SegmentRow | PointRow) -> Damaged | None:
    """What is wrong with a file; None if nothing is."""
    try:
        verify_file(path)
        if isinstance(row, PointRow):
            point_row(path, row.segment, row.position)
        else:
            segment_row(path, row.key)
    except Damaged as exc:
        return exc
    except OSError as exc:
        raise StoreError(f"{path} cannot be read: {exc.strerror or exc}; see to the disk, then verify again") from None
    return None


def prune(
    store: Store, limit_bytes: int | None = None, older_s: float | None = None, model: str | None = None
) -> dict[str, int]:
    """Removes contexts of a model, those not used for so many seconds, then the least missed down to a limit."""
    before = (len(store.index.segments()), store.index.total_bytes())
    if model is not None:
        for row in store.index.segments():
            if row.model == model and not row.parent:
                store.remove(row.key)
    if older_s is not None:
        _prune_older(store, time.time() - older_s)
    if limit_bytes is not None:
        while store.index.total_bytes() > limit_bytes and (leaf := store.index.leaf_to_evict(())) is not None:
            store.remove(leaf.key)
    after = (len(store.index.segments()), store.index.total_bytes())
    return {"segments": before[0] - after[0], "bytes": before[1] - after[1], "bytes_left": after[1]}


def _prune_older(store: Store, used_s: float) -> None:
    """A segment stays while anything that hangs on it does; children come before their parents."""
    rows = store.index.segments()
    kept: set[str] = set()
    for row in reversed(rows):
        if row.used_s >= used_s or row.key in kept:
            kept.add(row.parent)
        else:
            store.remove(row.key)


def export_context(store: Store, beginning: str, path: Path) -> dict[str, Any]:
    """Writes one context to a tar file; the files in it are the store's own."""
    chain = _chain(store, _find(store, beginning))
    points = _points(store, chain)
    names = [(f"segments/{row.key}", store.folder.segment(row.key)) for row in chain]
    names += [(f"points/{row.name}", store.folder.point(row.segment, row.position)) for row in points]
    try:
        with tarfile.open(path, "x:") as archive:
            for name, source in names:
                archive.add(source, name, recursive=False, filter=_anonymous)
    except FileExistsError:
        raise StoreError(f"{path} exists already; choose another name") from None
    except OSError as exc:
        path.unlink(missing_ok=True)
        raise StoreError(f"{path} cannot be written: {exc.strerror or exc}; check the folder and the disk") from None
    return {"file": str(path), "files": len(names), "tokens": chain[-1].stop, "bytes": path.stat().st_size}


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """No user names and no times in what is given away."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def import_contexts(store: Store, path: Path) -> dict[str, Any]:
    """Takes in a file written by `export_context`; each file in it is read and checked before it enters."""
    counts = {"segments": 0, "points": 0}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                counts[_import_member(store, archive, member)] += 1
    except tarfile.TarError as exc:
        raise StoreError(f"{path} is not an export of a store: {exc}; export it again") from None
    except Damaged as exc:
        raise StoreError(f"{path} is damaged: {exc}; export it again") from None
    except OSError as exc:
        raise StoreError(f"{path} cannot be taken in: {exc.strerror or exc}; check the file and the disk") from None
    return {"file": str(path), **counts}


def _import_member(store: Store, archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """ "segments" or "points". The name is matched whole, so that it cannot lead out of the store."""
    match = _MEMBER.fullmatch(member.name)
    source = archive.extractfile(member) if match and member.isreg() and not member.issparse() else None
    if match is None or source is None:
        raise Damaged(f"it holds {member.name[:80]!r}, which is no file of a store")
    if member.size > store.folder.room_bytes():
        raise StoreError(f"{member.size:,} bytes do not fit the disk of {store.folder.path}; make room or prune")
    with store.folder.temporary(_copied(source)) as written:
        verify_file(written)
        if match[1]:
            row = segment_row(written, match[2])
            _finish(store, written, store.folder.segment(row.key))
            entered = enter_segment(store.folder, store.index, row)
        else:
            point = point_row(written, match[4], int(match[5]))
            _finish(store, written, store.folder.point(point.segment, point.position))
            entered = enter_point(store.folder, store.index, point)
    if not entered:
        raise Damaged(f"{member.name[:20]} hangs on a segment that is missing before it")
    return match[1] or match[3]


def _finish(store: Store, written: Path, path: Path) -> None:
    if not path.exists():
        store.folder.finish(written, path)


def _copied(source: IO[bytes]) -> Iterator[bytes]:
    while piece := source.read(_COPY_BYTES):
        yield piece
