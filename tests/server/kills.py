"""Engines killed with SIGKILL at random points, and what comes back. Run as a program: prints one JSON object.

    python -m tests.server.kills FOLDER COUNT SEED

Two engines share a store. Prompts that begin alike are read and answered by both, and one of the two is killed again
and again, in whatever it does. A job that is cut off is sent again, as a client would. Each answer that comes must be
the one that the library gives to the same prompt alone, and in the end nothing temporary may be left in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tests.server.clock import awake_s
from tests.server.nursery import ForkedEngine, Nursery

from tenfold import Engine, SamplingParams
from tenfold.server import engine_client
from tenfold.server.engine_client import EngineProcess
from tenfold.server.wire import Admitted, Failed, Finished, Job, Start, Tokens

MODEL, MEMORY = "tiny-v4-flash", "3G"
SAMPLING: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
TEXTS, LONGEST_TOKENS = 6, 1500
LONGEST_S = 1.0
"""An engine that is ready lives so long at most."""
LONGEST_WAIT_S = 120.0
"""For the first prompt that is found in the store."""
LONGEST_PAUSE_S = 0.5
"""Before the next is started; a server lets more and more time pass, up to half a minute."""


def prompt(number: int) -> tuple[int, ...]:
    """One of a few: three in a row share their first half."""
    dice, tail = random.Random(number // 3), random.Random(1000 + number)
    return tuple(one.randrange(2, 2000) for one in (dice, tail) for _ in range(LONGEST_TOKENS // 2))


def truth(number: int, engine: Engine) -> list[int]:
    """What the library answers."""
    session = engine.session(LONGEST_TOKENS + SAMPLING["max_tokens"])
    session.feed(prompt(number))
    return [sampled.id for sampled in session.generate(SamplingParams(**SAMPLING))]


class Harness:
    """Counts what is seen."""

    def __init__(self, folder: Path, count: int, seed: int, nursery: Nursery) -> None:
        self.store, self.count, self.dice = folder / "store", count, random.Random(seed)
        start = Start(MODEL, memory=MEMORY, threads=1, store=str(self.store))
        self.engines = [ForkedEngine(start, nursery), ForkedEngine(start, nursery)]
        self.seen = {"kills": 0, "answers": 0, "wrong": 0, "cut_off": 0, "resumed": 0, "cached_tokens": 0}
        self.stopped = False

    async def run(self) -> dict[str, int]:
        engine = Engine.load(MODEL, memory=MEMORY, threads=1)
        self.truths = [truth(number, engine) for number in range(TEXTS)]
        for one in self.engines:
            await one.open()
            await one.loaded()
        asking = [asyncio.create_task(self._ask(one, n)) for n, one in enumerate(self.engines)]
        try:
            await self._kill()
            self.stopped = True
            await asyncio.gather(*asking)
        finally:
            for one in self.engines:
                await one.close(10)
        temporary = len(list((self.store / "temporary").iterdir()))
        return self.seen | {"temporaries_left": temporary}

    async def _kill(self) -> None:
        victim = self.engines[0]
        while self.seen["kills"] < self.count:
            await victim.loaded()
            await asyncio.sleep(self.dice.uniform(0, LONGEST_S))
            victim.kill()
            self.seen["kills"] += 1
            if self.seen["kills"] % 10 == 0:
                print(self.seen, file=sys.stderr, flush=True)
            while victim.ready is not None:
                await asyncio.sleep(0.01)
        await victim.loaded()
        began = awake_s()
        while not self.seen["resumed"] and awake_s() - began < LONGEST_WAIT_S:  # few kills take less than an answer
            await asyncio.sleep(0.01)

    async def _ask(self, engine: EngineProcess, who: int) -> None:
        turn = 0
        while not self.stopped:
            number = (turn + 3 * who) % TEXTS
            turn += await self._answered(engine, number, f"{who} {turn} {time.monotonic()}")

    async def _answered(self, engine: EngineProcess, number: int, name: str) -> bool:
        """Whether an answer came; one that was cut off is asked for again once the engine is back."""
        said: list[int] = []
        job = Job(name, "c", "", prompt(number), SAMPLING)
        async for event in engine.run(job):
            match event:
                case Admitted():
                    self.seen["resumed"] += event.cached_tokens > 0
                    self.seen["cached_tokens"] += event.cached_tokens
                case Tokens():
                    said += [token.id for token in event.tokens]
                case Failed():
                    self.seen["cut_off"] += 1
                    self.seen["wrong"] += said != self.truths[number][: len(said)] or not event.again
                    await asyncio.sleep(0.05)
                    return False
                case Finished():
                    self.seen["answers"] += 1
                    self.seen["wrong"] += said != self.truths[number]
        return True


def kills(folder: Path, count: int, seed: int) -> dict[str, Any]:
    engine_client._LONGEST_PAUSE_S = LONGEST_PAUSE_S
    with contextlib.closing(Nursery()) as nursery:
        return asyncio.run(Harness(folder, count, seed, nursery).run())


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(kills(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
