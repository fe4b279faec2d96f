"""Safetensors files as untrusted input: their headers, the index, and which files a folder may name.

Knows nothing of torch, of models or of values: it reads headers, never a byte of payload.

A shard is named by a plain file name and lies in the checkpoint's own folder. A symbolic link is followed
only to a regular file inside that folder, or inside `blobs` beside `snapshots`, which is how a download cache
lays a checkpoint out; a link that leads anywhere else is refused. Pickles (`.bin`, `.pt`) are never opened.

A header is accepted where safetensors 0.8.0 accepts it, but for these differences, all meant and stricter:
a tensor or a metadata key given twice; a tensor described by anything but an object of exactly `dtype`,
`shape` and `data_offsets`; a dtype that is not a plain string; more than about 250,000 tensors. Odd names of
tensors are sound headers; the loader then finds that no model has such a tensor.
"""

from __future__ import annotations

import gc
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tenfold.errors import CheckpointError

__all__ = [
    "DTYPE_BITS",
    "INDEX_NAME",
    "MAX_HEADER_BYTES",
    "HeaderEntry",
    "Problems",
    "Shard",
    "Stored",
    "StoredTensor",
    "open_regular",
    "parse_header",
    "read_folder",
    "read_shard",
    "shown",
]

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
MAX_COUNT = 2**64 - 1
MAX_SEPARATORS = 2_500_000
"""Colons and commas of a header: about 10 a tensor, and what keeps a hostile one from taking seconds."""

DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Every dtype the format knows, and the bits of one element."""

_ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}
_JSON_START = frozenset(b"{ \t\r\n")
_LFS_POINTER = b"version "
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OF_PATTERN = re.compile(r"(.*-)(\d+)-of-(\d+)\.safetensors")
_UNSAFE = frozenset('/\\:*?"<>|')
_UNSAFE_FIRST = frozenset(".-~ ")
_MAX_NUMBERED = 10_000
_OPEN_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"))


class _Missing(CheckpointError):
    """A file that is not there."""


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor of a header: dtype, shape, and the half-open byte range of its payload."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file whose header is sound and covers the file exactly."""

    name: str
    path: Path
    file_bytes: int
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """What a folder holds. `unread` names tensors whose shard could not be read, as far as an index tells.

    `partly_unread` is set where a shard could not be read and no index says what it holds.
    """

    shards: tuple[Shard, ...]
    tensors: dict[str, StoredTensor]
    unread: frozenset[str]
    partly_unread: bool


@dataclass(slots=True)
class Problems:
    """Collects what is wrong with a checkpoint; one error then lists the first few of each kind."""

    folder: Path
    found: dict[str, list[str]] = field(default_factory=dict)

    LISTED = 5

    def add(self, kind: str, detail: str) -> None:
        """`kind` is a plural noun, such as "missing tensors"."""
        self.found.setdefault(kind, []).append(detail)

    def raise_any(self) -> None:
        """Raises one `CheckpointError` if anything was added."""
        if self.found:
            lines = [self._line(kind, details) for kind, details in self.found.items()]
            raise CheckpointError(
                f"{self.folder} is not a checkpoint that can be used:\n" + "\n".join(lines) + "\n"
                "fetch the files that are named again, or use the config.json that belongs to these weights"
            )

    def _line(self, kind: str, details: list[str]) -> str:
        more = len(details) - self.LISTED
        rest = f"; and {more} more" if more > 0 else ""
        return f"  {kind} ({len(details)}): {'; '.join(details[: self.LISTED])}{rest}"


def shown(name: str) -> str:
    """A name from a file, safe to print: escaped where it holds control characters, cut where it is long."""
    text = name if name.isprintable() and name else ascii(name)
    return text if len(text) <= 120 else text[:117] + "..."


