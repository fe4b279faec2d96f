"""The engine process: `python -m tenfold.server.worker FD`. Reads frames from a socket it has inherited, answers there.

The main thread runs the loop; one thread reads, one sends the heartbeat. It ends when it is told to, when the other
end of the socket is gone, and on SIGTERM, each time after what was read is on disk. Knows nothing of HTTP.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tenfold import config as configuration
from tenfold.completion import load_tokenizer
from tenfold.config import DeepseekV4Config
from tenfold.constrain.matcher import Grammars
from tenfold.engine import Engine
from tenfold.errors import TenfoldError
from tenfold.server.loop import Loop, policy_of
from tenfold.server.wire import (
    HEADER_BYTES,
    Failed,
    Message,
    Ready,
    Shutdown,
    Start,
    WireError,
    decode,
    encode,
    frame_sizes,
)
from tenfold.store import Store
from tenfold.synth import v32_twin

__all__ = ["Channel", "main"]

_HEARTBEAT_S = 0.5
_SETTLE_S = 20.0
_LEAVE_S = 40.0
Inbox = queue.SimpleQueue[Message | Callable[[], None]]
_log = logging.getLogger(__name__)


class Channel:
    """Messages over a stream socket, sent by any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        self._file = connection.makefile("rb")

    def send(self, messages: Sequence[Message]) -> None:
        """Waits for the other end to read. Nobody is there any more: nothing happens, `receive` ends as well."""
        frames = b"".join(map(encode, messages))
        try:
            with self._lock:
                self._socket.sendall(frames)
        except OSError:
            return

    def receive(self) -> Iterator[Message]:
        """Until the other end closes. Raises WireError for what is no frame."""
        while len(header := self._file.read(HEADER_BYTES)) == HEADER_BYTES:
            body_bytes, payload_bytes = frame_sizes(header)
            body, payload = self._file.read(body_bytes), self._file.read(payload_bytes)
            if len(body) < body_bytes or len(payload) < payload_bytes:
                return
            yield decode(body, payload)


def main() -> None:
    """Never returns: threads that wait for a disk which does not answer must not hold the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then says what to do
    logging.basicConfig(format="engine: %(message)s", level=logging.WARNING)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    try:
        code = serve(channel)
    except BaseException:
        _log.exception("the engine ends")
        code = 1
    sys.stderr.flush()
    os._exit(code)


def serve(channel: Channel) -> int:
    """Loads what the first message says, then runs jobs until the end; the exit code."""
    messages = channel.receive()
    start = next(messages, None)
    if not isinstance(start, Start):
        return 1
    inbox: Inbox = queue.SimpleQueue()
    loaded = threading.Event()
    threading.Thread(target=_read, args=(messages, inbox, loaded), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: inbox.put(Shutdown()))
    try:
        engine = _load(start)
        loop = Loop(engine, policy_of(engine, start.queue_jobs), channel.send, inbox, _grammars(start, engine))
    except TenfoldError as exc:
        channel.send([Failed("", "input" if exc.exit_code == 2 else "engine", str(exc))])
        return exc.exit_code
    loaded.set()
    gc.collect()
    gc.freeze()  # what is there now stays; looking through it again and again took 4 % of a token's time
    channel.send([_ready(start, engine)])
    threading.Thread(target=_beat, args=(loop, channel), daemon=True).start()
    loop.run()
    loop.settle(_SETTLE_S)
    return 0


def _load(start: Start) -> Engine:
    store = None if start.store is None else Store(Path(start.store), start.store_limit_bytes)
    return Engine.load(start.model, start.backend, start.numerics, start.memory, store, threads=start.threads)


def _grammars(start: Start, engine: Engine) -> Grammars:
    folder, config = configuration.locate(start.model), engine.config
    block = "function_calls" if config.architecture == "deepseek_v32" else "tool_calls"
    return Grammars(lambda: load_tokenizer(folder, engine), config.vocab_size, config.eos_token_id, block=block)


def _ready(start: Start, engine: Engine) -> Ready:
    config = engine.config
    as_v32 = configuration.parse(v32_twin(config)) if isinstance(config, DeepseekV4Config) else config
    return Ready(
        model=configuration.locate(start.model).name,
        context=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        memory_bytes=engine.budget.memory_bytes,
        kv_fixed_bytes=sum(config.kv_bytes(0).values()),
        kv_bytes_per_token=config.kv_bytes_per_token,
        v32_kv_bytes_per_token=as_v32.kv_bytes_per_token,
        eos_ids=config.eos_token_id,
    )


def _read(messages: Iterator[Message], inbox: Inbox, loaded: threading.Event) -> None:
    """Hands on what comes; when nothing can come any more, the process has to end, whatever it is at."""
    try:
        for message in messages:
            inbox.put(message)
    except (WireError, OSError) as exc:
        _log.error("%s", exc)
    inbox.put(Shutdown())
    time.sleep(_LEAVE_S if loaded.is_set() else 0.0)
    os._exit(1)


def _beat(loop: Loop, channel: Channel) -> None:
    while True:
        channel.send([replace(loop.pulse, steps=loop.steps, rss_bytes=_rss_bytes())])
        time.sleep(_HEARTBEAT_S)


def _rss_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
