"""The GPU backend: every operation as Triton kernels, from Ampere on. Knows nothing of layers.

What the files agree on:

- Functions have the signature and the meaning of their namesakes in `ops/reference.py`; those whose numerics
  depend on `exact` take `parts` beside: 1 rounds activations to bf16 before a matrix product, 3 multiplies them
  as they are, in three bf16 terms (`lowp.mm_split`). Activations are float32 on the way in and out.
- Tensors live on one device: cuda, or cpu in the interpreter. New ones come from
  `x.new_empty` or `device=x.device`.
- No function reads a tensor's contents on the host, and shapes follow from shapes alone, so a step can be captured
  in a CUDA graph. (So `select_rows` has min(topk, rows of keys) columns, -1 at the end.)
- Kernels touch low-precision numbers through `lowp` alone; every format decision is a `tl.constexpr`.
- In the interpreter time goes by the number of operations, not by their size: `lowp.INTERPRET` chooses large tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tenfold.config import DeepseekV32Config, ModelConfig
from tenfold.ops import Experts, Weight, reference
from tenfold.ops.triton import (
    accelerators,
    attention,
    compress,
    experts,
    hyper,
    index,
    latent,
    linear,
    route,
    rows,
    sessions,
)
from tenfold.ops.triton.far import FarExperts
from tenfold.ops.triton.lowp import INTERPRET

__all__ = ["Triton"]


class Triton:
    """The operations on one device. `exact` multiplies activations unrounded."""

    reads_codes = True
    embed = staticmethod(compress.embed)
    look_up = staticmethod(reference.look_up)
    rms_norm = staticmethod(rows.rms_norm)
    layer_norm = staticmethod(rows.layer_norm)
    rope = staticmethod(rows.rope)
    norm_rope = staticmethod(rows.norm_rope)
    norm_rope_pack = staticmethod(rows.norm_rope_pack)
    rope_round = staticmethod(rows.rope_round)
    hadamard = staticmethod(rows.hadamard)
    pack_rows = staticmethod(rows.pack_rows)
    unpack_rows = staticmethod(rows.unpack_rows)
    hc_embed = staticmethod(compress.hc_embed)
    hc_mix = staticmethod(hyper.hc_mix)
    hc_merge = staticmethod(hyper.hc_merge)
    hc_collapse = staticmethod(hyper.hc_collapse)
    compress = staticmethod(compress.compress)
    route = staticmethod(route.route)
    select_rows = staticmethod(index.select_rows)
    store_rows = staticmethod(sessions.store_rows)
    compress_step = staticmethod(sessions.compress_step)
    hc_merge_mix = staticmethod(hyper.hc_merge_mix)
    enter = staticmethod(sessions.enter)
    enter_latent = staticmethod(latent.enter_latent)

    def __init__(self, *, exact: bool) -> None:
        self.device = torch.device("cpu" if INTERPRET.value else "cuda")
        parts = 3 if exact else 1
        self.linear = partial(linear.linear, parts=parts)
        self.linear_each = partial(linear.linear_each, parts=parts)
        self.norm_linear_each = partial(linear.norm_linear_each, parts=parts)
        self.linear_onto = partial(linear.linear_onto, parts=parts)
        self.grouped_linear = partial(linear.grouped_linear, parts=parts)
        self.grouped_linear_into = partial(linear.grouped_linear_into, parts=parts)
        self.parts = parts
        self.sparse_attention: Callable[..., Tensor] = attention.sparse_attention
        self.verdict: accelerators.Verdict | None = None
        self.far: FarExperts | None = None
        self.feed_forward = partial(experts.feed_forward, parts=parts)
        self.feed_forward_onto = partial(experts.feed_forward_onto, parts=parts)

    def accelerate(self, config: ModelConfig) -> None:
        """Lets kernels of others take the place of ours, where they win on this card (`accelerators.py`)."""
        if self.device.type == "cuda" and isinstance(config, DeepseekV32Config) and self.parts == 1:
            if accelerators.FLASH_MLA.version is not None:
                self.verdict, self.sparse_attention = accelerators.try_attention(
                    self.device, config.num_attention_heads
                )

    def prepare(self, weight: Weight, resident: bool) -> Weight:
        """The weight as it is stored, on the device."""
        return _moved(weight, self.device)

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        bank: Experts,
        breathe: Callable[[], None] | None = None,
        **words: Any,
    ) -> Tensor:
        """As in `Ops`; nothing here takes long."""
        self._seen(bank, ids)
        return experts.experts(x, ids, weights, bank, parts=self.parts, **words)

    def experts_apart(self, x: Tensor, ids: Tensor, weights: Tensor, bank: Experts, **words: Any) -> Tensor:
        return self.experts(x, ids, weights, bank, summed=False, **words)

    def experts_onto(
        self, x: Tensor, norm: Weight, eps: float, ids: Tensor, weights: Tensor, bank: Experts, **words: Any
    ) -> Tensor:
        self._seen(bank, ids)
        return experts.experts_onto(x, norm, eps, ids, weights, bank, parts=self.parts, **words)

    def _seen(self, bank: Experts, ids: Tensor) -> None:
        if self.far is not None:
            self.far.seen(bank, experts.bank_table(bank, self.device), ids)

    def keep_experts_far(self, hot: int) -> FarExperts:
        """Routed experts are read where `keep` of what comes back puts them, copies of `hot` of each layer apart."""
        self.far = FarExperts(self.device, hot)
        return self.far

    def rest(self) -> None:
        """Between two passes."""
        if self.far is not None:
            self.far.rest()

    def dequantize(self, weight: Weight) -> Tensor:
        """Only models being built ask for it, so the reference does it, on the CPU."""
        return reference.dequantize(_moved(weight, torch.device("cpu"))).to(weight.data.device)


def _moved(weight: Weight, device: torch.device) -> Weight:
    if weight.data.device.type == device.type:
        return weight
    scale = None if weight.scale is None else weight.scale.to(device)
    return Weight(weight.name, weight.shape, weight.format, weight.data.to(device), scale)
