"""Kernels of others in place of ours: each is tried against ours on real shapes, and taken only if right and faster.

Nothing here is needed, and nothing of it was ever run: no GPU was at hand. So none is taken on trust: one that cannot
be imported, that fails, that differs, or that is slower leaves ours where it was, with a line that says why. What
would have to keep rows or weights in another form than ours is not called at all. Knows no models.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.formats import RowLayout, kv_row_v32
from tenfold.ops import Rows, Weight
from tenfold.ops.triton.attention import sparse_attention
from tenfold.ops.triton.rows import pack_rows

__all__ = ["ACCELERATORS", "Accelerator", "Trial", "Verdict", "flash_mla_attention", "judge", "try_attention"]


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A package on PyPI, and what it could do here; `why_not` where it is not called."""

    package: str
    purpose: str
    why_not: str = ""

    @property
    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


FLASH_MLA = Accelerator("sgl-flash-mla", "V3.2's attention while it reads (Hopper)")
ACCELERATORS = (
    FLASH_MLA,
    Accelerator("sgl-deep-gemm", "index scores", "it wants pages of codes, then scales; rows here hold their own"),
    Accelerator("humming-kernels", "experts", "it repacks weights, and experts here are read as they are stored"),
)
ROWS = kv_row_v32(512, 64)
"""The rows that FlashMLA reads as they lie here: 656 bytes, 512 codes, 4 scales, 64 rope channels."""
_PAGE = 64
_BOUND = 8e-3
"""Of the difference, relative: both round queries and shares to bf16, and theirs the result as well."""
_GAIN = 0.95
"""Of our time: less of a gain is none."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One shape, computed twice from the same memory."""

    name: str
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a package takes the place of a kernel of ours, and why (not), for people."""

    package: str
    taken: bool
    why: str


Clock = Callable[[Callable[[], Tensor]], float]


def judge(package: str, trials: Sequence[Trial], bound: float = _BOUND, clock: Clock | None = None) -> Verdict:
    """Right on all trials, in each of two calls, and then faster in sum. What they raise is a reason, not an error."""
    clock = clock or _seconds
    try:
        for trial in trials:
            for _ in range(2):
                found, expected = trial.theirs().double(), trial.ours().double()
                if found.shape != expected.shape:
                    return Verdict(package, False, f"{trial.name}: it gives {tuple(found.shape)}, not as ours")
                error = float((found - expected).norm() / expected.norm())
                if not error <= bound:
                    return Verdict(package, False, f"{trial.name}: it differs from ours by {error:.1e}")
        theirs_s, ours_s = (sum(map(clock, side)) for side in zip(*((t.theirs, t.ours) for t in trials), strict=True))
    except Exception as exc:  # whatever a package of others raises
        return Verdict(package, False, f"it fails: {str(exc).splitlines()[0] if str(exc) else type(exc).__name__}")
    times = f"{1e6 * theirs_s:,.0f} us, ours takes {1e6 * ours_s:,.0f}"
    return Verdict(package, theirs_s <= _GAIN * ours_s, times)


def _seconds(call: Callable[[], Tensor]) -> float:
    """Median of a few calls that were warmed up."""
    device, times = call().device, []
    for _ in range(7):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


# ---------------------------------------------------------------------------------------------- FlashMLA


def flash_mla_attention(library: Any) -> Callable[..., Tensor]:
    """`sparse_attention` that calls FlashMLA where it reads rows as they lie here, and ours everywhere else."""

    def attention(
        q: Tensor,
        sources: Sequence[Rows],
        sink: Weight | None,
        scale: float,
        value_dim: int,
        position: int | Tensor,
        frequencies: Tensor | None = None,
    ) -> Tensor:
        pages = _pages(q, sources, value_dim) if sink is None and frequencies is None else None
        if pages is None:
            return sparse_attention(q, sources, sink, scale, value_dim, position, frequencies)
        index = sources[0].index
        assert index is not None
        out, _ = library.flash_mla_with_kvcache(
            q[None].to(torch.bfloat16), pages, None, None, value_dim, library.get_mla_metadata()[0],
            softmax_scale=scale, is_fp8_kvcache=True, indices=index[None].contiguous(), use_legacy=True,
        )  # fmt: skip
        found: Tensor = out[0].float()
        return found

    return attention


def _pages(q: Tensor, sources: Sequence[Rows], value_dim: int) -> Tensor | None:
    """One session's rows as whole pages, if these are what FlashMLA takes: [pages, 64, 1, 656]."""
    (n, heads, _), (source, *others) = q.shape, sources
    rows, index = source.packed, source.index
    if others or index is None or source.layout != ROWS or value_dim != ROWS.coded or heads not in (64, 128) or not n:
        return None
    if rows.dtype is not torch.uint8 or not rows.is_contiguous() or index.shape[1] % _PAGE or not index.shape[1]:
        return None
    num_pages, row_bytes = -(-rows.shape[0] // _PAGE), ROWS.row_bytes
    if rows.storage_offset() + num_pages * _PAGE * row_bytes > rows.untyped_storage().nbytes():
        return None  # the last page is not all memory of the session
    return rows.as_strided((num_pages, _PAGE, 1, row_bytes), (_PAGE * row_bytes, row_bytes, row_bytes, 1))


def try_attention(device: torch.device, heads: int, library: Any = None, clock: Clock | None = None,
                  sizes: Sequence[tuple[int, int, int]] = ((64, 8192, 2048), (512, 65536, 2048)),
                  ) -> tuple[Verdict, Callable[..., Tensor]]:  # fmt: skip
    """FlashMLA against our attention for chunks of V3.2; the better of both. `sizes`: queries, rows, rows of each."""
    try:
        found = importlib.import_module("flash_mla") if library is None else library
    except Exception as exc:  # a library of others may fail to load in any way
        return Verdict(FLASH_MLA.package, False, f"it cannot be imported: {exc}"), sparse_attention
    theirs = flash_mla_attention(found)
    trials = [_trial(device, heads, theirs, *size) for size in sizes]
    verdict = judge(FLASH_MLA.package, trials, clock=clock)
    return verdict, theirs if verdict.taken else sparse_attention


def _trial(
    device: torch.device, heads: int, theirs: Callable[..., Tensor], queries: int, depth: int, columns: int
) -> Trial:
    """Random rows in random order, lists of every length."""
    dice = torch.Generator().manual_seed(depth)
    rows = _random_rows(depth, ROWS, dice, device)
    index = torch.rand(queries, depth, generator=dice).topk(columns, 1).indices.sort(1).values.int()
    lengths = torch.linspace(1, columns, queries).long()[:, None]
    index = torch.where(torch.arange(columns) < lengths, index, -1).to(device)
    q = torch.randn(queries, heads, ROWS.width, generator=dice).to(device)
    source = [Rows(rows, ROWS, index=index)]
    assert _pages(q, source, ROWS.coded) is not None, "ours would be compared with ours"
    name = f"{queries} queries on {depth:,} rows"
    words = (q, source, None, ROWS.width**-0.5, ROWS.coded, 0)
    return Trial(name, lambda: sparse_attention(*words), lambda: theirs(*words))


def _random_rows(depth: int, layout: RowLayout, dice: torch.Generator, device: torch.device) -> Tensor:
    some = pack_rows(torch.randn(min(depth, 8192), layout.width, generator=dice).to(device), layout)
    return some[torch.randint(0, some.shape[0], (depth,), generator=dice).to(device)]
