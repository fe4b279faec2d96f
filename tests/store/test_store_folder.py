"""Whose folder it is, what happens when the disk is full, what goes first when the limit is reached, killed writers."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.programs import needs_compiler, run
from tests.store.fakes import Feeder, restore

from tenfold.errors import StoreError
from tenfold.store import Store
from tenfold.store import files as files_module
from tenfold.store.thinning import superfluous


def ids(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 1000, count)]


def test_nobody_else_can_read_it(store: Store) -> None:
    Feeder(store).feed(ids(100))
    for path in [store.folder.path, *store.folder.path.rglob("*")]:
        if not path.name.startswith("index.sqlite"):  # inside a folder that is closed to others
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_store_open_to_others_is_closed_with_a_warning(tmp_path: Path, warned: list[str]) -> None:
    Store(tmp_path / "store").close()
    (tmp_path / "store").chmod(0o755)
    Store(tmp_path / "store", warn=warned.append).close()
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
    assert len(warned) == 1


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds other files"):
        Store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    Store(tmp_path / "store").close()
    (tmp_path / "store" / "VERSION").write_text("tenfold store, version 2\n")
    with pytest.raises(StoreError, match=r"version 2.*version 1.*update tenfold"):
        Store(tmp_path / "store")
    (tmp_path / "store" / "VERSION").write_text("a novel")
    with pytest.raises(StoreError, match="not a store's"):
        Store(tmp_path / "store")


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be used"):
        Store(tmp_path / "file")
    with pytest.raises(StoreError, match="cannot be used"):
        Store(tmp_path / "file" / "store")


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(StoreError, match="not to you"):
        Store(tmp_path)


def test_temporaries_of_the_dead_are_swept_and_those_of_the_living_kept(store: Store) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = store.folder.path / "temporary" / f"{dead.pid}-0"
    left.write_bytes(b"half")
    with store.folder.temporary([b"being written"]) as written:
        Store(store.folder.path).close()
        assert written.exists()
    assert not left.exists()
    assert not written.exists()


def test_a_full_disk_pauses_storing(store: Store, warned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, nothing half-written, and it goes on when there is room."""
    feeder = Feeder(store)
    feeder.feed(ids(300))
    full = files_module.write_all

    def write_all(fd: int, pieces: object) -> None:
        os.write(fd, b"a part of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files_module, "write_all", write_all)
    chain = feeder.chain
    feeder.feed(ids(300, seed=1), 100)
    assert feeder.chain == chain
    assert len(warned) == 1
    assert "No space left" in warned[0]
    assert list((store.folder.path / "temporary").iterdir()) == []
    monkeypatch.setattr(files_module, "write_all", full)
    feeder.feed(ids(100, seed=2))
    assert restore(store, feeder.tokens).position == 700
    assert len(warned) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "tenfold-test", str(disk)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_really_fills_up(small_disk: Path, warned: list[str]) -> None:
    store = Store(small_disk / "store", warn=warned.append)
    try:
        feeders = [Feeder(store) for _ in range(150)]
        for seed, feeder in enumerate(feeders):
            feeder.feed(ids(4000, seed))
        positions = [restore(store, feeder.tokens).position for feeder in feeders]
        assert positions[0] == 4000
        assert positions[-1] == 0
        assert len(warned) == 1
        store.remove(feeders[0].chain[0].key)
        feeders[-1].save()
        feeders[-1].point("end")
        assert restore(store, feeders[-1].tokens).position == 4000
    finally:
        store.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_an_error_of_the_system_while_reading(
    store: Store, warned: list[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A bad sector is damage; too few file handles are not, and cost only this match."""
    Feeder(store).feed(ids(300), 100)
    whole, calls = files_module._read_batch, []

    def read_batch(fd: int, batch: object) -> None:
        calls.append(fd)
        if len(calls) == 6:
            raise OSError(number, os.strerror(number))
        whole(fd, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(files_module, "_read_batch", read_batch)
    assert restore(store, ids(300)).position < 300
    assert len(warned) == (number == errno.EIO)
    assert len(store.index.segments()) == 3 or number == errno.EIO


def test_one_shot_tails_go_first_and_shared_prefixes_last(tmp_path: Path, warned: list[str]) -> None:
    store = Store(tmp_path / "store", warn=warned.append)
    shared, tails = ids(1000), [ids(500, seed) for seed in range(1, 9)]
    for tail in tails[:4]:
        feeder = Feeder(store)
        feeder.feed(shared)
        feeder.feed(tail)
    restore(store, [*shared, *tails[0]])  # used again
    store.limit_bytes = store.index.total_bytes()
    Feeder(store).feed([*shared, *tails[4]])  # the room of one tail is needed: the second was never used again
    positions = [restore(store, [*shared, *tail]).position for tail in tails[:5]]
    assert positions == [1500, 1000, 1500, 1500, 1500]
    assert store.index.total_bytes() <= store.limit_bytes
    assert warned == []
    store.close()


def test_a_limit_too_small_for_one_context_pauses_and_keeps_its_beginning(tmp_path: Path, warned: list[str]) -> None:
    store = Store(tmp_path / "store", limit_bytes=60_000, warn=warned.append)
    feeder = Feeder(store)
    feeder.feed(ids(10_000), 500)
    assert 0 < restore(store, feeder.tokens).position < 10_000
    assert store.index.total_bytes() <= 60_000
    assert len(warned) == 1
    assert "smaller than this context" in warned[0]
    store.close()


def test_a_chain_whose_parent_was_evicted_starts_again(store: Store) -> None:
    feeder = Feeder(store)
    feeder.feed(ids(200))
    store.remove(feeder.chain[0].key)
    rows = {(spec.layer, spec.name): None for spec in feeder.timeline.growing}
    assert store.append(feeder.timeline, feeder.chain, ids(50), rows) == ()  # type: ignore[arg-type]
    feeder.feed(ids(50, 1))
    assert restore(store, feeder.tokens).position == 250


def test_automatic_points_stay_few(store: Store) -> None:
    auto: list[int] = []
    for tip in range(4096, (1 << 20) + 1, 4096):
        auto.append(tip)
        gone = set(superfluous(auto, [], []))
        auto = [position for position in auto if position not in gone]
    assert 20 <= len(auto) <= 60
    assert auto[-1] == 1 << 20
    for edit in range(0, (1 << 20) - 4096, 1000):  # whatever is edited, little is read again
        nearest = max((position for position in auto if position <= edit), default=0)
        assert edit - nearest <= max(((1 << 20) - edit) / 3, 4096)


def test_points_before_forks_and_message_ends_stay() -> None:
    auto = list(range(100, 10_000, 100))
    assert 1000 in superfluous(auto, [], [])
    assert 1000 not in superfluous(auto, [], [1050])
    auto.remove(1000)
    assert 1000 not in superfluous(auto, [1000], [])
    assert superfluous([], [5], []) == superfluous([], [], []) == superfluous([7], [], []) == []


def test_thinned_points_leave_the_disk(store: Store) -> None:
    feeder = Feeder(store)
    feeder.feed(ids(6000), 50)
    rows = store.index.points()
    assert len(rows) < 50
    assert len([path for path in (store.folder.path / "points").rglob("*-*") if path.is_file()]) == len(rows)
    assert restore(store, feeder.tokens).position == 6000


def test_a_point_turned_into_a_message_end_is_not_thinned(store: Store) -> None:
    feeder = Feeder(store)
    feeder.feed(ids(100), kind="auto")
    feeder.point("end")
    assert [row.kind for row in store.index.points()] == ["end"]


def test_threads_may_share_a_store(store: Store, warned: list[str]) -> None:
    shared = ids(300)

    def work(seed: int) -> None:
        feeder = Feeder(store)
        feeder.feed([*shared, *ids(200, seed % 3)], 100)
        assert restore(store, feeder.tokens).position == 500

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [restore(store, [*shared, *ids(200, seed)]).position for seed in range(3)] == [500] * 3
    assert len(store.index.segments()) == 3 + 3 * 2
    assert warned == []


def check_kills(folder: Path, count: int, seed: int) -> None:
    found = run("tests.store.kills", folder, count, seed)
    assert found["reported_appends"] > count <= found["kills"]
    assert found["naive_corrupt"] > count // 10, "the harness kills at the wrong moments"
    wrong = {name: found[name] for name in ("corrupt", "lost", "temporaries_left", "warnings")}
    assert set(wrong.values()) == {0}, wrong


def test_killed_writers(tmp_path: Path) -> None:
    check_kills(tmp_path, 20, seed=1)


@pytest.mark.slow
def test_many_killed_writers(tmp_path: Path) -> None:
    check_kills(tmp_path, 200, seed=2)


def check_crowd(folder: Path, seconds: int) -> None:
    found = run("tests.store.together", folder / "store", seconds)
    assert found.pop("rounds") > 0
    assert found.pop("killed") > seconds // 3
    assert set(found.values()) == {0}, found


@pytest.mark.slow
def test_four_processes_on_one_store(tmp_path: Path) -> None:
    check_crowd(tmp_path, 600)


def check_faults(folder: Path, stride: int) -> None:
    found = run("tests.store.faults", folder, stride)
    assert found["cases"] > 7 * (found["calls"] // stride - 1)
    wrong = {name: found[name] for name in ("raised", "wrong", "not_again", "files_left_open")}
    assert set(wrong.values()) == {0}, wrong


def check_power(states: int, seed: int) -> None:
    """Nothing is wrong or lost; a writer that does not sync is found out, and so is a disk that lies about it."""
    found = run("tests.store.power", states, seed)
    naive, lying = found.pop("naive"), [found.pop(name) for name in list(found) if name.startswith("lying")]
    assert found["states"] == states
    assert naive["wrong"] > naive["states"] // 10, "the harness loses too little"
    assert all(one["lost"] > one["states"] // 20 for one in lying), lying
    wrong = [{name: one[name] for name in ("wrong", "raised", "refused", "not_again", "over_limit",
                                           "temporaries_left", "unlike")} for one in (found, *lying)]  # fmt: skip
    assert not any(count for one in wrong for count in one.values()), wrong
    assert found["lost"] == found["twice"] == 0


@needs_compiler
def test_losses_of_power() -> None:
    check_power(40, seed=1)


@pytest.mark.slow
@needs_compiler
def test_many_losses_of_power() -> None:
    check_power(10_000, seed=2)


@needs_compiler
def test_some_calls_fail(tmp_path: Path) -> None:
    check_faults(tmp_path, 200)


@pytest.mark.slow
@needs_compiler
def test_every_call_fails(tmp_path: Path) -> None:
    check_faults(tmp_path, 1)


def test_processes_that_make_one_index_at_once(tmp_path: Path) -> None:
    assert run("tests.store.births", tmp_path) == {"failed": 0}


def test_two_processes_on_one_store(tmp_path: Path) -> None:
    found = run("tests.store.together", tmp_path / "store")
    assert found == {"failed": 0, "wrong": 0, "missing": 0, "warnings": 0, "written_again": 0, "over_limit": 0}
