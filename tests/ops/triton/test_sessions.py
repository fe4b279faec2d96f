"""A token of each of several sessions into their memory: the bytes that streams and the reference would have made."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.ops import sessions_cases

from tenfold.formats import RowLayout
from tenfold.ops.triton import Triton, sessions

DEVICE = Triton(exact=False).device


def test_rows_and_rings() -> None:
    sessions_cases.rows_and_rings(sessions, DEVICE)


@pytest.mark.parametrize(("layout", "ratio", "overlap", "spread"), sessions_cases.LAYOUTS, ids=sessions_cases.IDS)
def test_groups_are_compressed_as_by_the_reference(layout: RowLayout, ratio: int, overlap: bool, spread: bool) -> None:
    sessions_cases.groups_are_compressed_as_by_the_reference(sessions, DEVICE, layout, ratio, overlap, spread)
