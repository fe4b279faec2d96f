"""What this machine reaches at best: memory reads, float32, int8 and int16 multiply-adds, measured in a second or two.

The limits that kernels are judged by and times are predicted from. Knows nothing of models.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold import _native

__all__ = ["MeasuredPeaks", "measure"]

_READ_BYTES = 1 << 28
_ROUNDS = 1 << 20
_RUNS = 7


@dataclass(frozen=True, slots=True)
class MeasuredPeaks:
    """Medians on all threads of torch's pool; a multiply-add is two operations."""

    read_bytes_per_s: float
    float32_flops_per_s: float
    int8_ops_per_s: float
    int16_ops_per_s: float


def measure(runs: int = _RUNS, data: Tensor | None = None) -> MeasuredPeaks:
    """Measures with the kernels of the chosen instruction set; raises BackendMissing where there are none.

    Reads are those of `data`, dense and far larger than the caches, else of fresh memory: on a virtual machine one
    piece of memory may read at twice the rate of another. int8 multiply-adds go as in the index and the int8 products:
    tiles of AMX, vpdpbusd, or vpmaddubsw and a 16-bit addition. int16 ones go as in the FP8 products without AMX:
    vpdpwssd, or vpmaddwd and a 32-bit addition.
    """
    return MeasuredPeaks(
        read_bytes_per_s=_read(torch.ones(_READ_BYTES, dtype=torch.uint8) if data is None else data, runs),
        float32_flops_per_s=_compute("peak_float32", torch.tensor([1.0, 0.5, 0.25]), runs),
        int8_ops_per_s=_compute("peak_int8", torch.tensor([1, 2, 3], dtype=torch.int8), runs),
        int16_ops_per_s=_compute("peak_int16", torch.tensor([1, 2, 3], dtype=torch.int16), runs),
    )


def _read(data: Tensor, runs: int) -> float:
    checksum = torch.zeros(1, dtype=torch.int64)
    kernel = _native._kernel("peak_read", None)
    return data.nbytes / _median_s(
        lambda: kernel(data.data_ptr(), data.nbytes, checksum.data_ptr(), _native.num_threads()), runs
    )


def _compute(name: str, seed: Tensor, runs: int) -> float:
    operations = torch.zeros(1, dtype=torch.int64)
    kernel = _native._kernel(name, None)
    seconds = _median_s(lambda: kernel(_ROUNDS, seed.data_ptr(), operations.data_ptr(), _native.num_threads()), runs)
    return int(operations) / seconds


def _median_s(run: Callable[[], object], runs: int) -> float:
    run()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
