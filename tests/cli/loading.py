"""Every k-th call to the system fails while a model is loaded and answers. Run as a program: prints one JSON object.

    python -m tests.cli.loading MODEL STRIDE

`tenfold run` reads a text and answers it greedily while the k-th call that touches the checkpoint's folder fails, for
every STRIDE-th k: once, from there on, or with half the bytes. It must end with one sentence and its exit code, or with
the right tokens; never with others, never with a traceback. Afterwards it answers again.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

import torch
from tests.store.faults import ONCE, SOURCE, WAYS
from tests.store.preload import preload
from typer.testing import CliRunner

from tenfold import config
from tenfold.cli import app


def answer(model: str) -> tuple[int, list[object], str, BaseException | None]:
    """Exit code, tokens with their log-probabilities, what was said on stderr, and what should have been caught."""
    words = "--max-tokens 3 --temperature 0 --no-store --json --logprobs 1 --context 128 --threads 1"
    done = CliRunner().invoke(app, ["run", model, "What is the fact?", *words.split()])
    caught = None if isinstance(done.exception, SystemExit) else done.exception
    ids = json.loads(done.stdout)["logprobs"] if done.exit_code == 0 else []
    return done.exit_code, ids, done.stderr, caught


def main(model: str, stride: int) -> None:
    library, folder = ctypes.CDLL(None), str(config.locate(model).resolve()).encode()

    def failing(k: int, number: int, way: int) -> tuple[int, tuple[int, list[object], str, BaseException | None]]:
        library.faults_arm(folder, ctypes.c_long(k), number, way)
        found = answer(model)
        return library.faults_disarm(), found

    expected = answer(model)
    assert expected[0] == 0, expected
    calls, _ = failing(0, 0, ONCE)
    files = len(os.listdir("/proc/self/fd"))
    total = {
        "calls": calls,
        "cases": 0,
        "refused": 0,
        "right": 0,
        "wrong": 0,
        "raised": 0,
        "unclear": 0,
        "not_again": 0,
    }
    for at, (name, (number, way)) in enumerate(WAYS.items()):
        for k in range(1 + at % stride, calls + 1, stride):
            _, (code, ids, said, caught) = failing(k, number, way)
            total["cases"] += 1
            if caught is not None:
                kind = "raised"
            elif code:
                kind = "refused" if said.startswith("error: ") and "Traceback" not in said else "unclear"
            else:
                kind = "right" if ids == expected[1] else "wrong"
            total[kind] += 1
            if kind not in ("refused", "right"):
                print(f"{name}, call {k}: {kind}, {caught!r} {said}", file=sys.stderr)
    total["not_again"] = answer(model)[1] != expected[1]
    total["files_left_open"] = len(os.listdir("/proc/self/fd")) - files
    print(json.dumps(total))


if __name__ == "__main__":
    preload(SOURCE, "faults_arm", "tests.cli.loading")
    torch.set_num_threads(1)
    main(str(Path(sys.argv[1])), int(sys.argv[2]))
