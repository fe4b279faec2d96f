"""The configurations of the embedded models, in the words of config.json. Knows nothing of training."""

from __future__ import annotations

from tenfold import config as configuration
from tenfold.config import ModelConfig
from training.model import tiny_config

__all__ = ["CONFIGS"]

# 64 of 192 channels tell the position, so that what a row holds can be found at any distance; the same for index keys.
_FLASH = {
    "compress_ratios": [0, 0, 4, 128, 4, 0],
    "head_dim": 192,
    "index_head_dim": 128,
    "index_n_heads": 2,
    "index_topk": 128,
    "num_hash_layers": 2,
    "num_hidden_layers": 5,
}

# Pro's pattern, and Pro's proportions to Flash: twice the heads, groups and chosen rows, half as many experts again.
_PRO = _FLASH | {
    "compress_ratios": [128, 128, 4, 128, 4, 0],
    "index_topk": 256,
    "n_routed_experts": 8,
    "num_attention_heads": 8,
    "o_groups": 4,
    "routed_scaling_factor": 2.5,
}

# V3.2 in its own proportions to V4-Flash: four times as many chosen tokens as Flash has chosen entries, a dense first
# layer, experts in two groups of which one is asked.
_V32 = dict(configuration.preset("v3.2").raw) | {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_size": 256,
    "index_head_dim": 128,
    "index_n_heads": 2,
    "index_topk": 512,
    "intermediate_size": 384,
    "kv_lora_rank": 128,
    "max_position_embeddings": 1048576,
    "moe_intermediate_size": 128,
    "n_group": 2,
    "n_routed_experts": 4,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "rope_scaling": configuration.preset("v3.2").raw["rope_scaling"] | {"factor": 256},
    "topk_group": 1,
    "v_head_dim": 64,
    "vocab_size": 2048,
}

CONFIGS: dict[str, ModelConfig] = {
    "tiny-v4-flash": tiny_config(**_FLASH),
    "tiny-v4-pro": tiny_config(**_PRO),
    "tiny-v3.2": configuration.parse(_V32),
}
