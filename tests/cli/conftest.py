"""A tiny random model with the embedded model's tokenizer, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tenfold import config
from tenfold.synth import synth

TINY = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128, 0],
    "num_attention_heads": 2,
    "head_dim": 128,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 32,
    "index_n_heads": 16,
    "index_head_dim": 64,
    "index_topk": 8,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 2048,
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with weights, config and tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    synth(config.parse({**config.preset("v4-flash").raw, **TINY}), folder, fmt="bf16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(config.locate("tiny-v4-flash") / name, folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes to the user's own store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
