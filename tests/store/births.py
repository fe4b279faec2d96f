"""Processes that open an index that is not there yet, all at once. Run as a program: prints one JSON object.

python -m tests.store.births FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from tenfold.store.index import Index

ROUNDS, PROCESSES, START_S = 60, 4, 0.01


def born(path: Path, at_s: float) -> int:
    child = os.fork()
    if child:
        return child
    try:
        while time.monotonic() < at_s:
            pass
        Index(path).close()
    except BaseException as exc:
        print(repr(exc), file=sys.stderr)
        os._exit(4)
    os._exit(0)


def main(folder: Path) -> None:
    failed = 0
    for number in range(ROUNDS):
        at_s = time.monotonic() + START_S
        children = [born(folder / f"index-{number}.sqlite", at_s) for _ in range(PROCESSES)]
        failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
    print(json.dumps({"failed": failed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
