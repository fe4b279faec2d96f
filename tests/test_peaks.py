"""The measured limits are positive and the kernels behind them do what they are counted for, in every build."""

from __future__ import annotations

import pytest
import torch

from tenfold import _native, peaks


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("size", [0, 1, 7, 127, 128, 129, 4096 + 33])
def test_every_byte_is_read(isa: str, size: int) -> None:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    whole = torch.full((1,), -1, dtype=torch.int64)
    read = _native._kernel("peak_read", isa)
    read(data.data_ptr(), size, whole.data_ptr(), 1)
    for at in range(0, size, 61):  # a byte that changes changes the checksum
        data[at] ^= 1
        changed = torch.zeros(1, dtype=torch.int64)
        read(data.data_ptr(), size, changed.data_ptr(), 1)
        assert int(changed) != int(whole)
        data[at] ^= 1


@pytest.mark.parametrize("isa", _native.available_isas())
def test_operations_are_counted_by_thread_and_round(isa: str) -> None:
    for dtype in (torch.float32, torch.int8, torch.int16):
        name, seed = f"peak_{str(dtype).removeprefix('torch.')}", torch.ones(3, dtype=dtype)
        counts = []
        for rounds, threads in ((1000, 1), (2000, 1), (1000, 2)):
            operations = torch.zeros(1, dtype=torch.int64)
            _native._kernel(name, isa)(rounds, seed.data_ptr(), operations.data_ptr(), threads)
            counts.append(int(operations))
        assert counts[0] >= 24 * 1000
        assert abs(counts[1] - 2 * counts[0]) <= 2
        if _native.num_threads() > 1:
            assert abs(counts[2] - 2 * counts[0]) <= 2


def test_measured_peaks_are_positive() -> None:
    found = peaks.measure(runs=1)
    assert found.read_bytes_per_s > 0
    assert found.int8_ops_per_s > 0
    assert found.int16_ops_per_s > 0
    assert found.float32_flops_per_s > 0
