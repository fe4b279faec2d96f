"""Damage of any kind is dropped and reported, and never comes back as rows; the rest of the store stays."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from tests.store.fakes import Feeder, restore, timeline

from tenfold.store import Store, contents, recovery
from tenfold.store.files import Damaged, open_file, read_header
from tenfold.store.folder import Folder

TEXT = [int(token) for token in np.random.default_rng(5).integers(0, 1000, 900)]
FIRST = 300


@pytest.fixture
def fed(store: Store) -> Store:
    """Three segments, a point at the end of each."""
    feeder = Feeder(store)
    for start in range(0, len(TEXT), FIRST):
        feeder.feed(TEXT[start : start + FIRST])
    return store


def segments(store: Store) -> list[Path]:
    return [store.folder.segment(row.key) for row in store.index.segments()]


def points(store: Store) -> list[Path]:
    return [
        store.folder.point(row.segment, row.position) for row in sorted(store.index.points(), key=lambda r: r.position)
    ]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


RUINS: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "ten bytes": lambda path: path.write_bytes(path.read_bytes()[:10]),
    "long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a link": link,
    "a pipe": pipe,
}


@pytest.mark.parametrize("ruin", RUINS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_ruined_segment_is_dropped_with_what_hangs_on_it(
    fed: Store, warned: list[str], ruin: str, which: int
) -> None:
    path = segments(fed)[which]
    RUINS[ruin](path)
    assert restore(fed, TEXT).position == which * FIRST
    assert len(warned) == 1
    assert path.name[:12] in warned[0]
    assert ("is missing" if ruin == "removed" else "is damaged (") in warned[0]
    assert len(fed.index.segments()) == which
    assert not path.exists()
    again = Feeder(fed)
    again.feed(TEXT)
    assert restore(fed, TEXT).position == len(TEXT)


@pytest.mark.parametrize("ruin", RUINS)
def test_a_ruined_point_gives_way_to_the_one_before(fed: Store, warned: list[str], ruin: str) -> None:
    path = points(fed)[-1]
    RUINS[ruin](path)
    assert restore(fed, TEXT).position == 2 * FIRST
    assert len(warned) == 1
    assert ("is missing" if ruin == "removed" else "is damaged (") in warned[0]
    assert not path.exists()
    assert len(fed.index.segments()) == 3


@pytest.mark.parametrize("kind", ["segment", "point"])
def test_a_bit_flipped_anywhere_is_seen(tmp_path: Path, fed: Store, warned: list[str], kind: str) -> None:
    """At 40 places of the file, its first and last bytes among them."""
    path = (segments(fed) if kind == "segment" else points(fed))[-1]
    whole = path.read_bytes()
    copy = tmp_path / "copy"
    fed.close()
    shutil.copytree(fed.folder.path, copy)
    places = sorted({0, 8, 12, len(whole) - 1, *np.random.default_rng(1).integers(0, len(whole), 36).tolist()})
    for at in places:
        other = Store(copy, warn=warned.append)
        victim = copy / path.relative_to(fed.folder.path)
        flip(victim, at)
        assert restore(other, TEXT).position == 2 * FIRST, at
        assert not victim.exists(), at
        Feeder(other).feed(TEXT, FIRST)
        assert restore(other, TEXT).position == 3 * FIRST, at
        other.close()
    assert len(warned) == len(places)


def test_swapped_segments_are_not_taken_for_each_other(fed: Store, warned: list[str]) -> None:
    _, second, third = segments(fed)
    content = second.read_bytes()
    second.write_bytes(third.read_bytes())
    third.write_bytes(content)
    assert restore(fed, TEXT).position == FIRST
    assert len(warned) == 1
    assert "not the segment that its name says" in warned[0]


def test_swapped_points_are_not_taken_for_each_other(fed: Store, warned: list[str]) -> None:
    _, second, third = points(fed)
    third.write_bytes(second.read_bytes())
    assert restore(fed, TEXT).position == 2 * FIRST
    assert len(warned) == 1
    assert "not the restore point that its name says" in warned[0]


def test_rows_of_another_model_are_not_read(fed: Store) -> None:
    """Another digest finds nothing; the same digest with other streams is a lie, and is found out."""
    assert fed.match(timeline(digest="d2"), TEXT).reason == "nothing of this model is stored"
    warned: list[str] = []
    fed.warn = warned.append
    assert restore(fed, TEXT, timeline(widen=2)).position == 0
    assert "is not of this model" in warned[0]


def test_what_was_evicted_meanwhile_is_no_damage(fed: Store, warned: list[str]) -> None:
    other = Store(fed.folder.path, warn=warned.append)
    match = fed.match(timeline(), TEXT)
    other.remove(match.chain[0].key)
    assert restore(fed, TEXT).position == 0
    assert warned == []
    other.close()


def test_what_is_evicted_while_it_is_adopted_is_no_damage(
    fed: Store, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone when it is opened, or when it has been read."""
    gone = "ab" * 32
    ghosts = {"segments": gone, "points": f"{gone}-7"}
    found = Folder.found
    monkeypatch.setattr(Folder, "found", lambda self, kind: found(self, kind) | {ghosts[kind]})
    assert fed.adopt() == 0
    last = segments(fed)[-1]
    fed.index.remove_segments([last.name])
    read = contents.read_tokens

    def read_and_lose(path: Path, key: str) -> object:
        tokens = read(path, key)
        path.unlink()
        return tokens

    monkeypatch.setattr(recovery, "read_tokens", read_and_lose)
    assert fed.adopt() == 0
    assert not last.exists()
    assert warned == []


