"""Collects the training text: downloads pinned packages, extracts prose, dedupes, splits by document.

Run from the repository root on Debian 12 (once before: apt-get update):

    python -m training.data

Writes build/training/{train,valid}.txt (documents apart by a form feed), train_sources.json (the package of each
training document), corpus.json (what came from where), and src/tenfold/demo/document.txt.
Knows nothing of tokens and models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

from tenfold.errors import RunError
from training.extract import Block, blocks_of, is_prose, render
from training.sources import SOURCES, Source

__all__ = ["DOCUMENT", "DOCUMENT_SEPARATOR", "WORK", "Document", "Split", "load_split", "split_of"]

REPOSITORY = Path(__file__).resolve().parents[1]
WORK = REPOSITORY / "build" / "training"
DOCUMENT = REPOSITORY / "src" / "tenfold" / "demo" / "document.txt"
DOCUMENT_SEPARATOR = "\f"

CODE_SHARE = 0.10  # of a document's characters, at most
LONGEST_CODE_LINES = 16
LONGEST_HEADING_CHARS = 80
LONGEST_TERM_CHARS = 60
SMALLEST_DOCUMENT_BYTES = 600
SHIPPED_SOURCE = "sqlite3-doc"
SHIPPED_BYTES = (150_000, 200_000)  # the shipped document is filled to within these
SHIPPED_DOCUMENT_BYTES = (5_000, 45_000)  # each of its chapters: long enough to read, none dominating
SHINGLE_WORDS = 8
LARGEST_OVERLAP = 0.25  # of a training paragraph's shingles, with held-out text


@dataclass(frozen=True, slots=True)
class Document:
    """One source file as blocks; `name` is package/path and decides its split."""

    name: str
    blocks: tuple[Block, ...]

    @property
    def source(self) -> str:
        return self.name.partition("/")[0]

    @property
    def text(self) -> str:
        return render(list(self.blocks))


@dataclass(frozen=True, slots=True)
class Split:
    """The documents of the three sets; `held_out` makes the shipped document."""

    train: tuple[Document, ...]
    valid: tuple[Document, ...]
    held_out: tuple[Document, ...]


def load_split(path: Path) -> list[str]:
    """The documents of a written train.txt or valid.txt."""
    return path.read_text(encoding="utf-8").split(DOCUMENT_SEPARATOR)


def _rank(name: str) -> int:
    """A fixed pseudo-random number of a document name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def split_of(name: str) -> str:
    """`valid` for one document in fifty, by name alone."""
    return "valid" if _rank(name) % 50 == 0 else "train"


# --- download -----------------------------------------------------------------------------------------------


def _fetch(source: Source, work: Path) -> Path:
    """The unpacked package; downloads it unless it is there already."""
    unpacked = work / "raw" / source.package
    if not unpacked.is_dir():
        archive = _download(source, work / "deb" / source.package)
        # renamed when whole, so that what a broken run left behind is not taken for the package
        partial = unpacked.with_name(f"{source.package}.partial")
        unpacked.parent.mkdir(exist_ok=True)
        subprocess.run(["dpkg", "-x", str(archive), str(partial)], check=True)
        partial.rename(unpacked)
    return unpacked / source.root


