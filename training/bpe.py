"""Trains the embedded models' byte-level BPE and encodes the training text with it. Knows nothing of models.

    python -m training.bpe

Writes tokenizer.json and tokenizer_config.json beside the embedded model, and {train,valid}.npy (uint16, each
document followed by id 1), token_bytes.npy (UTF-8 bytes of each id) and tokens.json into the work folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from training.data import DOCUMENT, WORK, load_split

__all__ = [
    "END_ID",
    "SPECIAL_TOKENS",
    "TOKENIZER_DIR",
    "VOCABULARY",
    "encode",
    "token_bytes",
    "train_tokenizer",
]

VOCABULARY = 2048
SPECIAL_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
BEGIN_ID, END_ID, PAD_ID = range(3)
TOKENIZER_DIR = DOCUMENT.parent / "tiny-v4-flash"

_DIGITS = r"\p{N}{1,3}"
# a word with the one character before it | punctuation with its space and line ends | line ends | spaces
_PIECES = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(documents: Sequence[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE: special tokens first, then the 256 bytes, then merges. Every text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_DIGITS), "isolated"),
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """What transformers reads beside tokenizer.json, in the official checkpoints' words."""
    begin, end, pad = SPECIAL_TOKENS
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": begin,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "pad_token": pad,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> npt.NDArray[np.uint16]:
    """All documents in one row, id 1 after each."""
    pieces: list[npt.NDArray[np.uint16]] = []
    for start in range(0, len(documents), 64):
        for encoded in tokenizer.encode_batch(list(documents[start : start + 64]), add_special_tokens=False):
            pieces.append(np.array([*encoded.ids, END_ID], dtype=np.uint16))
    return np.concatenate(pieces)


def token_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.uint16]:
    """UTF-8 bytes that each id stands for; 0 for the special tokens, so they never count as text."""
    special = set(SPECIAL_TOKENS)
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.uint16)
    for name, index in tokenizer.get_vocab().items():
        # ByteLevel writes each byte as one character, so a name is as long as its bytes
        lengths[index] = 0 if name in special else len(name)
    return lengths


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="train the tokenizer and encode the text")
    parser.add_argument("--work", type=Path, default=WORK, help="folder with train.txt and valid.txt")
    work: Path = parser.parse_args().work
    texts = {name: load_split(work / f"{name}.txt") for name in ("train", "valid")}
    tokenizer = train_tokenizer(texts["train"])
    _save(tokenizer, TOKENIZER_DIR)
    lengths = token_bytes(tokenizer)
    np.save(work / "token_bytes.npy", lengths)
    counts = {}
    for name, documents in {**texts, "document": [DOCUMENT.read_text(encoding="utf-8")]}.items():
        ids = encode(tokenizer, documents)
        text_bytes = sum(len(document.encode()) for document in documents)
        assert int(lengths[ids].sum()) == text_bytes
        np.save(work / f"{name}.npy", ids)
        tokens = len(ids) - len(documents)
        counts[name] = {
            "documents": len(documents),
            "tokens": tokens,
            "bytes": text_bytes,
            "bytes_per_token": round(text_bytes / tokens, 4),
        }
    (work / "tokens.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
