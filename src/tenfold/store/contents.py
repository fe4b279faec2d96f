"""What the files of the store say: a segment's tokens and rows, a point's state. Knows neither folder nor index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tenfold.config import StreamSpec
from tenfold.store.files import Damaged, Header, Part, encode, open_file, read_header, read_parts

__all__ = ["Key", "Timeline", "Tokens", "encode_point", "encode_segment", "point_facts", "read_point", "read_rows",
           "read_tokens", "segment_key", "verify_file"]  # fmt: skip

Key = tuple[int, str]
"""A stream: layer and name."""

Tokens = npt.NDArray[np.int32]
_DTYPES = {"uint8": torch.uint8, "float32": torch.float32}


@dataclass(frozen=True)
class Timeline:
    """What rows mean: a model under a choice of numerics. `row_bytes` is a row's size as stored, by growing stream."""

    digest: str
    name: str
    streams: tuple[StreamSpec, ...]
    row_bytes: Mapping[Key, int]

    @property
    def growing(self) -> tuple[StreamSpec, ...]:
        return tuple(spec for spec in self.streams if spec.ratio)


def segment_key(digest: str, parent: str, start: int, tokens: Tokens) -> str:
    """SHA-256 of what a segment is: model and numerics, what comes before, and its own tokens; 64 hex digits."""
    what = hashlib.sha256(f"{digest}|{parent}|{start}|".encode())
    what.update(_memory(tokens.astype("<i4", copy=False)))
    return what.hexdigest()


def encode_segment(
    timeline: Timeline, parent: str, start: int, tokens: Tokens, rows: Mapping[Key, Tensor]
) -> tuple[str, list[bytes | memoryview]]:
    """Key and pieces of the file of a segment; the rows of each growing stream are taken where they lie."""
    key = segment_key(timeline.digest, parent, start, tokens)
    stop = start + len(tokens)
    facts = {"kind": "segment", "key": key, "digest": timeline.digest, "model": timeline.name, "parent": parent,
             "start": start, "stop": stop}  # fmt: skip
    arrays: list[tuple[str, str, Sequence[int], memoryview]] = [
        ("tokens", "int32", (len(tokens),), _memory(tokens.astype("<i4", copy=False)))
    ]
    for spec in timeline.growing:
        packed = rows[spec.layer, spec.name]
        shape = (spec.rows_at(stop) - spec.rows_at(start), timeline.row_bytes[spec.layer, spec.name])
        assert tuple(packed.shape) == shape, f"rows of {spec.layer}.{spec.name}: {tuple(packed.shape)}, not {shape}"
        arrays.append((f"{spec.layer}.{spec.name}", "uint8", shape, _tensor_memory(packed)))
    return key, encode(facts, arrays)


def encode_point(
    timeline: Timeline, key: str, position: int, moment: str, fixed: Mapping[Key, Tensor], logits: Tensor
) -> list[bytes | memoryview]:
    """The pieces of the file of a restore point; `moment` is "end" or "auto"."""
    facts = {"kind": "point", "digest": timeline.digest, "key": key, "position": position, "moment": moment}
    named = {"logits": logits, **{f"{layer}.{name}": value for (layer, name), value in fixed.items()}}
    dtypes = {dtype: name for name, dtype in _DTYPES.items()}
    return encode(facts, [(name, dtypes[one.dtype], one.shape, _tensor_memory(one)) for name, one in named.items()])


