"""The needles: repeatable, different things, questions that name them, judging."""

from __future__ import annotations

import pytest

from tenfold import needle
from tenfold.errors import UsageError


def test_the_same_seed_gives_the_same_facts_and_another_seed_others() -> None:
    assert needle.facts(3, 50) == needle.facts(3, 50)
    assert needle.facts(3, 50) != needle.facts(4, 50)
    assert needle.facts(3, 20) == needle.facts(3, 20)


def test_no_two_facts_are_about_the_same_thing() -> None:
    found = needle.facts(0, needle.MOST_FACTS)
    assert len({(fact.attribute, fact.place) for fact in found}) == needle.MOST_FACTS
    assert all(len(fact.value) == 4 and fact.value.isdigit() for fact in found)


def test_sentence_question_and_answer_speak_of_the_fact() -> None:
    fact = needle.Fact("access code", "east hall", "4817")
    assert fact.sentence == "The access code of the east hall is 4817."
    assert fact.question == "Q: What is the access code of the east hall?\nA:"
    assert fact.value not in fact.question
    assert needle.is_right(fact, fact.answer)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("4817", True), (" It is 4817, I think.", True), ("48175", False), ("4871 or 4817", False), ("", False)],
)
def test_the_first_number_of_an_answer_counts(answer: str, right: bool) -> None:
    assert needle.is_right(needle.Fact("key number", "old mill", "4817"), answer) is right


def test_too_many_facts_are_refused() -> None:
    with pytest.raises(UsageError, match="expected 0 to 8192"):
        needle.facts(0, needle.MOST_FACTS + 1)
