"""A server in a process of its own, to be measured, stopped and killed: `python -m tests.long.served KIND PORT STORE`.

`echo` says back the nonce of its prompt, 32 tokens long, without a model; `slow` reads for 65 seconds before it says a
sentence, and gives signs of life as often as a server by default; `real` has the embedded model in an engine process.
Two API keys are let in: alpha-key-1 and beta-key-22.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from tests.server.clock import awake_s
from tests.server.fakes import FakeJobs, Script, plain_language, saying, settings

from tenfold.server import engine_client
from tenfold.server.app import Gate
from tenfold.server.auth import Keys
from tenfold.server.engine_client import EngineProcess
from tenfold.server.language import Language
from tenfold.server.metrics import Metrics
from tenfold.server.service import Service
from tenfold.server.transport import guarded
from tenfold.server.wire import Admitted, Event, Finished, Job, Queued, Ready, Start, Token, Tokens

KEYS = ("alpha-key-1", "beta-key-22")
MODEL = "tenfold-test"
SLOW_S, SLOW_SAYS = 65.0, "All is well."
_NONCE = re.compile(r"nonce-\d+")
_LONGEST_PAUSE_S = 1.0
"""Before an engine that died is started again; a hundred deaths would make it half a minute."""


@dataclass
class Served:
    """The process and where it listens."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def rss_bytes(self) -> int:
        return int(self._status("VmRSS").split()[0]) * 1024

    def peak_bytes(self) -> int:
        return int(self._status("VmHWM").split()[0]) * 1024

    def threads(self) -> int:
        return int(self._status("Threads"))

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def engine_pid(self) -> int:
        """The process below this one; raises StopIteration where there is none."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return next(int(pid) for file in children for pid in file.read_text().split())

    def _status(self, name: str) -> str:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(line.split(":")[1] for line in text.splitlines() if line.startswith(f"{name}:"))

    def get(self, path: str) -> tuple[int, str]:
        """Status and text; status 0 where nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("GET", path, headers=auth())
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        return 0, ""

    def ready(self) -> bool:
        return self.get("/ready")[0] == 200

    def gauge(self, name: str) -> float:
        """One figure of /metrics."""
        return float(next(line for line in self.get("/metrics")[1].splitlines() if line.startswith(name)).split()[-1])

    def wait(self, seconds: float = 120.0) -> float:
        """Until it is ready; how long that took."""
        began = awake_s()
        while not self.ready():
            assert self.process.poll() is None, "the server has ended"
            assert awake_s() - began < seconds, f"the server does not get ready; its engine: {self._engine_state()}"
            time.sleep(0.05)
        return awake_s() - began

    def _engine_state(self) -> str:
        with contextlib.suppress(OSError, StopIteration):
            return Path(f"/proc/{self.engine_pid()}/status").read_text()
        return "none"


def auth(key: str = KEYS[0]) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@contextlib.contextmanager
def serving(kind: str, *more: str, env: dict[str, str] | None = None) -> Iterator[Served]:
    """A server that is ready; ended at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.long.served", kind, str(port), *more]
    process = subprocess.Popen(command, env={**os.environ, **(env or {})})
    served = Served(process, port)
    try:
        served.wait()
        yield served
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def command(folder: str, *more: str, keys: bool = False, env: dict[str, str] | None = None) -> Iterator[Served]:
    """`tenfold serve tiny-v4-flash` as a user starts it, ready; its log is FOLDER/log. Killed at the end."""
    log = Path(folder, "log")
    words = [sys.executable, "-m", "tenfold", "serve", "tiny-v4-flash", "--name", MODEL, "--port", "0", *more]
    if keys:
        Path(folder, "keys").write_text("\n".join(KEYS))
        words += ["--keys", f"{folder}/keys"]
    with log.open("wb") as file:
        process = subprocess.Popen(words, stderr=file, env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})})
    try:
        while (address := re.search(r"http://[0-9.]+:(\d+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        served = Served(process, int(address[1]))
        served.wait(300)
        yield served
    finally:
        process.kill()
        process.wait()


class _Forgetful(list[Any]):
    """A soak would measure what the fake remembers."""

    def append(self, item: Any) -> None:
        pass


def echo(language: Language) -> Script:
    def script(job: Job) -> Sequence[Event | float]:
        found = _NONCE.findall(language.tokenizer.decode(job.prompt)) or ["none"]
        ids = language.tokenizer.encode(f"{found[-1]} " * 8)[: job.sampling["max_tokens"]]
        tokens = [Tokens(job.id, (Token(token, -0.5),)) for token in ids]
        return [Queued(job.id, 0), Admitted(job.id, 0), *tokens, Finished(job.id, "stop")]

    return script


def slow(language: Language) -> Script:
    said = saying(SLOW_SAYS, language)

    def script(job: Job) -> Sequence[Event | float]:
        queued, admitted, *rest = said(job)
        return [queued, admitted, SLOW_S, *rest]

    return script


async def _serve(kind: str, port: int, store: str | None) -> None:
    language = plain_language()
    jobs: FakeJobs | EngineProcess
    if kind != "real":
        script = (slow if kind == "slow" else echo)(language)
        jobs = FakeJobs(script, ready=Ready("fake", 1 << 20, 2048, 1 << 30, 282_624, 118.8, 788.0, (1,)))
        jobs.jobs, jobs.cancelled = _Forgetful(), _Forgetful()
    else:
        engine_client._LONGEST_PAUSE_S = _LONGEST_PAUSE_S
        jobs = EngineProcess(Start("tiny-v4-flash", memory="2G", threads=1, store=store))
        await jobs.open()
    hasty = {} if kind == "slow" else {"keepalive_s": 2.0, "write_timeout_s": 20.0}
    service = Service(jobs, language, settings(**hasty), Metrics(MODEL))
    made = uvicorn.Config(
        Gate(service, Keys.of(KEYS)), host="127.0.0.1", port=port, http=guarded(2400, 10.0), log_config=None,
        lifespan="off", ws="none", backlog=4096, timeout_graceful_shutdown=2,
    )  # fmt: skip
    await uvicorn.Server(made).serve()
    if isinstance(jobs, EngineProcess):
        await jobs.close()
    service.close()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None))