def _download(source: Source, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wanted = f"{source.package}={source.version}"
    command = ["apt-get", "download", wanted]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.deb"))
    if done.returncode != 0 or len(archives) != 1:
        raise RunError(
            f"could not download {wanted}: {done.stderr.strip()}; expected exactly this version: "
            f"run apt-get update on Debian 12, or unpack it (dpkg -x) into "
            f"{folder.parents[1] / 'raw' / source.package}"
        )
    return archives[0]


def _files(root: Path, source: Source) -> list[Path]:
    found = {path for pattern in source.include for path in root.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not _is_excluded(f"/{path.relative_to(root)}", source))


def _is_excluded(name: str, source: Source) -> bool:
    return any(fnmatch(name, pattern) for pattern in source.exclude)


# --- choosing blocks ----------------------------------------------------------------------------------------


def _choose(blocks: list[Block]) -> list[Block]:
    """Prose, the headings and terms it belongs to, and a little of the code right after it."""
    chosen: list[Block] = []
    heading: Block | None = None
    term = ""
    prose_chars, code_chars = 0, 0
    for before, block in pairwise([Block("heading", ""), *blocks]):
        if block.kind == "heading":
            heading, term = _numberless(block), ""
        elif block.kind == "term":
            term = block.text if len(block.text) <= LONGEST_TERM_CHARS else ""
        elif block.kind == "code":
            room = CODE_SHARE * prose_chars - code_chars
            if chosen and _is_wanted(before) and _fits(block, room):
                code_chars += len(block.text)
                chosen.append(block)
        elif _is_wanted(block):
            if heading is not None and 2 < len(heading.text) <= LONGEST_HEADING_CHARS:
                chosen.append(heading)
            chosen.append(Block(block.kind, f"{term}: {block.text}") if term else block)
            heading, term = None, ""
            prose_chars += len(block.text)
    whole = (_without_dangling(block, after) for block, after in _with_next(chosen))
    return [block for block in whole if block is not None]


def _fits(code: Block, room_chars: float) -> bool:
    return len(code.text) <= room_chars and code.text.count("\n") < LONGEST_CODE_LINES


def _with_next(blocks: list[Block]) -> Iterator[tuple[Block, Block | None]]:
    return zip(blocks, [*blocks[1:], None], strict=False)


def _without_dangling(block: Block, after: Block | None) -> Block | None:
    """Cuts a last sentence announcing a list or code which was not kept; None if that was all."""
    if block.kind not in ("text", "item") or not block.text.endswith(":"):
        return block
    if after is not None and (after.kind == "code" or (after.kind == "item" and block.kind == "text")):
        return block
    text = re.sub(r"(?:^|(?<=[.!?] ))[^.!?]*:$", "", block.text).strip()
    return Block(block.kind, text) if text else None


def _numberless(heading: Block) -> Block:
    """Section numbers and "#" marks say nothing to a reader of plain text."""
    number = r"^(?:Chapter |Appendix |Part )?(?:[A-Z]?\d+\.|[A-Z]\.|[IVX]+\.)[\d.]*\s*"
    text = re.sub(number, "", heading.text)
    return Block("heading", text.rstrip("# ").strip())


def _is_wanted(block: Block) -> bool:
    if block.kind == "item":
        return is_prose(block.text, fewest_words=5)
    ends_well = block.text.endswith((".", ":", "?", "!", '."', ".)", ";", '!"'))
    return ends_well and is_prose(block.text)


# --- dedupe and overlap -------------------------------------------------------------------------------------


def _shingles(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


class _Deduper:
    """Keeps a paragraph the first time it is seen; training text also gives way to held-out text."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._held_out: set[str] = set()

    def keep(self, document: Document, *, is_train: bool) -> Document:
        kept = [b for b in document.blocks if b.kind == "heading" or self._is_new(b, is_train)]
        blocks = [block for block, after in _with_next(kept) if _has_body(block, after)]
        if not is_train:
            self._held_out |= {s for block in blocks for s in _shingles(block.text)}
        return Document(document.name, tuple(blocks))

    def _is_new(self, block: Block, is_train: bool) -> bool:
        key = " ".join(re.findall(r"\w+", block.text.lower()))
        if key in self._seen:
            return False
        self._seen.add(key)
        shingles = _shingles(block.text) if is_train else set()
        return len(shingles & self._held_out) <= LARGEST_OVERLAP * len(shingles)


def _has_body(block: Block, after: Block | None) -> bool:
    """A heading stays only above something."""
    return block.kind != "heading" or (after is not None and after.kind != "heading")


def _split(documents: list[Document]) -> Split:
    """Held-out and validation documents are deduped first, so training text can repeat neither."""
    deduper = _Deduper()
    held_out = _shipped(documents)
    held_out_names = {document.name for document in held_out}
    rest = [document for document in documents if document.name not in held_out_names]
    held_out = [deduper.keep(document, is_train=False) for document in held_out]
    valid = [deduper.keep(d, is_train=False) for d in rest if split_of(d.name) == "valid"]
    train = [deduper.keep(d, is_train=True) for d in rest if split_of(d.name) == "train"]
    return Split(_worth_keeping(train), _worth_keeping(valid), tuple(held_out))


def _worth_keeping(documents: list[Document]) -> tuple[Document, ...]:
    return tuple(d for d in documents if len(d.text.encode()) >= SMALLEST_DOCUMENT_BYTES)


def _shipped(documents: list[Document]) -> list[Document]:
    """Documents of the public-domain source in the order of their hashes, until the size is reached."""
    low, high = SHIPPED_DOCUMENT_BYTES
    chapters = [d for d in documents if d.source == SHIPPED_SOURCE and "/c3ref/" not in d.name]
    chapters = [d for d in chapters if low <= len(d.text.encode()) <= high]
    taken: list[Document] = []
    total_bytes = 0
    for document in sorted(chapters, key=lambda d: _rank("shipped " + d.name)):
        size_bytes = len(document.text.encode())
        if total_bytes + size_bytes <= SHIPPED_BYTES[1] and total_bytes < SHIPPED_BYTES[0]:
            taken.append(document)
            total_bytes += size_bytes
    return taken


# --- the whole ----------------------------------------------------------------------------------------------


def _read(work: Path) -> list[Document]:
    documents = []
    for source in SOURCES:
        root = _fetch(source, work)
        for path in _files(root, source):
            name = f"{source.package}/{path.relative_to(root)}"
            documents.append(Document(name, tuple(_choose(blocks_of(path)))))
        print(f"{source.package}: {len(documents)} documents so far", flush=True)
    return documents


def _write(path: Path, documents: Iterable[Document]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(DOCUMENT_SEPARATOR.join(document.text for document in documents), encoding="utf-8")


def _report(split: Split) -> dict[str, object]:
    """What came from where, for README.md and for whoever checks the recipe."""
    sets = {"train": split.train, "valid": split.valid, "held_out": split.held_out}

    def bytes_of(documents: Iterable[Document], package: str) -> int:
        return sum(len(d.text.encode()) for d in documents if d.source == package)

    return {
        "sources": [
            {"package": s.package, "version": s.version, "licence": s.licence}
            | {f"{name}_bytes": bytes_of(documents, s.package) for name, documents in sets.items()}
            for s in SOURCES
        ],
        "shipped_document": [document.name for document in split.held_out],
        "sha256": {name: _digest(documents) for name, documents in sets.items()},
    }


def _digest(documents: Iterable[Document]) -> str:
    return hashlib.sha256("".join(document.text for document in documents).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="collect the training text")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for downloads and results")
    work: Path = parser.parse_args().work
    split = _split(_read(work))
    train = list(split.train)
    random.Random(0).shuffle(train)
    _write(work / "train.txt", train)
    (work / "train_sources.json").write_text(json.dumps([d.source for d in train]) + "\n", encoding="utf-8")
    _write(work / "valid.txt", split.valid)
    chapters = "\n\n".join(document.text.strip("\n") for document in split.held_out) + "\n"
    DOCUMENT.parent.mkdir(parents=True, exist_ok=True)
    DOCUMENT.write_text(chapters, encoding="utf-8")
    report = _report(split)
    (work / "corpus.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
