"""A random network of V3.2's architecture, as wide as a V4 model: for bytes and seconds, it has learned nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tenfold import config as configuration
from tenfold.config import DeepseekV4Config
from tenfold.synth import synth

__all__ = ["TWIN", "v32_twin", "written_twin"]

TWIN = "V3.2 twin"


@contextmanager
def written_twin(model: str) -> Iterator[Path]:
    """The folder of a twin of `model`; it goes with the block."""
    config = configuration.load(model)
    assert isinstance(config, DeepseekV4Config)
    with tempfile.TemporaryDirectory(prefix="tenfold-") as folder:
        synth(configuration.parse(v32_twin(config)), Path(folder) / "twin")
        yield Path(folder) / "twin"


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
