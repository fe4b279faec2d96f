"""Engine: weights and kernels, unchanged after load. Session: one timeline of tokens. Knows nothing of text.

One path for prefill and decode: a session contributes n >= 1 tokens from its position, always.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from tenfold import _native, checkpoint, ops
from tenfold import config as configuration
from tenfold.budget import Budget, Need, fit, gpu_session_bytes, longest, shared_tile_tokens
from tenfold.config import ModelConfig
from tenfold.counting import CountingOps, counting
from tenfold.decoding import Decoder, Place, can_decode
from tenfold.errors import ContextTooLong, InputError, UsageError
from tenfold.keeping import Keeper, Kept, timeline_of
from tenfold.machine import Machine, anonymous_bytes, parse_bytes, shrink_heap, this_machine, tidy_heap
from tenfold.models import Binder, Model, build
from tenfold.ops import cpu_pool
from tenfold.placement import Placement, place
from tenfold.planner import Work
from tenfold.planner.work import reading_cost
from tenfold.sampler import Sampled, Sampler, SamplingParams
from tenfold.step import Pace, Span, Step
from tenfold.store import Match, Store
from tenfold.streams import RestorePoint, Streams
from tenfold.weights import Weights, open_weights

__all__ = ["Engine", "Match", "Session", "Snapshot", "checked_numerics", "common_prefix", "parse_bytes"]

Numerics = Literal["deployed", "exact"]
"""As the models were trained to run: KV rows and index keys quantised, a backend free to round activations; or all
in float32."""

_MAX_POINTS = 8
_POINT_EVERY_TOKENS = 128

_REPORT_EVERY_S = 0.2
_KEEP_EVERY_S, _KEEP_EVERY_TOKENS = 10.0, 16384
_LEAST_RESERVE_BYTES = 1 << 30

_GPU_SWIFTNESS = 500
"""Times as much as two cores a GPU does in a third of a second."""

_HEAVY_TOKENS = 1024
"""A pass of so many takes long enough for the heap to be put in order behind it."""

_PLACED_CONTEXT = 131072
"""Tokens that a GPU has room for beside the weights it holds, before copies of experts get the rest."""

_CPU = torch.device("cpu")

Progress = Callable[[int], None]
"""Called with the number of tokens read so far: after each chunk, and a few times a second within one."""


def checked_numerics(name: str) -> Numerics:
    """`name` if it is a choice of numerics, else a UsageError."""
    if name not in get_args(Numerics):
        raise UsageError(f"numerics is {name!r}, expected one of {', '.join(get_args(Numerics))}")
    return cast(Numerics, name)


class Engine:
    """A loaded model on a backend; make sessions with `session()`."""

    def __init__(
        self,
        config: ModelConfig,
        model: Model,
        *,
        backend: str,
        exact: bool,
        budget: Budget,
        chunk_tokens: int | None = None,
        counter: CountingOps | None = None,
        keeper: Keeper | None = None,
        device: torch.device = _CPU,
        decoder: Decoder | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.backend = backend
        self.exact = exact
        self.budget = budget
        self.chunk_tokens = chunk_tokens
        self.keeper = keeper
        self.device = device
        self.placement = placement
        self._counter = counter
        self.decoder = decoder

    @classmethod
    def load(
        cls,
        source: str | Path,
        backend: str = "auto",
        numerics: Numerics = "deployed",
        memory: str | int | None = None,
        store: Store | str | Path | None = None,
        count: bool = False,
        threads: int | None = None,
    ) -> Engine:
        """Opens a checkpoint folder or an embedded model.

        `memory` is all this process may take, mapped weights apart (default: what is free less a reserve). With
        `count`, `counted` tells the work of the last pass. `threads` sets torch's pool, which the kernels share
        (default: as it is, but no more than the physical cores this process may use).

        What sessions read is kept in `store`, a folder or an opened one (default: nowhere).

        Raises ConfigError, CheckpointError, BackendMissing, StoreError or UsageError.
        """
        exact = checked_numerics(numerics) == "exact"
        tidy_heap()
        name, operations = ops.select(backend, exact=exact)
        device = ops.device_of(operations)
        machine = this_machine()
        allowed = _default_memory(machine, device) if memory is None else parse_bytes(memory)
        num_threads = machine.threads(threads)
        torch.set_num_threads(min(torch.get_num_threads(), num_threads) if threads is None else num_threads)
        config = configuration.load(source)
        weights = _open(source, config)
        if hasattr(operations, "accelerate"):
            operations.accelerate(config)
        resident = 4 * sum(spec.numel for spec in checkpoint.tensors(config)) <= allowed // 4
        counter = None
        if count:
            operations, counter = counting(operations, config)
        placement = expert = None
        if device.type == "cuda":
            session_bytes = gpu_session_bytes(config, min(_PLACED_CONTEXT, config.max_position_embeddings), exact=exact)
            placement = place(config, ((w.component, w.num_bytes) for w in weights), allowed, session_bytes)
            if not placement.all_on_gpu:
                expert = cast(ops.BatchOps, operations).keep_experts_far(placement.hot_experts).keep
        model = build(config, Binder(weights.take, operations, resident, exact=exact, device=device, expert=expert))
        weights.finish()
        weights_bytes = sum(info.num_bytes for info in weights)
        budget = _budget(allowed, weights_bytes, machine, device)
        decoder = None
        if not count and can_decode(operations):
            decoder = Decoder(config, model, operations, exact, device)
        keeper = None
        if store is not None:
            opened = store if isinstance(store, Store) else Store(Path(store))
            keeper = Keeper(opened, timeline_of(configuration.locate(source), config, weights, exact))
        return cls(
            config,
            model,
            backend=name,
            exact=exact,
            budget=budget,
            counter=counter,
            keeper=keeper,
            device=device,
            decoder=decoder,
            placement=placement,
        )

    @property
    def counted(self) -> tuple[Work, ...]:
        """Multiply-adds and bytes of the last pass by component, comparable with `planner.step_work`."""
        if self._counter is None:
            raise UsageError("this engine does not count; load it with count=True")
        return self._counter.counted

    def reading_cost(self) -> Callable[[int], float]:
        """What reading the tokens before a position costs, in proportion to the time it takes here."""
        return reading_cost(self.config, _native.isa() if self.backend == "cpu" else self.backend)

    def session(self, context: int | None = None, space: str = "") -> Session:
        """A new, empty timeline for up to `context` tokens (default: the model's, or as many as fit the memory).

        It meets in the store, and keeps there, what belongs to `space` alone. Raises ContextTooLong, and DoesNotFit
        with what would fit.
        """
        most = self.config.max_position_embeddings
        if context is not None and not 1 <= context <= most:
            raise ContextTooLong(f"context is {context:,} tokens, expected 1 to {most:,} for this model")
        return Session(self, self.need(context), space)

    def need(self, context: int | None = None) -> Need:
        """The memory a session of `context` tokens takes and how it reads, before anything is allocated."""
        most = self.config.max_position_embeddings
        need = (
            longest(self.config, most, self.budget, self.exact)
            if context is None
            else fit(self.config, context, self.budget, exact=self.exact)
        )
        return need if self.chunk_tokens is None else need.in_chunks(self.chunk_tokens)

    def step(
        self, batch: Mapping[Session, Sequence[int]], tick: Callable[[float], None] | None = None
    ) -> dict[Session, Tensor]:
        """Adds tokens to several sessions in one pass; float32 [vocab] logits of each one's last position.

        `tick` is told the share that is done, more than once a second. What it raises ends the pass, as if the
        tokens had never been given.
        """
        if any(session.engine is not self for session in batch):
            raise UsageError("a session belongs to another engine; step each engine with its own sessions")
        if not batch:
            return {}
        self._run({session: session.accept(ids) for session, ids in batch.items()}, every=False, tick=tick)
        return {session: session.last_logits for session in batch}

    def _run(
        self, batch: Mapping[Session, array[int]], every: bool, tick: Callable[[float], None] | None = None
    ) -> Tensor:
        """One forward pass; a session whose pass is cut short is put right before its next use."""
        for session in batch:
            session.ready()
        of_one = all(len(ids) == 1 for ids in batch.values())
        if self.decoder is not None and of_one:
            return self._write(batch, self.decoder, tick)
        spans, start = [], 0
        for session, ids in batch.items():
            spans.append(Span(session.streams, start, start + len(ids), session.length))
            start += len(ids)
        last = torch.tensor([span.stop - 1 for span in spans])
        device = self.device
        step = Step(
            ids=torch.cat([torch.frombuffer(ids, dtype=torch.int32) for ids in batch.values()]).long().to(device),
            positions=torch.cat([torch.arange(s.position, s.position + s.num_tokens, device=device) for s in spans]),
            spans=tuple(spans),
            wanted=None if every else last.to(device),
            tile_tokens=shared_tile_tokens(session.need for session in batch),
            wide_tokens=max(session.need.wide_tokens for session in batch),
            pace=None if tick is None else Pace(tick),
            swiftness=_GPU_SWIFTNESS if device.type == "cuda" else 1,
        )
        for session in batch:
            session.in_flight = True
        if self._counter is not None:
            self._counter.restart()
        try:
            with torch.no_grad():
                logits = self.model.forward(step).cpu()
        finally:
            cpu_pool.release()
        if start >= _HEAVY_TOKENS:
            shrink_heap()
        for row, (session, ids) in enumerate(batch.items()):
            session.advance(ids, logits[last[row] if every else row].clone())  # so that it keeps no others
        return logits

    def _write(
        self, batch: Mapping[Session, array[int]], decoder: Decoder, tick: Callable[[float], None] | None
    ) -> Tensor:
        """A pass of one token each."""
        places = [Place(session.streams, ids[0], session.length) for session, ids in batch.items()]
        for session in batch:
            session.in_flight = True
        logits = decoder.run(places, tick)
        for row, (session, ids) in enumerate(batch.items()):
            session.advance(ids, logits[row])
        return logits


def _open(source: str | Path, config: ModelConfig) -> Weights:
    if isinstance(source, str) and source in configuration.PRESETS and not Path(source).is_dir():
        raise UsageError(
            f"{source!r} is a configuration without weights; download the checkpoint and give its folder, "
            f"or try `tenfold synth {source} --layers 4 --hidden 512 DIR` for a small random one"
        )
    return open_weights(configuration.locate(source), config)


def _default_memory(machine: Machine, device: torch.device) -> int:
    """What this process has and what is free, of a GPU's memory what is free, less a tenth and at least 1 GiB."""
    if device.type == "cuda":
        free, base = torch.cuda.mem_get_info(device)[0], 0
    else:
        free, base = machine.ram_available_bytes, anonymous_bytes()
    return base + free - min(free // 2, max(_LEAST_RESERVE_BYTES, free // 10))


def _budget(allowed: int, weights_bytes: int, machine: Machine, device: torch.device) -> Budget:
    """Once the weights are where they stay: on a GPU they are charged, in host memory they are mapped."""
    if device.type == "cuda":
        return Budget(allowed, torch.cuda.memory_allocated(device), weights_bytes, streamed=False, on_gpu=True)
    return Budget(allowed, anonymous_bytes(), weights_bytes, weights_bytes > machine.ram_available_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class _Point:
    """A place a session can come back to without reading from the start."""

    streams: RestorePoint
    logits: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A whole timeline in memory: tokens, streams, last logits. Restores into any session of the same engine."""

    engine: Engine
    tokens: tuple[int, ...]
    point: RestorePoint
    rows: Mapping[tuple[int, str], Tensor]
    logits: Tensor | None


class Session:
    """One timeline of tokens with its streams."""

    def __init__(self, engine: Engine, need: Need, space: str) -> None:
        self.engine = engine
        self.need = need
        self.space = space
        self.context = need.context
        self.streams = Streams(engine.config, need.context, engine.exact, engine.device)
        self.in_flight = False
        self._tokens = array("i")
        self._logits: Tensor | None = None
        self._points: list[_Point] = []
        self._kept, self._kept_s = Kept(), time.monotonic()

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(self._tokens)

    @property
    def length(self) -> int:
        return len(self._tokens)

    @property
    def last_logits(self) -> Tensor:
        """float32 [vocab] after the last token."""
        self.ready()
        if self._logits is None:
            raise UsageError("the session holds no tokens yet; feed a prompt first")
        return self._logits

    def kv_bytes(self) -> dict[str, int]:
        """Bytes in use by component: window, csa, hca, mla, index_keys, state."""
        return self.streams.kv_bytes()

    def resume(self, ids: Sequence[int]) -> Match | None:
        """Makes the timeline the longest prefix of `ids` that the store can give back, if it is longer than the
        prefix this session can rewind to; None without a store. The rest of `ids` is the caller's to feed."""
        keeper = self._keeper
        if keeper is None:
            return None
        tokens = self._valid(ids)
        self.check_fits(len(tokens))
        match = keeper.find(tokens)
        if match.position <= self._keepable(tokens):
            return match
        self._tokens, self._points, self._logits, self.in_flight = array("i"), [], None, True
        self.streams.clear()
        match, logits = keeper.load(tokens, self.streams)
        self._tokens, self._logits, self.in_flight = array("i", tokens[: match.position]), logits, False
        self._kept = Kept(match.chain)
        if logits is not None:
            self._mark()
        return match

    def _keepable(self, tokens: Sequence[int]) -> int:
        """How far a rewind could keep this timeline: to the last restore point within the prefix it shares."""
        shared = self.shared(tokens)
        if shared == self.length and not self.in_flight:
            return shared
        return max((p.streams.length for p in self._points if p.streams.length <= shared), default=0)

    def keep(self, kind: Literal["end", "auto"] = "end") -> None:
        """Stores what is new of this timeline, with a restore point here; nothing without a store."""
        if (keep := self.keeping(kind)) is not None:
            keep()

    def keeping(self, kind: Literal["end", "auto"] = "end") -> Callable[[], None] | None:
        """`keep`, to be called in another thread while the timeline goes on from here; None if there is nothing to do.

        Those of one session are called in turn, in their order.
        """
        keeper = self._keeper
        if keeper is None or not self._tokens or self.in_flight:
            return None
        self._kept_s = time.monotonic()
        tokens, logits = self._tokens[:], self.last_logits
        state = {key: data.clone() for key, data in self.streams.live_state(self.length).items()}
        return lambda: keeper.keep(self._kept, tokens, self.streams, state, logits, kind)

    @property
    def _keeper(self) -> Keeper | None:
        return None if self.engine.keeper is None else self.engine.keeper.within(self.space)

    def is_time_to_keep(self) -> bool:
        """Often enough that little is lost, seldom enough that waiting for the disk does not show."""
        late = time.monotonic() - self._kept_s > _KEEP_EVERY_S
        return late or self.length - self._kept.length >= _KEEP_EVERY_TOKENS

    def feed(
        self, ids: Sequence[int], logits: Literal["last", "all"] = "last", progress: Progress | None = None
    ) -> Tensor:
        """Reads tokens; float32 [vocab] of the last position, or [len(ids), vocab] with logits="all"."""
        if logits not in ("last", "all"):
            raise UsageError(f"logits is {logits!r}, expected 'last' or 'all'")
        tokens = self.accept(ids, allow_empty=True)
        collected = [torch.empty(0, self.engine.config.vocab_size)]
        reports = None if progress is None else _Reports(progress)
        for start in range(0, len(tokens), self.need.chunk_tokens):
            chunk = tokens[start : start + self.need.chunk_tokens]
            tick = None if reports is None else reports.chunk(start, len(chunk))
            output = self.engine._run({self: chunk}, every=logits == "all", tick=tick)
            if logits == "all":
                collected.append(output)
            if start + len(chunk) < len(tokens) and self.is_time_to_keep():
                self.keep("auto")
            if progress is not None:
                progress(start + len(chunk))
        if len(tokens) > 1:
            self._mark()
            self.keep()
        return torch.cat(collected) if logits == "all" else self.last_logits

    def generate(self, params: SamplingParams) -> Iterator[Sampled]:
        """Samples until max_tokens, an end-of-sequence token or a full context; what it yields joins the timeline.

        The end-of-sequence token is neither yielded nor read. Stop strings are the caller's: they need text.
        """
        sampler = Sampler(params, prompt=self._tokens)
        try:
            for _ in range(min(params.max_tokens, self.context - self.length)):
                sampled = sampler.sample(self.last_logits)
                if sampled.id in self.engine.config.eos_token_id and not params.ignore_eos:
                    return
                yield sampled
                self.feed([sampled.id])
        finally:
            self.keep()

    def rewind(self, length: int) -> None:
        """Back to the first `length` tokens: the nearest restore point before, then what is missing is read again."""
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot rewind to {length:,} tokens, the session holds {self.length:,}")
        if length == self.length and not self.in_flight:
            return
        tokens = self._tokens[:length]
        self._kept.cut(length)
        self._points = [point for point in self._points if point.streams.length <= length]
        try:
            self._restore_nearest()
            missing = tokens[self.length :]
            for start in range(0, len(missing), self.need.chunk_tokens):
                self.engine._run({self: missing[start : start + self.need.chunk_tokens]}, every=False)
        except BaseException:
            # Cut short as well: the tokens are what was asked for, and the next use reads what the streams lack.
            self._tokens, self.in_flight = tokens, True
            raise

    def snapshot(self) -> Snapshot:
        """A copy of the whole timeline, in memory."""
        self.ready()
        point, rows = self.streams.restore_point(self.length), self.streams.copy_rows()
        return Snapshot(self.engine, self.tokens, point, rows, self._logits)

    def restore(self, state: Snapshot) -> None:
        """Replaces this timeline by a snapshot taken from a session of the same engine."""
        if state.engine is not self.engine:
            raise UsageError("the snapshot belongs to another engine; restore it into a session of that one")
        if len(state.tokens) > self.context:
            raise ContextTooLong(f"the snapshot holds {len(state.tokens):,} tokens, this session {self.context:,}")
        self._tokens, self._points = array("i", state.tokens), []
        self._kept, self.in_flight = Kept(), True  # until the streams have followed
        self.streams.restore_rows(state.rows)
        self.streams.restore(state.point)
        self._logits, self.in_flight = state.logits, False
        self._points = [] if state.logits is None else [_Point(state.point, state.logits)]

    def shared(self, ids: Sequence[int]) -> int:
        """How many tokens the timeline and `ids` both begin with."""
        return common_prefix(self._tokens, ids)

    def accept(self, ids: Sequence[int], allow_empty: bool = False) -> array[int]:
        """The ids as int32, if each is a token of the model and all fit the context."""
        tokens = self._valid(ids)
        if not tokens and not allow_empty:
            raise InputError("no tokens to read; give at least one")
        self.check_fits(self.length + len(tokens))
        return tokens

    def _valid(self, ids: Sequence[int]) -> array[int]:
        vocab = self.engine.config.vocab_size
        try:
            tokens = ids if isinstance(ids, array) and ids.typecode == "i" else array("i", map(index, ids))
        except TypeError:
            raise InputError(f"token ids are {str(ids)[:80]!r}, expected integers; a tokenizer makes them") from None
        except OverflowError:
            tokens = None
        if tokens is None or (tokens and not 0 <= min(tokens) <= max(tokens) < vocab):
            wrong = next(token for token in ids if not 0 <= token < vocab)
            raise InputError(f"token id {wrong} is outside the vocabulary, expected 0 to {vocab - 1}")
        return tokens

    def check_fits(self, num_tokens: int) -> None:
        """Raises ContextTooLong if the session cannot hold `num_tokens` tokens in all."""
        if num_tokens > self.context:
            most = self.engine.config.max_position_embeddings
            way_out = "shorten the text" if self.context == most else f"shorten it or allow more, up to {most:,}"
            raise ContextTooLong(f"{num_tokens:,} tokens do not fit the context of {self.context:,}; {way_out}")

    def fall_back(self) -> None:
        """After a pass that was cut short: back to the last restore point, and nothing is read again."""
        if self.in_flight:
            self._restore_nearest()
            self._kept.cut(self.length)

    def ready(self) -> None:
        """Puts right what a pass that was cut short left behind."""
        if self.in_flight:
            self.rewind(self.length)

    def advance(self, ids: array[int], logits: Tensor) -> None:
        """Takes the tokens of a finished pass into the timeline."""
        self._tokens.extend(ids)
        self._logits = logits.clone()
        self.in_flight = False
        last = self._points[-1].streams.length if self._points else 0
        if self.length - last >= _POINT_EVERY_TOKENS:
            self._mark()

    def _mark(self) -> None:
        """A restore point here; of too many, the one whose absence costs least is dropped."""
        if self._points and self._points[-1].streams.length == self.length:
            return
        self._points.append(_Point(self.streams.restore_point(self.length), self.last_logits))
        if len(self._points) > _MAX_POINTS:
            del self._points[_most_dispensable([point.streams.length for point in self._points])]

    def _restore_nearest(self) -> None:
        self.in_flight = False
        if not self._points:
            self.streams.clear()
            self._tokens, self._logits = array("i"), None
            return
        point = self._points[-1]
        self.streams.restore(point.streams)
        del self._tokens[point.streams.length :]
        self._logits = point.logits


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differ = np.asarray(one[:length]) != np.asarray(other[:length])
    return int(differ.argmax()) if differ.any() else length


class _Reports:
    """Progress within the chunks of a read, no more often than people can read.

    Layers cost unlike shares of a chunk: how the time of the chunk before went by tells where this one is.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._passed = [(0.0, 0.0), (1.0, 1.0)]  # share of the layers that was done, seconds from the chunk's start

    def chunk(self, start: int, num_tokens: int) -> Callable[[float], None]:
        """What to tell the shares of a chunk's layers that are done."""
        before, began_s = self._passed, time.monotonic()
        self._passed = [(0.0, 0.0)]
        last_s = began_s

        def tick(share: float) -> None:
            nonlocal last_s
            now_s = time.monotonic()
            if share > self._passed[-1][0]:
                self._passed.append((share, now_s - began_s))
            if now_s - last_s >= _REPORT_EVERY_S and share < 1:
                shares, seconds = zip(*before, strict=True)
                done = float(np.interp(share, shares, seconds)) / seconds[-1]
                self._progress(start + int(done * num_tokens))
                last_s = now_s

        return tick


def _most_dispensable(lengths: list[int]) -> int:
    """Index of the point whose gap, relative to how far back it lies, is smallest; the last one stays."""
    now = lengths[-1]
    gaps = [(lengths[i + 1] - (lengths[i - 1] if i else 0)) / (now - lengths[i] + 1) for i in range(len(lengths) - 1)]
    return gaps.index(min(gaps))
