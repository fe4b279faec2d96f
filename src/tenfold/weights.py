"""The weights of a checkpoint folder, memory-mapped and bound to the tensors a config asks for.

Knows names, shapes and formats; nothing of what a tensor is for, and no arithmetic. Opening reads headers
only; the payload is paged in by whoever touches it. Values are not inspected, except that expert ids exist.

Files must stay as they are while a model runs. Replacing a file by renaming is harmless. One that was cut
shorter is refused by `open_weights` and by `take`; cutting it after `take` ends the process with SIGBUS when
the lost pages are touched, as it does for every memory-mapped file.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tenfold import checkpoint
from tenfold.checkpoint import TensorSpec
from tenfold.config import ModelConfig
from tenfold.errors import CheckpointError, DoesNotFit, disk_errors
from tenfold.formats import I64, MXFP4, WeightFormat
from tenfold.ops import Weight
from tenfold.shards import Problems, Shard, Stored, StoredTensor, open_regular, read_folder, shown

__all__ = ["TensorInfo", "Weights", "open_weights"]

_SAMPLES, _SAMPLE_BYTES = 16, 4096
_STORED_AS = {MXFP4.name: ("I8", "U8", "F4"), I64.name: ("I64", "I32")}
"""Where a format may lie under another dtype than its own: packed nibbles, and ids of 32 bits."""

_TORCH_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64, "I32": torch.int32}
"""The dtypes of which a view is taken; codes of 8 and 4 bits stay uint8."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One weight for people to read: logical shape, format, bytes of codes and scales, and its shard."""

    name: str
    shape: tuple[int, ...]
    format: str
    num_bytes: int
    shard: str
    component: str


@dataclass(frozen=True, slots=True)
class _Bound:
    """A tensor the config asks for and where it lies."""

    spec: TensorSpec
    format: WeightFormat
    codes: StoredTensor
    scale: StoredTensor | None


