"""The recipe's own parts on small inputs. Knows no packages and no network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from training.baselines import bits_of
from training.bpe import (
    END_ID,
    SPECIAL_TOKENS,
    TOKENIZER_DIR,
    VOCABULARY,
    encode,
    token_bytes,
    train_tokenizer,
)
from training.data import DOCUMENT, split_of
from training.extract import Block, blocks_of, is_prose, render
from training.ngrams import Smoothing, train_ngrams

SHIPPED = Tokenizer.from_file(str(TOKENIZER_DIR / "tokenizer.json"))


def test_html_keeps_prose_and_drops_menus(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<body><nav><p>Home of all the pages</p></nav><h1>1. Title</h1><p>One  <b>two</b>\n&amp; three."
        "<p>Next&nbsp;one.<ul><li>an item<li><a href='x'>only a link</a></ul><pre>  a\n    b\n</pre>"
        "<dl><dt>name</dt><dd>meaning</dd></dl><div class='toc'><div><p>Contents</p></div></div>"
        "<p>Last.</body>",
        encoding="utf-8",
    )
    assert blocks_of(page) == [
        Block("heading", "1. Title"),
        Block("text", "One two & three."),
        Block("text", "Next one."),
        Block("item", "an item"),
        Block("code", "    a\n      b"),
        Block("term", "name"),
        Block("text", "meaning"),
        Block("text", "Last."),
    ]


def test_pod_formatting_codes_are_read(tmp_path: Path) -> None:
    page = tmp_path / "page.pod"
    page.write_text(
        "=head1 A B<bold> title\n\nUse C<< a->b >> or L<the docs|perlfunc>,\nE<lt>hereE<gt>.X<index>\n\n"
        "=begin x\n\nhidden\n\n=end x\n\n=over 4\n\n=item * I<first>\n\n  code\n",
        encoding="utf-8",
    )
    assert blocks_of(page) == [
        Block("heading", "A bold title"),
        Block("text", "Use a->b or the docs, <here>."),
        Block("item", "first"),
        Block("code", "    code"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The database can be opened read-only by using a query parameter.", True),
        ("Die Datenbank wird mit einem Parameter nur zum Lesen geöffnet, ganz einfach.", False),
        ("int sqlite3_open(const char *name, sqlite3 **db); /* open it, in C */ x = y[0];", False),
        ("Too short to tell.", False),
    ],
)
def test_prose_is_told_from_code_and_other_languages(text: str, expected: bool) -> None:
    assert is_prose(text) is expected


def test_render_groups_items() -> None:
    blocks = [Block("text", "Two:"), Block("item", "a"), Block("item", "b"), Block("text", "End.")]
    assert render(blocks) == "Two:\n\n- a\n- b\n\nEnd.\n"


def test_split_depends_on_the_name_alone() -> None:
    names = [f"package/page{i}.html" for i in range(5000)]
    valid = [name for name in names if split_of(name) == "valid"]
    assert 60 < len(valid) < 140
    assert "package/page42.html" not in valid


def test_shipped_tokenizer_has_the_fixed_ids() -> None:
    assert SHIPPED.get_vocab_size() == VOCABULARY
    assert [SHIPPED.token_to_id(name) for name in SPECIAL_TOKENS] == [0, 1, 2]
    assert len(SHIPPED.encode("1234567").ids) >= 3


@settings(deadline=None)
@given(st.text())
def test_every_text_round_trips(text: str) -> None:
    ids = SHIPPED.encode(text, add_special_tokens=False).ids
    assert SHIPPED.decode(ids, skip_special_tokens=False) == text
    assert int(token_bytes(SHIPPED)[np.array(ids, dtype=np.int64)].sum()) == len(text.encode())


def test_shipped_document_encodes_to_its_own_bytes() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    ids = encode(SHIPPED, [text])
    assert 120_000 <= len(text.encode()) <= 200_000
    assert ids[-1] == END_ID
    assert int(token_bytes(SHIPPED)[ids].sum()) == len(text.encode())


def test_training_a_tokenizer_is_repeatable() -> None:
    documents = [DOCUMENT.read_text(encoding="utf-8")[:20_000]]
    first, second = (train_tokenizer(documents, 400).to_str() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("smoothing", ["kneser-ney", "witten-bell"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_probabilities_sum_to_one(smoothing: Smoothing, length: int) -> None:
    rng = np.random.default_rng(0)
    symbols = np.minimum(rng.geometric(0.1, 3000), 49).astype(np.int64)
    model = train_ngrams(symbols, length, 50, smoothing)
    for context in (symbols[: length - 1], np.full(length - 1, 49, dtype=np.int64)):
        total = sum(float(model.probabilities(np.append(context, symbol))[0]) for symbol in range(50))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_witten_bell_bigram_by_hand() -> None:
    model = train_ngrams(np.array([0, 1, 0, 1, 0, 2], dtype=np.int64), 2, 4, "witten-bell")
    unigram = (2 + 3 / 4) / (6 + 3)  # symbol 1: twice of six, three kinds seen, floor 1/4
    assert model.probabilities(np.array([0, 1], dtype=np.int64))[0] == pytest.approx((2 + 2 * unigram) / (3 + 2))


def test_separators_are_not_scored() -> None:
    symbols = np.array([0, 1, 1, 0, 1, 1, 0], dtype=np.int64)
    model = train_ngrams(symbols, 2, 2, "witten-bell")
    one_after = model.probabilities(np.array([0, 1, 1], dtype=np.int64))
    assert bits_of(model, np.array([1, 1, 0], dtype=np.int64), separator=0) == pytest.approx(
        float(-np.log2(one_after).sum())
    )
