"""`tenfold serve`: options from the command line and a file, the socket, the engine's process, signals, the end.

The server listens before the model is loaded, so that `/health` and `/ready` can tell the two apart. SIGTERM lets the
answers under way come to their end, a second one does not. Knows no protocol.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import resource
import signal
import socket
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast, get_args, get_type_hints

import deepseek_recipe
import uvicorn

from tenfold import chat
from tenfold import config as configuration
from tenfold.errors import CheckpointError, RunError, UsageError
from tenfold.machine import cache_folder, parse_bytes
from tenfold.server import page
from tenfold.server.app import Gate
from tenfold.server.auth import Keys, read_keys
from tenfold.server.engine_client import EngineProcess
from tenfold.server.language import Language
from tenfold.server.metrics import Metrics
from tenfold.server.service import Service, Settings
from tenfold.server.transport import IDLE_S, guarded
from tenfold.server.wire import Start
from tenfold.tokenizer import Tokenizer

__all__ = ["Options", "options_of", "serve"]

Numerics = Literal["deployed", "exact"]
KEY_VARIABLE = "TENFOLD_API_KEY"
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_LEAVE_S = 3
_MOST_PORT = 65_535


@dataclass(frozen=True, slots=True)
class Options:
    """What can be chosen; the names are those of the command line and of the file."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    name: tuple[str, ...] = ()
    allow_host: tuple[str, ...] = ()
    keys: str | None = None
    insecure: bool = False
    shared_cache: bool = False
    queue: int = 256
    drain: float = 30.0
    restart: bool = True
    profile: str | None = None
    backend: str = "auto"
    numerics: str = "deployed"
    memory: str | None = None
    threads: int | None = None
    store: str | None = None
    no_store: bool = False
    store_limit: str | None = None


def options_of(given: Mapping[str, Any], file: Path | None) -> Options:
    """The options of a TOML file, and above them those of the command line; None says nothing."""
    found = {} if file is None else _read(file)
    found |= {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None and value != []
    }
    if "model" not in found:
        raise UsageError("no model is named; give a folder, or model = in the file")
    options = Options(**found)
    if not 0 <= options.port <= _MOST_PORT:
        raise UsageError(f"port is {options.port}, expected 0 to {_MOST_PORT}")
    if options.numerics not in get_args(Numerics):
        raise UsageError(f"numerics is {options.numerics!r}, expected one of {', '.join(get_args(Numerics))}")
    if options.drain < 0 or options.queue < 1:
        raise UsageError(f"drain is {options.drain} and queue {options.queue}, expected at least 0 and 1")
    return options


def serve(options: Options) -> None:
    """Serves until a signal comes. Raises what keeps it from serving, or why the engine has ended."""
    keys = _keys(options)
    if not keys.digests and not options.insecure and not _is_loopback(options.host):
        raise UsageError(
            f"{options.host} can be reached by others and there is no API key; give --keys FILE or {KEY_VARIABLE}, "
            "or --insecure if that is wanted"
        )
    language = _language(options)
    with _listening(options) as listener:
        _raise_file_limit()
        _log_to_stderr()
        asyncio.run(_serve(options, keys, language, listener))


async def _serve(options: Options, keys: Keys, language: Language, listener: socket.socket) -> None:
    engine = EngineProcess(_start(options), restart=options.restart)
    settings = _settings(options)
    service = Service(engine, language, settings, Metrics(settings.names[0]))
    config = uvicorn.Config(
        Gate(service, keys, page.routes()),
        http=guarded(),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(IDLE_S),
        timeout_graceful_shutdown=_LEAVE_S,
    )
    server = _Server(config, service)
    await engine.open()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    _announce(options, settings, listener)
    try:
        await asyncio.wait([serving, engine.over], return_when=asyncio.FIRST_COMPLETED)
        lost = engine.over.done() and not service.draining
        server.should_exit = True
        await serving
    finally:
        if server.force_exit:
            engine.kill()
        await engine.close()
        service.close()
    if lost:
        raise engine.problem or RunError("the engine has ended; its log says more")


