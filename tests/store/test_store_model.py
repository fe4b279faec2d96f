"""The store against a dictionary: random texts, branches, rewinds, restarts; what comes back is what went in."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.store.fakes import Feeder, restore

from tenfold.store import Store

TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=40)
# What a session does: reads a text in chunks, goes back, starts anew beside another, or the program restarts.
FEED = st.tuples(st.just("feed"), TEXT, st.integers(1, 50))
REWIND = st.tuples(st.just("rewind"), st.integers(0, 60), st.just(0))
OTHER = st.tuples(st.sampled_from(["anew", "restart"]), st.just(0), st.just(0))
STEPS = st.lists(st.one_of(FEED, FEED, REWIND, OTHER), min_size=1, max_size=12)


@settings(max_examples=60)
@given(steps=STEPS, questions=st.lists(TEXT, max_size=4))
def test_random_sessions(steps: list[tuple[str, object, int]], questions: list[list[int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        warned: list[str] = []
        store = Store(Path(folder), warn=warned.append)
        feeder = Feeder(store)
        stored: set[tuple[int, ...]] = set()  # every prefix that was fed
        points: set[tuple[int, ...]] = set()
        texts: list[list[int]] = []
        for what, value, chunk in steps:
            if what == "feed":
                assert isinstance(value, list)
                before = len(feeder.tokens)
                for start in range(0, len(value), chunk):
                    feeder.feed(value[start : start + chunk])
                    points.add(tuple(feeder.tokens))
                texts.append(list(feeder.tokens))
                stored.update(tuple(feeder.tokens[:n]) for n in range(before + 1, len(feeder.tokens) + 1))
            elif what == "rewind":
                assert isinstance(value, int)
                feeder.rewind(min(value, len(feeder.tokens)))
            else:
                if what == "restart":
                    store.close()
                    store = Store(Path(folder), warn=warned.append)
                feeder = Feeder(store)
        for text in [*texts, *questions, *([*text, 9] for text in texts)]:
            match = restore(store, text)
            prefixes = [tuple(text[:n]) for n in range(1, len(text) + 1)]
            assert match.matched == max((len(one) for one in prefixes if one in stored), default=0)
            assert match.position == max((len(one) for one in prefixes if one in points), default=0)
        assert sum(row.stop - row.start for row in store.index.segments()) == len(stored)  # each token once
        assert warned == []
        store.close()
