"""One task on flyweight-llm. It offers no way to make up a context, so what is not read within the limit is missing."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from typing import Any

import numpy as np
from common import CHUNK_TOKENS, arguments, decode_steps, memory_mb, random_ids, report, save_logits, seconds
from flyweight.deepseek4 import Deepseek4Runtime
from flyweight.v2 import V2Model


def main() -> None:
    options = arguments(("dense", str, "q8"), ("kv", str, "f16"))
    model = V2Model(str(options.work / f"{options.dense}.gguf"))
    runtime = Deepseek4Runtime(model, options.tokens + 256, cache_type_k=options.kv, cache_type_v=options.kv)
    result = globals()[options.task](runtime, options)
    report(**result, peak_mb=memory_mb(), version=version("flyweight-llm"))


def read(runtime: Any, ids: list[int]) -> None:
    for start in range(0, len(ids), CHUNK_TOKENS):
        runtime.prefill(np.array(ids[start : start + CHUNK_TOKENS], np.uint32))


def prefill(runtime: Any, options: argparse.Namespace) -> dict[str, object]:
    ids = random_ids(options.tokens)
    read(runtime, ids[:CHUNK_TOKENS])
    runtime.reset()
    return {"tps": options.tokens / seconds(lambda: read(runtime, ids))}


def decode(runtime: Any, options: argparse.Namespace) -> dict[str, object]:
    read(runtime, random_ids(options.tokens))
    last = {"id": 5}

    def step() -> None:
        last["id"] = int(np.argmax(runtime.forward(last["id"])))

    return decode_steps(step)


def logits(runtime: Any, options: argparse.Namespace) -> dict[str, object]:
    ids = random_ids(options.tokens, seed=7)
    read(runtime, ids[:-1])
    return dict(save_logits(options.work, f"flyweight-{options.dense}", options.tokens, runtime.forward(ids[-1])))


def memory(runtime: Any, options: argparse.Namespace) -> dict[str, object]:
    ids = random_ids(options.tokens)
    read(runtime, ids[: options.tokens // 2])
    before = int(runtime.info["state_bytes"])
    read(runtime, ids[options.tokens // 2 :])
    grown = int(runtime.info["state_bytes"]) - before
    for _ in range(16):
        runtime.forward(5)
    return {"bytes_per_token": grown / (options.tokens // 2)}


if __name__ == "__main__":
    main()
