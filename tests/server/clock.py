"""Seconds in which this process could run: one that is stopped for a while, as on a machine shared with benchmarks, has
not been slow."""

from __future__ import annotations

import threading
import time

_EVERY_S, _MOST_S = 0.01, 0.1

_seconds = 0.0


def awake_s() -> float:
    """For differences."""
    return _seconds


def _count() -> None:
    global _seconds
    before = time.monotonic()
    while True:
        time.sleep(_EVERY_S)
        now = time.monotonic()
        _seconds += min(now - before, _MOST_S)
        before = now


threading.Thread(target=_count, daemon=True).start()