class _Server(uvicorn.Server):
    """uvicorn's server, which at the first signal goes on until the answers under way have ended or time is up."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._until = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            self.force_exit = self.should_exit = True
            return
        self._service.draining = True
        self._until = time.monotonic() + self._service.settings.drain_s
        logging.getLogger("tenfold.serve").info("%s: no more requests are taken", signal.Signals(sig).name)

    async def on_tick(self, counter: int) -> bool:
        service = self._service
        if service.draining and not self.should_exit and (not service.live or time.monotonic() >= self._until):
            service.abort()
            self.should_exit = True
        return await super().on_tick(counter)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise UsageError(f"{file} is no TOML file that can be read: {exc}") from None
    known = get_type_hints(Options)
    options = {}
    for name, value in found.items():
        field = name.replace("-", "_")
        if field not in known:
            names = ", ".join(one.name for one in fields(Options))
            raise UsageError(f"{file}: nobody knows {name!r}; the options are {names}")
        options[field] = _typed(file, name, value, Options.__dataclass_fields__[field].type)
    return options


def _typed(file: Path, name: str, value: Any, kind: object) -> Any:
    wanted = str(kind).removesuffix(" | None")
    if wanted.startswith("tuple"):
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(one, str) for one in values):
            return tuple(values)
    elif wanted == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif type(value).__name__ == wanted:
        return value
    raise UsageError(f"{file}: {name} is {value!r}, expected {'a list of names' if wanted[:5] == 'tuple' else wanted}")


def _keys(options: Options) -> Keys:
    entries = [] if options.keys is None else read_keys(Path(options.keys))
    if given := os.environ.get(KEY_VARIABLE):
        entries.append(given)
    return Keys.of(entries)


def _language(options: Options) -> Language:
    config = configuration.load(options.model)
    folder = configuration.locate(options.model)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"no tokenizer.json in {folder}; copy the one of the model's checkpoint there")
    profile = chat.profile_for(config, folder=folder, override=options.profile)
    tokenizer = Tokenizer.load(folder, config_vocab_size=config.vocab_size)
    return Language(tokenizer, profile, deepseek_recipe.Tokenizer.from_file(str(file)))


def _settings(options: Options) -> Settings:
    hosts = None
    if _is_loopback(options.host):
        hosts = frozenset(name.lower() for name in (*_LOOPBACK_NAMES, options.host, *options.allow_host))
    elif options.allow_host:
        hosts = frozenset(name.lower() for name in options.allow_host)
    names = options.name or (Path(options.model).name,)
    return Settings(names, drain_s=options.drain, shared_cache=options.shared_cache, host_names=hosts)


def _start(options: Options) -> Start:
    store = None if options.no_store else options.store or str(cache_folder() / "store")
    return Start(
        options.model,
        options.backend,
        cast(Numerics, options.numerics),
        options.memory,
        options.threads,
        store,
        None if options.store_limit is None else parse_bytes(options.store_limit, "--store-limit"),
        options.queue,
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


@contextmanager
def _listening(options: Options) -> Iterator[socket.socket]:
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
    except OSError as exc:
        raise UsageError(f"host is {options.host!r}, which is no address: {exc.strerror}") from exc
    # asyncio turns Nagle's algorithm off where the protocol is named; else a second answer waits 40 ms for an ACK.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((options.host, options.port))
        except OSError as exc:
            where = f"{options.host}:{options.port}"
            raise RunError(f"{where} cannot be listened on: {exc.strerror or exc}; choose another --port") from exc
        yield listener


def _raise_file_limit() -> None:
    """A thousand connections are more files than a shell allows by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 65_536)), hard))


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("tenfold")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it would call an answer that broke off a bug


def _announce(options: Options, settings: Settings, listener: socket.socket) -> None:
    host = f"[{options.host}]" if ":" in options.host else options.host
    port = listener.getsockname()[1]
    logging.getLogger("tenfold.serve").info("%s on http://%s:%d", settings.names[0], host, port)
