"""An engine without a model, run as the engine process: what a job's sampling says under "do" is what it does.

A job that says nothing there, as those of a server, has its prompt said back."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

from tenfold.server.wire import (
    HEADER_BYTES,
    Admitted,
    Failed,
    Finished,
    Heartbeat,
    Job,
    Message,
    Queued,
    Ready,
    Shutdown,
    Start,
    Token,
    Tokens,
    decode,
    encode,
    frame_sizes,
)


class FakeEngine:
    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.file = connection, connection.makefile("rb")
        self.lock = threading.Lock()
        self.beats = self.moves = True
        self.steps = 0

    def send(self, *messages: Message) -> None:
        with self.lock:
            self.connection.sendall(b"".join(map(encode, messages)))

    def receive(self) -> Iterator[Message]:
        while len(header := self.file.read(HEADER_BYTES)) == HEADER_BYTES:
            body, payload = frame_sizes(header)
            yield decode(self.file.read(body), self.file.read(payload))

    def beat(self) -> None:
        while True:
            self.steps += self.moves
            if self.beats:
                self.send(Heartbeat(self.steps, 0, 0, 0, 0, 0))
            time.sleep(0.1)

    def run(self) -> None:
        messages = self.receive()
        start = next(messages)
        assert isinstance(start, Start)
        if start.model == "missing":
            self.send(Failed("", "input", "there is no such model"))
            os._exit(2)
        if start.model == "crashes":
            os._exit(7)
        if start.model == "hangs":
            threading.Event().wait()
        if start.model == "slow":
            compute(3.0)
        self.send(Ready(start.model, 65_536, 2048, 1 << 30, 0, 1.0, 10.0, (0,)))
        threading.Thread(target=self.beat, daemon=True).start()
        for message in messages:
            if isinstance(message, Shutdown):
                os._exit(0)
            if isinstance(message, Job):
                self.do(message)

    def do(self, job: Job) -> None:
        what = job.sampling.get("do", "say")
        if what == "queue":
            self.send(Queued(job.id, 0))
            return
        self.send(Admitted(job.id, 0))
        if what == "say":
            for token in job.prompt:
                self.send(Tokens(job.id, (Token(token, -1.0),)))
            self.send(Finished(job.id, "length"))
        elif what == "flood":
            for start in range(0, 200_000, 100):
                self.send(Tokens(job.id, tuple(Token(start + n, -1.0) for n in range(100))))
        elif what == "die":
            os._exit(3)
        elif what == "rave":
            with self.lock:
                self.connection.sendall(b"Traceback (most recent call last)")
        elif what == "fall silent":
            self.beats = False
        elif what == "stand still":
            self.moves = False
        elif what == "environment":
            said = " ".join(sorted(os.environ))
            self.send(Failed(job.id, "engine", said))


def compute(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(10_000))


FakeEngine(socket.socket(fileno=int(sys.argv[1]))).run()
