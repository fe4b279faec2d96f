"""Which automatic restore points of a chain may go. Knows positions only, neither files nor index."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["superfluous"]

_SHARE = 4


def superfluous(auto: Sequence[int], fixed: Sequence[int], forks: Sequence[int]) -> list[int]:
    """Positions of `auto` that are not worth their bytes, with the last position of all as the tip.

    A point goes if the gap that it leaves is at most a quarter of its distance from the tip. So gaps are about an
    eighth of it: dense where edits happen, sparse far back, a few dozen points however long the chain, and what is read
    again after an edit is at most a third of what lies behind it. The last point stays, and the nearest one before each
    place where another chain forks off. Positions rise; those of `fixed` stay and count as neighbours.
    """
    every = sorted([*auto, *fixed])
    needed = {every[-1], *fixed} if every else set()
    needed.update(every[at - 1] for fork in forks if (at := bisect_right(every, fork)))
    dropped, before = [], 0
    for position, after in pairwise(every):
        if position not in needed and (after - before) * _SHARE <= every[-1] - position:
            dropped.append(position)
        else:
            before = position
    return dropped
