"""What comes back of a long context, and how soon: regenerate, edit of the last message, the same after a restart.

    python benchmarks/reuse.py DIR [--context 1040000] [--folder DIR]

DIR is a checkpoint as in decode.py. A session of random rows (`contexts.pretend`) reads two messages, answers, and is
kept in a store. Each task ends with the first token's logits and is set beside what reading the tokens that it has to
read again takes in the same session (`replay_s`). A restart is a new engine in this process with the store's files
dropped from the page cache: `resume_s` is what the store takes, `raw_s` reading the same files.

Results: results/reuse.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runs import commit, machine_name

from tenfold import Engine, SamplingParams
from tenfold.contexts import pretend
from tenfold.engine import Session

RESULTS = Path(__file__).parent / "results" / "reuse.json"
MESSAGE_TOKENS, ANSWER_TOKENS, RUNS = 100, 24, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--context", type=int, default=1_040_000)
    parser.add_argument("--folder", type=Path, default=Path("build"), help="where the store is made, and removed again")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="reuse-", dir=options.folder))
    try:
        found = measured(options.checkpoint, options.context, folder)
    finally:
        shutil.rmtree(folder)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def measured(checkpoint: Path, context: int, folder: Path) -> dict[str, Any]:
    session = Engine.load(checkpoint, backend="cpu", store=folder).session()
    pretend(session, context)
    session.keep()
    first, second, other = (message(number) for number in (1, 2, 3))
    session.feed(first)
    asked = session.length
    session.feed(second)
    answered = session.length
    answer(session)
    regenerate_s = statistics.median(regenerated_s(session, answered) for _ in range(RUNS))
    replay_s = median(lambda: session.feed(other))
    edit_s = median(lambda: edited(session, asked, other))
    tokens = session.tokens
    return {
        "machine": machine_name(),
        "commit": commit(),
        "context": context,
        "layers": len(session.engine.config.layers),
        "live_bytes": sum(session.kv_bytes().values()),
        "message_tokens": MESSAGE_TOKENS,
        "replay_s": round(replay_s, 3),
        "regenerate": {"first_token_s": round(regenerate_s, 3)},
        "edit of the last message": {"first_token_s": round(edit_s, 3)},
        "edit after a restart": restarted(checkpoint, folder, [*tokens[:asked], *message(4)]),
    }


def message(seed: int) -> list[int]:
    return [3 + (seed * 977 + 31 * place) % 1000 for place in range(MESSAGE_TOKENS)]


def answer(session: Session) -> None:
    for _ in session.generate(SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)):
        pass


def regenerated_s(session: Session, answered: int) -> float:
    """Forgets the answer: the logits to sample another one from are those of the restore point."""
    took = seconds(lambda: session.rewind(answered))
    answer(session)
    return took


def edited(session: Session, asked: int, ids: list[int]) -> None:
    session.rewind(asked)
    session.feed(ids)


def restarted(checkpoint: Path, folder: Path, ids: list[int]) -> dict[str, Any]:
    session = Engine.load(checkpoint, backend="cpu", store=folder).session()
    files = [path for path in folder.rglob("*") if path.is_file()]
    drop(files)
    raw_s = seconds(lambda: [path.read_bytes() for path in files])
    drop(files)
    resume_s = seconds(lambda: session.resume(ids))
    resumed = session.length
    replay_s = seconds(lambda: session.feed(ids[resumed:]))
    return {
        "resumed_tokens": resumed,
        "read_again_tokens": len(ids) - resumed,
        "store_bytes": sum(path.stat().st_size for path in files),
        "raw_s": round(raw_s, 3),
        "resume_s": round(resume_s, 3),
        "replay_s": round(replay_s, 3),
        "first_token_s": round(resume_s + replay_s, 3),
    }


def drop(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def median(run: Callable[[], object]) -> float:
    return statistics.median(seconds(run) for _ in range(RUNS))


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
