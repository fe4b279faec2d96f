"""Which automatic restore points of a chain may go. Knows positions only, neither files nor index."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

__all__ = ["superfluous"]

_SHARE = 8


def superfluous(auto: Sequence[int], fixed: Sequence[int], forks: Sequence[int]) -> list[int]:
    """Positions of `auto` that are not worth their bytes, with the last position as the tip.

    A point stays while its gaps to the point after it and to a fixed one before it are at least an eighth of its
    distance from the tip: dense where edits happen, sparse far back, a few dozen however long the chain. The last
    point stays, and the nearest one before each place where another chain forks off. Positions rise.
    """
    every = sorted({*auto, *fixed})
    needed = {every[-1]} if every else set()
    needed.update(every[at - 1] for fork in forks if (at := bisect_right(every, fork)))
    dropped, after = [], every[-1] if every else 0
    tip = after
    for position in reversed(auto):
        before = fixed[at - 1] if (at := bisect_right(fixed, position)) else -tip
        after = min([*fixed[at : at + 1], after])
        gap = min(after - position, position - before)
        if position not in needed and gap * _SHARE < tip - position:
            dropped.append(position)
        else:
            after = position
    return dropped
