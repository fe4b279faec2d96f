"""Text in, text out: reads a prompt into a session and turns what it samples into events.

Joins the session with the tokenizer, the chat parser and stop strings. Knows nothing of terminals and HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tenfold import chat
from tenfold.chat import Event, Parser, Profile
from tenfold.engine import Engine, Progress, Session
from tenfold.errors import CheckpointError, InputError, disk_errors
from tenfold.sampler import Sampled, SamplingParams
from tenfold.stops import StopStrings
from tenfold.tokenizer import Detokenizer, Tokenizer

__all__ = ["Completion", "Reading", "load_tokenizer", "profile_of", "read", "read_text"]


def load_tokenizer(folder: Path, engine: Engine) -> Tokenizer:
    """The tokenizer beside the weights, checked against the model's vocabulary."""
    with disk_errors(folder):
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(f"no tokenizer.json in {folder}; copy the one of the model's checkpoint there")
    return Tokenizer.load(folder, config_vocab_size=engine.config.vocab_size)


def profile_of(folder: Path, engine: Engine, override: str | None) -> Profile:
    """The chat grammar of the checkpoint, or the one named."""
    return chat.profile_for(engine.config, folder=folder, override=override)


def read_text(content: bytes, name: str) -> str:
    """The text of a file or of standard input; what is not text, or empty, is refused by name."""
    if not content.strip():
        raise InputError(f"{name} is empty, expected text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise InputError(
            f"{name} is not UTF-8 text (byte {content[exc.start]:#04x} at offset {exc.start:,}); "
            "convert it to text first"
        ) from None
    if "\0" in text:
        raise InputError(f"{name} holds NUL bytes, so it is not text; convert it to text first")
    return text


@dataclass(frozen=True, slots=True)
class Reading:
    """Where a prompt came from: of its tokens `kept` were in the session already, `stored` came from the store.

    `reason` says why the stored prefix went no further, where there is a store and not all came from it.
    """

    kept: int
    stored: int
    reason: str = ""

    @property
    def reused(self) -> int:
        return max(self.kept, self.stored)


def read(
    session: Session, ids: Sequence[int], progress: Progress | None = None, begin: Progress | None = None
) -> Reading:
    """Makes the session's timeline `ids`; what the session or the store has of it is not read again.

    `begin` is told how many tokens these are before the first of the others is read.
    """
    match = session.resume(ids)
    shared = session.shared(ids)
    stored = shared if match is not None and match.position == shared == session.length else 0
    session.rewind(shared)
    if begin is not None:
        begin(shared)
    session.feed(ids[shared:], progress=None if progress is None else lambda done: progress(shared + done))
    return Reading(0 if stored else shared, stored, "" if match is None else match.reason)


class Completion:
    """Samples from a session; iterate for events, then look at `finish_reason`, `sampled` and `matched_stop`."""

    def __init__(self, session: Session, tokenizer: Tokenizer, parser: Parser, params: SamplingParams) -> None:
        params.check_vocabulary(session.engine.config.vocab_size)
        self.session, self.tokenizer, self.parser, self.params = session, tokenizer, parser, params
        self.sampled: list[Sampled] = []
        self.matched_stop: str | None = None
        self.finish_reason: Literal["stop", "length"] | None = None

    def __iter__(self) -> Iterator[Event]:
        detokenizer, stops = Detokenizer(self.tokenizer), StopStrings(self.params.stop)
        for sampled in self.session.generate(self.params):
            self.sampled.append(sampled)
            yield from self.parser.push(stops.push(detokenizer.push(sampled.id)))
            if stops.matched is not None:
                break
        else:
            yield from self.parser.push(stops.push(detokenizer.finish()) + stops.finish())
        yield from self.parser.finish()
        self.matched_stop = stops.matched
        self.finish_reason = "length" if stops.matched is None and self._ran_out() else "stop"

    def _ran_out(self) -> bool:
        return len(self.sampled) >= self.params.max_tokens or self.session.length >= self.session.context