def test_an_eviction_whose_end_was_lost_is_finished_at_opening(fed: Store, warned: list[str]) -> None:
    """Files are gone and their rows are back, as after a loss of power; one of three points goes alone."""
    rows, point = fed.index.segments(), points(fed)[0]
    point.unlink()
    for path in (*segments(fed)[1:], *points(fed)[2:]):
        path.unlink()
    fed.close()
    again = Store(fed.folder.path, warn=warned.append)
    assert again.index.segments() == rows[:1]
    assert again.index.points() == []
    assert again.folder.found("points") == set()
    Feeder(again).feed(TEXT, FIRST)
    assert restore(again, TEXT).position == len(TEXT)
    assert warned == []
    again.close()


def test_a_missing_file_below_others_was_not_evicted(fed: Store, warned: list[str]) -> None:
    segments(fed)[1].unlink()
    fed.close()
    again = Store(fed.folder.path, warn=warned.append)
    assert warned == []
    assert restore(again, TEXT).position == FIRST
    assert len(warned) == 1
    assert "is missing" in warned[0]
    again.close()


def test_files_out_of_reach_are_not_missing(fed: Store, warned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = fed.index.segments(), fed.index.points()
    monkeypatch.setattr(Folder, "found", lambda self, kind: set())
    fed.adopt()
    monkeypatch.setattr(Path, "lstat", lambda self: os.lstat(os.devnull + "/" + self.name))  # ENOTDIR
    with pytest.raises(NotADirectoryError):
        fed.adopt()
    assert (fed.index.segments(), fed.index.points()) == rows


def test_files_without_rows_in_the_index_are_adopted(fed: Store, warned: list[str]) -> None:
    rows = fed.index.segments(), fed.index.points()
    fed.close()
    for name in ("index.sqlite", "index.sqlite-wal", "index.sqlite-shm"):
        (fed.folder.path / name).unlink(missing_ok=True)
    again = Store(fed.folder.path, warn=warned.append)
    assert [(row.key, row.start, row.stop, row.bytes) for row in again.index.segments()] == [
        (row.key, row.start, row.stop, row.bytes) for row in rows[0]
    ]
    assert again.index.points() == rows[1]
    assert restore(again, TEXT).position == len(TEXT)
    assert warned == []
    again.close()


def test_a_damaged_index_is_made_again(fed: Store, warned: list[str]) -> None:
    fed.close()
    (fed.folder.path / "index.sqlite-wal").unlink(missing_ok=True)
    (fed.folder.path / "index.sqlite").write_bytes(b"this is no database, not at all" * 400)
    again = Store(fed.folder.path, warn=warned.append)
    assert restore(again, TEXT).position == len(TEXT)
    assert len(warned) == 1
    assert "damaged" in warned[0]
    again.close()


def test_an_index_that_contradicts_itself_does_not_hold_up_eviction(
    fed: Store, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is evicted is found again and again."""
    monkeypatch.setattr(fed.index, "remove_segments", lambda keys: None)
    fed.limit_bytes = 1
    Feeder(fed).feed([1, 2, 3])
    assert warned == ["storing pauses: the index contradicts itself"]


def test_damage_that_cannot_be_removed_is_met_once(fed: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fed, "_remove", lambda key: None)
    fed.warn = lambda text: None
    flip(segments(fed)[2], -1)
    assert restore(fed, TEXT).position == 2 * FIRST


def check_spoiled_index(folder: Path, count: int, seed: int) -> None:
    """Rows are the truth whatever the index says, and all can be stored again, now and after the next opening."""
    dice = random.Random(seed)
    for number in range(count):
        store = Store(folder, warn=lambda text: None)
        Feeder(store).feed(TEXT, FIRST)
        store.close()
        how = spoil(folder / "index.sqlite", dice.choice(list(folder.glob("segments/*/*"))), dice)
        store = Store(folder, dice.choice((None, 20_000)), warn=lambda text: None)
        restore(store, TEXT)
        store.limit_bytes = None
        Feeder(store).feed(TEXT, FIRST)
        assert restore(store, TEXT).position == len(TEXT), (number, how)
        store.close()


def test_spoiled_indices(tmp_path: Path) -> None:
    check_spoiled_index(tmp_path, 40, seed=1)


@pytest.mark.slow
def test_many_spoiled_indices(tmp_path: Path) -> None:
    check_spoiled_index(tmp_path, 2_000, seed=2)


def test_what_hangs_on_nothing_is_removed_at_opening(fed: Store) -> None:
    orphan = segments(fed)[2]
    content = orphan.read_bytes()
    fed.remove(fed.index.segments()[1].key)
    orphan.write_bytes(content)
    fed.close()
    again = Store(fed.folder.path)
    assert not orphan.exists()
    assert len(again.index.segments()) == 1
    again.close()


def spoil(path: Path, other: Path, dice: random.Random) -> str:
    """Ruins a file in one of many ways; which."""
    content = bytearray(path.read_bytes())
    at, count = dice.randrange(max(len(content), 1)), dice.randrange(1, 200)
    how = dice.choice(("flip", "noise", "zeros", "cut", "added", "hole", "taken", "mixed")) if content else "added"
    if how == "flip":
        content[at] ^= 1 << dice.randrange(8)
    elif how == "noise":
        content[at : at + count] = dice.randbytes(len(content[at : at + count]))
    elif how == "zeros":
        content[at:] = bytes(len(content) - at)
    elif how == "cut":
        del content[at:]
    elif how == "added":
        content += dice.randbytes(count)
    elif how == "hole":
        del content[at : at + count]
    elif how == "taken":
        content[:] = other.read_bytes()
    else:
        content[at:] = other.read_bytes()[at:]
    path.write_bytes(content)
    return how


def check_spoiled(store: Store, count: int, seed: int) -> None:
    """What is restored is the truth (`restore` looks), whatever happened to the files, and all can be stored again."""
    dice = random.Random(seed)
    for number in range(count):
        files = dice.choice((segments, points))(store)
        path, other = dice.sample(files, 2)
        before = path.read_bytes()
        how = spoil(path, other, dice)
        same = path.read_bytes() == before
        position = restore(store, TEXT).position
        assert position == len(TEXT) or not same, (number, how)
        Feeder(store).feed(TEXT, FIRST)
        assert restore(store, TEXT).position == len(TEXT), (number, how)


def test_spoiled_files(fed: Store) -> None:
    check_spoiled(fed, 60, seed=1)


@pytest.mark.slow
def test_many_spoiled_files(fed: Store) -> None:
    check_spoiled(fed, 10_000, seed=2)


def header(found: object, claimed_bytes: int | None = None) -> bytes:
    """A header with a right checksum, whatever it says."""
    text = found if isinstance(found, bytes) else json.dumps(found).encode()
    start = struct.pack("<8sII", b"TENFOLD\n", 1, len(text) if claimed_bytes is None else claimed_bytes) + text
    return start + struct.pack("<Q", xxhash.xxh3_64_intdigest(start))


def part(**fields: object) -> dict[str, object]:
    return {"facts": {}, "parts": [{"name": "a", "dtype": "uint8", "shape": [1], "checksums": ["0"], **fields}]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"TENFOLD\n",
        header({}, claimed_bytes=(1 << 32) - 1),
        header(b"[" * 100_000),
        header(b"\xff\xfe"),
        header([]),
        header({"facts": [], "parts": []}),
        header({"facts": {}, "parts": {"a": 1}}),
        header(part(shape=[1 << 39, 1 << 39])),
        header(part(shape=[-1])),
        header(part(shape=[True])),
        header(part(shape=[])),
        header(part(dtype="object")),
        header(part(name=7)),
        header(part(checksums=["zz"])),
        header(part(checksums=[])),
        header(part(checksums="0" * 1_000_000)),
        header(part()),
        header({"facts": {}, "parts": part()["parts"] * 2}) + b"\0\0",  # type: ignore[operator]
        header({"facts": {}, "parts": []}) + b"\0",
        header({"facts": {}, "parts": []}).replace(b"TENFOLD", b"tenfold"),
        struct.pack("<8sII", b"TENFOLD\n", 2, 0) + bytes(8),
    ],
    ids=lambda content: f"{len(content)}-{content[16:60]!r}",
)
def test_hostile_headers_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with open_file(tmp_path / "file") as fd, pytest.raises(Damaged):
        read_header(fd)


def test_a_harmless_header_is_not(tmp_path: Path) -> None:
    """What the test above would miss if every header were refused."""
    (tmp_path / "file").write_bytes(header(part()) + b"\0")
    with open_file(tmp_path / "file") as fd:
        assert read_header(fd).parts["a"].num_bytes == 1