def _memory(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of an array, not copied."""
    return memoryview(array.reshape(-1).view(np.uint8).data) if array.size else memoryview(b"")


def _tensor_memory(tensor: Tensor) -> memoryview:
    return _memory(tensor.detach().contiguous().numpy())


def read_tokens(path: Path, key: str) -> tuple[Header, Tokens]:
    """Header and tokens of a segment's file, checked against its name; raises Damaged."""
    with open_file(path) as fd:
        header = read_header(fd)
        return header, _tokens(fd, header, key)


def _tokens(fd: int, header: Header, key: str) -> Tokens:
    start, stop = header.integer("start"), header.integer("stop")
    part = header.parts.get("tokens")
    if header.text("kind") != "segment" or part is None or part.dtype != "int32" or part.shape != (stop - start,):
        raise Damaged("not a segment")
    tokens = np.empty(part.shape, dtype="<i4")
    read_parts(fd, [(part, _memory(tokens))])
    if not len(tokens) or segment_key(header.text("digest"), header.text("parent"), start, tokens) != key:
        raise Damaged("not the segment that its name says")
    return tokens


def read_rows(path: Path, key: str, timeline: Timeline, stop: int, memory: Callable[[Key, int, int], Tensor]) -> None:
    """Reads the rows of a segment up to token `stop` into `memory(stream, first row, rows)`; raises Damaged."""
    with open_file(path) as fd:
        header = read_header(fd)
        if header.facts.get("key") != key or header.facts.get("digest") != timeline.digest:
            raise Damaged("not the segment that its name says")
        start, full = header.integer("start"), header.integer("stop")
        wanted = []
        for spec in timeline.growing:
            stream, first = (spec.layer, spec.name), spec.rows_at(start)
            shape = (spec.rows_at(full) - first, timeline.row_bytes[stream])
            part = _part(header, f"{spec.layer}.{spec.name}", "uint8", shape)
            if count := spec.rows_at(stop) - first:
                wanted.append((part, _tensor_memory_to_fill(memory(stream, first, count))))
        read_parts(fd, wanted)


def _part(header: Header, name: str, dtype: str, shape: Sequence[int]) -> Part:
    part = header.parts.get(name)
    if part is None or part.dtype != dtype or part.shape != tuple(shape):
        raise Damaged(f"{name} is not of this model")
    return part


def _tensor_memory_to_fill(tensor: Tensor) -> memoryview:
    assert tensor.is_contiguous(), "rows are read straight into contiguous memory"
    assert tensor.dtype == torch.uint8, f"rows are bytes, not {tensor.dtype}"
    return _memory(tensor.numpy())


def point_facts(path: Path, key: str, position: int) -> Header:
    """The header of a point's file, checked against its name; raises Damaged."""
    with open_file(path) as fd:
        return _point_header(fd, key, position)


def _point_header(fd: int, key: str, position: int) -> Header:
    header = read_header(fd)
    facts = [header.facts.get(name) for name in ("kind", "key", "position")]
    known = header.facts.get("moment") in ("auto", "end") and "logits" in header.parts
    if facts != ["point", key, position] or not known:
        raise Damaged("not the restore point that its name says")
    return header


def read_point(path: Path, key: str, position: int, timeline: Timeline) -> tuple[dict[Key, Tensor], Tensor]:
    """State by stream, and logits, of a point's file; raises Damaged."""
    with open_file(path) as fd:
        header = _point_header(fd, key, position)
        if header.facts.get("digest") != timeline.digest or any(p.dtype not in _DTYPES for p in header.parts.values()):
            raise Damaged("not a restore point of this model")
        tensors = {part.name: torch.empty(part.shape, dtype=_DTYPES[part.dtype]) for part in header.parts.values()}
        read_parts(fd, [(part, _memory(tensors[part.name].numpy())) for part in header.parts.values()])
    logits = tensors.pop("logits")
    fixed = {(spec.layer, spec.name): tensors.get(f"{spec.layer}.{spec.name}") for spec in timeline.streams}
    return {stream: tensor for stream, tensor in fixed.items() if tensor is not None}, logits


def verify_file(path: Path) -> Header:
    """Reads a whole file and checks every checksum; raises Damaged."""
    memory = memoryview(bytearray(0))
    with open_file(path) as fd:
        header = read_header(fd)
        for part in header.parts.values():
            if len(memory) < part.num_bytes:
                memory = memoryview(bytearray(part.num_bytes))
            read_parts(fd, [(part, memory[: part.num_bytes])])
    return header
