"""Where weights lie beside a GPU: all on it, or experts in host memory with copies of as many as fit."""

from __future__ import annotations

import pytest

from tenfold.config import preset
from tenfold.errors import DoesNotFit
from tenfold.placement import place

FLASH = preset("v4-flash")
GB = 10**9
SIZES = [("attn_linear", 8 * GB), ("moe_shared", 2 * GB), ("moe_routed", 146 * GB)]


def test_what_fits_lies_on_the_gpu() -> None:
    found = place(FLASH, SIZES, gpu_bytes=180 * GB, session_bytes=5 * GB)
    assert found.all_on_gpu
    assert found.gpu_bytes == 156 * GB
    assert "all weights" in found.told(FLASH)


def test_what_does_not_fit_keeps_its_experts_in_host_memory() -> None:
    found = place(FLASH, SIZES, gpu_bytes=80 * GB, session_bytes=5 * GB)
    assert (found.gpu_bytes, found.host_bytes) == (10 * GB, 146 * GB)
    assert found.gpu_bytes + found.hot_bytes + 5 * GB <= 80 * GB
    assert found.hot_experts == 65 * GB // (146 * GB // 256)
    assert f"copies of {found.hot_experts} of 256" in found.told(FLASH)


def test_no_room_for_copies_is_no_error_and_none_for_the_rest_is() -> None:
    assert place(FLASH, SIZES, gpu_bytes=15 * GB, session_bytes=5 * GB).hot_experts == 0
    with pytest.raises(DoesNotFit, match=r"10\.0 GB and a session 5\.0 GB, and the GPU has 14\.0 GB"):
        place(FLASH, SIZES, gpu_bytes=14 * GB, session_bytes=5 * GB)
