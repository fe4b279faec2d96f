"""One task on llama.cpp, through the ctypes binding of llama-cpp-python.

Its context cannot be filled from outside: for a long one an empty sequence starts far behind position 0, so that it
scans rows of zeros it never wrote. That is kind to it: really filled caches were up to 20 % slower at 16K.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re

import numpy as np
from common import CHUNK_TOKENS, VOCAB, arguments, decode_steps, memory_mb, random_ids, report, save_logits, seconds

OPTIONS = arguments(
    ("dense", str, "q8"), ("kv", str, "q8_0"), ("ubatch", int, CHUNK_TOKENS), ("lib", str, "")
)  # before the import, which looks for the libraries
if OPTIONS.lib:
    os.environ["LLAMA_CPP_LIB_PATH"] = OPTIONS.lib

import llama_cpp  # noqa: E402
from llama_cpp import llama_cpp as L  # noqa: E402

TYPES = {"f16": 1, "q8_0": 8}
LONGEST_FILL = 4096
"""Contexts up to here are really read before writing is timed."""


class Llama:
    """A model and a context of its own."""

    def __init__(self, options: argparse.Namespace, n_ctx: int) -> None:
        self.lines: list[str] = []
        self._log = L.llama_log_callback(lambda level, text, data: self.lines.append(text.decode(errors="replace")))
        L.llama_log_set(self._log, ctypes.c_void_p(0))
        L.llama_backend_init()
        model_params = L.llama_model_default_params()
        model_params.n_gpu_layers = 0
        path = str(options.work / f"{options.dense}.gguf").encode()
        self.model = L.llama_load_model_from_file(path, model_params)
        params = L.llama_context_default_params()
        params.n_ctx, params.n_ubatch = n_ctx, options.ubatch
        params.n_batch = max(options.ubatch, CHUNK_TOKENS)
        params.n_threads = params.n_threads_batch = 2
        params.n_seq_max, params.swa_full = 1, False
        params.type_k = params.type_v = TYPES[options.kv]
        self.context = L.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp made no context:\n" + "".join(self.lines[-20:]))
        self.batch = L.llama_batch_init(int(params.n_batch), 0, 1)
        self.most = int(params.n_batch)

    def run(self, ids: list[int], position: int) -> None:
        for start in range(0, len(ids), self.most):
            self._run(ids[start : start + self.most], position + start)

    def _run(self, ids: list[int], position: int) -> None:
        batch = self.batch
        batch.n_tokens = len(ids)
        for j, token in enumerate(ids):
            batch.token[j], batch.pos[j] = token, position + j
            batch.n_seq_id[j], batch.seq_id[j][0] = 1, 0
            batch.logits[j] = j == len(ids) - 1
        code = L.llama_decode(self.context, batch)
        if code:
            raise SystemExit(f"llama_decode answered {code}:\n" + "".join(self.lines[-20:]))
        L.llama_synchronize(self.context)

    def logits(self) -> np.ndarray:
        return np.ctypeslib.as_array(L.llama_get_logits_ith(self.context, -1), (VOCAB,)).copy()

    def clear(self) -> None:
        L.llama_memory_clear(L.llama_get_memory(self.context), True)


def main() -> None:
    result = globals()[OPTIONS.task](OPTIONS)
    report(**result, peak_mb=memory_mb(), version=llama_cpp.__version__)


def prefill(options: argparse.Namespace) -> dict[str, object]:
    llama, ids = Llama(options, options.tokens + CHUNK_TOKENS), random_ids(options.tokens)
    llama.run(ids[:CHUNK_TOKENS], 0)
    llama.clear()
    return {"tps": options.tokens / seconds(lambda: llama.run(ids, 0))}


def chunk(options: argparse.Namespace) -> dict[str, object]:
    llama, ids = Llama(options, options.tokens + 2 * CHUNK_TOKENS), random_ids(CHUNK_TOKENS)
    ids = ids[: options.ubatch]
    llama.run(ids, options.tokens - len(ids))
    return {"tps": len(ids) / seconds(lambda: llama.run(ids, options.tokens)), "timed_tokens": len(ids)}


def decode(options: argparse.Namespace) -> dict[str, object]:
    llama, last = Llama(options, options.tokens + 2 * CHUNK_TOKENS), {"id": 5, "position": options.tokens}
    if options.tokens <= LONGEST_FILL:
        llama.run(random_ids(options.tokens), 0)
    else:
        llama.run(random_ids(options.ubatch), options.tokens - options.ubatch)

    def step() -> None:
        llama.run([last["id"]], last["position"])
        last.update(id=int(llama.logits().argmax()), position=last["position"] + 1)

    return decode_steps(step)


def logits(options: argparse.Namespace) -> dict[str, object]:
    llama = Llama(options, options.tokens + CHUNK_TOKENS)
    llama.run(random_ids(options.tokens, seed=7), 0)
    name = f"llama.cpp-{options.dense}-{options.kv}"
    return dict(save_logits(options.work, name, options.tokens, llama.logits()))


def memory(options: argparse.Namespace) -> dict[str, object]:
    llama = Llama(options, options.tokens + CHUNK_TOKENS)
    llama.run(random_ids(options.tokens), 0)
    for step in range(16):
        llama.run([5], options.tokens + step)
    peak_mb = memory_mb()  # of the short context: before the long one below
    small, large = (cache_mib(options, n_ctx) for n_ctx in (1 << 18, 1 << 20))
    per_token = (large - small) * 2**20 / (3 << 18)
    return {"bytes_per_token": per_token, "short_peak_mb": peak_mb}


def cache_mib(options: argparse.Namespace, n_ctx: int) -> float:
    """What llama.cpp says it set aside for rows of the context."""
    lines = "".join(Llama(options, n_ctx).lines)
    return sum(float(size) for size in re.findall(r"(?:KV|kv|state|cache)\S* buffer size = +([\d.]+) MiB", lines))


if __name__ == "__main__":
    main()
