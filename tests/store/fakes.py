"""A small timeline and a session that feeds a store, with a plain dictionary as the truth. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tenfold.config import StreamSpec
from tenfold.formats import RowLayout
from tenfold.store import Link, Match, Store, StoreDamaged, Timeline

Key = tuple[int, str]


def spec(layer: int, name: str, width: int, ratio: int, fixed_rows: int = 0) -> StreamSpec:
    return StreamSpec(layer, name, name, RowLayout("bytes", width), ratio=ratio, fixed_rows=fixed_rows)


def timeline(digest: str = "d1", name: str = "tiny", widen: int = 1) -> Timeline:
    """Streams of ratio 1, 4 and 128, a ring and a state."""
    streams = (
        spec(0, "window", 6, 0, 8),
        spec(0, "latents", 5 * widen, 1),
        spec(1, "rows", 24 * widen, 4),
        spec(1, "index_keys", 3, 4),
        spec(1, "state", 8, 0, 4),
        spec(2, "rows", 7, 128),
    )
    return Timeline(digest, name, streams, {(s.layer, s.name): s.layout.row_bytes for s in streams if s.ratio})


TIMELINE = timeline()


def digests(tokens: Sequence[int]) -> np.ndarray:
    """uint64 [len(tokens) + 1]: a number for each prefix; two different prefixes never share one."""
    return _digests(tuple(tokens))


@lru_cache(1000)
def _digests(tokens: tuple[int, ...]) -> np.ndarray:
    numbers = [1]
    for token in tokens:
        numbers.append((numbers[-1] * 6364136223846793005 + token * 2654435761 + 1442695040888963407) % (1 << 64))
    return np.asarray(numbers, np.uint64)


def bytes_of(prefixes: np.ndarray, salt: int, width: int) -> Tensor:
    """uint8 [len(prefixes), width] that depends on every bit of each prefix."""
    factors = np.random.default_rng(salt).integers(1, 1 << 63, width, np.uint64) | np.uint64(1)
    return torch.from_numpy(((prefixes[:, None] * factors) >> np.uint64(56)).astype(np.uint8))


def true_rows(tokens: Sequence[int], of: Timeline = TIMELINE) -> dict[Key, Tensor]:
    """The rows of all growing streams after `tokens`; a row depends on the tokens up to its last one."""
    prefixes = digests(tokens)
    return {
        (one.layer, one.name): bytes_of(prefixes[one.ratio :: one.ratio], at, of.row_bytes[one.layer, one.name])
        for at, one in enumerate(of.growing)
    }


def true_point(tokens: Sequence[int]) -> tuple[dict[Key, Tensor], Tensor]:
    """Ring, state (live part: as many rows as tokens are pending) and logits after `tokens`."""
    last = digests(tokens)[-1:]
    state = bytes_of(last, 201, 8).float().repeat(len(tokens) % 4, 1)
    fixed = {(0, "window"): bytes_of(last, 200, 48).view(8, 6), (1, "state"): state}
    return fixed, bytes_of(last, 202, 11)[0].float()


class Feeder:
    """What a session does with a store: resumes, appends after each chunk, marks points, rewinds."""

    def __init__(self, store: Store, of: Timeline = TIMELINE) -> None:
        self.store, self.timeline = store, of
        self.tokens: list[int] = []
        self.chain: tuple[Link, ...] = ()

    def feed(self, ids: Sequence[int], chunk: int = 1 << 20, kind: str | None = "end") -> None:
        """Appends in chunks, with an automatic point after each and one of `kind` at the end."""
        for start in range(0, len(ids), chunk):
            self.tokens += ids[start : start + chunk]
            self.save()
            if kind is not None:
                self.point("auto" if start + chunk < len(ids) else kind)

    def save(self) -> None:
        """Stores everything behind the chain."""
        rows = true_rows(self.tokens, self.timeline)
        for _ in range(2):
            stop = self.chain[-1].stop if self.chain else 0
            behind = {(s.layer, s.name): rows[s.layer, s.name][s.rows_at(stop) :] for s in self.timeline.growing}
            before, self.chain = self.chain, self.store.append(self.timeline, self.chain, self.tokens[stop:], behind)
            if self.chain or not before:
                return

    def point(self, kind: str) -> None:
        fixed, logits = true_point(self.tokens)
        self.store.add_point(self.timeline, self.chain, len(self.tokens), fixed, logits, kind)

    def rewind(self, length: int) -> None:
        self.tokens = self.tokens[:length]
        self.chain = tuple(Link(x.key, x.start, min(x.stop, length)) for x in self.chain if x.start < length)


def restore(store: Store, ids: Sequence[int], of: Timeline = TIMELINE) -> Match:
    """Matches and loads as a session would; fails unless what comes back is the truth, byte for byte."""
    while True:
        match = store.match(of, ids)
        assert 0 <= match.position <= match.matched <= len(ids)
        if match.point is None:
            assert match.position == 0
            return match
        memory: dict[Key, Tensor] = {}

        def rows(key: Key, count: int, memory: dict[Key, Tensor] = memory) -> Tensor:
            memory[key] = torch.full((count, of.row_bytes[key]), 0xA5, dtype=torch.uint8)
            return memory[key]

        try:
            loaded = store.load(of, match, rows)
        except StoreDamaged:
            continue
        prefix = ids[: match.position]
        for key, expected in true_rows(prefix, of).items():
            assert torch.equal(memory[key], expected), f"rows of {key} at {match.position}"
        fixed, logits = true_point(prefix)
        assert loaded.fixed.keys() == fixed.keys()
        for key, expected in fixed.items():
            assert torch.equal(loaded.fixed[key], expected), key
        assert torch.equal(loaded.logits, logits)
        return match
