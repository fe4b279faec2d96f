"""Bodies as text: how strictly and how fast they are judged."""

from __future__ import annotations

import contextlib
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.server.body import parse
from tenfold.server.errors import Refusal

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=25)
@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_every_json_object_is_read(found: dict[str, object]) -> None:
    assert parse(json.dumps(found).encode()) == found
    assert parse(json.dumps(found, ensure_ascii=False, indent=1).encode()) == found


@given(st.binary(max_size=200))
def test_bytes_are_read_or_refused(body: bytes) -> None:
    with contextlib.suppress(Refusal):
        assert isinstance(parse(body), dict)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"a": ["' + b"," * 4_000_000 + b'"]}', None),
        (b'{"a": ["' + b'\\",[{' * 1_000_000 + b'"]}', None),
        (b'{"a": [' + b"1," * 1_200_000 + b"1]}", None),
        (b'{"a": [' + b"[]," * 4_000_000 + b"[]]}", "too many values"),
        (b'{"a": "' + b"[" * 4_000_000, "the body"),  # a string without an end is no string
        (b"[" * 4_000_000, "too many values"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b'"' * 4_000_001, "not JSON"),
        (b'{"a": ' + b"[" * 199 + b"]" * 199 + b"}", None),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_size_is_judged_in_linear_time(body: bytes, message: str | None) -> None:
    began = time.process_time()
    if message is None:
        parse(body)
    else:
        with pytest.raises(Refusal, match=message):
            parse(body)
    assert time.process_time() - began < 3
