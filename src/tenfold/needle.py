"""Needles: facts made from a seed, the sentences that plant them, the questions, how an answer is judged.

The embedded models were trained on this form and these words (training/facts.py); other models answer it too.
Knows nothing of models, tokenizers and haystacks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tenfold.errors import UsageError

__all__ = ["ANSWER_TOKENS", "ATTRIBUTES", "FIRST_WORDS", "MOST_FACTS", "SECOND_WORDS", "Fact", "facts", "is_right"]

ANSWER_TOKENS = 8  # enough for any answer: a space, digits, the end of the sentence

# Each word one token of the embedded tokenizer, so that a fact looks the same wherever it stands.
ATTRIBUTES = (
    "access code", "lock code", "key number", "file number", "order number", "record number", "part number",
    "version number",
)  # fmt: skip
FIRST_WORDS = (
    "old", "new", "small", "large", "main", "second", "first", "last", "left", "right", "long", "open", "local",
    "global", "shared", "simple", "single", "normal", "original", "primary", "internal", "virtual", "current",
    "previous", "next", "standard", "special", "regular", "empty", "common", "default", "top",
)  # fmt: skip
SECOND_WORDS = (
    "library", "server", "table", "path", "point", "group", "port", "page", "field", "project", "system", "section",
    "script", "socket", "session", "space", "stack", "database", "directory", "client", "cache", "buffer", "package",
    "module", "frame", "link", "model", "program", "source", "target", "tool", "view",
)  # fmt: skip
MOST_FACTS = len(ATTRIBUTES) * len(FIRST_WORDS) * len(SECOND_WORDS)

# Pairs of digits the embedded tokenizer may write as one token; a code without them is written digit by digit.
_JOINED = re.compile("00|10|12|16|20|32|64")


@dataclass(frozen=True, slots=True)
class Fact:
    """One needle: the `attribute` of a `place` is `value`, four digits."""

    attribute: str
    place: str
    value: str

    @property
    def sentence(self) -> str:
        """What is planted: a paragraph or a sentence of its own."""
        return f"The {self.attribute} of the {self.place} is {self.value}."

    @property
    def question(self) -> str:
        """What follows the haystack after a blank line; a model of plain text goes on with a space and the answer."""
        return f"Q: What is the {self.attribute} of the {self.place}?\nA:"

    @property
    def answer(self) -> str:
        """How the answer reads in the training text, directly behind the question."""
        return f" {self.value}.\n"


def facts(seed: int, count: int) -> list[Fact]:
    """`count` facts about different things, the same for the same seed.

    Places and attributes repeat among them (one place has several attributes), pairs of both never do.

    Raises:
        UsageError: more facts than there are different things.
    """
    if not 0 <= count <= MOST_FACTS:
        raise UsageError(f"{count} facts were asked for, expected 0 to {MOST_FACTS}: ask for fewer, or use two seeds")
    rng = random.Random(f"needle {seed}")
    values = _codes(rng)
    return [_fact(number, next(values)) for number in rng.sample(range(MOST_FACTS), count)]


def is_right(fact: Fact, answer: str) -> bool:
    """Whether the first number in `answer` is the fact's value, however the answer words it."""
    found = re.search(r"\d+", answer)
    return found is not None and found[0] == fact.value


def _fact(number: int, value: str) -> Fact:
    number, second = divmod(number, len(SECOND_WORDS))
    attribute, first = divmod(number, len(FIRST_WORDS))
    return Fact(ATTRIBUTES[attribute], f"{FIRST_WORDS[first]} {SECOND_WORDS[second]}", value)


def _codes(rng: random.Random) -> Iterator[str]:
    while True:
        code = str(rng.randrange(1000, 10000))
        if not _JOINED.search(code):
            yield code
