"""Index and files brought together: what only one of them knows of.

Finished files without a row are taken in, or removed where nothing leads to them: left behind by a process that died
between a file and its row, by a lost index, or brought by an import. A cheap check, headers and tokens only; `load`
checks the rest when it reads it. Rows whose files were evicted go: files go first, and the rest of that eviction may
have been lost with its process or with the power.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tenfold.store.contents import point_facts, read_tokens
from tenfold.store.files import Damaged
from tenfold.store.folder import Folder
from tenfold.store.index import Index, PointRow, SegmentRow

__all__ = ["adopt", "enter_point", "enter_segment", "point_row", "segment_row"]


def adopt(folder: Folder, index: Index, warn: Callable[[str], None]) -> int:
    """Takes in what is whole and hangs on something, and out what has been evicted; returns how many files came in."""
    known, there = index.segment_keys(), folder.found("segments")
    _forget_segments(folder, index, [key for key in known if key not in there])
    segments = []
    for key in there.difference(known):
        path = folder.segment(key)
        with _discarded_if_damaged(path, warn):
            segments.append(segment_row(path, key))
    adopted = sum(enter_segment(folder, index, row) for row in sorted(segments, key=lambda row: row.start))
    named = {f"{key}-{position}": (key, position) for key, position in index.point_names()}
    there = folder.found("points")
    _forget_points(folder, index, [named[name] for name in named if name not in there])
    points = []
    for name in there.difference(named):
        key, _, position = name.partition("-")
        path = folder.point(key, int(position))
        with _discarded_if_damaged(path, warn):
            points.append(point_row(path, key, int(position)))
    return adopted + sum(enter_point(folder, index, row) for row in points)


def _forget_segments(folder: Folder, index: Index, keys: list[str]) -> None:
    """Rows whose files were evicted. What lacks a file but has children was not: whoever asks for it is told.

    Points of a segment that goes lead nowhere, and their files go with what else the index does not know.
    """
    for key in reversed(keys):  # children first
        with index.transaction():
            if _is_gone(folder.segment(key)) and not index.children_of([key]):
                index.remove_segments([key])


def _forget_points(folder: Folder, index: Index, points: list[tuple[str, int]]) -> None:
    for key, position in points:
        with index.transaction():
            if _is_gone(folder.point(key, position)):
                index.remove_point(key, position)


def _is_gone(path: Path) -> bool:
    """Not merely out of reach for now, as `exists` may have it."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    return False


def segment_row(path: Path, key: str) -> SegmentRow:
    """What the file of a segment says of itself, checked against its name; raises Damaged."""
    header, tokens = read_tokens(path, key)
    texts = (header.text("digest"), header.text("model"), header.text("parent"))
    extent = (header.integer("start"), header.integer("stop"))
    return SegmentRow(key, *texts, *extent, int(tokens[0]), path.stat().st_size)


def point_row(path: Path, key: str, position: int) -> PointRow:
    """The same for a restore point."""
    header = point_facts(path, key, position)
    return PointRow(key, position, header.text("moment"), path.stat().st_size)


def enter_segment(folder: Folder, index: Index, row: SegmentRow) -> bool:
    """Into the index, if its parent is there; else the file goes."""
    path = folder.segment(row.key)
    with index.transaction():
        parent = index.segment(row.parent) if row.parent else None
        leads_here = parent is not None and parent.start < row.start <= parent.stop and parent.digest == row.digest
        if not leads_here and (row.parent or row.start):
            path.unlink(missing_ok=True)
            return False
        if not path.exists():  # evicted by another process just now
            return False
        index.add_segment(row)
    return True


def enter_point(folder: Folder, index: Index, row: PointRow) -> bool:
    """Into the index, if its segment is there; else the file goes."""
    path = folder.point(row.segment, row.position)
    with index.transaction():
        segment = index.segment(row.segment)
        if segment is None or not segment.start < row.position <= segment.stop:
            path.unlink(missing_ok=True)
            return False
        if not path.exists():
            return False
        index.add_point(row)
    return True


@contextmanager
def _discarded_if_damaged(path: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """One that another process has evicted meanwhile is no damage."""
    try:
        yield
    except FileNotFoundError:
        return
    except Damaged as exc:
        if os.path.lexists(path):
            name = f"{path.parent.parent.name[:-1]} {path.name[:12]}"
            warn(f"{name} of the store is damaged ({exc}); it is dropped")
            path.unlink(missing_ok=True)
