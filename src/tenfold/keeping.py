"""Between a session's streams and the disk store: what is written of them, and how they come back.

Knows streams and the store, no models. Rows are written once, as a segment for each run of tokens; a restore point
holds the rings and the pending compressor state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from tenfold.config import ModelConfig
from tenfold.store import Link, Match, Store, StoreDamaged, Timeline, cut
from tenfold.streams import Streams
from tenfold.weights import Weights

__all__ = ["Keeper", "Kept", "timeline_of"]

_MOST_SEGMENT_TOKENS = 65536
_ROWS_VERSION = 1
"""Rises when the same model would store other bytes for the same tokens."""


def timeline_of(folder: Path, config: ModelConfig, weights: Weights, exact: bool) -> Timeline:
    """What the rows of this model mean: its config, its weights and the choice of numerics decide.

    Weights are told apart by their tensor table and a sample of their bytes; reading 160 GB would take minutes.
    """
    text = json.dumps(json.loads((folder / "config.json").read_text(encoding="utf-8")), sort_keys=True)
    what = hashlib.sha256(f"{_ROWS_VERSION}|{'exact' if exact else 'deployed'}|{text}|".encode())
    what.update(weights.sample())
    streams = Streams(config, 0, exact)
    row_bytes = {
        (spec.layer, spec.name): streams.rows(spec.layer, spec.name).layout.row_bytes
        for spec in config.streams
        if spec.ratio
    }
    return Timeline(what.hexdigest(), folder.name, config.streams, row_bytes)


@dataclass
class Kept:
    """The part of a session's timeline that is in the store: the chain of its segments."""

    chain: tuple[Link, ...] = field(default=())

    @property
    def length(self) -> int:
        return self.chain[-1].stop if self.chain else 0

    def cut(self, length: int) -> None:
        self.chain = cut(self.chain, length)


class Keeper:
    """Writes sessions of one model to a store and reads them back."""

    def __init__(self, store: Store, timeline: Timeline) -> None:
        self.store, self.timeline = store, timeline

    def within(self, space: str) -> Keeper:
        """The keeper of a part of the store that is found under this name alone; "" is the common part."""
        if not space:
            return self
        digest = hashlib.sha256(f"{self.timeline.digest}|{space}".encode()).hexdigest()
        return Keeper(self.store, replace(self.timeline, digest=digest))

    def find(self, ids: Sequence[int]) -> Match:
        """The longest stored prefix of `ids`, without reading its rows."""
        return self.store.match(self.timeline, ids)

    def load(self, ids: Sequence[int], streams: Streams) -> tuple[Match, Tensor | None]:
        """Fills empty streams with the longest stored prefix that can be read; the logits behind it, None for none.

        Damage met on the way is dropped and reported by the store, and the next best prefix taken.
        """
        while True:
            match = self.find(ids)
            if match.position == 0:
                return match, None
            try:
                loaded = self.store.load(self.timeline, match, lambda key, count: streams.to_fill(*key, count))
            except StoreDamaged:
                streams.clear()
                continue
            streams.restore_live(match.position, loaded.fixed)
            return match, loaded.logits

    def keep(
        self,
        kept: Kept,
        tokens: Sequence[int],
        streams: Streams,
        state: Mapping[tuple[int, str], Tensor],
        logits: Tensor,
        kind: str,
    ) -> None:
        """Stores what is new of a timeline, and a restore point at its end; a store in trouble is no error.

        `state` and `logits` are those behind the last of `tokens`; `streams` may have gone on meanwhile. `kind` is
        "end" for a place users come back to, "auto" for one in the middle of a long read.
        """
        while kept.length < len(tokens):
            stop = min(len(tokens), kept.length + _MOST_SEGMENT_TOKENS)
            before = kept.chain
            rows = {
                (spec.layer, spec.name): streams.host_rows(
                    spec.layer, spec.name, spec.rows_at(kept.length), spec.rows_at(stop)
                )
                for spec in self.timeline.growing
            }
            kept.chain = self.store.append(self.timeline, before, tokens[kept.length : stop], rows)
            if kept.chain == before:
                return
        self.store.add_point(self.timeline, kept.chain, len(tokens), state, logits, kind)
