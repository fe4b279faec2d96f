"""Text <-> token ids over a byte-level `tokenizer.json`, and a detokeniser that never splits a character.

Two encoders are built from the one file: the full one, for text that is known to be grammar, and a plain one
without added tokens, for everything a user wrote: there, `<｜User｜>` is just letters. Knows ids, bytes and
which tokens are added; knows nothing of chat grammar, models or tensors.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from tenfold.errors import CheckpointError, InputError, TenfoldError, disk_errors

__all__ = ["Detokenizer", "Prompt", "Tokenizer"]


def _byte_alphabet() -> dict[str, int]:
    """Which byte each letter of a byte-level vocabulary stands for.

    Printable Latin-1 stands for itself, every other byte is written from U+0100 on.
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(itself)]
    return {chr(byte): byte for byte in itself} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_alphabet()
_NO_TOKEN = "\ufffd".encode()  # shown for an id that the model can produce but the vocabulary leaves unused


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text of which only `control_ranges` become control tokens.

    Each range is half-open and spells one token; they ascend and do not overlap.
    """

    text: str
    control_ranges: tuple[tuple[int, int], ...] = ()


class Tokenizer:
    """One vocabulary. `vocab_size` is the highest id + 1; the model may have more rows than that."""

    def __init__(
        self,
        document: Mapping[str, Any],
        *,
        eos_token_ids: Iterable[int] = (),
        config_vocab_size: int | None = None,
    ) -> None:
        """From a parsed `tokenizer.json`; refuses one that is not byte-level or does not fit the model."""
        _check_byte_level(document)
        self._full = _build(document)
        self._plain = _build(_without_added_tokens(document))
        self._control: dict[str, int] = {token["content"]: token["id"] for token in document["added_tokens"]}
        self._known_bytes: dict[int, bytes] = {}
        self.control_ids = frozenset(self._control.values())
        self.vocab_size: int = 1 + max((*document["model"]["vocab"].values(), *self.control_ids))
        self.eos_token_ids = tuple(eos_token_ids)
        self._num_rows = config_vocab_size or self.vocab_size
        self._check_fits()

    @classmethod
    def load(cls, path: str | Path, *, config_vocab_size: int | None = None) -> Tokenizer:
        """From a checkpoint folder or a `tokenizer.json`; end tokens come from the json files beside it.

        `config_vocab_size` is the number of rows the model has: a larger vocabulary is refused.
        """
        with disk_errors(Path(path)):
            file = _tokenizer_file(Path(path))
        with _mapped(CheckpointError, f"{file} is not a usable tokenizer.json; download it again"):
            document = _read_json(file)
            eos_token_ids = _eos_token_ids(file.parent, document)
            return cls(document, eos_token_ids=eos_token_ids, config_vocab_size=config_vocab_size)

    def _check_fits(self) -> None:
        rows = self._num_rows
        if self.vocab_size > rows:
            raise CheckpointError(
                f"tokenizer.json has ids up to {self.vocab_size - 1}, config.json says vocab_size {rows}; "
                "they are not of the same checkpoint, download both again"
            )
        for token_id in self.eos_token_ids:
            if not 0 <= token_id < rows:
                raise CheckpointError(f"eos_token_id is {token_id}, expected 0..{rows - 1}; correct config.json")

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """Ids of `text`, nothing added; what spells a control token stays text unless `control` is true."""
        _refuse_surrogates(text)
        encoder = self._full if control else self._plain
        with _mapped(InputError, "the text cannot be tokenised; check tokenizer.json and the text"):
            return list(encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt: its control ranges as control tokens, everything between them as plain text."""
        ids: list[int] = []
        at = 0
        for start, end in prompt.control_ranges:
            ids += self.encode(prompt.text[at:start])
            ids.append(self._control_id(prompt.text[start:end]))
            at = end
        return ids + self.encode(prompt.text[at:])

    def _control_id(self, spelling: str) -> int:
        token_id = self._control.get(spelling)
        if token_id is None:
            raise InputError(
                f"the vocabulary has no token {spelling!r}, which this chat grammar needs; "
                "use the plain profile, or the tokenizer.json of a DeepSeek checkpoint"
            )
        return token_id

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        return self._full.token_to_id(token)

    def knows(self, token_id: int) -> bool:
        """Whether the vocabulary has the id; a model may have rows that it leaves unused."""
        return self._full.id_to_token(token_id) is not None

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes a token stands for; U+FFFD for an id the model has and the vocabulary leaves unused."""
        known = self._known_bytes.get(token_id)
        if known is None:
            known = self._known_bytes[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._num_rows:
            raise InputError(f"token id {token_id} is outside the vocabulary 0..{self._num_rows - 1}")
        token = self._full.id_to_token(token_id)
        if token is None:
            return _NO_TOKEN
        if token_id in self.control_ids or not all(letter in _BYTE_OF_LETTER for letter in token):
            return token.encode()
        return bytes(_BYTE_OF_LETTER[letter] for letter in token)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control tokens by their spelling; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", errors="replace")


class Detokenizer:
    """Ids one by one -> text, complete characters only; pushes plus `finish` add up to `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters this token completes; "" while one is still being assembled."""
        return self._decoder.decode(self._tokenizer.bytes_of(token_id))

    def finish(self) -> str:
        """What is left of an unfinished character, as U+FFFD; the detokeniser is as new afterwards."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


@contextmanager
def _mapped(error: type[TenfoldError], sentence: str) -> Iterator[None]:
    """Foreign errors of the block become `error`; a Rust panic is no Exception, so the net is wide."""
    try:
        yield
    except (TenfoldError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as exc:
        raise error(f"{sentence} ({type(exc).__name__}: {exc})") from exc


def _tokenizer_file(path: Path) -> Path:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; give the folder of a complete checkpoint")
    return file


def _read_json(file: Path) -> dict[str, Any]:
    document = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise CheckpointError(f"{file} holds a json {type(document).__name__}, expected an object; download it again")
    return document


def _build(document: Mapping[str, Any]) -> tokenizers.Tokenizer:
    with _mapped(CheckpointError, "tokenizer.json cannot be used; download it again"):
        built = tokenizers.Tokenizer.from_str(json.dumps(document))
        built.no_truncation()  # a limit stored in the file would silently shorten prompts
        built.no_padding()
        return built


def _without_added_tokens(document: Mapping[str, Any]) -> dict[str, Any]:
    """The same vocabulary without added tokens, nor the places some of them have in the base vocabulary."""
    added = {token["content"] for token in document["added_tokens"]}
    vocab = {token: index for token, index in document["model"]["vocab"].items() if token not in added}
    return {**document, "added_tokens": [], "model": {**document["model"], "vocab": vocab}}


def _check_byte_level(document: Mapping[str, Any]) -> None:
    """Every byte must have its letter, or text would be lost without a word."""
    with _mapped(CheckpointError, "tokenizer.json lacks a part every byte-level BPE has; download it again"):
        if "ByteLevel" not in _types(document["decoder"]) & _types(document["pre_tokenizer"]):
            raise CheckpointError("tokenizer.json is not byte-level; use a checkpoint with a byte-level BPE")
        letters = document["model"]["vocab"].keys() - {token["content"] for token in document["added_tokens"]}
        missing = [byte for letter, byte in _BYTE_OF_LETTER.items() if letter not in letters]
    if missing:
        raise CheckpointError(
            f"tokenizer.json has no token for byte 0x{missing[0]:02x} and {len(missing) - 1} others, "
            "expected all 256; train it with the whole byte alphabet"
        )


def _types(node: Mapping[str, Any] | None) -> set[str]:
    """The types of a pre-tokeniser or decoder and of the parts of a sequence."""
    if node is None:
        return set()
    parts = [*node.get("pretokenizers", ()), *node.get("decoders", ())]
    return {str(node["type"])}.union(*map(_types, parts))


def _eos_token_ids(folder: Path, document: Mapping[str, Any]) -> list[int]:
    """generation_config.json decides, then config.json, then tokenizer_config.json's spelling; else none."""
    for name in ("generation_config.json", "config.json"):
        value = _beside(folder / name).get("eos_token_id")
        if value is not None:
            with _mapped(CheckpointError, f"{folder / name}: eos_token_id is {value!r}, expected an id or a list"):
                return [int(token_id) for token_id in (value if isinstance(value, list) else [value])]
    token = _beside(folder / "tokenizer_config.json").get("eos_token")
    spelling = token.get("content") if isinstance(token, dict) else token
    return [added["id"] for added in document["added_tokens"] if added["content"] == spelling]


def _beside(file: Path) -> dict[str, Any]:
    with _mapped(CheckpointError, f"{file} is not usable json; download it again"):
        return _read_json(file) if file.is_file() else {}


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise InputError(
            f"character {exc.start} of the text is U+{ord(text[exc.start]):04X}, half of a surrogate pair, "
            "expected Unicode text; remove it, or read the file as UTF-8"
        ) from exc
