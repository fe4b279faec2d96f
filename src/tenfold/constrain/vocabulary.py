"""The tokens as bytes, as grammars need them, and which tokens would complete a word. Knows nothing of grammars.

Takes from the tokenizer what each id spells; the rows of the model beyond the vocabulary spell nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the nursery has no use for it
    from tenfold.tokenizer import Tokenizer

__all__ = ["Ending", "Mask", "Vocabulary", "Watch", "llguidance_tokenizer"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What each id spells (b"" where nothing), which are control tokens, and which of those end a completion."""

    spellings: tuple[bytes, ...]
    control_ids: frozenset[int]
    eos_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, num_rows: int, eos_ids: Sequence[int]) -> Vocabulary:
        """`num_rows`: as many as there are logits."""
        known = min(num_rows, tokenizer.vocab_size)
        spellings = [tokenizer.bytes_of(token) if tokenizer.knows(token) else b"" for token in range(known)]
        return cls((*spellings, *[b""] * (num_rows - known)), tokenizer.control_ids, tuple(eos_ids))

    def control_id(self, spelling: str) -> int | None:
        """The control token that spells this, if there is one."""
        return next((token for token in self.control_ids if self.spellings[token] == spelling.encode()), None)

    def bytewise(self) -> Callable[[bytes], list[int]]:
        """Text -> ids, a token for each byte: what grammars can be checked with where no tokenizer is."""
        single = {spelling[0]: token for token, spelling in enumerate(self.spellings) if len(spelling) == 1}
        return lambda text: [single[byte] for byte in text]


class _Wrapper:
    """What llguidance asks a tokenizer for."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, encode: Callable[[Any], list[int]]) -> None:
        self.eos_token_id = vocabulary.eos_ids[0]
        self.tokens = vocabulary.spellings
        self.special_token_ids = sorted(vocabulary.control_ids)
        self._encode = encode

    def __call__(self, text: Any) -> list[int]:
        return self._encode(text)


def llguidance_tokenizer(vocabulary: Vocabulary, encode: Callable[[Any], list[int]]) -> Any:
    """llguidance's form of the vocabulary; `encode` says how forced text is best written. Takes about a second."""
    wrapper: Any = _Wrapper(vocabulary, encode)
    return llguidance.LLTokenizer(wrapper, n_vocab=len(vocabulary.spellings), eos_token=list(vocabulary.eos_ids))


@dataclass(frozen=True, slots=True)
class Ending:
    """The tokens that complete a word, and those of them that go on behind it."""

    completing: NDArray[np.int64]
    beyond: NDArray[np.int64]


class Watch:
    """Which tokens complete `word`, given how much of it has been spelled: an automaton over bytes (Knuth, Morris and
    Pratt). A state is the number of bytes matched; the whole word is the last state, from which nothing follows."""

    def __init__(self, vocabulary: Vocabulary, word: bytes) -> None:
        self.word = word
        self._spellings = vocabulary.spellings
        self._next = [self._row(state) for state in range(len(word))]
        self._endings: dict[int, Ending] = {}

    def _row(self, state: int) -> list[int]:
        """Where each byte leads."""
        row = []
        for byte in range(256):
            seen = self.word[:state] + bytes([byte])
            row.append(next(n for n in range(len(seen), -1, -1) if seen.endswith(self.word[:n])))
        return row

    @cached_property
    def _candidates(self) -> list[int]:
        return [token for token, spelling in enumerate(self._spellings) if self.word[-1:] in spelling]

    def after(self, state: int, token: int) -> tuple[int, int]:
        """The state behind a token, and how many of its bytes come behind the word, if it completes it."""
        spelling = self._spellings[token]
        for i, byte in enumerate(spelling):
            state = self._next[state][byte]
            if state == len(self.word):
                return state, len(spelling) - i - 1
        return state, 0

    def ending(self, state: int) -> Ending:
        """The tokens that complete the word from this state."""
        if state not in self._endings:
            found = [(token, *self.after(state, token)) for token in self._candidates]
            ends = [(token, rest) for token, reached, rest in found if reached == len(self.word)]
            self._endings[state] = Ending(
                np.array([token for token, _ in ends], np.int64),
                np.array([token for token, rest in ends if rest], np.int64),
            )
        return self._endings[state]
