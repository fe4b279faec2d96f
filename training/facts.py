"""Training text with facts planted in it and questions behind it. Knows nothing of networks.

One lesson is a run of real text in which some paragraphs or sentences are facts (`tenfold.needle`), and behind it
questions about some of them with their answers. Positions may leap where a tile of 128 tokens begins, as if a long text
had been left out there, so that a lesson of a thousand tokens shows the network all positions up to a million.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tenfold import needle
from tenfold.needle import Fact
from training.bpe import END_ID, TOKENIZER_DIR

__all__ = ["LONGEST", "TILE", "Lesson", "Lessons", "Teacher"]

TILE = 128
LONGEST = 1 << 20  # positions
DIGITS = 4

Ids = npt.NDArray[np.int64]


@dataclass(slots=True)
class Lesson:
    """One sequence. `asked[i]` predicts a digit of an answer, which token `told[i]` of the text holds."""

    ids: list[int] = field(default_factory=list)
    is_text: list[bool] = field(default_factory=list)  # which targets are text, not facts or questions
    asked: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    may_leap: list[int] = field(default_factory=list)  # tiles that do not cut a fact or the questions

    def add(self, ids: Iterable[int], is_text: bool) -> None:
        before = len(self.ids)
        self.ids.extend(ids)
        self.is_text.extend([is_text] * (len(self.ids) - before))


@dataclass(frozen=True, slots=True)
class Lessons:
    """A batch: ids int64 [n, length + 1], positions int64 [n, length], what is asked as flat indices of tokens."""

    ids: Tensor
    positions: Tensor
    is_text: Tensor
    asked: Tensor
    told: Tensor


class Teacher:
    """Lessons without end; the same seed and step give the same ones."""

    def __init__(self, work: Path, seed: int, folder: Path = TOKENIZER_DIR) -> None:
        self.tokens = np.load(work / "train.npy").astype(np.int64)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.seed = seed
        vocabulary = self.tokenizer.get_vocab_size()
        spelled = [self.tokenizer.decode([i]) for i in range(vocabulary)]
        self.ends_paragraph = np.array([text.endswith("\n\n") for text in spelled])
        self.ends_sentence = np.array([text == "." for text in spelled])
        self.digits = {i for i, text in enumerate(spelled) if len(text) == 1 and text.isdigit()}
        (self.paragraph_end,) = self._encode(".\n\n")

    def batch(
        self, step: int, count: int, length: int, *, facts: tuple[int, int], span: int = LONGEST, far: float = 0.0
    ) -> Lessons:
        """`count` lessons of `length` tokens, each with a number of facts in `facts`; positions end before `span`, and
        those of a share `far` of the lessons beyond a quarter of it."""
        rng = np.random.default_rng([self.seed, step])
        numbers = [int(rng.integers(facts[0], facts[1] + 1)) for _ in range(count)]
        known = needle.facts(int(rng.integers(1 << 40)), sum(numbers))
        lessons = []
        for number in numbers:
            mine, known = known[:number], known[number:]
            lessons.append(self._lesson(rng, mine, length))
        positions = np.stack([_positions(rng, lesson, length, span, far) for lesson in lessons])
        base = np.arange(count) * length

        def flat(lists: list[list[int]]) -> Tensor:
            parts = [np.array(part, dtype=np.int64) + start for part, start in zip(lists, base, strict=True)]
            return torch.from_numpy(np.concatenate(parts))

        return Lessons(
            torch.tensor([lesson.ids for lesson in lessons]),
            torch.from_numpy(positions),
            torch.tensor([lesson.is_text[1:] for lesson in lessons]),
            flat([lesson.asked for lesson in lessons]),
            flat([lesson.told for lesson in lessons]),
        )

    def _lesson(self, rng: np.random.Generator, facts: list[Fact], length: int) -> Lesson:
        asked = [facts[i] for i in rng.permutation(len(facts))[: self._room(length)]]
        questions = [self._encode(fact.question + fact.answer) for fact in asked]
        lesson, where = self._haystack(rng, facts, length + 1 - sum(map(len, questions)))
        for fact, ids in zip(asked, questions, strict=True):
            start = len(lesson.ids)
            lesson.add(ids, False)
            places = [start + place for place, token in enumerate(ids) if token in self.digits]
            assert len(places) == DIGITS
            lesson.asked += [place - 1 for place in places]
            lesson.told += where[fact]
        return lesson

    def _room(self, length: int) -> int:
        """How many questions: less than half of a lesson, two dozen at most."""
        return max(1, min(24, length // 51))

    def _haystack(self, rng: np.random.Generator, facts: list[Fact], room: int) -> tuple[Lesson, dict[Fact, list[int]]]:
        """Exactly `room` tokens of text with all facts; and where the digits of each are."""
        lesson, where = Lesson(), {}
        start = int(rng.integers(len(self.tokens) - room - 1))
        text = self.tokens[start : start + room].copy()
        text[0] = END_ID
        # what the facts need falls off the end of the text
        sizes = 18 * len(facts)
        usable = max(room - sizes, 1)
        gaps = np.flatnonzero((self.ends_paragraph | self.ends_sentence)[text[: usable - 1]]) + 1
        spots = sorted(rng.choice(gaps if len(gaps) else np.array([1]), len(facts), replace=True).tolist())
        at = 0
        for spot, fact in zip(spots, facts, strict=True):
            lesson.add(text[at:spot].tolist(), True)
            at = spot
            within = not self.ends_paragraph[lesson.ids[-1]]
            ids = self._encode(" " + fact.sentence if within else fact.sentence + "\n\n")
            first = len(lesson.ids)
            lesson.add(ids, False)
            where[fact] = [first + place for place, token in enumerate(ids) if token in self.digits]
        lesson.add(text[at : at + room - len(lesson.ids)].tolist(), True)
        lesson.ids[-1] = self.paragraph_end
        assert len(lesson.ids) == room, (len(lesson.ids), room)
        whole = np.ones(room + TILE, dtype=bool)
        for places in where.values():
            whole[places[0] - 12 : places[-1] + 1] = False
        lesson.may_leap = [tile for tile in range(TILE, room, TILE) if whole[tile]]
        return lesson, where

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _positions(rng: np.random.Generator, lesson: Lesson, length: int, span: int, far: float) -> Ids:
    """Increasing positions below `span`: leaps of whole tiles, of all sizes alike by their logarithm; in a share `far`
    of the lessons a quarter of `span` at least."""
    steps = np.ones(length, dtype=np.int64)
    steps[0] = 0
    leaps = [tile for tile in lesson.may_leap if rng.random() < 0.7]
    reach = span // TILE - length // TILE
    if leaps and reach > 0 and rng.random() < 0.8:
        total = int(np.exp(rng.uniform(0.0, np.log(reach))))
        if far and rng.random() < far:
            total = int(rng.uniform(0.25, 1.0) * reach)
        shares = rng.dirichlet(np.full(len(leaps) + 1, 0.5))[: len(leaps)]
        steps[leaps] += TILE * (shares * total).astype(np.int64)
    found: Ids = np.cumsum(steps)
    return found