def read_folder(folder: Path, problems: Problems) -> Stored:
    """Reads the header of every shard of a checkpoint; what is wrong goes to `problems`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the one with config.json and *.safetensors")
    root = folder.resolve()
    weight_map = _read_index(root, problems)
    names = _shard_names(root, weight_map, problems)
    shards = [shard for name in names if (shard := _try_shard(root, name, problems)) is not None]
    tensors = _merge(shards, problems)
    read = {shard.name for shard in shards}
    if weight_map is None:
        return Stored(tuple(shards), tensors, frozenset(), partly_unread=len(read) < len(names))
    absent = _compare_index(weight_map, shards, problems)
    unread = absent | {name for name, shard in weight_map.items() if shard not in read}
    return Stored(tuple(shards), tensors, frozenset(unread), partly_unread=False)


def read_shard(path: Path, name: str | None = None) -> Shard:
    """Reads and checks the header of one file; `CheckpointError` says what is wrong with it."""
    name = path.name if name is None else name
    with open_regular(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header = _read_header(file, file_bytes)
    start = LENGTH_BYTES + len(header)
    entries = parse_header(header, file_bytes - start)
    tensors = tuple(
        StoredTensor(tensor, entry.dtype, entry.shape, name, start + entry.start, entry.stop - entry.start)
        for tensor, entry in entries.items()
    )
    return Shard(name, path, file_bytes, tensors)


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading; a link, a pipe or a device is refused without waiting for it."""
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except FileNotFoundError:
        raise _Missing("is missing") from None
    except OSError as exc:
        raise CheckpointError(f"cannot be opened: {exc.strerror}") from exc
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError("is not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _read_header(file: BinaryIO, file_bytes: int) -> bytes:
    """The bytes of the header; nothing is allocated that the file does not hold."""
    prefix = file.read(LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES:
        raise CheckpointError(f"holds {file_bytes} bytes, too few for a safetensors file")
    if prefix == _LFS_POINTER:
        raise CheckpointError("is a git-lfs pointer, not the file itself; run `git lfs pull`")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(f"claims a header of {header_bytes} bytes, expected at most {MAX_HEADER_BYTES}")
    if header_bytes > file_bytes - LENGTH_BYTES:
        raise CheckpointError(f"claims a header of {header_bytes} bytes and holds {file_bytes} in all")
    first = file.read(min(1, header_bytes))
    if not first or first[0] not in _JSON_START:
        raise CheckpointError("has a header that is not a JSON object")
    header = first + file.read(header_bytes - 1)
    if len(header) < header_bytes:
        raise CheckpointError("became shorter while it was read")
    return header


@contextmanager
def _collector_paused() -> Iterator[None]:
    """A large header is a million small objects, which the garbage collector would walk again and again."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@_collector_paused()
def parse_header(header: bytes, payload_bytes: int) -> dict[str, HeaderEntry]:
    """The tensors of a header, checked against each other and against the bytes that follow it."""
    fields = _strict_json(header)
    if not isinstance(fields, dict):
        raise CheckpointError("has a header that is not a JSON object")
    metadata = fields.pop("__metadata__", None)
    if metadata is not None and not _is_string_map(metadata):
        raise CheckpointError("has __metadata__ that is not an object of strings")
    entries = {name: _entry(name, value) for name, value in fields.items()}
    _check_cover(entries, payload_bytes)
    return entries


def _is_string_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _strict_json(data: bytes) -> object:
    """JSON without what Python lets pass: no key twice, no negative zero, no half of a surrogate pair."""
    if data.count(b":") + data.count(b",") > MAX_SEPARATORS:
        raise CheckpointError(f"holds JSON of more than {MAX_SEPARATORS:,} fields and numbers")
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_natural)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise CheckpointError("holds JSON that is nested too deeply") from None
    except UnicodeError as exc:
        raise CheckpointError(f"holds JSON that is not UTF-8: {exc}") from None
    except ValueError as exc:
        raise CheckpointError(f"holds broken JSON: {str(exc)[:200]}") from None
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{shown(twice)} is there twice")
    return fields


def _natural(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(f"{digits[:20]} is negative")
    return int(digits)


def _entry(name: str, value: object) -> HeaderEntry:
    if not isinstance(value, dict) or value.keys() != _ENTRY_FIELDS:
        raise CheckpointError(f"describes {shown(name)} by something else than dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"gives {shown(name)} the unknown dtype {shown(str(dtype))}")
    if not _are_counts(shape):
        raise CheckpointError(f"gives {shown(name)} the shape {shown(str(shape))}, expected counts")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"gives {shown(name)} the bytes {shown(str(offsets))}, expected [start, stop]")
    entry = HeaderEntry(dtype, tuple(shape), offsets[0], offsets[1])
    _check_size(name, entry)
    return entry


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item <= MAX_COUNT for item in value)


def _check_size(name: str, entry: HeaderEntry) -> None:
    """The shape fills the byte range; the product is taken step by step, so that a zero hides no overflow."""
    bits = 1
    for extent in (*entry.shape, DTYPE_BITS[entry.dtype]):
        bits *= extent
        if bits > MAX_COUNT:
            raise CheckpointError(f"gives {shown(name)} a shape beyond 64 bits")
    if bits % 8:
        raise CheckpointError(f"gives {shown(name)} {bits} bits of {entry.dtype}, not whole bytes")
    if bits // 8 != entry.stop - entry.start:
        raise CheckpointError(
            f"gives {shown(name)} {entry.stop - entry.start} bytes, but {entry.dtype} "
            f"{shown(str(list(entry.shape)))} takes {bits // 8}"
        )


def _check_cover(entries: dict[str, HeaderEntry], payload_bytes: int) -> None:
    """The tensors lie end to end: no hole, no overlap, nothing behind the last."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            what = "overlaps another tensor" if entry.start < position else "leaves a hole"
            raise CheckpointError(f"puts {shown(name)} at {entry.start}, which {what}; expected {position}")
        position = entry.stop
    if position != payload_bytes:
        state = "is truncated" if position > payload_bytes else "has trailing bytes"
        raise CheckpointError(f"{state}: its tensors take {position} bytes, the file holds {payload_bytes}")


def _read_index(root: Path, problems: Problems) -> dict[str, str] | None:
    """The `weight_map` of the index, or None where there is no index."""
    if not os.path.lexists(root / INDEX_NAME):
        return None
    try:
        return _parse_index(_safe_path(root, INDEX_NAME))
    except CheckpointError as exc:
        problems.add("broken index files", f"{INDEX_NAME} {exc}")
        problems.raise_any()
        raise


@_collector_paused()
def _parse_index(path: Path) -> dict[str, str]:
    with open_regular(path) as file:
        data = file.read(MAX_HEADER_BYTES + 1)
    if len(data) > MAX_HEADER_BYTES:
        raise CheckpointError(f"is larger than {MAX_HEADER_BYTES} bytes")
    index = _strict_json(data)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not _is_string_map(weight_map):
        raise CheckpointError("has no weight_map of tensor names to file names")
    return weight_map


def _shard_names(root: Path, weight_map: dict[str, str] | None, problems: Problems) -> list[str]:
    """The names of the shards: those of the index, else every safetensors file of the folder."""
    present = {name for name in os.listdir(root) if name.endswith(".safetensors")}
    if weight_map is None:
        if not present:
            raise CheckpointError(_nothing_to_read(root))
        for name in _missing_of_series(present):
            problems.add("missing shards", name)
        return sorted(present)
    named = sorted(set(weight_map.values()))
    for name in sorted(present - set(named)):
        problems.add("shards the index does not name", shown(name))
    allowed = [name for name in named if _allow_name(name, problems)]
    _refuse_twins(allowed, problems)
    for name in sorted(set(allowed) - present):
        problems.add("missing shards", name)
    return [name for name in allowed if name in present]


def _allow_name(name: str, problems: Problems) -> bool:
    """Whether an entry of the index is a plain file name, before anything is opened."""
    plain = name.isprintable() and _UNSAFE.isdisjoint(name) and name[:1] not in _UNSAFE_FIRST
    if plain and name.endswith(".safetensors") and len(name.encode("utf-8")) <= 255:
        return True
    problems.add("shard names that are not plain *.safetensors file names", shown(name))
    return False


def _refuse_twins(names: list[str], problems: Problems) -> None:
    """Names that differ by case are one file on some systems and two on others."""
    first: dict[str, str] = {}
    for name in names:
        twin = first.setdefault(name.casefold(), name)
        if twin != name:
            problems.add("shard names that differ by case only", f"{twin} and {name}")


def _missing_of_series(present: set[str]) -> Iterator[str]:
    """Names such as model-00002-of-00003.safetensors that a series without an index lacks."""
    series = {(m[1], len(m[2]), m[3]) for name in present if (m := _OF_PATTERN.fullmatch(name))}
    for stem, width, total in sorted(series):
        for number in range(1, min(int(total), _MAX_NUMBERED) + 1):
            name = f"{stem}{number:0{width}d}-of-{total}.safetensors"
            if name not in present:
                yield name


def _nothing_to_read(root: Path) -> str:
    names = sorted(os.listdir(root))
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{root} has no *.safetensors, only {', '.join(map(shown, pickles[:3]))}; "
            "pickles can run code and are never opened: fetch the safetensors version of the checkpoint"
        )
    other = [name for name in names if name.endswith(".gguf")]
    if other:
        return f"{root} has no *.safetensors, only {shown(other[0])}; fetch the official checkpoint"
    return f"{root} has no *.safetensors; fetch the weights of the checkpoint into this folder"


def _try_shard(root: Path, name: str, problems: Problems) -> Shard | None:
    try:
        return read_shard(_safe_path(root, name), name)
    except _Missing:
        problems.add("missing shards", shown(name))
    except CheckpointError as exc:
        problems.add("damaged shards", f"{shown(name)} {exc}")
    except OSError as exc:
        problems.add("unreadable shards", f"{shown(name)}: {exc.strerror}")
    return None


def _safe_path(root: Path, name: str) -> Path:
    """The file behind `name`, with links resolved, if it lies where a checkpoint's files may lie."""
    try:
        path = (root / name).resolve(strict=True)
    except FileNotFoundError:
        raise _Missing("is missing") from None
    except (OSError, RuntimeError) as exc:
        raise CheckpointError("is a link that leads nowhere") from exc
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append((root.parent.parent / "blobs").resolve())
    if not any(path.is_relative_to(home) for home in homes):
        raise CheckpointError("is a link out of the checkpoint's folder; put the file itself there")
    return path


def _merge(shards: list[Shard], problems: Problems) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in shard.tensors:
            first = tensors.setdefault(tensor.name, tensor)
            if first is not tensor:
                detail = f"{shown(tensor.name)} in {shown(first.shard)} and {shown(tensor.shard)}"
                problems.add("tensors in two shards", detail)
    return tensors


def _compare_index(weight_map: dict[str, str], shards: list[Shard], problems: Problems) -> set[str]:
    """Compares the index with the headers; returns the tensors that are not where the index puts them."""
    held = {shard.name: {tensor.name for tensor in shard.tensors} for shard in shards}
    absent = {name for name, shard in weight_map.items() if shard in held and name not in held[shard]}
    for name in sorted(absent):
        problems.add("tensors absent from the shard the index names", f"{shown(name)} in {weight_map[name]}")
    for shard, names in held.items():
        for name in sorted(names - weight_map.keys()):
            problems.add("tensors the index does not list", f"{shown(name)} in {shard}")
    return absent
