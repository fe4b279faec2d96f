"""Bits per byte of n-gram models and xz on the same text as the embedded model. Knows no neural network.

    python -m training.baselines

Trains on the whole of train.txt / train.npy, scores the shipped document and valid.txt, and writes
benchmarks/results/baselines.json. Ends of documents are context, never scored.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.bpe import END_ID, VOCABULARY
from training.data import DOCUMENT, DOCUMENT_SEPARATOR, REPOSITORY, WORK, load_split
from training.ngrams import NgramModel, Smoothing, train_ngrams

__all__ = ["Result", "bits_of"]

RESULTS = REPOSITORY / "benchmarks" / "results" / "baselines.json"
BYTE_LENGTHS = (2, 3, 5)
TOKEN_LENGTHS = (2, 3, 5)
SMOOTHINGS: tuple[Smoothing, ...] = ("kneser-ney", "witten-bell")
XZ_PRESET = 9 | lzma.PRESET_EXTREME

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Result:
    """One baseline: bits per UTF-8 byte on the shipped document and on the validation text."""

    name: str
    document_bits_per_byte: float
    valid_bits_per_byte: float


@dataclass(frozen=True, slots=True)
class Text:
    """The same documents three ways; symbols have the separator after each document."""

    raw: bytes
    byte_symbols: Ints
    token_symbols: Ints


def _read(documents: Sequence[str], ids: npt.NDArray[np.uint16]) -> Text:
    marked = "".join(document + DOCUMENT_SEPARATOR for document in documents).encode()
    symbols = np.frombuffer(marked, dtype=np.uint8).astype(np.int64)
    return Text("".join(documents).encode(), symbols, ids.astype(np.int64))


def bits_of(model: NgramModel, symbols: Ints, separator: int) -> float:
    """Bits to write the symbols of all documents, the separators themselves not counted."""
    context = np.full(len(model.orders) - 1, separator, dtype=np.int64)
    probabilities = model.probabilities(np.concatenate([context, symbols]))
    return float(-np.log2(probabilities[symbols != separator]).sum())


def _ngram_results(train: Text, document: Text, valid: Text) -> list[Result]:
    results = []
    kinds: tuple[tuple[str, Callable[[Text], Ints], int, int, tuple[int, ...]], ...] = (
        ("byte", lambda text: text.byte_symbols, 256, ord(DOCUMENT_SEPARATOR), BYTE_LENGTHS),
        ("token", lambda text: text.token_symbols, VOCABULARY, END_ID, TOKEN_LENGTHS),
    )
    for kind, symbols, vocabulary, separator, lengths in kinds:
        for length in lengths:
            for smoothing in SMOOTHINGS:
                model = train_ngrams(symbols(train), length, vocabulary, smoothing)
                figures = [bits_of(model, symbols(t), separator) / len(t.raw) for t in (document, valid)]
                results.append(Result(f"{kind} {length}-gram, {smoothing}", *figures))
                _print(results[-1])
    return results


def _xz_bytes(raw: bytes) -> int:
    return len(lzma.compress(raw, preset=XZ_PRESET))


def _xz_results(train: Text, document: Text, valid: Text) -> list[Result]:
    """xz alone, and what the text adds to an archive of all training text (it fits xz's 64 MiB window)."""
    alone = [8 * _xz_bytes(text.raw) / len(text.raw) for text in (document, valid)]
    known_bytes = _xz_bytes(train.raw)
    added_bytes = [_xz_bytes(train.raw + text.raw) - known_bytes for text in (document, valid)]
    after = [8 * added / len(text.raw) for added, text in zip(added_bytes, (document, valid), strict=True)]
    results = [Result("xz -9e", *alone), Result("xz -9e after the training text", *after)]
    for result in results:
        _print(result)
    return results


def _print(result: Result) -> None:
    figures = f"{result.document_bits_per_byte:8.4f} {result.valid_bits_per_byte:8.4f}"
    print(f"{result.name:34} {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="bits per byte of simple models")
    parser.add_argument("--work", type=Path, default=WORK, help="folder with the text and token files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    arguments = parser.parse_args()
    work: Path = arguments.work
    results_path: Path = arguments.results
    train = _read(load_split(work / "train.txt"), np.load(work / "train.npy"))
    valid = _read(load_split(work / "valid.txt"), np.load(work / "valid.npy"))
    document = _read([DOCUMENT.read_text(encoding="utf-8")], np.load(work / "document.npy"))
    print(f"{'bits per byte':34} {'document':>8} {'valid':>8}")
    results = _ngram_results(train, document, valid) + _xz_results(train, document, valid)
    record = {
        "bytes": {"train": len(train.raw), "document": len(document.raw), "valid": len(valid.raw)},
        "note": "n-grams: interpolated, trained on all training text; ends of documents not scored",
        "results": [asdict(result) for result in results],
    }
    results_path.parent.mkdir(parents=True, exist_ok=True)
    results_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
