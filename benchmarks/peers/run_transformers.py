"""One task on transformers, float32 or --dtype bfloat16, in chunks of 512 tokens.

Knows the fields of its cache, to make up a long context: 256 tokens really read, then compressed entries of
noise up to the depth wanted.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from common import CHUNK_TOKENS, arguments, decode_steps, memory_mb, random_ids, report, save_logits, seconds
from torch import Tensor

RUNS = 2
BASIS = 256


def main() -> None:
    options = arguments(("chunk", int, CHUNK_TOKENS), ("dtype", str, "float32"))
    torch.set_num_threads(2)
    model = load(options.work / "plain", getattr(torch, options.dtype))
    run(model, random_ids(64), None, 0)
    result = globals()[options.task](model, options)
    report(**result, peak_mb=memory_mb(), version=transformers.__version__)


def load(folder: Path, dtype: torch.dtype) -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    words = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = transformers.DeepseekV4Config(**words)
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, output_loading_info=True
    )
    model, problems = model
    wrong = {kind: names for kind, names in problems.items() if names}
    assert not wrong, wrong
    return model.eval()


def run(model: Any, ids: list[int], cache: Any, position: int) -> Any:
    places = torch.arange(position, position + len(ids))[None]
    return model(
        torch.tensor([ids]), past_key_values=cache, use_cache=cache is not None, position_ids=places, logits_to_keep=1
    )


def read(model: Any, ids: list[int], chunk_tokens: int) -> tuple[Any, Any]:
    cache, output = transformers.DynamicCache(config=model.config), None
    for start in range(0, len(ids), chunk_tokens):
        output = run(model, ids[start : start + chunk_tokens], cache, start)
    return cache, output


def filled(model: Any, tokens: int) -> Any:
    """A cache behind `tokens` tokens."""
    cache, _ = read(model, random_ids(BASIS), BASIS)
    for layer in cache.layers:
        for name, rows in getattr(layer, "compressed_kv", {}).items():
            if rows is not None:
                missing = tokens // layer.compress_rate - rows.shape[1]
                noise = torch.randn(1, missing, rows.shape[2], dtype=rows.dtype) * rows.std()
                layer.compressed_kv[name] = torch.cat([rows, noise], 1)
                layer.entry_count[name] = layer.compressed_kv[name].shape[1]
        layer.cumulative_length = tokens
    return cache


def prefill(model: Any, options: argparse.Namespace) -> dict[str, object]:
    ids = random_ids(options.tokens)
    read(model, ids[:CHUNK_TOKENS], CHUNK_TOKENS)
    return {"tps": options.tokens / seconds(lambda: read(model, ids, options.chunk))}


def chunk(model: Any, options: argparse.Namespace) -> dict[str, object]:
    times = []
    for _ in range(1 if options.tokens > 100_000 else RUNS):
        cache = filled(model, options.tokens)
        times.append(seconds(lambda cache=cache: run(model, random_ids(CHUNK_TOKENS), cache, options.tokens)))
    return {"tps": CHUNK_TOKENS / statistics.median(times)}


def decode(model: Any, options: argparse.Namespace) -> dict[str, object]:
    cache, last = filled(model, options.tokens), {"id": 5, "position": options.tokens}

    def step() -> None:
        output = run(model, [last["id"]], cache, last["position"])
        last.update(id=int(output.logits[0, -1].argmax()), position=last["position"] + 1)

    return decode_steps(step)


def logits(model: Any, options: argparse.Namespace) -> dict[str, object]:
    output = model(torch.tensor([random_ids(options.tokens, seed=7)]), use_cache=False)
    return dict(save_logits(options.work, "transformers", options.tokens, output.logits[0].numpy()))


def memory(model: Any, options: argparse.Namespace) -> dict[str, object]:
    cache, _ = read(model, random_ids(options.tokens), CHUNK_TOKENS)
    small, large = (used_bytes(filled(model, tokens)) for tokens in (4096, 8192))
    for step in range(16):
        run(model, [5], cache, options.tokens + step)
    return {"bytes_per_token": (large - small) / 4096}


def used_bytes(cache: Any) -> int:
    storages = [tensor.untyped_storage() for layer in cache.layers for tensor in tensors(vars(layer))]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def tensors(found: object) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        for value in found.values():
            yield from tensors(value)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
