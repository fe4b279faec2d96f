"""One task on tenfold, on the official files. What comes before a chunk or a written token is random rows."""

from __future__ import annotations

import statistics

import torch
from common import CHUNK_TOKENS, arguments, decode_steps, memory_mb, random_ids, report, save_logits, seconds

import tenfold
from tenfold.contexts import pretend
from tenfold.engine import Engine, Session

RUNS = 3


def main() -> None:
    options = arguments(("numerics", str, "deployed"))
    torch_mb = memory_mb()
    engine = Engine.load(options.work / "official", backend="cpu", numerics=options.numerics)
    result = globals()[options.task](engine, options)
    report(**result, torch_mb=torch_mb, peak_mb=memory_mb(), version=tenfold.__version__)


def prefill(engine: Engine, options: object) -> dict[str, object]:
    ids = random_ids(options.tokens)
    engine.session(CHUNK_TOKENS).feed(ids[:CHUNK_TOKENS])
    session = engine.session(options.tokens)
    return {"tps": options.tokens / seconds(lambda: session.feed(ids))}


def chunk(engine: Engine, options: object) -> dict[str, object]:
    session, ids, times = room(engine, options.tokens), random_ids(CHUNK_TOKENS), []
    for _ in range(1 + RUNS):
        pretend(session, options.tokens)
        times.append(seconds(lambda: session.feed(ids)))
    return {"tps": CHUNK_TOKENS / statistics.median(times[1:])}


def decode(engine: Engine, options: object) -> dict[str, object]:
    session = room(engine, options.tokens)
    pretend(session, options.tokens)
    return decode_steps(lambda: session.feed([int(session.last_logits.argmax())]))


def room(engine: Engine, tokens: int) -> Session:
    return engine.session(tokens + 2 * CHUNK_TOKENS)


def logits(engine: Engine, options: object) -> dict[str, object]:
    found = engine.session(options.tokens).feed(random_ids(options.tokens, seed=7), logits="all")
    return dict(save_logits(options.work, f"tenfold-{options.numerics}", options.tokens, found.numpy()))


def memory(engine: Engine, options: object) -> dict[str, object]:
    session = engine.session()
    before = sum(session.kv_bytes().values())
    session.feed(random_ids(options.tokens))
    grown = sum(session.kv_bytes().values()) - before
    for _ in range(16):
        session.feed([int(session.last_logits.argmax())])
    return {"bytes_per_token": grown / options.tokens, "fixed_bytes": before}


if __name__ == "__main__":
    with torch.no_grad():
        main()
