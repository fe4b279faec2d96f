"""Text in, text out: reading with a shared prefix, and what is refused as text."""

from __future__ import annotations

import pytest

from tenfold.completion import read_text
from tenfold.errors import InputError


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b" \n", "empty"), (b"\xff\xfeh\x00", "not UTF-8"), (b"a\xc3", "not UTF-8"), (b"a\0b", "NUL")],
)
def test_what_is_not_text_is_refused_by_name(content: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=f"book.*{reason}"):
        read_text(content, "book")


def test_a_byte_order_mark_is_not_part_of_the_text() -> None:
    assert read_text(b"\xef\xbb\xbfna\xc3\xafve", "book") == "naïve"
