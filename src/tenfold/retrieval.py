"""A model reads a haystack once and answers every question from there: ask, rewind, ask the next.

Knows sessions, prompts and needles; nothing of grids, tables and files.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tenfold import completion
from tenfold import config as configuration
from tenfold.chat import Parser, Profile, compose
from tenfold.chat_v32 import BOS
from tenfold.completion import Completion
from tenfold.engine import Engine, Session, checked_numerics
from tenfold.errors import ContextTooLong
from tenfold.haystack import Haystack
from tenfold.keeping import timeline_of
from tenfold.needle import ANSWER_TOKENS, Fact
from tenfold.needle_grid import Answers
from tenfold.sampler import SamplingParams
from tenfold.store import Store
from tenfold.terminal import ReadingClock
from tenfold.tokenizer import Prompt, Tokenizer
from tenfold.weights import open_weights

__all__ = ["SessionReader", "around", "open_reader"]

_CHAT_ANSWER_TOKENS = 64
"""A chat model may wrap the answer in a sentence."""


def open_reader(
    model: str,
    backend: str = "auto",
    numerics: str = "deployed",
    memory: str | None = None,
    threads: int | None = None,
    store: Store | None = None,
) -> SessionReader:
    """A checkpoint folder or an embedded model, ready to read."""
    engine = Engine.load(model, backend, checked_numerics(numerics), memory, store, threads=threads)
    folder = configuration.locate(model)
    tokenizer = completion.load_tokenizer(folder, engine)
    return SessionReader(engine, tokenizer, completion.profile_of(folder, engine, None), folder)


class SessionReader:
    """Reads with an engine of this process. After `ask`, `session` holds the haystack alone."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, profile: Profile, folder: Path) -> None:
        self.engine, self.tokenizer, self.profile, self.folder = engine, tokenizer, profile, folder
        self.encode = tokenizer.encode
        self._answer_tokens = ANSWER_TOKENS if profile is Profile.PLAIN else _CHAT_ANSWER_TOKENS
        self._head, _ = around("?", profile, tokenizer)
        self._session: Session | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def identity(self) -> str:
        """A digest of config, weights and numerics."""
        config = self.engine.config
        return timeline_of(self.folder, config, open_weights(self.folder, config), self.engine.exact).digest[:16]

    @property
    def session(self) -> Session:
        assert self._session is not None
        return self._session

    def room_for(self, length: int, facts: Sequence[Fact]) -> int:
        """What is left of `length` tokens behind the prompt's beginning; of the model's whole context, also before the
        longest question and its answer.

        Raises:
            ContextTooLong: more than the model holds.
        """
        most = self.engine.config.max_position_embeddings
        if length > most:
            raise ContextTooLong(f"{length:,} tokens do not fit the context of {self.name}, {most:,}; ask for less")
        return min(length, most - self._room_to_answer(facts)) - len(self._head)

    def prompt(self, haystack: Haystack) -> array[int]:
        """What is read before any question: the prompt's beginning and the whole text."""
        return array("i", self._head) + haystack.ids

    def ask(self, haystack: Haystack, clock: ReadingClock) -> Answers:
        """Reads it, or takes from the store what that has of it, and answers what every needle asks."""
        facts = [needle.fact for needle in haystack.needles]
        ids = self.prompt(haystack)
        self._session = None  # the one before is gone before there is another
        self._session = session = self.engine.session(len(ids) + self._room_to_answer(facts))
        began = time.monotonic()
        clock.weigh(self.engine.reading_cost())
        reading = completion.read(session, ids, clock.advance, clock.begin)
        read = time.monotonic()
        with _forgetting(self.engine):
            texts = tuple(self._answer(session, fact) for fact in facts)
        return Answers(texts, len(ids), reading.stored, read - began, time.monotonic() - read)

    def _answer(self, session: Session, fact: Fact) -> str:
        length = session.length
        session.feed(self._tail(fact))
        plain = self.profile is Profile.PLAIN
        params = SamplingParams(temperature=0, max_tokens=self._answer_tokens, stop=("\n",) if plain else ())
        events = list(Completion(session, self.tokenizer, Parser(self.profile, thinking=False), params))
        session.rewind(length)
        return "".join(event.text for event in events if event.kind == "content").strip()

    def _tail(self, fact: Fact) -> list[int]:
        return around(fact.question, self.profile, self.tokenizer)[1]

    def _room_to_answer(self, facts: Sequence[Fact]) -> int:
        questions = [len(self._tail(fact)) for fact in facts]
        return max(questions, default=0) + self._answer_tokens


def around(question: str, profile: Profile, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of what the chat grammar puts before a user's message, and of a question at its end with what follows."""
    whole = compose([{"role": "user", "content": question}], profile, thinking=False)
    at = whole.text.index(question)
    before = tuple((start, stop) for start, stop in whole.control_ranges if stop <= at)
    behind = tuple((start - at, stop - at) for start, stop in whole.control_ranges if start >= at)
    head = tokenizer.encode_prompt(Prompt(whole.text[:at], before))
    bos = tokenizer.token_to_id(BOS) if profile is Profile.PLAIN else None
    return head if bos is None else [bos, *head], tokenizer.encode_prompt(Prompt(whole.text[at:], behind))


@contextmanager
def _forgetting(engine: Engine) -> Iterator[None]:
    """Nothing that is read in the block goes to the store: a question is no context to come back to."""
    keeper, engine.keeper = engine.keeper, None
    try:
        yield
    finally:
        engine.keeper = keeper
