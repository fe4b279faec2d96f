"""Haystacks: exact lengths, the same for the same seed, facts where they were asked for."""

from __future__ import annotations

import time

import pytest

from tenfold import config, haystack, needle
from tenfold.errors import InputError, UsageError
from tenfold.haystack import Straw, build, evenly
from tenfold.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(config.locate("tiny-v4-flash"))
DOCUMENT = Straw(haystack.embedded_document(), TOKENIZER.encode)


def planted(count: int, seed: int = 0) -> list[tuple[needle.Fact, float]]:
    return list(zip(needle.facts(seed, count), evenly(count), strict=True))


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 127, 128, 129, 1000, 49_837, 49_839, 131_072])
def test_a_haystack_has_exactly_so_many_tokens(num_tokens: int) -> None:
    found = build(DOCUMENT, num_tokens, planted(min(5, num_tokens // 64)), seed=num_tokens)
    assert len(found.ids) == num_tokens


@pytest.mark.parametrize("num_tokens", [5000, 120_001])
def test_its_ids_are_those_of_its_text(num_tokens: int) -> None:
    """Put together from paragraphs, it is what the tokenizer would make of the whole."""
    found = build(DOCUMENT, num_tokens, planted(7), seed=3)
    text = TOKENIZER.decode(found.ids)
    begin = text.index("\n\n") + 2  # the first paragraph may be cut within a word
    assert TOKENIZER.encode(text[begin:]) == found.ids[-len(TOKENIZER.encode(text[begin:])) :].tolist()
    assert text.endswith("\n\n")


def test_the_same_seed_gives_the_same_ids_and_another_seed_others() -> None:
    one, same, other = (build(DOCUMENT, 70_000, planted(4), seed).ids for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_facts_stand_where_they_were_asked_for() -> None:
    found = build(DOCUMENT, 60_000, planted(8), seed=5)
    for asked, placed in zip(evenly(8), found.needles, strict=True):
        sentence = TOKENIZER.encode(placed.fact.sentence + "\n\n")
        assert found.ids[placed.position : placed.position + len(sentence)].tolist() == sentence
        assert TOKENIZER.decode(found.ids[: placed.position]).endswith("\n\n")
        assert placed.depth == placed.position / 60_000
        assert abs(placed.depth - asked) < 0.015  # half of the longest paragraph, 738 tokens, and the facts before


def test_the_outermost_depths_are_the_outermost_places() -> None:
    first, last = needle.facts(0, 2)
    found = build(DOCUMENT, 2000, [(last, 1.0), (first, 0.0)], seed=0)
    text = TOKENIZER.decode(found.ids)
    assert text.startswith(first.sentence)
    assert text.endswith(last.sentence + "\n\n")
    assert [placed.fact for placed in found.needles] == [last, first]


def test_the_text_comes_in_order_before_it_is_repeated() -> None:
    text = TOKENIZER.decode(build(DOCUMENT, 20_000, [], seed=1).ids)
    tail = text[text.index("\n\n") + 2 :]
    whole = haystack.embedded_document()
    assert all(paragraph in whole for paragraph in tail.split("\n\n"))
    assert tail[:3000] in whole or tail[-3000:].rstrip("\n") in whole


def test_a_million_tokens_take_no_time() -> None:
    began = time.monotonic()
    assert len(build(DOCUMENT, 1_048_576, planted(1000), seed=0).ids) == 1_048_576
    assert time.monotonic() - began < 5


def test_a_text_without_blank_lines_has_places_too() -> None:
    straw = Straw("word " * 10_000, TOKENIZER.encode)
    found = build(straw, 8000, planted(4), seed=0)
    assert len({placed.position for placed in found.needles}) == 4


def test_text_in_other_scripts_and_line_ends() -> None:
    straw = Straw("Öl fließt.\r\n\r\n雪が降る。\r\n \r\n" * 3, TOKENIZER.encode)
    for num_tokens in range(1, 60):
        assert len(build(straw, num_tokens, [], seed=num_tokens).ids) == num_tokens


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"10 needles are .* at most half of the haystack's 100"):
        build(DOCUMENT, 100, planted(10), seed=0)
    with pytest.raises(InputError, match="empty"):
        Straw(" \n\n ", TOKENIZER.encode)
