"""One task on tenfold, on the official files. A long context is made of random tokens and random packed rows."""

from __future__ import annotations

import statistics

import torch
from common import CHUNK_TOKENS, arguments, decode_steps, memory_mb, random_ids, report, save_logits, seconds
from torch import Tensor

import tenfold
from tenfold.engine import Engine, Session, Snapshot
from tenfold.ops import reference
from tenfold.streams import RestorePoint

RUNS = 3
BASIS = 256
"""Tokens really read before a made-up context goes on; a multiple of every compression ratio."""
ROWS_AT_ONCE = 1 << 14


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
    session, state = filled(engine, options.tokens)
    ids, times = random_ids(CHUNK_TOKENS), []
    for _ in range(1 + RUNS):
        session.restore(state)
        times.append(seconds(lambda: session.feed(ids)))
    return {"tps": CHUNK_TOKENS / statistics.median(times[1:])}


def decode(engine: Engine, options: object) -> dict[str, object]:
    session, _ = filled(engine, options.tokens)
    return decode_steps(lambda: session.feed([int(session.last_logits.argmax())]))


def logits(engine: Engine, options: object) -> dict[str, object]:
    found = engine.session(options.tokens).feed(random_ids(options.tokens, seed=7))
    return dict(save_logits(options.work, f"tenfold-{options.numerics}", options.tokens, found.numpy()))


def memory(engine: Engine, options: object) -> dict[str, object]:
    session = engine.session()
    before = sum(session.kv_bytes().values())
    session.feed(random_ids(options.tokens))
    grown = sum(session.kv_bytes().values()) - before
    for _ in range(16):
        session.feed([int(session.last_logits.argmax())])
    return {"bytes_per_token": grown / options.tokens, "fixed_bytes": before}


def filled(engine: Engine, tokens: int) -> tuple[Session, Snapshot]:
    """A session behind `tokens` tokens: the rings and the compressors' state of BASIS real ones, rows of noise."""
    session = engine.session(tokens + 2 * CHUNK_TOKENS)
    session.feed(random_ids(BASIS))
    basis = session.snapshot()
    rows = {
        (spec.layer, spec.name): noise(session.streams.rows(spec.layer, spec.name).layout, spec.rows_at(tokens))
        for spec in engine.config.streams
        if spec.ratio
    }
    point = RestorePoint(tokens, basis.point.fixed)
    state = Snapshot(engine, tuple(random_ids(tokens)), point, rows, basis.logits)
    session.restore(state)
    return session, state


def noise(layout: object, count: int) -> Tensor:
    """Packed rows of normal numbers; blocks of ROWS_AT_ONCE repeat."""
    block = reference.pack_rows(torch.randn(min(count, ROWS_AT_ONCE), layout.width), layout)
    return block.repeat(-(-count // max(1, len(block))), 1)[:count]


if __name__ == "__main__":
    with torch.no_grad():
        main()