class Weights:
    """The tensors of a checkpoint by name, each to be taken exactly once.

    `draft` lists the stored tensors of the draft head, which are left aside.
    """

    def __init__(
        self, folder: Path, config: ModelConfig, bound: dict[str, _Bound], draft: Sequence[StoredTensor]
    ) -> None:
        self.folder = folder
        self.config = config
        self.draft = tuple(draft)
        self._bound = bound
        self._left = set(bound)
        self._shards: dict[str, _MappedShard] = {}

    def __len__(self) -> int:
        return len(self._bound)

    def __iter__(self) -> Iterator[TensorInfo]:
        """Every weight of the backbone, in the order of the layers."""
        for name, item in self._bound.items():
            num_bytes = item.codes.num_bytes + (item.scale.num_bytes if item.scale else 0)
            component, shape = item.spec.component, item.spec.shape
            yield TensorInfo(name, shape, item.format.name, num_bytes, item.codes.shard, component)

    def take(self, name: str) -> Weight:
        """The weight as views of the mapped file: codes in uint8, scales in uint8 (e8m0) or float32."""
        if name not in self._left:
            reason = "was taken before" if name in self._bound else "is no tensor of this model"
            raise CheckpointError(f"{self.folder}: {shown(name)} {reason}; each tensor has exactly one user")
        self._left.discard(name)
        item = self._bound[name]
        data = self._view(item.codes)
        if item.format is I64:
            data = data.to(torch.int64)
            self._check_ids(name, data)
        return Weight(name, item.spec.shape, item.format, data, self._view(item.scale) if item.scale else None)

    def sample(self) -> bytes:
        """A digest of every tensor's name, format and place and of some of each shard's bytes: tells models apart."""
        what = hashlib.sha256()
        for info in self:
            what.update(f"{info.name}|{info.shape}|{info.format}|{info.num_bytes}|".encode())
        for name in sorted(self._shards):
            octets = self._shards[name].octets
            step = max(_SAMPLE_BYTES, octets.shape[0] // _SAMPLES)
            for start in range(0, octets.shape[0], step):
                what.update(octets[start : start + _SAMPLE_BYTES].numpy().tobytes())
        return what.digest()

    def finish(self) -> None:
        """Says that all tensors are bound; one that nobody took is an error."""
        if self._left:
            names = [name for name in self._bound if name in self._left]
            raise CheckpointError(
                f"{self.folder}: the model used every tensor but {len(names)}: {', '.join(names[:5])}"
                f"{', ...' if len(names) > 5 else ''}; this is a fault of tenfold, please report it"
            )

    def _map(self, shards: Iterable[Shard], problems: Problems) -> None:
        for shard in shards:
            try:
                self._shards[shard.name] = _map_shard(shard)
            except CheckpointError as exc:
                problems.add("damaged shards", f"{shown(shard.name)} {exc}")

    def _view(self, stored: StoredTensor) -> Tensor:
        """The tensor's bytes as its dtype and shape; copied only where they lie unaligned for it."""
        shard = self._shards[stored.shard]
        stop = stored.offset + stored.num_bytes
        if shard.mapping.size() < stop:
            raise CheckpointError(
                f"{self.folder}: {shown(stored.shard)} was cut shorter while in use; "
                "put the file back and load the model again"
            )
        octets = shard.octets[stored.offset : stop]
        dtype = _TORCH_DTYPES.get(stored.dtype, torch.uint8)
        if stored.offset % dtype.itemsize:
            octets = octets.clone()
        return octets.view(dtype).view(_byte_shape(stored))

    def _check_ids(self, name: str, ids: Tensor) -> None:
        """An expert id out of range would read another expert's memory."""
        low, high = (int(bound) for bound in ids.aminmax())
        experts = self.config.n_routed_experts
        if low < 0 or high >= experts:
            wrong = low if low < 0 else high
            raise CheckpointError(
                f"{self.folder}: {name} names expert {wrong}, expected 0 to {experts - 1}; "
                "the checkpoint is damaged or belongs to another config.json"
            )


def open_weights(folder: Path, config: ModelConfig) -> Weights:
    """Checks every tensor of a checkpoint against the config and maps its files.

    Reads headers only. All that is wrong is listed in one `CheckpointError`.
    """
    with disk_errors(folder):
        return _open(folder, config, Problems(folder))


def _open(folder: Path, config: ModelConfig, problems: Problems) -> Weights:
    stored = read_folder(folder, problems)
    names, draft = _by_official_name(config, stored, problems)
    excused = {checkpoint.canonical_name(config, name) for name in stored.unread}
    bound = _Binder(names, None if stored.partly_unread else excused, problems).bind(config)
    problems.raise_any()
    weights = Weights(folder, config, bound, draft)
    weights._map(stored.shards, problems)
    problems.raise_any()
    return weights


def _by_official_name(
    config: ModelConfig, stored: Stored, problems: Problems
) -> tuple[dict[str, StoredTensor], list[StoredTensor]]:
    """The tensors of the backbone by the official name, and those of the draft head."""
    names: dict[str, StoredTensor] = {}
    draft: list[StoredTensor] = []
    for tensor in stored.tensors.values():
        name = checkpoint.canonical_name(config, tensor.name)
        if checkpoint.is_draft(config, name):
            draft.append(tensor)
        elif names.setdefault(name, tensor) is not tensor:
            problems.add("tensors under two names", f"{shown(tensor.name)} and {shown(names[name].name)}")
    return names, draft


@dataclass(slots=True)
class _Binder:
    """Matches stored tensors with expected ones; what nothing matches stays in `left`.

    A tensor of `excused` may be missing, for its shard was found missing already; None excuses all.
    """

    left: dict[str, StoredTensor]
    excused: set[str] | None
    problems: Problems

    def bind(self, config: ModelConfig) -> dict[str, _Bound]:
        bound = {spec.name: item for spec in checkpoint.tensors(config) if (item := self._match(spec)) is not None}
        for name, tensor in self.left.items():
            self.problems.add("unexpected tensors", f"{shown(name)} in {shown(tensor.shard)}")
        return bound

    def _match(self, spec: TensorSpec) -> _Bound | None:
        """Finds the format from the stored dtypes, and checks shapes."""
        codes = self._pop("missing tensors", spec.name, spec.name)
        formats = [form for form in spec.formats if codes is not None and codes.dtype in _dtypes_of(form)]
        if codes is None or not formats:
            self.left.pop(spec.scale_name, None)
            if codes is not None:
                self.problems.add("tensors of the wrong dtype", _wrong_dtype(spec, codes))
            return None
        if formats[0].block is None:
            self._check_shape("tensors", codes, spec.shape, spec.name)
            return _Bound(spec, formats[0], codes, None)
        return self._match_scaled(spec, codes, formats)

    def _match_scaled(self, spec: TensorSpec, codes: StoredTensor, formats: list[WeightFormat]) -> _Bound | None:
        name = spec.scale_name
        scale = self._pop("missing scales", name, f"{name} for the {codes.dtype} of {spec.name}")
        if scale is None:
            return None
        form = next((form for form in formats if form.scale_dtype == scale.dtype), None)
        if form is None:
            expected = " or ".join(str(form.scale_dtype) for form in formats)
            self.problems.add("scales of the wrong dtype", f"{name} is {scale.dtype}, expected {expected}")
            return None
        self._check_shape("tensors", codes, _file_shape(spec, form, codes), spec.name)
        self._check_shape("scales", scale, form.scale_shape(spec.shape), name)
        return _Bound(spec, form, codes, scale)

    def _pop(self, kind: str, name: str, detail: str) -> StoredTensor | None:
        found = self.left.pop(name, None)
        if found is None and self.excused is not None and name not in self.excused:
            self.problems.add(kind, detail)
        return found

    def _check_shape(self, what: str, stored: StoredTensor, expected: tuple[int, ...] | None, name: str) -> None:
        if stored.shape != expected:
            detail = f"{name} is {list(stored.shape)}, expected {list(expected or ())}"
            self.problems.add(f"{what} of the wrong shape", detail)


def _dtypes_of(form: WeightFormat) -> tuple[str, ...]:
    return _STORED_AS.get(form.name, (form.dtype,))


def _wrong_dtype(spec: TensorSpec, codes: StoredTensor) -> str:
    expected = dict.fromkeys(dtype for form in spec.formats for dtype in _dtypes_of(form))
    hint = ", which has not the range of bf16" if codes.dtype == "F16" else ""
    return f"{spec.name} is {codes.dtype}{hint}, expected {' or '.join(expected)}"


def _file_shape(spec: TensorSpec, form: WeightFormat, codes: StoredTensor) -> tuple[int, ...]:
    """The shape a header gives: F4 counts numbers, I8 and U8 count bytes of two."""
    return spec.shape if codes.dtype == "F4" else form.stored_shape(spec.shape)


def _byte_shape(stored: StoredTensor) -> tuple[int, ...]:
    """The shape of the view: two F4 numbers share a byte."""
    return (*stored.shape[:-1], stored.shape[-1] // 2) if stored.dtype == "F4" else stored.shape


@dataclass(frozen=True, slots=True)
class _MappedShard:
    """A shard in the address space: the mapping, and a uint8 tensor over the whole of it."""

    mapping: mmap.mmap
    octets: Tensor


def _map_shard(shard: Shard) -> _MappedShard:
    with open_regular(shard.path) as file:
        if os.fstat(file.fileno()).st_size != shard.file_bytes:
            raise CheckpointError("changed its size while it was read")
        try:
            mapping = mmap.mmap(file.fileno(), shard.file_bytes, access=mmap.ACCESS_READ)
        except OSError as exc:
            raise DoesNotFit(
                f"{shard.path.name} ({shard.file_bytes} bytes) cannot be mapped: {exc.strerror}; "
                "raise the limit on address space (ulimit -v)"
            ) from exc
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so; nothing in this package writes to a weight.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return _MappedShard(mapping, torch.frombuffer(mapping, dtype=torch.uint8))
