"""The file format of the store: a checked header, then named arrays in blocks with checksums. Knows no index.

    8 bytes   magic, then u32 version and u32 length of the header, little-endian
    header    JSON: the facts of the file and its parts in order (name, dtype, shape, checksums)
    8 bytes   xxh3-64 of everything before
    payload   the parts one after the other, to the end of the file

Where a part lies follows from the parts before it, so parts cannot overlap or lie outside. A header is believed only
after its length, its checksum and the size of the file have been checked; nothing is allocated before.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import xxhash

__all__ = ["BLOCK_BYTES", "VERSION", "Damaged", "Header", "Missing", "Part", "encode", "open_file", "read_header",
           "read_parts", "write_all"]  # fmt: skip

VERSION = 1
BLOCK_BYTES = 1 << 20
"""Every block of a part has its own checksum, so that the beginning of a part can be read and checked alone."""

_MAGIC = b"TENFOLD\n"
_PREFIX = struct.Struct("<8sII")
_SUM = struct.Struct("<Q")
_MAX_HEADER_BYTES = 8 << 20
_ITEM_BYTES = {"uint8": 1, "int32": 4, "float32": 4}
_READ_BYTES = 4 << 20  # at once: large enough for the disk, small enough to be hashed from the cache
_WRITE_BYTES = 16 << 20
_BAD_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENOTDIR, errno.EIO)
_MAX_VIEWS = 512  # below IOV_MAX, 1024 on Linux


class Damaged(Exception):
    """A file is not what was once written; the message says how."""

    @property
    def verdict(self) -> str:
        """What a sentence about the file says of it."""
        return f"is damaged ({self})"


class Missing(Damaged):
    """A file is gone: evicted by a process whose last word was lost with the power, or removed by hand."""

    @property
    def verdict(self) -> str:
        return "is missing"


@dataclass(frozen=True, slots=True)
class Part:
    """One array of a file: `offset` is its first byte in the file, `checksums` one xxh3-64 a block."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    checksums: tuple[int, ...]
    offset: int = 0

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself: its facts, and its parts by name."""

    facts: Mapping[str, Any]
    parts: Mapping[str, Part]

    def integer(self, name: str) -> int:
        """A fact that must be a number from 0."""
        value = self.facts.get(name)
        if type(value) is not int or not 0 <= value < 1 << 40:
            raise Damaged(f"its {name} is {value!r}")
        return value

    def text(self, name: str) -> str:
        """A fact that must be a short text."""
        value = self.facts.get(name)
        if not isinstance(value, str) or len(value) > 4096:
            raise Damaged(f"its {name} is {str(value)[:40]!r}")
        return value


def encode(
    facts: Mapping[str, Any], arrays: Sequence[tuple[str, str, Sequence[int], memoryview]]
) -> list[bytes | memoryview]:
    """The pieces of a file in order. An array is name, dtype, shape and its bytes, which are not copied."""
    parts = [
        {"name": name, "dtype": dtype, "shape": list(shape), "checksums": [f"{s:016x}" for s in _checksums(view)]}
        for name, dtype, shape, view in arrays
    ]
    header = json.dumps({"facts": dict(facts), "parts": parts}, separators=(",", ":")).encode()
    start = _PREFIX.pack(_MAGIC, VERSION, len(header)) + header
    return [start + _SUM.pack(xxhash.xxh3_64_intdigest(start)), *(view for *_, view in arrays)]


def _checksums(view: memoryview) -> Iterator[int]:
    for start in range(0, len(view), BLOCK_BYTES):
        yield xxhash.xxh3_64_intdigest(view[start : start + BLOCK_BYTES])


def write_all(fd: int, pieces: Iterable[bytes | memoryview]) -> None:
    """Writes every byte, however few the system takes at a time."""
    for piece in pieces:
        view = memoryview(piece)
        while view:
            view = view[os.write(fd, view[:_WRITE_BYTES]) :]


@contextmanager
def open_file(path: Path) -> Iterator[int]:
    """A descriptor to read `path` by; only a regular file, never a link, a pipe or a device.

    Raises Damaged for what says that the file is bad, Missing if it is gone, OSError for what says nothing about it.
    """
    fd = None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Damaged("not a regular file")
        yield fd
    except FileNotFoundError as exc:
        raise Missing("no such file") from exc
    except OSError as exc:
        if exc.errno in _BAD_FILE:
            raise Damaged(exc.strerror or str(exc)) from exc
        raise
    finally:
        if fd is not None:
            os.close(fd)


def read_header(fd: int) -> Header:
    """The header, checked against its checksum and the size of the file; raises Damaged."""
    file_bytes = os.fstat(fd).st_size
    prefix = os.pread(fd, _PREFIX.size, 0)
    if len(prefix) < _PREFIX.size:
        raise Damaged("truncated within the header")
    magic, version, header_bytes = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise Damaged("not a file of the store")
    if version != VERSION:
        raise Damaged(f"written in version {version} of the format, this is version {VERSION}")
    payload = _PREFIX.size + header_bytes + _SUM.size
    if header_bytes > _MAX_HEADER_BYTES or payload > file_bytes:
        raise Damaged("truncated within the header")
    rest = os.pread(fd, header_bytes + _SUM.size, _PREFIX.size)
    if _SUM.pack(xxhash.xxh3_64_intdigest(prefix + rest[:header_bytes])) != rest[header_bytes:]:
        raise Damaged("checksum of the header")
    header = _parse(rest[:header_bytes], payload)
    stop = payload + sum(part.num_bytes for part in header.parts.values())
    if stop != file_bytes:
        raise Damaged(f"{file_bytes:,} bytes long, its header says {stop:,}")
    return header


def _parse(text: bytes, payload: int) -> Header:
    """A header with a right checksum may still come from somebody else: every field is checked."""
    try:
        found = json.loads(text)
        facts, described = found["facts"], found["parts"]
        parts: dict[str, Part] = {}
        for fields in described:
            part = _part(fields, payload)
            payload += part.num_bytes
            if parts.setdefault(part.name, part) is not part:
                raise Damaged(f"part {part.name!r} twice")
    except (KeyError, TypeError, ValueError, RecursionError) as exc:
        raise Damaged("a header that makes no sense") from exc
    if not isinstance(facts, dict):
        raise Damaged("a header that makes no sense")
    return Header(facts, parts)


def _part(fields: Any, offset: int) -> Part:
    name, dtype, shape, checksums = (fields[key] for key in ("name", "dtype", "shape", "checksums"))
    valid = isinstance(name, str) and dtype in _ITEM_BYTES and isinstance(shape, list) and 1 <= len(shape) <= 4
    if not valid or not all(type(extent) is int and 0 <= extent < 1 << 40 for extent in shape):
        raise Damaged(f"part {str(name)[:40]!r} of shape {str(shape)[:40]}")
    part = Part(name, dtype, tuple(shape), tuple(int(text, 16) for text in checksums), offset)
    if len(part.checksums) != ceil(part.num_bytes / BLOCK_BYTES):
        raise Damaged(f"part {name[:40]!r} with {len(part.checksums)} checksums")
    return part


@dataclass(frozen=True, slots=True)
class _Block:
    """A stretch of the file with one checksum, and the memory it goes to."""

    offset: int
    views: tuple[memoryview, ...]
    checksum: int
    part: str

    @property
    def stop(self) -> int:
        return self.offset + sum(len(view) for view in self.views)


def read_parts(fd: int, wanted: Sequence[tuple[Part, memoryview]]) -> None:
    """Reads the beginning of each part straight into the memory given; raises Damaged unless every checksum holds.

    Parts come in the order of the file. Memory may be shorter than the part; the rest of its last block is read
    aside, because the checksum covers it.
    """
    batch: list[_Block] = []
    for block in _blocks(wanted):
        views = sum(len(one.views) for one in batch)
        if batch and (
            block.offset != batch[-1].stop or block.stop - batch[0].offset > _READ_BYTES or views + 2 > _MAX_VIEWS
        ):
            _read_batch(fd, batch)
            batch = []
        batch.append(block)
    if batch:
        _read_batch(fd, batch)


def _blocks(wanted: Sequence[tuple[Part, memoryview]]) -> Iterator[_Block]:
    for part, view in wanted:
        for number, start in enumerate(range(0, len(view), BLOCK_BYTES)):
            inside = view[start : start + BLOCK_BYTES]
            beyond = min(part.num_bytes - start, BLOCK_BYTES) - len(inside)
            views = (inside, memoryview(bytearray(beyond))) if beyond else (inside,)
            yield _Block(part.offset + start, views, part.checksums[number], part.name)


def _read_batch(fd: int, batch: Sequence[_Block]) -> None:
    offset, views = batch[0].offset, [view for block in batch for view in block.views]
    while views:
        count = os.preadv(fd, views, offset)
        if count == 0:
            raise Damaged("truncated")
        offset += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
    for block in batch:
        digest = xxhash.xxh3_64()
        for view in block.views:
            digest.update(view)
        if digest.intdigest() != block.checksum:
            raise Damaged(f"checksum of {block.part}")
