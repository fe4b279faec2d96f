"""Interpolated n-gram models over any integer symbols, counted with numpy. Knows no text and no tokenizer.

Modified Kneser-Ney (lower orders count distinct left neighbours) and Witten-Bell, down to a uniform floor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["NgramModel", "Smoothing", "train_ngrams"]

Smoothing = Literal["kneser-ney", "witten-bell"]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

FLAT_DISCOUNT = 0.5  # where the counts of counts allow no estimate, as for a handful of symbols


@dataclass(frozen=True, slots=True)
class _Order:
    """The n-grams of one length, sorted by packed key, and the weight each context leaves to shorter ones."""

    keys: Ints
    seen: Floats  # discounted count / total of its context
    contexts: Ints
    left: Floats  # share of each context that goes to the next shorter order


@dataclass(frozen=True, slots=True)
class NgramModel:
    """Probabilities of symbols given the `len(orders) - 1` symbols before."""

    orders: tuple[_Order, ...]  # shortest first
    bits: int
    vocabulary: int

    def probabilities(self, symbols: Ints) -> Floats:
        """p of every symbol after the first n - 1; those serve as context only."""
        count = len(symbols) - len(self.orders) + 1
        result: Floats = np.full(count, 1.0 / self.vocabulary)
        for length, order in enumerate(self.orders, start=1):
            keys = _packed(symbols, length, self.bits)[-count:]
            left = _look_up(order.contexts, order.left, keys >> self.bits, missing=1.0)
            result = _look_up(order.keys, order.seen, keys, missing=0.0) + left * result
        return result


def train_ngrams(symbols: Ints, length: int, vocabulary: int, smoothing: Smoothing) -> NgramModel:
    """Counts all n-grams of 1..length symbols. `length` * bits per symbol must fit 63 bits."""
    bits = max(1, (vocabulary - 1).bit_length())
    counted = [np.unique(_packed(symbols, n, bits), return_counts=True) for n in range(1, length + 1)]
    if smoothing == "kneser-ney":
        for n in range(length - 1):
            longer = counted[n + 1][0]
            counted[n] = np.unique(longer & ((1 << bits * (n + 1)) - 1), return_counts=True)
    orders = tuple(_order(keys, counts, bits, smoothing) for keys, counts in counted)
    return NgramModel(orders, bits, vocabulary)


def _packed(symbols: Ints, length: int, bits: int) -> Ints:
    """Every run of `length` symbols as one integer, the latest symbol lowest."""
    count = len(symbols) - length + 1
    keys = np.zeros(count, dtype=np.int64)
    for offset in range(length):
        keys = (keys << bits) | symbols[offset : offset + count]
    return keys


def _order(keys: Ints, counts: Ints, bits: int, smoothing: Smoothing) -> _Order:
    contexts, starts = np.unique(keys >> bits, return_index=True)
    totals = np.add.reduceat(counts, starts).astype(np.float64)
    sizes = np.diff(np.append(starts, len(keys)))
    if smoothing == "witten-bell":
        whole = totals + sizes
        return _Order(keys, counts / np.repeat(whole, sizes), contexts, sizes / whole)
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    left = np.add.reduceat(discounts, starts) / totals
    return _Order(keys, (counts - discounts) / np.repeat(totals, sizes), contexts, left)


def _discounts(counts: Ints) -> Floats:
    """What modified Kneser-Ney takes from counts of 1, 2 and 3 or more (index 0 is unused)."""
    n1, n2, n3, n4 = (float(n) for n in np.bincount(np.minimum(counts, 5), minlength=6)[1:5])
    flat = np.array([0.0, FLAT_DISCOUNT, FLAT_DISCOUNT, FLAT_DISCOUNT])
    if min(n1, n2, n3, n4) == 0:
        return flat
    y = n1 / (n1 + 2 * n2)
    estimate = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return estimate if bool((estimate[1:] > 0).all()) else flat


def _look_up(keys: Ints, values: Floats, wanted: Ints, missing: float) -> Floats:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], missing)
