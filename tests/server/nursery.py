"""Engines that start at once: a process that has imported all that an engine needs forks one for each socket sent.

    python -m tests.server.nursery FD

Each is a process of its own with the worker's own code, killed like any other; only the seconds in which Python reads
its modules are spared.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from typing import cast

from tenfold.server import worker
from tenfold.server.engine_client import EngineProcess
from tenfold.server.wire import Start


class Child:
    """As much of subprocess.Popen as an EngineProcess uses, of a process that is another one's child."""

    def __init__(self, pid: int) -> None:
        self.pid, self._fd = pid, os.pidfd_open(pid)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if not select.select([self._fd], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("engine", timeout or 0.0)
        return 0

    def __del__(self) -> None:
        os.close(self._fd)


class Nursery:
    """The process that forks."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tests.server.nursery", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()

    def start(self, connection: socket.socket) -> Child:
        socket.send_fds(self._socket, [b"x"], [connection.fileno()])
        return Child(int.from_bytes(self._socket.recv(4), "little"))

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


class ForkedEngine(EngineProcess):
    def __init__(self, start: Start, nursery: Nursery) -> None:
        super().__init__(start)
        self._nursery = nursery

    def _spawn(self, connection: socket.socket) -> subprocess.Popen[bytes]:
        return cast("subprocess.Popen[bytes]", self._nursery.start(connection))


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    while True:
        said, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not said:
            return
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setpgid(0, 0)
            control.close()
            sys.argv[1] = str(fds[0])
            worker.main()
        os.close(fds[0])
        control.send(pid.to_bytes(4, "little"))


if __name__ == "__main__":
    main()
