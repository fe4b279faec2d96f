"""DeepSeek V3.2: multi-head latent attention over tokens an indexer selects (spec 5).

Attribute names are the checkpoint's tensor names. Knows nothing of sessions beyond their streams.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold.config import DeepseekV32Config, LayerSpec
from tenfold.formats import BF16, F32, FP8_BLOCK, FP8_BLOCK_F32
from tenfold.models.blocks import Binder, add_shared, attend, fused, select, select_fused, through_layers
from tenfold.ops import FusedOps, Rows, Stack, Weight
from tenfold.step import BatchSpan, Span, Step

__all__ = ["DeepseekV32"]

# Of the norms inside attention; `rms_norm_eps` is for those between the sub-layers alone, and 1e-6 as well in V3.2.
_INNER_NORM_EPS = 1e-6


class DeepseekV32:
    """V3.2, any size."""

    def __init__(self, config: DeepseekV32Config, bind: Binder) -> None:
        self.config, self.ops = config, bind.ops
        self.embed_tokens = bind("model.embed_tokens.weight")
        self.layers = [Block(config, layer, bind) for layer in config.layers]
        self.norm = bind("model.norm.weight")
        self.lm_head = bind("lm_head.weight")

    def forward(self, step: Step) -> Tensor:
        """Runs all tokens through one layer before the next; logits float32 [rows wanted, vocab]."""
        h = self.ops.embed(step.ids, self.embed_tokens)
        h = through_layers(self.layers, h, step)
        return self.ops.linear(self.ops.rms_norm(step.of_wanted(h), self.norm, self.config.rms_norm_eps), self.lm_head)


class Block:
    """One pre-norm residual layer."""

    def __init__(self, config: DeepseekV32Config, layer: LayerSpec, bind: Binder) -> None:
        prefix = f"model.layers.{layer.index}."
        self.ops, self.eps = bind.ops, config.rms_norm_eps
        self.input_layernorm = bind(prefix + "input_layernorm.weight")
        self.self_attn = Attention(config, layer, bind, prefix + "self_attn.")
        self.post_attention_layernorm = bind(prefix + "post_attention_layernorm.weight")
        kind = DenseFFN if layer.router == "dense" else MoE
        self.mlp = kind(config, bind, prefix + "mlp.")

    def forward(self, h: Tensor, step: Step) -> Tensor:
        one = fused(self.ops, step)
        if one is not None:
            h = self.self_attn.forward_fused(one, h, self.input_layernorm, step)
            step.breathe()
            return self.mlp.forward_fused(one, h, self.post_attention_layernorm)
        h = self.attend(h, step)
        step.breathe()
        return h + self.mlp.forward(self.ops.rms_norm(h, self.post_attention_layernorm, self.eps))

    def attend(self, h: Tensor, step: Step) -> Tensor:
        return h + self.self_attn.forward(self.ops.rms_norm(h, self.input_layernorm, self.eps), step)

    def feed(self, h: Tensor, step: Step) -> None:
        x = self.ops.rms_norm(h, self.post_attention_layernorm, self.eps)
        h += self.mlp.forward_wide(x, step)


class Attention:
    """MLA, absorbed: queries are carried into the latent space, where one row is key and value (spec 5.2)."""

    def __init__(self, config: DeepseekV32Config, layer: LayerSpec, bind: Binder, prefix: str) -> None:
        self.config, self.layer, self.ops = config, layer, bind.ops
        self.q_a_proj, self.q_b_proj = bind(prefix + "q_a_proj.weight"), bind(prefix + "q_b_proj.weight")
        self.q_a_layernorm = bind(prefix + "q_a_layernorm.weight")
        self.kv_a_proj_with_mqa = bind(prefix + "kv_a_proj_with_mqa.weight")
        self.kv_a_layernorm = bind(prefix + "kv_a_layernorm.weight")
        self.o_proj = bind(prefix + "o_proj.weight")
        self.k_up, self.v_up = self._absorbed(bind, prefix + "kv_b_proj.weight")
        self.layout = bind.layout(layer.stream("rows").layout)
        self.frequencies = bind.frequencies(layer.rope)
        self.indexer = Indexer(config, layer, bind, prefix + "indexer.")
        self.inputs = Stack((self.q_a_proj, self.kv_a_proj_with_mqa, self.indexer.wk, self.indexer.weights_proj))
        self.queries = Stack((self.q_b_proj, self.indexer.wq_b))

    def _absorbed(self, bind: Binder, name: str) -> tuple[Weight, Weight]:
        """kv_b_proj as two grouped projections, one a head: nope -> latent for keys, latent -> value.

        Unpacked, unless the backend multiplies codes with activations as fine as the models were trained for.
        """
        weight, c = bind.take(name), self.config
        whole = not any(size % 128 for size in (c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank))
        kept = (BF16, FP8_BLOCK, FP8_BLOCK_F32) if whole else (BF16,)  # else a block is part of two heads
        if not getattr(bind.ops, "reads_codes", False) or weight.format not in kept:
            weight = Weight(name, weight.shape, F32, bind.ops.dequantize(weight))
        parts = split_by_head(weight, c.num_attention_heads, c.qk_nope_head_dim)
        k_up, v_up = (bind.ops.prepare(part, bind.resident) for part in parts)
        return k_up, v_up

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [n, hidden], normed -> [n, hidden]; new rows enter the streams of each span."""
        ops = self.ops
        q_latent, row, key, weights = (ops.linear(x, weight) for weight in self.inputs.weights)
        q_latent = ops.rms_norm(q_latent, self.q_a_layernorm, _INNER_NORM_EPS)
        q, q_index = (ops.linear(q_latent, weight) for weight in self.queries.weights)
        q = self._queries(q, step)
        rows = self._rows(row, step)
        chosen = self.indexer.select(q_index, key, weights, step)
        outs = [self._attend(q[s.rows], rows[s.rows], s, chosen[i], step) for i, s in enumerate(step.spans)]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return ops.linear(ops.grouped_linear(out, self.v_up), self.o_proj)

    def forward_fused(self, one: FusedOps, h: Tensor, norm: Weight, step: Step) -> Tensor:
        """h and what attention makes of it, normed, of a batch: all that streams take enters at once."""
        c, (batch,) = self.config, step.spans
        assert isinstance(batch, BatchSpan)
        q_latent, row, key, weights = one.norm_linear_each(h, norm, c.rms_norm_eps, self.inputs)
        q, q_index = one.norm_linear_each(q_latent, self.q_a_layernorm, _INNER_NORM_EPS, self.queries)
        q = q.view(-1, c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim)
        rows, index = batch.streams.rows(self.layer.index), self.indexer
        keys = batch.streams.rows(self.layer.index, "index_keys")
        queries, q_index = one.enter_latent(
            q, q_index.view(-1, c.index_n_heads, c.index_head_dim), row, key, self.kv_a_layernorm,
            index.k_norm_weight, index.k_norm_bias, _INNER_NORM_EPS, step.positions, self.frequencies,
            rows.packed, rows.layout, keys.packed, keys.layout, index.spread,
        )  # fmt: skip
        one.grouped_linear_into(q, self.k_up, queries)
        chosen = index.select_fused(one, q_index, weights, batch)
        source = Rows(rows.packed, rows.layout, index=chosen, most=rows.most)
        out = attend(one, step, batch, queries, [source], None, c.softmax_scale, c.kv_lora_rank)
        return one.linear_onto(h, one.grouped_linear(out, self.v_up), self.o_proj)

    def _queries(self, q: Tensor, step: Step) -> Tensor:
        """[n, heads, kv_lora_rank + rope]: the nope part carried into the latent space, the rope part rotated."""
        c, ops = self.config, self.ops
        q = q.view(q.shape[0], c.num_attention_heads, -1)
        nope, rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=2)
        nope = ops.grouped_linear(nope, self.k_up).view(q.shape[0], c.num_attention_heads, c.kv_lora_rank)
        return torch.cat([nope, ops.rope(rope, step.positions, self.frequencies)], dim=2)

    def _rows(self, row: Tensor, step: Step) -> Tensor:
        c, ops = self.config, self.ops
        latent, rope = row.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=1)
        latent = ops.rms_norm(latent, self.kv_a_layernorm, _INNER_NORM_EPS)
        return ops.pack_rows(torch.cat([latent, ops.rope(rope, step.positions, self.frequencies)], 1), self.layout)

    def _attend(self, q: Tensor, rows: Tensor, span: Span | BatchSpan, chosen: Tensor, step: Step) -> Tensor:
        stream = span.streams.rows(self.layer.index)
        stream.append(rows)
        source = Rows(stream.packed, stream.layout, index=chosen, most=stream.most)
        c = self.config
        return attend(self.ops, step, span, q, [source], None, c.softmax_scale, c.kv_lora_rank)


