"""What was appended comes back, byte for byte, at every restore point; what is shared is stored once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tests.store.fakes import Feeder, restore

from tenfold.store import Store


def ids(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 1000, count)]


def test_a_prompt_comes_back(store: Store, warned: list[str]) -> None:
    text = ids(1000)
    Feeder(store).feed(text, 300)
    match = restore(store, text)
    assert (match.position, match.matched, match.reason) == (1000, 1000, "all of it is stored")
    assert [link.start for link in match.chain] == [0, 300, 600, 900]
    match = restore(store, [*text, 7])
    assert (match.position, match.reason) == (1000, "nothing is stored beyond token 1,000")
    assert warned == []


def test_another_end_goes_back_to_the_point_before_it(store: Store) -> None:
    text = ids(1000)
    Feeder(store).feed(text, 300)
    match = restore(store, [*text[:700], 5000, *text[701:]])
    assert (match.position, match.matched, match.reason) == (600, 700, "the stored text differs at token 700")
    match = restore(store, [5000, *text])
    assert (match.position, match.reason) == (0, "the stored text differs at token 0")


def test_a_child_branches_off_inside_its_parent(store: Store) -> None:
    text = ids(1000)
    first = Feeder(store)
    first.feed(text)
    other = Feeder(store)
    other.feed([*text[:501], *ids(200, seed=1)])
    assert [(link.start, link.stop) for link in other.chain] == [(0, 501), (501, 701)]
    assert restore(store, other.tokens).position == 701
    assert restore(store, text).position == 1000
    assert len(store.index.segments()) == 2


def test_a_restart_finds_everything(tmp_path: Path) -> None:
    text = ids(500)
    before = Store(tmp_path)
    Feeder(before).feed(text, 128)
    before.close()
    after = Store(tmp_path)
    assert restore(after, text).position == 500
    after.close()
