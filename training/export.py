"""Trained weights -> a checkpoint in the official layout, beside the tokenizer. Knows nothing of training.

    python -m training.export

Reads build/training/ckpt/last.pt, of a run that may still be going on, and replaces config.json,
generation_config.json and model.safetensors of the embedded model.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tenfold.checkpoint import TensorSpec
from tenfold.config import ModelConfig, parse
from tenfold.formats import I64, WeightFormat
from tenfold.ops import Weight
from tenfold.quantise import quantize
from tenfold.synth import write_checkpoint
from training.bpe import BEGIN_ID, END_ID, TOKENIZER_DIR
from training.data import WORK
from training.model import stack_name

__all__ = ["export", "stored"]

SHARD = "model.safetensors"


def stored(weights: dict[str, Tensor], spec: TensorSpec, form: WeightFormat) -> Weight:
    """One weight of a run, by its official name, in the format it is shipped in."""
    stack, place = stack_name(spec.name)
    values = weights[stack] if place is None else weights[stack][place]
    if spec.name.endswith(("embed.weight", "embed_tokens.weight", "gate.tid2eid")):
        # In training every document followed an end mark; a prompt follows a begin mark, so it gets the same rows.
        values = values.clone()
        values[BEGIN_ID] = values[END_ID]
    return Weight(spec.name, spec.shape, I64, values) if form is I64 else quantize(spec.name, values, form)


def export(config: ModelConfig, weights: dict[str, Tensor], folder: Path) -> int:
    """Writes the checkpoint into `folder`, file by file in place of the old ones; returns the bytes of the shard."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as name:
        fresh = Path(name) / "new"
        write_checkpoint(config, fresh, lambda spec, form: stored(weights, spec, form))
        (shard,) = fresh.glob("*.safetensors")
        os.replace(shard, folder / SHARD)
        os.replace(fresh / "config.json", folder / "config.json")
    generation = {"bos_token_id": BEGIN_ID, "eos_token_id": END_ID, "do_sample": True, "temperature": 1.0, "top_p": 1.0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    return (folder / SHARD).stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description="write the trained weights in the official layout")
    parser.add_argument("--state", type=Path, default=WORK / "ckpt" / "last.pt")
    parser.add_argument("--folder", type=Path, default=TOKENIZER_DIR)
    arguments = parser.parse_args()
    state = torch.load(arguments.state, weights_only=True)
    config = parse(json.loads(state["config"]))
    num_bytes = export(config, state["weights"], arguments.folder)
    print(json.dumps({"folder": str(arguments.folder), "shard_bytes": num_bytes} | state["progress"]))


if __name__ == "__main__":
    main()
