"""What a shipped model finds and how well it continues text, measured with the engine. Knows nothing of training.

    python -m training.evaluate --model tiny-v4-flash

Bits per byte on the shipped document and on validation text, beside the n-gram models; facts found at lengths up to a
million tokens. Writes benchmarks/results/MODEL.json after each part, and goes on with the parts that it lacks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from tenfold import Engine, SamplingParams, needle
from tenfold.haystack import Straw, build, embedded_document, evenly
from tenfold.tokenizer import Tokenizer
from training.bpe import BEGIN_ID, END_ID, TOKENIZER_DIR
from training.data import REPOSITORY, WORK, load_split

__all__ = ["POSITIONS", "bits_by_token", "needles_found", "summary"]

RESULTS = REPOSITORY / "benchmarks" / "results"
POSITIONS = (0, 128, 1024, 4096, 8192, 16384, 32768, 1 << 20)
VALID_TOKENS = 16384
CHUNK_TOKENS = 2048
PIECE_TOKENS = 2048
LENGTHS = (1 << 10, 1 << 12, 1 << 14, 1 << 17, 1 << 20)
NEEDLES = 100  # at each length

Numerics = Literal["deployed", "exact"]
Numbers = npt.NDArray[np.float64]

_NUMERICS: tuple[Numerics, ...] = ("deployed", "exact")


def bits_by_token(engine: Engine, ids: npt.NDArray[np.int64]) -> Numbers:
    """Bits each token costs after all before it, in one context; the first is predicted from an end mark."""
    session = engine.session()
    fed = torch.from_numpy(np.concatenate([[END_ID], ids[:-1]]))
    targets = torch.from_numpy(ids)
    parts = []
    for start in range(0, len(ids), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        logits = session.feed(fed[part].tolist(), logits="all")
        parts.append(torch.nn.functional.cross_entropy(logits, targets[part], reduction="none"))
    bits: Numbers = torch.cat(parts).double().numpy() / math.log(2.0)
    return bits


def summary(bits: Numbers, ids: npt.NDArray[np.int64], token_bytes: npt.NDArray[np.int64]) -> dict[str, object]:
    """Bits per byte of the whole and by position; end marks are context and are not scored."""
    scored, num_bytes = ids != END_ID, token_bytes[ids]
    places = np.arange(len(ids))
    by_position = {}
    for low, high in pairwise(POSITIONS):
        mine = scored & (places >= low) & (places < high)
        if mine.any():
            by_position[f"{low}-{min(high, len(ids))}"] = round(float(bits[mine].sum() / num_bytes[mine].sum()), 4)
    return {
        "tokens": len(ids),
        "bytes": int(num_bytes[scored].sum()),
        "bits_per_byte": round(float(bits[scored].sum() / num_bytes[scored].sum()), 4),
        "nats_per_token": round(float(bits[scored].mean()) * math.log(2.0), 4),
        "bits_per_byte_by_position": by_position,
    }


def _in_pieces(engine: Engine, ids: npt.NDArray[np.int64]) -> Numbers:
    """The same with a new context every `PIECE_TOKENS`: what longer contexts are compared with."""
    pieces = [ids[start : start + PIECE_TOKENS] for start in range(0, len(ids), PIECE_TOKENS)]
    return np.concatenate([bits_by_token(engine, piece) for piece in pieces])


def _measure(folder: Path, numerics: Numerics, work: Path) -> dict[str, object]:
    engine = Engine.load(folder, numerics=numerics)
    token_bytes, document, valid = (
        np.load(work / f"{name}.npy").astype(np.int64) for name in ("token_bytes", "document", "valid")
    )
    runs = {
        "document": (bits_by_token, document),
        f"document_in_contexts_of_{PIECE_TOKENS}": (_in_pieces, document),
        "valid": (bits_by_token, valid[:VALID_TOKENS]),
    }
    found: dict[str, object] = {}
    for name, (bits_of, ids) in runs.items():
        start_s = time.monotonic()
        found[name] = summary(bits_of(engine, ids), ids, token_bytes)
        print(f"{numerics} {name}: {time.monotonic() - start_s:.0f} s {json.dumps(found[name])}", flush=True)
    return found


def needles_found(
    engine: Engine, tokenizer: Tokenizer, straw: Straw, length: int, count: int, at_once: int
) -> dict[str, object]:
    """Fresh facts found in contexts of `length` tokens, evenly deep; `at_once` in a context, each asked on its own."""
    at_once = min(count, at_once)
    start_s, answers = time.monotonic(), []
    for seed in range(-(-count // at_once)):
        facts = needle.facts(length + seed, at_once)
        haystack = build(straw, length - 1, list(zip(facts, evenly(at_once), strict=True)), seed)
        session = engine.session(length + 64)
        session.feed([BEGIN_ID, *haystack.ids])
        for planted in haystack.needles:
            session.feed(tokenizer.encode(planted.fact.question))
            greedy = SamplingParams(temperature=0, max_tokens=needle.ANSWER_TOKENS)
            text = tokenizer.decode([sampled.id for sampled in session.generate(greedy)])
            answers.append((needle.is_right(planted.fact, text), planted.depth))
            session.rewind(length)
    return {
        "needles": len(answers),
        "in_a_context": at_once,
        "found": sum(right for right, _ in answers),
        "missed_depths": [round(depth, 3) for right, depth in answers if not right],
        "seconds": round(time.monotonic() - start_s, 1),
    }


def _straw(tokenizer: Tokenizer, work: Path) -> Straw:
    """Held-out text: the shipped document and the validation text."""
    texts = [embedded_document(), *load_split(work / "valid.txt")]
    return Straw("\n\n".join(texts), tokenizer.encode)


def main() -> None:
    parser = argparse.ArgumentParser(description="measure an embedded model with the engine")
    parser.add_argument("--model", default="tiny-v4-flash")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--needles", type=int, default=NEEDLES)
    parser.add_argument("--at-once", type=int, default=20, help="needles in a context: the others of it distract")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder, out = TOKENIZER_DIR.parent / arguments.model, RESULTS / f"{arguments.model}.json"
    baselines = json.loads((RESULTS / "baselines.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    if report.get("sha256") != digest:
        report = {
            "sha256": digest,
            "shard_bytes": (folder / "model.safetensors").stat().st_size,
            "note": "one context for each text but where a length is given; valid: its first 16,384 tokens; "
            "baselines: the whole texts; needles: the shipped document and the validation text, facts of their own",
            "needles": {"deployed": {}, "exact": {}},
            "baselines": baselines["results"],
        }

    def write() -> None:
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    for numerics in _NUMERICS:
        engine, tokenizer = Engine.load(folder, numerics=numerics), Tokenizer.load(folder)
        straw = _straw(tokenizer, WORK)
        for length in arguments.lengths:
            mine, key = report["needles"][numerics], f"{length}, {arguments.at_once} at once"
            if key in mine or (numerics == "exact" and length > LENGTHS[2]):
                continue
            mine[key] = needles_found(engine, tokenizer, straw, length, arguments.needles, arguments.at_once)
            print(f"{numerics} {key}: {mine[key]}", flush=True)
            write()
        if numerics not in report:
            report[numerics] = _measure(folder, numerics, WORK)
            write()


if __name__ == "__main__":
    main()
