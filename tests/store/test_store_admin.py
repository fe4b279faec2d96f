"""The verbs of `tenfold store`, and what an export from a stranger may hold."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.store.fakes import Feeder, restore, timeline
from typer.testing import CliRunner

from tenfold.cli import app
from tenfold.store import Store

SHARED = [int(token) for token in np.random.default_rng(7).integers(0, 1000, 300)]
TAIL = [int(token) for token in np.random.default_rng(8).integers(0, 1000, 100)]
OTHER_MODEL = timeline("d2", "other")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two contexts of one model that share their beginning, one of another."""
    store = Store(tmp_path / "store")
    Feeder(store).feed([*SHARED, *TAIL], 150)
    Feeder(store).feed([*SHARED[:200], 5000])
    Feeder(store, OTHER_MODEL).feed(SHARED)
    store.close()
    return tmp_path / "store"


def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["store", *map(str, words)])
    assert done.exit_code == code, done.output
    return done.output


def told(*words: object, code: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["store", *map(str, words), "--json"])
    assert done.exit_code == code, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def listed(folder: Path) -> list[dict[str, Any]]:
    contexts: list[dict[str, Any]] = told("list", "--store", folder)["contexts"]
    return contexts


def test_list(folder: Path) -> None:
    contexts = listed(folder)
    assert [(one["model"], one["tokens"], one["points"]) for one in contexts] == [
        ("other", 300, 1),
        ("tiny", 201, 2),
        ("tiny", 400, 3),
    ]
    assert contexts[0]["id"] in run("list", "--store", folder)


def test_show(folder: Path) -> None:
    one = listed(folder)[1]
    found = told("show", one["id"][:8], "--store", folder)
    assert [(row["start"], row["stop"]) for row in found["segments"]] == [(0, 150), (150, 200), (200, 201)]
    assert [(row["kind"], row["position"]) for row in found["restore_points"]] == [("auto", 150), ("end", 201)]
    assert "Restore points" in run("show", one["id"], "--store", folder)


@pytest.mark.parametrize("words", [["show", "zz"], ["show", ""], ["export", "zz", "file.tar"]])
def test_an_id_that_means_nothing_or_much(folder: Path, words: list[str]) -> None:
    assert "tenfold store list" in run(*words, "--store", folder, code=2)


def test_verify_finds_damage(folder: Path) -> None:
    found = told("verify", "--store", folder)
    assert (found["files"], found["damaged"]) == (4 + 1 + 5, [])
    key = listed(folder)[2]["id"]
    victim = next((folder / "segments").rglob(f"{key}*"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0\0")
    found = told("verify", "--store", folder, code=1)
    assert [row["file"] for row in found["damaged"]] == [f"segments/{victim.name}"]
    assert "0 damaged" in run("verify", "--store", folder)


def test_prune(folder: Path) -> None:
    assert told("prune", "--older", "1h", "--store", folder)["segments"] == 0
    assert told("prune", "--model", "other", "--store", folder)["segments"] == 1
    assert [one["model"] for one in listed(folder)] == ["tiny", "tiny"]
    assert told("prune", "--limit", "1", "--store", folder)["bytes_left"] == 0
    assert listed(folder) == []
    assert not [path for kind in ("segments", "points") for path in (folder / kind).rglob("*") if path.is_file()]


def test_prune_by_age(folder: Path) -> None:
    store = Store(folder)
    store.index._all("UPDATE segments SET used_s = used_s - 7200 WHERE model = 'tiny' AND stop < 400")
    store.close()
    assert told("prune", "--older", "1h", "--store", folder)["segments"] == 1  # parents of what is younger stay
    assert [one["tokens"] for one in listed(folder)] == [300, 400]


@pytest.mark.parametrize("words", [[], ["--older", "soon"], ["--limit", "much"]])
def test_prune_must_be_told_what(folder: Path, words: list[str]) -> None:
    run("prune", *words, "--store", folder, code=2)


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    assert "no store" in run("list", "--store", tmp_path / "typo", code=2)
    assert not (tmp_path / "typo").exists()


def exported(folder: Path, tmp_path: Path) -> Path:
    one = next(row for row in listed(folder) if row["tokens"] == 400)
    told("export", one["id"], tmp_path / "one.tar", "--store", folder)
    return tmp_path / "one.tar"


def test_export_and_import(folder: Path, tmp_path: Path) -> None:
    archive = exported(folder, tmp_path)
    assert "exists already" in run("export", listed(folder)[2]["id"], archive, "--store", folder, code=2)
    found = told("import", archive, "--store", tmp_path / "new")
    assert (found["segments"], found["points"]) == (3, 3)
    store = Store(tmp_path / "new")
    assert restore(store, [*SHARED, *TAIL]).position == 400
    store.close()
    assert told("import", archive, "--store", tmp_path / "new")["segments"] == 3  # once more changes nothing
    assert len(listed(tmp_path / "new")) == 1


def repacked(archive: Path, change: Any) -> Path:
    """The archive with each member's name and content changed; None leaves it out."""
    path = archive.with_name("changed.tar")
    with tarfile.open(archive) as old, tarfile.open(path, "w") as new:
        for member in old:
            source = old.extractfile(member)
            assert source is not None
            changed = change(member, source.read())
            if changed is not None:
                member, content = changed
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    return path


def renamed(name: str) -> Any:
    return lambda member, content: (member.replace(name=name), content)


CHANGES = {
    "a path out": renamed("../../evil"),
    "an absolute path": renamed("/tmp/evil"),
    "a path inside": renamed(f"segments/../{'a' * 64}"),
    "another name": renamed(f"segments/{'a' * 64}"),
    "a point for a segment": renamed(f"points/{'a' * 64}-5"),
    "a bit": lambda member, content: (member, content[:-1] + bytes([content[-1] ^ 1])),
    "a byte less": lambda member, content: (member, content[:-1]),
    "nothing in it": lambda member, content: (member, b""),
    "no root": lambda member, content: None if content.find(b'"start":0') > 0 else (member, content),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_export_is_refused(folder: Path, tmp_path: Path, change: str) -> None:
    archive = repacked(exported(folder, tmp_path), CHANGES[change])
    assert "error: " in run("import", archive, "--store", tmp_path / "new", code=2)
    assert listed(tmp_path / "new") == []
    files = [path.name for path in tmp_path.rglob("*") if path.is_file() and "new" in path.parts]
    assert {name for name in files if not name.startswith("index.sqlite")} <= {"VERSION"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_an_import_takes_plain_files_only(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo(f"segments/{'a' * 64}")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    assert "no file of a store" in run("import", tmp_path / "a.tar", "--store", tmp_path / "new", code=2)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_an_import_of_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    run("import", tmp_path / "a.tar", "--store", tmp_path / "new", code=2)
    run("import", tmp_path / "missing.tar", "--store", tmp_path / "new", code=2)
