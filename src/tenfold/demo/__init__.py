"""The first thing a newcomer sees: the embedded V4 model reads a real document, beside V3.2's architecture.

The V4 model is trained; its V3.2 twin of the same width is random, since only its bytes and seconds are looked at.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tenfold import config as configuration
from tenfold import terminal
from tenfold.chat import Parser, Profile
from tenfold.chat_v32 import BOS
from tenfold.completion import Completion, load_tokenizer
from tenfold.config import DeepseekV4Config, ModelConfig
from tenfold.engine import Engine, Session
from tenfold.haystack import embedded_document
from tenfold.sampler import SamplingParams
from tenfold.synth import synth

__all__ = ["MODEL", "embedded_document", "show", "v32_twin"]

MODEL = "tiny-v4-flash"
_PIECE_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading one document took."""

    model: str
    tokens: int
    seconds: float
    kv_bytes: dict[str, int]
    kv_bytes_per_token: float
    nats: float


def show(text: str | None, *, max_tokens: int, seed: int, quiet: bool, threads: int | None = None) -> dict[str, Any]:
    """Reads `text` (default: the embedded document), goes on with it, and returns all figures; prints unless quiet."""
    document = embedded_document() if text is None else text
    engine = Engine.load(MODEL, threads=threads)
    tokenizer = load_tokenizer(configuration.locate(MODEL), engine)
    bos = tokenizer.token_to_id(BOS)
    ids = [*([] if bos is None else [bos]), *tokenizer.encode(document)]
    session = engine.session()
    if not quiet:
        _introduce(document, ids, engine)
    v4 = _read(MODEL, session, ids)
    # The document ends where a new one may begin: without its end mark the model goes on with this one.
    bias = dict.fromkeys(engine.config.eos_token_id, -100.0)
    params = SamplingParams(max_tokens=max_tokens, seed=seed, temperature=0.7, top_p=0.95, logit_bias=bias)
    completion = Completion(session, tokenizer, Parser(Profile.PLAIN), params)
    continuation = "".join(event.text for event in completion)
    if not quiet:
        terminal.out.print(f"... {document[-200:]}", style="dim", markup=False, soft_wrap=True)
        terminal.out.print(continuation, style="bold", markup=False, soft_wrap=True)
    v32 = _read_with_twin(engine.config, ids)
    found = _figures(document, v4, v32, continuation)
    if not quiet:
        _show_figures(found)
    return found


def _introduce(document: str, ids: list[int], engine: Engine) -> None:
    terminal.talk.print(
        f"{MODEL}: a small network of V4-Flash's architecture, trained from scratch; see its README for what it is.\n"
        f"The document has {len(document.encode()):,} bytes, {len(ids):,} tokens; backend {engine.backend}.",
        soft_wrap=True,
    )


def _read(name: str, session: Session, ids: list[int]) -> Reading:
    """Feeds the document in pieces and scores each token by the logits before it."""
    nats, before = 0.0, None
    with terminal.reading(len(ids), f"{name:<14}") as clock:
        for start in range(0, len(ids), _PIECE_TOKENS):
            piece = ids[start : start + _PIECE_TOKENS]
            logits = session.feed(piece, logits="all")
            predictions = logits[:-1] if before is None else torch.cat([before[None], logits[:-1]])
            targets = torch.tensor(piece[1:] if before is None else piece)
            nats += float(torch.nn.functional.cross_entropy(predictions, targets, reduction="sum"))
            before = logits[-1]
            clock.advance(start + len(piece))
    per_token = session.engine.config.kv_bytes_per_token
    return Reading(name, len(ids), clock.elapsed_s, session.kv_bytes(), per_token, nats)


def _read_with_twin(config: ModelConfig, ids: list[int]) -> Reading:
    assert isinstance(config, DeepseekV4Config)
    with tempfile.TemporaryDirectory(prefix="tenfold-") as folder:
        synth(configuration.parse(v32_twin(config)), Path(folder) / "twin")
        return _read("V3.2 twin", Engine.load(Path(folder) / "twin").session(), ids)


def v32_twin(config: DeepseekV4Config) -> dict[str, Any]:
    """The config.json of a V3.2 network of the same width, in V3.2's own proportions to V4-Flash."""
    published = configuration.preset("v3.2").raw
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "index_n_heads",
            "qk_rope_head_dim", "index_head_dim", "moe_intermediate_size", "n_routed_experts", "n_shared_experts",
            "num_experts_per_tok", "max_position_embeddings")  # fmt: skip
    return {
        **published,
        **{name: getattr(config, name) for name in same},
        "num_key_value_heads": config.num_attention_heads,
        "kv_lora_rank": config.head_dim,
        "qk_nope_head_dim": config.head_dim // 4,
        "v_head_dim": config.head_dim // 4,
        "index_topk": 4 * config.index_topk,
        "intermediate_size": config.moe_intermediate_size * (config.num_experts_per_tok + 1),
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_id),
    }


def _figures(document: str, v4: Reading, v32: Reading, continuation: str) -> dict[str, Any]:
    columns = {
        reading.model: {
            "tokens": reading.tokens,
            "seconds": round(reading.seconds, 2),
            "tokens_per_s": round(reading.tokens / reading.seconds, 1),
            "kv_bytes": reading.kv_bytes,
            "kv_bytes_total": sum(reading.kv_bytes.values()),
            "kv_bytes_per_token": reading.kv_bytes_per_token,
        }
        for reading in (v4, v32)
    }
    bits = v4.nats / math.log(2) / len(document.encode())
    return {"bits_per_byte": round(bits, 4), "continuation": continuation, "models": columns}


def _show_figures(found: dict[str, Any]) -> None:
    models = found["models"]
    names = list(models)
    components = sorted({part for figures in models.values() for part in figures["kv_bytes"]})
    rows = [
        ("tokens read", *(f"{models[name]['tokens']:,}" for name in names)),
        ("seconds", *(f"{models[name]['seconds']:,.1f}" for name in names)),
        ("tokens/s", *(f"{models[name]['tokens_per_s']:,.0f}" for name in names)),
        *((f"KV {part}", *(f"{models[name]['kv_bytes'].get(part, 0):,}" for name in names)) for part in components),
        ("KV bytes, all", *(f"{models[name]['kv_bytes_total']:,}" for name in names)),
        ("KV per further token", *(f"{models[name]['kv_bytes_per_token']:,.1f}" for name in names)),
    ]
    terminal.out.print(terminal.table("", ("", *names), rows))
    v4, v32 = (models[name] for name in names)
    share = v4["kv_bytes_total"] / v32["kv_bytes_total"]
    terminal.out.print(
        f"V4's memory of the document is {share:.1%} of V3.2's. The model predicted the document at "
        f"{found['bits_per_byte']:.3f} bits per byte. The twin is random: only its bytes and seconds mean anything.",
        soft_wrap=True,
    )
