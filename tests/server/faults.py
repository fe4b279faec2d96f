"""Every k-th call to the system fails in a server under requests. Run as a program: prints one JSON object.

    python -m tests.server.faults STRIDE [PART]

A server with an engine process is asked by raw clients of three APIs, one of which goes away, while the k-th call of
the HTTP process on its sockets, pipes and files fails, for every STRIDE-th k (parts 0 to STRIDE - 1 together are every
k): once, from there on, or with half the bytes. An answer may be refused in words or be cut off, so that its client
sees it; it must not end tidily before its end, or differ, nor hang, unless each further call fails, so that it cannot
even be refused. Afterwards the same process answers all again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from tests.server.fakes import MODEL, plain_language, settings
from tests.store.faults import FROM_THERE, ONCE, SHORT
from tests.store.preload import built

from tenfold.server import engine_client
from tenfold.server.app import Gate
from tenfold.server.auth import Keys
from tenfold.server.engine_client import EngineProcess
from tenfold.server.metrics import Metrics
from tenfold.server.service import Service
from tenfold.server.transport import guarded
from tenfold.server.wire import Start

SOURCE = Path(__file__).with_suffix(".c")
WAYS = {
    "ECONNRESET once": (errno.ECONNRESET, ONCE),
    "EIO from there": (errno.EIO, FROM_THERE),
    "ENOBUFS once": (errno.ENOBUFS, ONCE),
    "EMFILE from there": (errno.EMFILE, FROM_THERE),
    "EINTR once": (errno.EINTR, ONCE),
    "half": (0, SHORT),
}
ANSWER_S, WELL_S = 3.0, 30.0
"""The longest that an answer may take, and until all is well again."""
STAND_STILL_S = 2.0
"""A client or an engine from which nothing comes is let go."""
_MESSAGES = [{"role": "user", "content": "Say it again: nonce."}]
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("/v1/completions", {"prompt": "All is well in the house.", "max_tokens": 64}),
    "stream": ("/v1/completions", {"prompt": "The table is set.", "max_tokens": 64, "stream": True}),
    "chat": ("/v1/chat/completions", {"messages": _MESSAGES, "max_tokens": 64, "stream": True}),
    "messages": ("/v1/messages", {"messages": _MESSAGES, "max_tokens": 64, "stream": True}),
}
FINE = ("right", "refused", "cut", "unanswered")
WRONG = ("hung", "tidy", "wrong", "unclear")
LAST = (b"data: [DONE]", b"event: message_stop")


class Control(ctypes.Structure):
    """As `faults.c` has it."""

    _fields_ = (
        ("pid", ctypes.c_int32),
        ("error_number", ctypes.c_int32),
        ("way", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("chosen", ctypes.c_int64),
        ("calls", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Heard:
    """All that came over a connection, and whether it came within the time."""

    raw: bytes
    in_time: bool

    def judge(self, truth: str) -> str:
        """What a client makes of it: right, refused, cut, or what must not be."""
        head, _, body = self.raw.partition(b"\r\n\r\n")
        if not self.in_time:
            return "hung"
        status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.1 ") and body else 0
        if b"transfer-encoding: chunked" in head.lower():
            if not body.endswith(b"\r\n0\r\n\r\n"):
                return "cut"
            if b'"error"' in body:
                return "refused"
            return ("right" if self.text() == truth else "wrong") if any(last in body for last in LAST) else "tidy"
        length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":-1")
        if not status or len(body) < int(length.split(b":")[1]):
            return "cut"
        if status >= 400:
            return "refused" if b'"error"' in body else "unclear"
        return "right" if self.text() == truth else "wrong"

    def text(self) -> str:
        """What was said, in any of the three APIs."""
        body = self.raw.partition(b"\r\n\r\n")[2].replace(b"\r\n", b"\n")
        pieces = [line.removeprefix(b"data: ") for line in body.split(b"\n") if b"{" in line]
        return "".join(map(_said, map(json.loads, pieces)))


def _said(event: dict[str, Any]) -> str:
    """The new text of an event, or the text of a whole answer."""
    parts = [choice.get("text") or choice.get("delta", {}).get("content") for choice in event.get("choices", ())]
    return "".join(part or "" for part in (*parts, event.get("delta", {}).get("text")))


async def ask(port: int, path: str, body: dict[str, Any], *, leave: bool = False) -> Heard:
    """One request on a connection of its own; with `leave` the client goes away when the answer begins."""
    text = json.dumps({"model": MODEL, "temperature": 0, **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type: application/json\r\n"
    raw = bytearray()
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                writer.write(f"{head}content-length: {len(text)}\r\n\r\n".encode() + text)
                while piece := await reader.read(65_536):
                    raw += piece
                    if leave:
                        break
    except TimeoutError:
        return Heard(bytes(raw), False)
    except OSError:
        pass
    return Heard(bytes(raw), True)


async def ask_all(port: int) -> dict[str, Heard]:
    """The requests one after another, so that the calls are the same ones each time, as far as they can be."""
    heard = {name: await ask(port, path, body) for name, (path, body) in ASKED.items()}
    await ask(port, *ASKED["stream"], leave=True)
    return heard


class Harness:
    """The server, what fails in it, and what was seen."""

    def __init__(self, control: Control, process: subprocess.Popen[bytes], port: int) -> None:
        self.control, self.process, self.port = control, process, port
        self.seen = dict.fromkeys((*FINE, *WRONG, "not_again"), 0)
        self.truth: dict[str, str] = {}

    def arm(self, k: int, number: int, way: int) -> None:
        self.control.error_number, self.control.way, self.control.chosen = number, way, k
        self.control.calls = 0
        self.control.pid = self.process.pid

    def disarm(self) -> int:
        self.control.pid = 0
        return int(self.control.calls)

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def judged(self) -> list[str]:
        """What comes of each request."""
        heard = await ask_all(self.port)
        return [one.judge(self.truth[name]) for name, one in heard.items()]

    async def well(self) -> bool:
        """Whether all is as before, within a time: every answer, and no file left open."""
        until = time.monotonic() + WELL_S
        while time.monotonic() < until:
            assert self.process.poll() is None, "the server has ended"
            found = await self.judged()
            if set(found) == {"right"} and self.files() <= self.most_files:
                return True
            await asyncio.sleep(0.05)
        return False

    async def run(self, stride: int, part: int) -> dict[str, Any]:
        """All ways and every `stride`-th call."""
        while not all(b"HTTP/1.1 200" in heard.raw for heard in (await ask_all(self.port)).values()):
            assert self.process.poll() is None, "the server has ended"
            await asyncio.sleep(0.05)
        self.truth = {name: heard.text() for name, heard in (await ask_all(self.port)).items()}
        assert all(self.truth.values()), self.truth
        await asyncio.sleep(0.5)
        self.most_files = self.files()
        calls = 0
        for _ in range(3):
            self.arm(0, 0, ONCE)
            await ask_all(self.port)
            calls = max(calls, self.disarm())
        cases = reached = 0
        for at, (name, (number, way)) in enumerate(WAYS.items()):
            for k in range(1 + (at + part) % stride, calls + 1, stride):
                self.arm(k, number, way)
                found = await self.judged()
                cases += 1
                reached += self.disarm() >= k
                if way == FROM_THERE:
                    found = ["unanswered" if kind == "hung" else kind for kind in found]
                well = await self.well()
                for kind in (*found, *([] if well else ["not_again"])):
                    self.seen[kind] += 1
                if not well or set(WRONG) & set(found):
                    print(f"{name}, call {k}: {found}, {'well' if well else 'not well'} again", file=sys.stderr)
        return {"calls": calls, "cases": cases, "reached": reached, **self.seen}


class _Engine(EngineProcess):
    program = (str(Path(__file__).with_name("fake_worker.py")),)


async def serve() -> None:
    """The server; says its port."""
    engine_client._FIRST_PAUSE_S = engine_client._LONGEST_PAUSE_S = 0.05
    jobs = _Engine(Start("fake"), loading_s=STAND_STILL_S)
    await jobs.open()
    service = Service(jobs, plain_language(), settings(keepalive_s=2.0, write_timeout_s=5.0), Metrics(MODEL))
    config = uvicorn.Config(
        Gate(service, Keys.of(())), http=guarded(1200, STAND_STILL_S), log_config=None, lifespan="off", ws="none"
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        await uvicorn.Server(config).serve(sockets=[listening])
    await jobs.close()
    service.close()


def main(stride: int, part: int = 0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "control")
        path.write_bytes(bytes(ctypes.sizeof(Control)))
        library = built(SOURCE, Path(folder), f'-DCONTROL="{path}"')
        with path.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        command = [sys.executable, "-m", "tests.server.faults", "serve"]
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        with Path(folder, "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            found = asyncio.run(Harness(Control.from_buffer(mapped), process, port).run(stride, part))
        except BaseException:
            print(Path(folder, "log").read_text()[-5000:], file=sys.stderr)
            raise
        finally:
            process.terminate()
            process.wait(30)
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        asyncio.run(serve())
    else:
        main(*map(int, sys.argv[1:]))
