"""Bits per byte of the shipped model on the shipped document, beside the n-gram models. Knows nothing of training.

    python -m training.evaluate

Reads the checkpoint with the engine, as any user would, and writes benchmarks/results/tiny-v4-flash.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from tenfold import Engine
from training.bpe import END_ID, TOKENIZER_DIR
from training.data import REPOSITORY, WORK

__all__ = ["POSITIONS", "bits_by_token", "summary"]

RESULTS = REPOSITORY / "benchmarks" / "results"
POSITIONS = (0, 128, 1024, 4096, 8192, 16384, 32768, 1 << 20)
VALID_TOKENS = 16384
CHUNK_TOKENS = 2048
PIECE_TOKENS = 2048  # the length of most sequences in training

Numbers = npt.NDArray[np.float64]


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


def _measure(folder: Path, numerics: Literal["deployed", "exact"], work: Path) -> dict[str, object]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the embedded model with the engine")
    parser.add_argument("--folder", type=Path, default=TOKENIZER_DIR)
    parser.add_argument("--out", type=Path, default=RESULTS / "tiny-v4-flash.json")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    baselines = json.loads((RESULTS / "baselines.json").read_text(encoding="utf-8"))
    report = {
        "shard_bytes": (arguments.folder / "model.safetensors").stat().st_size,
        "note": "one context for each text but where a length is given; valid: its first 16,384 tokens; "
        "baselines: the whole texts",
        "deployed": _measure(arguments.folder, "deployed", WORK),
        "exact": _measure(arguments.folder, "exact", WORK),
        "baselines": baselines["results"],
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
