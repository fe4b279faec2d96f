"""One conversation at the terminal: an engine with its store, a session, the tokenizer and the chat grammar.

What `tenfold run` and `tenfold chat` share. Knows nothing of their options.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from tenfold import completion, terminal, views
from tenfold import config as configuration
from tenfold.budget import Need
from tenfold.chat import Parser, Profile, message_of, render_ids
from tenfold.completion import Completion, Reading
from tenfold.engine import Engine, Session, checked_numerics, parse_bytes
from tenfold.errors import StoreError, UsageError
from tenfold.sampler import SamplingParams
from tenfold.store import Store, default_folder
from tenfold.terminal import ReadingClock
from tenfold.tokenizer import Tokenizer

__all__ = ["Talk", "open_store", "open_talk"]


def open_store(folder: Path | None, nowhere: bool, limit: str | None) -> Store | None:
    """The store; None if nothing is to be kept, or with a warning where the default folder cannot be used."""
    if nowhere:
        if folder is not None or limit is not None:
            raise UsageError("--no-store keeps nothing; leave --store and --store-limit away")
        return None
    limit_bytes = None if limit is None else parse_bytes(limit, "--store-limit")
    try:
        return Store(folder or default_folder(), limit_bytes, warn=terminal.warn)
    except StoreError as exc:
        if folder is not None:
            raise
        terminal.warn(f"nothing is kept on disk: {exc}")
        return None


def open_talk(
    model: str,
    backend: str,
    numerics: str,
    memory: str | None,
    threads: int | None,
    context: int | None,
    profile: str | None,
    store: Store | None,
) -> Talk:
    """A conversation with `model`, for up to `context` tokens (None: as many as it turns out to need, or may have)."""
    engine = Engine.load(model, backend, checked_numerics(numerics), memory, store, threads=threads)
    folder = configuration.locate(model)
    tokenizer = completion.load_tokenizer(folder, engine)
    return Talk(engine, context, tokenizer, completion.profile_of(folder, engine, profile))


class Talk:
    """Reads prompts into one session and samples answers."""

    def __init__(self, engine: Engine, context: int | None, tokenizer: Tokenizer, profile: Profile) -> None:
        self.engine, self.context, self.tokenizer, self.profile = engine, context, tokenizer, profile
        self.message: dict[str, Any] = {}
        self.decode_s = 0.0
        self.reading = Reading(0, 0)
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        if self._session is None:
            self._session = self.engine.session(self.context)
        return self._session

    @property
    def weights_told(self) -> str | None:
        """Where the weights lie, if a GPU computes."""
        placement = self.engine.placement
        return None if placement is None else placement.told(self.engine.config)

    def plan(self, num_prompt_tokens: int, max_tokens: int) -> Need:
        """The memory a prompt and its answer take; a context that was not given becomes just large enough.

        Raises ContextTooLong and DoesNotFit.
        """
        if self.context is None:
            most = self.engine.config.max_position_embeddings
            self.context = min(num_prompt_tokens + max_tokens, most)
        self.session.check_fits(num_prompt_tokens)
        return self.session.need

    def render(self, messages: list[dict[str, Any]], *, thinking: bool | None, effort: str | None) -> array[int]:
        return array("i", render_ids(messages, self.profile, self.tokenizer, thinking=thinking, effort=effort))

    def read(self, ids: array[int]) -> ReadingClock:
        """Brings the session to `ids`, with a progress bar."""
        self.session.check_fits(len(ids))
        with terminal.reading(len(ids)) as clock:
            clock.weigh(self.engine.reading_cost())
            self.reading = completion.read(self.session, ids, clock.advance, clock.begin)
        return clock

    def complete(self, params: SamplingParams, thinking: bool | None, *, show: bool) -> Completion:
        """Samples an answer; with `show`, prints it as it comes."""
        found = Completion(self.session, self.tokenizer, Parser(self.profile, thinking), params)
        began = time.monotonic()
        events = []
        for event in found:
            events.append(event)
            if show:
                views.show_event(event)
        if show:
            typer.echo()
        self.decode_s = time.monotonic() - began
        self.message = message_of(events)
        return found

    def report(self, found: Completion, clock: ReadingClock, num_prompt_tokens: int) -> dict[str, Any]:
        """All that `--json` tells of one answer."""
        tokens = len(found.sampled)
        return {
            "message": self.message,
            "finish_reason": found.finish_reason,
            "stop": found.matched_stop,
            "prompt_tokens": num_prompt_tokens,
            "reused_tokens": self.reading.reused,
            "stored_tokens": self.reading.stored,
            "prefix_ends": self.reading.reason,
            "completion_tokens": tokens,
            "logprobs": None if found.params.logprobs is None else [asdict(one) for one in found.sampled],
            "prefill_s": round(clock.elapsed_s, 3),
            "prefill_tps": round(clock.tokens_per_s, 2),
            "decode_s": round(self.decode_s, 3),
            "decode_tps": round(tokens / self.decode_s, 2) if self.decode_s else 0.0,
            "kv_bytes": self.session.kv_bytes(),
            "memory_plan": asdict(self.session.need),
            "backend": self.engine.backend,
            "numerics": "exact" if self.engine.exact else "deployed",
            "profile": str(self.profile),
        }
