"""Depth times length: which haystacks make up the grid, what was found in them, the file that lets a run go on.

A haystack holds several facts at every depth, so that one reading answers many questions. Knows needles and haystacks;
who reads them is a `Reader`'s business.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tenfold import needle
from tenfold.errors import InputError, UsageError
from tenfold.haystack import Haystack, Straw, build
from tenfold.needle import Fact
from tenfold.terminal import ReadingClock

__all__ = ["Answers", "Cell", "Grid", "Plan", "Reader", "Results", "ask"]

_LEAST_TOKENS_A_FACT = 1000
"""Facts stand no denser than that, but for one at each depth."""

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Answers:
    """What a reader said to each question, in their order. `tokens` were read, `stored` of them came from a store."""

    texts: tuple[str, ...]
    tokens: int
    stored: int
    read_s: float
    answer_s: float


class Reader(Protocol):
    """Whoever reads a haystack and answers: a model in this process, or a server."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str:
        """Another one gives other answers."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def room_for(self, length: int, facts: Sequence[Fact]) -> int:
        """Tokens of the haystack in a context of `length` tokens."""
        ...

    def ask(self, haystack: Haystack, clock: ReadingClock) -> Answers: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """One haystack of the grid: `plant` says what is hidden and how deep."""

    length: int
    number: int
    seed: int
    plant: tuple[tuple[Fact, float], ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """Facts between two depths at one length."""

    length: int
    depth: int
    asked: int
    found: int


@dataclass(frozen=True, slots=True)
class Grid:
    """`depths` equal bands of each length, `per_cell` facts in each."""

    lengths: tuple[int, ...]
    depths: int
    per_cell: int
    seed: int

    def __post_init__(self) -> None:
        for option, value, most in (("--depths", self.depths, 100), ("--per-cell", self.per_cell, 10_000)):
            if not 1 <= value <= most:
                raise UsageError(f"{option} is {value}, expected 1 to {most:,}")
        if list(self.lengths) != sorted(set(self.lengths)):
            raise UsageError(f"--lengths are {', '.join(map(str, self.lengths))}; expected each once, shortest first")

    def plans(self) -> Iterator[Plan]:
        """All haystacks, the shortest first; each is the same whatever other lengths are asked for."""
        for length in self.lengths:
            dense = min(self.per_cell, length // (_LEAST_TOKENS_A_FACT * self.depths), needle.MOST_FACTS // self.depths)
            left = self.per_cell
            for number in range(self.per_cell):
                if not left:
                    break
                count = min(left, max(1, dense))
                left -= count
                yield self._plan(length, number, count)

    def _plan(self, length: int, number: int, count: int) -> Plan:
        seed = random.Random(f"{self.seed} {length} {number}").getrandbits(32)
        depths = [(band + (i + 0.5) / count) / self.depths for band in range(self.depths) for i in range(count)]
        return Plan(length, number, seed, tuple(zip(needle.facts(seed, len(depths)), depths, strict=True)))


def ask(plan: Plan, depths: int, reader: Reader, straw: Straw, clock: ReadingClock) -> dict[str, Any]:
    """Builds one haystack, has it read and judges every answer; all of it as JSON."""
    facts = [fact for fact, _ in plan.plant]
    haystack = build(straw, reader.room_for(plan.length, facts), plan.plant, plan.seed)
    answers = reader.ask(haystack, clock)
    questions = [
        {
            "band": int(asked * depths),
            "depth": round(placed.depth, 5),
            "fact": placed.fact.sentence,
            "answer": text,
            "right": needle.is_right(placed.fact, text),
        }
        for (_, asked), placed, text in zip(plan.plant, haystack.needles, answers.texts, strict=True)
    ]
    return {
        "length": plan.length,
        "number": plan.number,
        "tokens": answers.tokens,
        "read_s": round(answers.read_s, 3),
        "answer_s": round(answers.answer_s, 3),
        "questions": questions,
    }


class Results:
    """What was found so far. With a file it is written after each haystack, and what it holds is not asked again."""

    def __init__(self, about: Mapping[str, Any], path: Path | None = None) -> None:
        self.about = {"version": _VERSION, **about}
        self.path = path
        self.haystacks: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self.haystacks = self._read(path)

    def missing(self, grid: Grid) -> list[Plan]:
        done = {(one["length"], one["number"]) for one in self.haystacks}
        return [plan for plan in grid.plans() if (plan.length, plan.number) not in done]

    def add(self, record: dict[str, Any]) -> None:
        self.haystacks.append(record)
        self.save()

    def save(self) -> None:
        """The whole file anew, in one step: a crash leaves the one before."""
        if self.path is None:
            return
        beside = self.path.with_name(self.path.name + ".new")
        found = {**self.about, "haystacks": self.haystacks}
        try:
            beside.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            os.replace(beside, self.path)
        except OSError as exc:
            raise InputError(f"{self.path} cannot be written: {exc.strerror or exc}; check the folder") from None

    def cells(self, lengths: Sequence[int]) -> list[Cell]:
        """Every cell of these lengths that was asked something."""
        counts: dict[tuple[int, int], list[int]] = {}
        for one in self.haystacks:
            for question in one["questions"]:
                count = counts.setdefault((one["length"], question["band"]), [0, 0])
                count[0] += 1
                count[1] += question["right"]
        return [Cell(*key, asked, found) for key, (asked, found) in sorted(counts.items()) if key[0] in lengths]

    def _read(self, path: Path) -> list[dict[str, Any]]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            valid = all(map(_is_record, found["haystacks"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise InputError(f"{path} does not hold results of `eval needle`; name another file, or remove it")
        differs = [name for name in self.about if found.get(name) != self.about[name]]
        if differs:
            name = differs[0]
            raise UsageError(
                f"{path} holds results with {name} {found.get(name)!r}, now it is {self.about[name]!r}; "
                "ask as before to go on, or name another file"
            )
        return list(found["haystacks"])


def _is_record(one: Mapping[str, Any]) -> bool:
    asked = all(isinstance(each["band"], int) and isinstance(each["right"], bool) for each in one["questions"])
    return asked and isinstance(one["length"], int) and isinstance(one["number"], int)
