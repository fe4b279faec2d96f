"""Whether a machine was quiet while something was timed: CPUs that other processes kept busy. Linux only."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["Watch"]


class Watch:
    """Started when made."""

    def __init__(self) -> None:
        self._began_s, self._began = time.perf_counter(), _busy_s()

    def disturbed_cpus(self) -> float:
        """CPUs that others kept busy on average since the start; this process and its threads do not count."""
        whole, own = (now - then for now, then in zip(_busy_s(), self._began, strict=True))
        return max(0.0, whole - own) / (time.perf_counter() - self._began_s)


def _busy_s() -> tuple[float, float]:
    """CPU seconds of the whole machine without idling, and of this process."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    whole = sum(int(field) for field in fields[:3]) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return whole, own.user + own.system