def split_by_head(weight: Weight, heads: int, first: int) -> tuple[Weight, Weight]:
    """The `first` rows of each head's, transposed, and the other rows: as stored, FP8 where blocks of 128 fit."""

    def parts(tensor: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        head = tensor.view(heads, -1, tensor.shape[1])
        one, other = head[:, :rows].transpose(1, 2), head[:, rows:]
        return one.reshape(-1, rows).contiguous(), other.reshape(-1, tensor.shape[1]).contiguous()

    data = parts(weight.data, first)
    scales = (None, None) if weight.scale is None else parts(weight.scale, first // 128)
    one, other = (
        Weight(weight.name, tuple(codes.shape), weight.format, codes, scale)
        for codes, scale in zip(data, scales, strict=True)
    )
    return one, other


class Indexer:
    """Chooses the tokens each query attends to (spec 5.4)."""

    def __init__(self, config: DeepseekV32Config, layer: LayerSpec, bind: Binder, prefix: str) -> None:
        self.config, self.layer, self.ops = config, layer, bind.ops
        self.wq_b, self.wk = bind(prefix + "wq_b.weight"), bind(prefix + "wk.weight")
        self.k_norm_weight, self.k_norm_bias = bind(prefix + "k_norm.weight"), bind(prefix + "k_norm.bias")
        self.weights_proj = bind(prefix + "weights_proj.weight")
        self.layout = bind.layout(layer.stream("index_keys").layout)
        self.frequencies = bind.frequencies(layer.rope)
        # Unquantised, the Hadamard transform cancels between query and key.
        self.spread = not bind.exact
        self.factor = float((config.index_head_dim * config.index_n_heads) ** -0.5)

    def select(self, q: Tensor, key: Tensor, weights: Tensor, step: Step) -> list[Tensor]:
        """Of what `wq_b`, `wk` and `weights_proj` make of the tokens: new keys enter the streams.

        Then int32 [tokens, up to index_topk] positions for each span, -1 = none.
        """
        c, ops = self.config, self.ops
        q = self._rotated(q.view(-1, c.index_n_heads, c.index_head_dim), step)
        if self.spread:
            q = ops.unpack_rows(ops.pack_rows(q, self.layout), self.layout)
        key = ops.layer_norm(key, self.k_norm_weight, self.k_norm_bias, _INNER_NORM_EPS)
        keys = ops.pack_rows(self._rotated(key, step), self.layout)
        return [self._select(q[span.rows], weights[span.rows], keys[span.rows], span, step) for span in step.spans]

    def select_fused(self, one: FusedOps, q: Tensor, weights: Tensor, batch: BatchSpan) -> Tensor:
        """The same for a batch, whose keys are in the streams, of queries as `enter_latent` makes them."""
        return select_fused(one, q, weights, batch, self.layer, self.config.index_topk, self.factor)

    def _rotated(self, x: Tensor, step: Step) -> Tensor:
        """The rope channels come FIRST here and pair (i, i + rope/2), unlike everywhere else (trap 10)."""
        rope_dim = self.config.qk_rope_head_dim
        rope = self.ops.rope(x[..., :rope_dim], step.positions, self.frequencies, interleaved=False)
        x = torch.cat([rope, x[..., rope_dim:]], dim=-1)
        return self.ops.hadamard(x) if self.spread else x

    def _select(self, q: Tensor, weights: Tensor, keys: Tensor, span: Span | BatchSpan, step: Step) -> Tensor:
        stream = span.streams.rows(self.layer.index, "index_keys")
        stream.append(keys)
        _, visible = span.entries(1)
        return select(self.ops, step, q, weights, stream, visible, self.config.index_topk, self.factor)


class DenseFFN:
    """The feed-forward network of the first layers."""

    def __init__(self, config: DeepseekV32Config, bind: Binder, prefix: str) -> None:
        self.config, self.ops = config, bind.ops
        self.gate_proj, self.down_proj, self.up_proj = (
            bind(f"{prefix}{name}.weight") for name in ("gate_proj", "down_proj", "up_proj")
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.feed_forward(x, self.gate_proj, self.down_proj, self.up_proj, None)

    def forward_wide(self, x: Tensor, step: Step) -> Tensor:
        """The same of more tokens than a tile has."""
        y = torch.empty_like(x)
        for rows, _ in step.tiles():
            y[rows] = self.forward(x[rows])
            step.breathe()
        return y

    def forward_fused(self, one: FusedOps, h: Tensor, norm: Weight) -> Tensor:
        """h and what comes of it, normed, of a batch."""
        weights = self.gate_proj, self.down_proj, self.up_proj
        return one.feed_forward_onto(h, norm, self.config.rms_norm_eps, *weights, None)


class MoE:
    """Group-limited sigmoid routing, experts weighed after their last projection, and the shared one (spec 5.5)."""

    def __init__(self, config: DeepseekV32Config, bind: Binder, prefix: str) -> None:
        self.config, self.ops = config, bind.ops
        self.gate = bind(prefix + "gate.weight")
        self.e_score_correction_bias = bind(prefix + "gate.e_score_correction_bias")
        names = ("gate_proj", "down_proj", "up_proj")
        self.experts = bind.experts(prefix + "experts.", config.n_routed_experts, names)
        self.shared_experts = bind.shared_expert(prefix + "shared_experts.", names)

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.ops.route(x, self.gate, **self._choice)
        return self.ops.experts(x, ids, weights, self.experts, shared=self.shared_experts, **self._sum)

    def forward_wide(self, x: Tensor, step: Step) -> Tensor:
        """The same of more tokens than a tile has."""
        ids, weights = self.ops.route(x, self.gate, **self._choice)
        y = self.ops.experts(x, ids, weights, self.experts, breathe=step.breathe, **self._sum)
        return add_shared(self.ops, y, x, self.shared_experts, None, step)

    def forward_fused(self, one: FusedOps, h: Tensor, norm: Weight) -> Tensor:
        """h and what comes of it, normed, of a batch."""
        eps = self.config.rms_norm_eps
        ids, weights = one.route(h, self.gate, norm=norm, eps=eps, **self._choice)
        return one.experts_onto(h, norm, eps, ids, weights, self.experts, shared=self.shared_experts, **self._sum)

    @property
    def _choice(self) -> dict[str, Any]:
        c = self.config
        return {
            "scoring": "sigmoid",
            "topk": c.num_experts_per_tok,
            "scaling": c.routed_scaling_factor,
            "bias": self.e_score_correction_bias,
            "groups": c.n_group,
            "topk_group": c.topk_group,
        }

    @property
    def _sum(self) -> dict[str, Any]:
        return {"limit": None, "weigh_first": False}
