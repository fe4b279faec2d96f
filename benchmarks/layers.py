"""The kernels against the reference, layer by layer and token by token. Times nothing.

    python benchmarks/layers.py [--tokens 1200] [--greedy 2000]

Random networks in the shape of V4-Flash, V4-Pro and V3.2 and the embedded model, exact and deployed numerics, the
latter with float32 activations too. The error of the residual after every layer goes to layers.csv, the judgement of
the embedded model's tokens to tokens.csv. What the columns mean is said in
tests/models/layer_errors.py; what is allowed, in tests/models/test_layers.py.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests are no installed package

from tests.models.layer_errors import (  # noqa: E402
    NUMERICS,
    SHAPES,
    Layer,
    engines,
    greedy,
    layers,
    random_ids,
    small_network,
    tokens,
)

from tenfold import _native  # noqa: E402
from tenfold.config import locate  # noqa: E402
from tenfold.demo import MODEL, embedded_document  # noqa: E402
from tenfold.tokenizer import Tokenizer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
HIDDEN = 512
PROMPT_TOKENS = 500


def main() -> int:
    options = parse()
    stamp = {"isa": _native.isa(), "commit": commit()}
    with tempfile.TemporaryDirectory() as folder:
        networks = {name: small_network(name, Path(folder) / name, HIDDEN) for name in SHAPES}
        table = [row | stamp for row in layer_rows(networks | {MODEL: locate(MODEL)}, options.tokens)]
    write("layers.csv", table)
    write("tokens.csv", [row | stamp for row in token_rows(options.greedy)])
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares the kernels with the reference, layer by layer.")
    parser.add_argument("--tokens", type=int, default=1200, help="tokens read by every network (1200)")
    parser.add_argument("--greedy", type=int, default=2000, help="tokens chosen by the embedded model (2000)")
    return parser.parse_args()


def layer_rows(networks: dict[str, Path], num_tokens: int) -> Iterator[dict[str, Any]]:
    for name, folder in networks.items():
        for numerics in NUMERICS:
            reference, kernels = engines(folder, numerics)
            ids = random_ids(reference.config, num_tokens)
            for layer in layers(reference, kernels, ids):
                yield {"network": name, "numerics": numerics, "tokens": num_tokens} | flat(layer)


def flat(layer: Layer) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer.index, "attention": layer.attention, "router": layer.router}
    for name in ("fed", "run", "nudged"):
        row |= {f"{name}_{which}": f"{value:.2e}" for which, value in asdict(getattr(layer, name)).items()}
    return row


def token_rows(num_greedy: int) -> Iterator[dict[str, Any]]:
    """The embedded model's own continuation of the document's beginning, and the document itself, as long."""
    document = Tokenizer.load(locate(MODEL)).encode(embedded_document())
    for numerics in NUMERICS:
        reference, kernels = engines(locate(MODEL), numerics)
        chosen = greedy(kernels, document[:PROMPT_TOKENS], num_greedy)
        for text, ids in (("greedy", chosen), ("document", document[: len(chosen)])):
            found = tokens(reference, kernels, ids, first=PROMPT_TOKENS - 1)
            first = min(found.gaps, default=None)
            yield {
                "text": text,
                "numerics": numerics,
                "positions": found.positions,
                "different": len(found.gaps),
                "first_different": "" if first is None else first,
                "gap_there": "" if first is None else f"{found.gaps[first]:.2e}",
                "largest_gap": f"{max(found.gaps.values(), default=0.0):.2e}",
                "median_gap_of_top_2": f"{found.median_gap:.2e}",
                "median_logit_error": f"{found.median_logit_error:.2e}",
                "worst_logit_error": f"{found.worst_logit_error:.2e}",
            }


def commit() -> str:
    """The commit of this tree, with a plus sign if kernels or engine differ from it."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "src", "native"], cwd=ROOT, check=False)
    return head.stdout.strip()[:12] + ("+" if changed.returncode else "")


def write(name: str, rows: list[dict[str, Any]]) -> None:
    with (RESULTS / name).open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    for row in rows:
        print("  ".join(f"{value!s:>9}" for value in row.values()))


if __name__ == "__main__":
    sys.exit(main())
