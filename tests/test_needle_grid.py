"""The grid: how many facts where, judged answers, results that a second start goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tenfold import needle
from tenfold.errors import InputError, UsageError
from tenfold.haystack import Haystack, Straw
from tenfold.needle_grid import Answers, Grid, Reader, Results, ask
from tenfold.terminal import ReadingClock

ABOUT = {"model": "scripted", "identity": "1", "depths": 4, "per_cell": 3, "seed": 0}


class Scripted:
    """Reads every character as a token and answers from the text, but not what lies before `blind` of it."""

    name = identity = "scripted"

    def __init__(self, blind: float = 0.0) -> None:
        self.blind, self.read = blind, 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def room_for(self, length: int, facts: Any) -> int:
        return length

    def ask(self, haystack: Haystack, clock: ReadingClock) -> Answers:
        self.read += 1
        text = "".join(map(chr, haystack.ids))[int(self.blind * len(haystack.ids)) :]
        known = (needle.fact for needle in haystack.needles)
        texts = tuple(fact.value if fact.sentence in text else "0000" for fact in known)
        return Answers(texts, len(haystack.ids), 0, 1.0, 0.5)


def straw(reader: Reader) -> Straw:
    return Straw("\n\n".join(f"Paragraph {i} says little." for i in range(100)), reader.encode)


def run(grid: Grid, results: Results, reader: Reader, most: int | None = None) -> None:
    for plan in results.missing(grid)[:most]:
        results.add(ask(plan, grid.depths, reader, straw(reader), ReadingClock(plan.length)))


@pytest.mark.parametrize(
    ("length", "depths", "per_cell", "haystacks"),
    [(1024, 10, 10, 10), (20_000, 10, 10, 5), (30_000, 10, 10, 4), (1_048_576, 10, 100, 1), (1_048_576, 100, 100, 10)],
)
def test_every_cell_gets_its_facts_in_as_few_haystacks_as_are_not_crowded(
    length: int, depths: int, per_cell: int, haystacks: int
) -> None:
    plans = list(Grid((length,), depths, per_cell, 0).plans())
    assert len(plans) == haystacks
    counts = [sum(int(depth * depths) == band for plan in plans for _, depth in plan.plant) for band in range(depths)]
    assert counts == [per_cell] * depths
    assert all(len(plan.plant) <= max(depths, length // 1000) for plan in plans)


def test_a_haystack_is_the_same_whatever_else_is_asked() -> None:
    alone = list(Grid((4096,), 4, 3, 7).plans())
    among = [plan for plan in Grid((1024, 4096, 9000), 4, 3, 7).plans() if plan.length == 4096]
    assert alone == among
    assert alone != list(Grid((4096,), 4, 3, 8).plans())
    assert len({plan.seed for plan in alone}) == len(alone)


def test_answers_are_judged_where_they_lie(tmp_path: Path) -> None:
    grid = Grid((2048, 8192), 4, 3, 0)
    results = Results(ABOUT)
    run(grid, results, Scripted(blind=0.5))
    cells = results.cells(grid.lengths)
    assert [(cell.length, cell.depth) for cell in cells] == [(n, d) for n in (2048, 8192) for d in range(4)]
    assert all(cell.asked == 3 for cell in cells)
    assert [cell.found for cell in cells] == [0, 0, 3, 3] * 2
    assert {cell.length for cell in results.cells([8192])} == {8192}


def test_a_second_start_goes_on(tmp_path: Path) -> None:
    grid, path = Grid((2048, 4096), 4, 3, 0), tmp_path / "found.json"
    first, second = Scripted(), Scripted()
    run(grid, Results(ABOUT, path), first, most=2)
    results = Results(ABOUT, path)
    run(grid, results, second)
    assert (first.read, second.read) == (2, 4)
    whole = Results(ABOUT)
    run(grid, whole, Scripted())
    assert results.haystacks == whole.haystacks == json.loads(path.read_text("utf-8"))["haystacks"]
    longer = Grid((2048, 4096, 9000), 4, 3, 0)
    assert {plan.length for plan in Results(ABOUT, path).missing(longer)} == {9000}
    assert sorted(tmp_path.iterdir()) == [path]


def test_other_questions_do_not_go_on(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    Results(ABOUT, path).save()
    with pytest.raises(UsageError, match=r"holds results with seed 0, now it is 1"):
        Results({**ABOUT, "seed": 1}, path)
    with pytest.raises(UsageError, match="identity"):
        Results({**ABOUT, "identity": "2"}, path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"haystacks": 3}', '{"haystacks": [{"length": 1}]}', '{"a"'])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "found.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="does not hold results"):
        Results(ABOUT, path)
    assert path.read_text(encoding="utf-8") == content


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        Results(ABOUT, tmp_path / "absent" / "found.json").save()


def test_impossible_grids_are_refused() -> None:
    for lengths, depths, per_cell, said in (
        ((1024,), 0, 1, "--depths is 0"),
        ((1024,), 4, 0, "--per-cell is 0"),
        ((2048, 1024), 4, 1, "shortest first"),
        ((1024, 1024), 4, 1, "each once"),
    ):
        with pytest.raises(UsageError, match=said):
            Grid(lengths, depths, per_cell, 0)
    plan = next(Grid((128,), 10, 1, 0).plans())
    with pytest.raises(UsageError, match="allow more tokens"):
        ask(plan, 10, Scripted(), straw(Scripted()), ReadingClock(128))


def test_the_codes_are_judged_as_needles_are() -> None:
    plan = next(Grid((2048,), 4, 1, 0).plans())
    record = ask(plan, 4, Scripted(), straw(Scripted()), ReadingClock(2048))
    assert record["tokens"] == 2048
    for question, (fact, _) in zip(record["questions"], plan.plant, strict=True):
        assert question["fact"] == fact.sentence
        assert question["right"] is needle.is_right(fact, question["answer"]) is True
