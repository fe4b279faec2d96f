"""The configurations of the embedded models, in the words of config.json. Knows nothing of training."""

from __future__ import annotations

from tenfold.config import DeepseekV4Config
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

CONFIGS: dict[str, DeepseekV4Config] = {
    "tiny-v4-flash": tiny_config(**_FLASH),
    "tiny-v4-pro": tiny_config(**_PRO),
}
