"""Haystacks: real text of exactly so many tokens with facts planted in it, the same ones for the same seed.

Paragraphs are tokenised once; a haystack of a million tokens is put together from their ids. Knows text and ids,
nothing of models.
"""

from __future__ import annotations

import random
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import accumulate, chain

from tenfold.errors import InputError, UsageError
from tenfold.needle import Fact

__all__ = ["Haystack", "Needle", "Straw", "build", "embedded_document", "evenly"]

BLANK_LINE = "\n\n"
_MOST_CHARACTERS = 4000
"""A paragraph that is longer is taken for several, so that facts can be planted within it."""


def embedded_document() -> str:
    """Twelve chapters of the SQLite documentation (public domain), none of them part of the training text."""
    return resources.files("tenfold").joinpath("demo", "document.txt").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Needle:
    """A planted fact: its sentence begins behind `position` tokens of the haystack, `depth` of the whole."""

    fact: Fact
    position: int
    depth: float


@dataclass(frozen=True, slots=True)
class Haystack:
    """Ids of the whole text, which ends with a blank line, and what is hidden in it, in the order it was asked for."""

    ids: array[int]
    needles: tuple[Needle, ...]


class Straw:
    """A text to hide facts in: its paragraphs as ids, each with the blank line behind it."""

    def __init__(self, text: str, encode: Callable[[str], list[int]]) -> None:
        self.encode = encode
        self._paragraphs = [encode(paragraph + BLANK_LINE) for paragraph in _paragraphs(text)]
        if not self._paragraphs:
            raise InputError("the text to hide facts in is empty; give one with words")

    def pieces(self, num_tokens: int, seed: int) -> list[list[int]]:
        """Paragraphs of `num_tokens` tokens in all: the text from a paragraph on that `seed` chooses, then all of its
        paragraphs shuffled, as often as it takes. What is too much is cut from the beginning, so every end is one."""
        rng = random.Random(f"haystack {seed}")
        first = rng.randrange(len(self._paragraphs))
        order = [*range(first, len(self._paragraphs)), *range(first)]
        found: list[list[int]] = []
        missing = num_tokens
        while missing > 0:
            for number in order:
                found.append(self._paragraphs[number])
                missing -= len(found[-1])
                if missing <= 0:
                    break
            rng.shuffle(order)
        return _without_first(found, -missing)


def evenly(count: int) -> list[float]:
    """Depths of `count` facts, each in the middle of its share of the text."""
    return [(i + 0.5) / count for i in range(count)]


def build(straw: Straw, num_tokens: int, plant: Sequence[tuple[Fact, float]], seed: int) -> Haystack:
    """`num_tokens` tokens of straw and facts, each of these a paragraph of its own at the end of the paragraph nearest
    to its depth, 0 (the beginning) to 1 (the end).

    Raises:
        UsageError: the facts would be more than half of the text.
    """
    sentences = [straw.encode(fact.sentence + BLANK_LINE) for fact, _ in plant]
    planted = sum(map(len, sentences))
    if 2 * planted > num_tokens:
        raise UsageError(
            f"{len(plant)} needles are {planted:,} tokens, expected at most half of the haystack's {num_tokens:,}; "
            "hide fewer, or allow more tokens"
        )
    pieces = straw.pieces(num_tokens - planted, seed)
    ends = [0, *accumulate(map(len, pieces))]
    at_end: list[list[int]] = [[] for _ in ends]  # numbers of the facts planted at each end of a paragraph
    for number, (_, depth) in sorted(enumerate(plant), key=lambda item: item[1][1]):
        at_end[_nearest(ends, depth * ends[-1])].append(number)
    ids = array("i")
    positions = [0] * len(plant)
    for piece, numbers in zip(chain([[]], pieces), at_end, strict=True):
        ids.extend(piece)
        for number in numbers:
            positions[number] = len(ids)
            ids.extend(sentences[number])
    needles = (
        Needle(fact, position, position / num_tokens) for (fact, _), position in zip(plant, positions, strict=True)
    )
    return Haystack(ids, tuple(needles))


def _paragraphs(text: str) -> list[str]:
    lines = text.replace("\r\n", "\n").split("\n")
    parts = re.split(r"\n\n+", "\n".join(line if line.strip() else "" for line in lines).strip("\n"))
    return [part[start : start + _MOST_CHARACTERS] for part in parts for start in range(0, len(part), _MOST_CHARACTERS)]


def _without_first(pieces: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The pieces without their first `num_tokens` tokens."""
    gone = 0
    while num_tokens and num_tokens >= len(pieces[gone]):
        num_tokens -= len(pieces[gone])
        gone += 1
    return [pieces[gone][num_tokens:], *pieces[gone + 1 :]] if gone < len(pieces) else []


def _nearest(ends: Sequence[int], target: float) -> int:
    """Index of the end that is nearest to `target`; the earlier one of two."""
    after = min(bisect_left(ends, target), len(ends) - 1)
    if after and target - ends[after - 1] <= ends[after] - target:
        return after - 1
    return after
