"""Following tokens down the tree of stored segments. Knows how tokens are compared, not what rows are.

A segment may be used up to any of its tokens; what goes on from there is a child that starts there. So each node
costs one query and one comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from tenfold.store.contents import Timeline, Tokens
from tenfold.store.index import Index, SegmentRow

__all__ = ["Link", "Path", "cut", "walk"]


@dataclass(frozen=True, slots=True)
class Link:
    """A segment of a chain, used from `start` up to `stop`."""

    key: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Path:
    """A chain as far as the tokens agree, and why they do not agree further."""

    chain: tuple[Link, ...]
    reason: str

    @property
    def stop(self) -> int:
        return self.chain[-1].stop if self.chain else 0


@dataclass(frozen=True, slots=True)
class _Node:
    link: Link
    before: _Node | None

    def chain(self) -> tuple[Link, ...]:
        links, node = [], self if self.link.key else None
        while node is not None:
            links.append(node.link)
            node = node.before
        return tuple(reversed(links))


def cut(chain: tuple[Link, ...], length: int) -> tuple[Link, ...]:
    """The chain up to `length` tokens."""
    return tuple(Link(link.key, link.start, min(link.stop, length)) for link in chain if link.start < length)


def walk(
    index: Index,
    timeline: Timeline,
    chain: tuple[Link, ...],
    tokens: Tokens,
    read: Callable[[SegmentRow], Tokens | str],
) -> Iterator[Path]:
    """Every way in which stored segments go on behind `chain` with `tokens`, as far as each goes.

    More than one only where two processes stored the same text at once. `read` gives a segment's tokens, or says
    why they cannot be had.
    """
    base = chain[-1].stop if chain else 0
    before = None
    for link in chain[:-1]:
        before = _Node(link, before)
    pending = [_Node(chain[-1] if chain else Link("", 0, 0), before)]
    while pending:
        node, reason = _along(index, pending.pop(), tokens, base, read)
        if not reason:
            children, reason = _onwards(index, timeline, node, tokens, base, read)
            pending.extend(children)
        if reason:
            yield Path(node.chain(), reason)


def _along(
    index: Index, node: _Node, tokens: Tokens, base: int, read: Callable[[SegmentRow], Tokens | str]
) -> tuple[_Node, str]:
    """The node used further, up to its end or to where the tokens differ."""
    row = index.segment(node.link.key) if node.link.key else None
    if row is None or node.link.stop == row.stop or node.link.stop - base == len(tokens):
        return node, ""
    stored = read(row)
    if isinstance(stored, str):
        return node, stored
    stop = node.link.stop + _common(stored[node.link.stop - row.start :], tokens[node.link.stop - base :])
    return _Node(Link(row.key, row.start, stop), node.before), ""


def _onwards(
    index: Index, timeline: Timeline, node: _Node, tokens: Tokens, base: int, read: Callable[[SegmentRow], Tokens | str]
) -> tuple[list[_Node], str]:
    """The children that agree with the next tokens, each used as far as it does, or why there is none."""
    stop = node.link.stop
    if stop - base == len(tokens):
        return [], "all of it is stored"
    nodes, reasons = [], []
    for row in index.children(timeline.digest, node.link.key, stop, int(tokens[stop - base])):
        stored = read(row)
        if isinstance(stored, str):
            reasons.append(stored)
        elif count := _common(stored, tokens[stop - base :]):
            nodes.append(_Node(Link(row.key, row.start, row.start + count), node if node.link.key else None))
    if nodes or reasons:
        return nodes, "" if nodes else reasons[0]
    row_here = index.segment(node.link.key) if node.link.key else None
    inside = row_here is not None and stop < row_here.stop
    if inside or index.goes_on(timeline.digest, node.link.key, stop):
        return [], f"the stored text differs at token {stop:,}"
    return [], f"nothing is stored beyond token {stop:,}" if stop else "nothing of this model is stored"


def _common(stored: Tokens, tokens: Tokens) -> int:
    """Tokens from the start that are equal in both."""
    length = min(len(stored), len(tokens))
    differ = stored[:length] != tokens[:length]
    return int(np.argmax(differ)) if differ.any() else length
