"""Stop strings: the end of a completion, found in its text. Knows nothing of tokens and models; needs no torch."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["StopStrings"]


class StopStrings:
    """Finds the first stop string in a text that comes in pieces, whatever the pieces.

    The match that ends first wins, of those the longest. `push` returns text that can be shown: what may be
    the start of a stop string is held back, a stop string and what follows it never appear. Cost is linear.
    """

    def __init__(self, stop: Iterable[str]) -> None:
        self._stops = sorted(stop, key=len, reverse=True)
        self._fallbacks = [_fallbacks(one) for one in self._stops]
        self._matched_chars = [0] * len(self._stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is certainly before any stop string; "" once one has matched."""
        if self.matched is not None:
            return ""
        for position, char in enumerate(text):
            self._advance(char)
            if self.matched is not None:
                return self._release(self._held + text[: position + 1], len(self.matched), keep=False)
        return self._release(self._held + text, max(self._matched_chars, default=0), keep=True)

    def finish(self) -> str:
        """The text held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held

    def _release(self, text: str, num_held: int, *, keep: bool) -> str:
        at = len(text) - num_held
        self._held = text[at:] if keep else ""
        return text[:at]

    def _advance(self, char: str) -> None:
        """One character through the automaton of each stop string (Knuth, Morris and Pratt)."""
        for i, (stop, fallback) in enumerate(zip(self._stops, self._fallbacks, strict=True)):
            n = self._matched_chars[i]
            while n and stop[n] != char:
                n = fallback[n - 1]
            n += stop[n] == char
            self._matched_chars[i] = n
            if n == len(stop) and self.matched is None:
                self.matched = stop


def _fallbacks(pattern: str) -> list[int]:
    """For each prefix: length of its longest proper prefix that is also its end."""
    table = [0] * len(pattern)
    n = 0
    for i in range(1, len(pattern)):
        while n and pattern[i] != pattern[n]:
            n = table[n - 1]
        n += pattern[i] == pattern[n]
        table[i] = n
    return table
