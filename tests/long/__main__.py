"""The long tests of the server: `python -m tests.long [NAME...]`; one line of JSON each, on stdout.

Bounded, on loopback only. What they found is written down in docs/reliability.md.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.long import ends, engine, load, neighbours, programs, stores

TESTS: dict[str, Callable[..., dict[str, Any]]] = {
    "streams": load.streams,
    "slow": load.slow,
    "soak": load.soak,
    "killed": engine.killed,
    "stopped": engine.stopped,
    "tenancy": engine.tenancy,
    "clock": engine.clock,
    "clock_at_ends": ends.clock_at_ends,
    "disconnects": ends.disconnects,
    "longest": ends.longest,
    "signals": ends.signals,
    "contamination": neighbours.contamination,
    "codex": programs.codex,
    "claude": programs.claude,
    "continue": programs.continue_,
    **{name: partial(programs.loaded_by, name) for name in programs.GENERATORS},
    "full": stores.full,
    "shared": stores.shared,
}

if __name__ == "__main__":
    failed = False
    for name in sys.argv[1:] or TESTS:
        began = time.monotonic()
        try:
            found = {"ok": True, **TESTS[name]()}
        except AssertionError as exc:
            found, failed = {"ok": False, "problem": str(exc)[:2000]}, True
        print(json.dumps({"test": name, "seconds": round(time.monotonic() - began, 1), **found}), flush=True)
    sys.exit(failed)
