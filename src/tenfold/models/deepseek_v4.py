"""DeepSeek V4: hyper-connected blocks of compressed sparse attention and experts (spec 2).

Attribute names are the checkpoint's tensor names. Knows nothing of sessions beyond their streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold.config import DeepseekV4Config, LayerSpec
from tenfold.errors import CheckpointError
from tenfold.models.blocks import Binder, add_shared, attend, fused, select, select_fused, through_layers
from tenfold.ops import FusedOps, Group, Rows, Stack, Weight
from tenfold.step import BatchSpan, Span, Step

__all__ = ["DeepseekV4"]

Merge = tuple[Tensor, Tensor, Tensor, Tensor]
"""Streams, a sub-layer's output, post and combination: the arguments of `hc_merge`."""


class DeepseekV4:
    """V4-Flash and V4-Pro, any size."""

    def __init__(self, config: DeepseekV4Config, bind: Binder) -> None:
        self.config, self.ops = config, bind.ops
        self.embed = bind("embed.weight")
        self.blocks = [Block(config, layer, bind) for layer in config.layers]
        self.hc_head_fn = bind("hc_head_fn")
        self.hc_head_base = bind("hc_head_base")
        self.hc_head_scale = bind("hc_head_scale")
        self.norm = bind("norm.weight")
        self.head = bind("head.weight")

    def forward(self, step: Step) -> Tensor:
        """Runs all tokens through one layer before the next; logits float32 [rows wanted, vocab]."""
        c, ops = self.config, self.ops
        one = fused(ops, step)
        h = self._streams(step)
        h = through_layers(self.blocks, h, step) if one is None else self._through(one, h, step)
        x = ops.hc_collapse(
            step.of_wanted(h),
            self.hc_head_fn,
            self.hc_head_base,
            self.hc_head_scale,
            self.norm,
            norm_eps=c.rms_norm_eps,
            eps=c.hc_eps,
        )
        return ops.linear(x, self.head)

    def _through(self, one: FusedOps, h: Tensor, step: Step) -> Tensor:
        """`through_layers` for a batch, each merge within the next mapping."""
        merge = None
        for block in self.blocks:
            merge = block.forward_fused(one, h, merge, step)
            h = merge[0]
            step.breathe()
        return h if merge is None else one.hc_merge(*merge)

    def _streams(self, step: Step) -> Tensor:
        """The residual streams [n, hc_mult, hidden], copies of the embeddings at first; made tile by tile, so that
        the embeddings of a chunk need no room beside them."""
        copies = self.config.hc_mult
        tiles = step.tiles()
        if len(tiles) == 1:
            return self.ops.hc_embed(step.ids, self.embed, copies)
        h = torch.empty(step.ids.shape[0], copies, self.config.hidden_size, device=step.ids.device)
        for rows, tile in tiles:
            h[rows] = self.ops.embed(tile.ids, self.embed)[:, None, :]
        return h


class Block:
    """One layer: attention, then experts, each between a hyper-mix and a hyper-merge."""

    def __init__(self, config: DeepseekV4Config, layer: LayerSpec, bind: Binder) -> None:
        prefix = f"layers.{layer.index}."
        self.ops = bind.ops
        self.hc_attn = HyperConnection(config, bind, prefix + "hc_attn")
        self.hc_ffn = HyperConnection(config, bind, prefix + "hc_ffn")
        self.attn_norm = bind(prefix + "attn_norm.weight")
        self.ffn_norm = bind(prefix + "ffn_norm.weight")
        self.attn = Attention(config, layer, bind, prefix + "attn.")
        self.ffn = MoE(config, layer, bind, prefix + "ffn.")

    def forward(self, h: Tensor, step: Step) -> Tensor:
        h = self.attend(h, step)
        step.breathe()
        x, post, combination = self.hc_ffn.mix(h, self.ffn_norm)
        y = self.ffn.forward(x, step)
        return self.ops.hc_merge(h, y, post, combination)

    def attend(self, h: Tensor, step: Step) -> Tensor:
        x, post, combination = self.hc_attn.mix(h, self.attn_norm)
        y = self.attn.forward(x, step)
        return self.ops.hc_merge(h, y, post, combination)

    def feed(self, h: Tensor, step: Step) -> None:
        (n, m, d), tiles = h.shape, step.tiles()
        x, post, combination = h.new_empty(n, d), h.new_empty(n, m), h.new_empty(n, m, m)
        for rows, _ in tiles:
            x[rows], post[rows], combination[rows] = self.hc_ffn.mix(h[rows], self.ffn_norm)
        y = self.ffn.forward_wide(x, step)
        for rows, _ in tiles:
            h[rows] = self.ops.hc_merge(h[rows], y[rows], post[rows], combination[rows])

    def forward_fused(self, one: FusedOps, h: Tensor, merge: Merge | None, step: Step) -> Merge:
        """The same for a batch: `merge` is what the layer before left to be merged, and so is what comes back."""
        if merge is None:
            x, post, combination = self.hc_attn.mix(h, self.attn_norm)
        else:
            h, x, post, combination = self.hc_attn.merge_mix(one, merge, self.attn_norm)
        merge = h, self.attn.forward(x, step), post, combination
        h, x, post, combination = self.hc_ffn.merge_mix(one, merge, self.ffn_norm)
        return h, self.ffn.forward(x, step), post, combination


class HyperConnection:
    """The learned mapping between the residual streams and one sub-layer (spec 2.1)."""

    def __init__(self, config: DeepseekV4Config, bind: Binder, prefix: str) -> None:
        self.config, self.ops = config, bind.ops
        self.fn, self.base, self.scale = bind(prefix + "_fn"), bind(prefix + "_base"), bind(prefix + "_scale")

    def mix(self, h: Tensor, norm: Weight) -> tuple[Tensor, Tensor, Tensor]:
        """The sub-layer's input, normed, and what `hc_merge` needs afterwards."""
        return self.ops.hc_mix(h, self.fn, self.base, self.scale, norm, **self._words)

    def merge_mix(self, one: FusedOps, merge: Merge, norm: Weight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The streams that the last sub-layer leaves behind, and `mix` of them."""
        return one.hc_merge_mix(*merge, self.fn, self.base, self.scale, norm, **self._words)

    @property
    def _words(self) -> dict[str, Any]:
        c = self.config
        return {"norm_eps": c.rms_norm_eps, "eps": c.hc_eps, "iterations": c.hc_sinkhorn_iters}


class Attention:
    """Window, compressed and selected rows under one softmax (spec 2.2-2.6)."""

    def __init__(self, config: DeepseekV4Config, layer: LayerSpec, bind: Binder, prefix: str) -> None:
        self.config, self.layer, self.ops = config, layer, bind.ops
        self.wq_a, self.wq_b = bind(prefix + "wq_a.weight"), bind(prefix + "wq_b.weight")
        self.wkv = bind(prefix + "wkv.weight")
        self.wo_a, self.wo_b = bind(prefix + "wo_a.weight"), bind(prefix + "wo_b.weight")
        self.q_norm, self.kv_norm = bind(prefix + "q_norm.weight"), bind(prefix + "kv_norm.weight")
        self.attn_sink = bind(prefix + "attn_sink")
        self.layout = bind.layout(layer.stream("window").layout)
        self.frequencies = bind.frequencies(layer.rope)
        self.compressor = self.indexer = None
        if layer.attention != "swa":
            self.compressor = Compressor(config, layer, bind, prefix + "compressor.", "rows", "state")
        if layer.attention == "csa":
            self.indexer = Indexer(config, layer, bind, prefix + "indexer.")
        compressed = () if self.compressor is None else self.compressor.inputs
        indexed = () if self.indexer is None else self.indexer.inputs
        self.inputs = Stack((self.wq_a, self.wkv, *compressed, *indexed))
        self.queries = Stack((self.wq_b, *(() if self.indexer is None else (self.indexer.wq_b,))))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """x [n, hidden], normed -> [n, hidden]; new rows enter the streams of each span."""
        c, ops = self.config, self.ops
        n, one = x.shape[0], fused(ops, step)
        q_latent, row, *compressed = ops.linear_each(x, self.inputs)
        if one is not None:
            return self._forward_fused(one, q_latent, row, compressed, step)
        q_latent = ops.rms_norm(q_latent, self.q_norm, c.rms_norm_eps)
        q = ops.linear(q_latent, self.wq_b).view(n, c.num_attention_heads, c.head_dim)
        q = ops.norm_rope(q, None, c.rms_norm_eps, step.positions, self.frequencies)
        rows = ops.norm_rope_pack(
            row,
            self.kv_norm,
            c.rms_norm_eps,
            step.positions,
            self.frequencies,
            self.layout,
            spread=False,
        )
        if self.compressor is not None:
            values, gates, *compressed = compressed
            self.compressor.append(values, gates, step)
        chosen: Sequence[Tensor | None] = [None] * len(step.spans)
        if self.indexer is not None:
            values, gates, weights = compressed
            chosen = self.indexer.select(values, gates, weights, q_latent, step)
        outs = [self._attend(q[s.rows], rows[s.rows], s, chosen[i], step) for i, s in enumerate(step.spans)]
        return self._out(outs[0] if len(outs) == 1 else torch.cat(outs))

    def _forward_fused(
        self, one: FusedOps, q_latent: Tensor, row: Tensor, compressed: Sequence[Tensor], step: Step
    ) -> Tensor:
        """The same for a batch, from what `inputs` made of it: all that streams take enters at once."""
        c, (batch,) = self.config, step.spans
        assert isinstance(batch, BatchSpan)
        q, *q_index = one.norm_linear_each(q_latent, self.q_norm, c.rms_norm_eps, self.queries)
        q = q.view(-1, c.num_attention_heads, c.head_dim)
        met = q_index[0].view(-1, c.index_n_heads, c.index_head_dim) if self.indexer is not None else None
        compressors = [] if self.compressor is None else [self.compressor]
        compressors += [] if self.indexer is None else [self.indexer.compressor]
        pairs = zip(compressors, zip(compressed[::2], compressed[1::2], strict=False), strict=False)
        groups = [compressor.group(values, gates, batch) for compressor, (values, gates) in pairs]
        ring, overlap = batch.streams.window(self.layer.index), self.layer.attention == "csa"
        q, met = one.enter(
            row, self.kv_norm, c.rms_norm_eps, step.positions, self.frequencies, ring.packed, ring.most, ring.layout,
            groups, self.layer.ratio, overlap, q, met,
        )  # fmt: skip
        chosen = None if self.indexer is None else self.indexer.select_fused(one, met, compressed[-1], batch)
        return self._out(self._attend(q, None, batch, chosen, step))

    def _out(self, attended: Tensor) -> Tensor:
        grouped = attended.view(attended.shape[0], self.config.o_groups, -1)
        return self.ops.linear(self.ops.grouped_linear(grouped, self.wo_a), self.wo_b)

    def _attend(
        self, q: Tensor, rows: Tensor | None, span: Span | BatchSpan, chosen: Tensor | None, step: Step
    ) -> Tensor:
        """`rows` None: they are in the window already, as of a batch only."""
        sources = [span.seen_window(self.layer.index, rows)]
        if self.compressor is not None:
            stream = span.streams.rows(self.layer.index)
            if chosen is None:
                start, stop = span.entries(self.layer.ratio)
                sources.append(Rows(stream.packed, stream.layout, start, stop, most=stream.most))
            else:
                sources.append(Rows(stream.packed, stream.layout, index=chosen, most=stream.most))
        width = self.config.head_dim
        return attend(self.ops, step, span, q, sources, self.attn_sink, width**-0.5, width, self.frequencies)


class Compressor:
    """Pools each complete group of tokens into one row (spec 2.4); `rows` and `state` name its streams."""

    def __init__(
        self, config: DeepseekV4Config, layer: LayerSpec, bind: Binder, prefix: str, rows: str, state: str
    ) -> None:
        self.config, self.layer, self.ops = config, layer, bind.ops
        self.wkv, self.wgate = bind(prefix + "wkv.weight"), bind(prefix + "wgate.weight")
        self.inputs = (self.wkv, self.wgate)
        self.norm, self.ape = bind(prefix + "norm.weight"), bind(prefix + "ape")
        self.rows, self.state = rows, state
        self.frequencies = bind.frequencies(layer.rope)
        self.layout = bind.layout(layer.stream(rows).layout)
        # The Hadamard transform only spreads what fp4 rounds; unquantised it cancels between query and key.
        self.spread = rows == "index_keys" and not bind.exact

    def append(self, values: Tensor, gates: Tensor, step: Step) -> None:
        """Folds what `inputs` make of the tokens, [n, width] each, into the streams of each span."""
        batch = step.spans[0]
        if isinstance(batch, BatchSpan):
            state = batch.streams.state(self.layer.index, self.state)
            rows, eps = batch.streams.rows(self.layer.index, self.rows), self.config.rms_norm_eps
            state.extend(values, gates, self.ape, rows, self.norm, eps, self.frequencies, self.spread)
            return
        gates = gates + self.ops.embed(step.places(self.layer.ratio), self.ape)
        for span in step.spans:
            assert isinstance(span, Span)
            self._append(values[span.rows], gates[span.rows], span)

    def group(self, values: Tensor, gates: Tensor, batch: BatchSpan) -> Group:
        """What a batch adds to the streams, not added yet."""
        state = batch.streams.state(self.layer.index, self.state)
        rows = batch.streams.rows(self.layer.index, self.rows)
        return state.group(values, gates, self.ape, rows, self.norm, self.spread)

    def _append(self, values: Tensor, gates: Tensor, span: Span) -> None:
        overlap = self.layer.attention == "csa"
        groups = span.streams.state(self.layer.index, self.state).extend(values, gates, span.position)
        if groups is None:
            return
        entries = self.ops.compress(*groups, overlap)
        stream = span.streams.rows(self.layer.index, self.rows)
        places = torch.arange(stream.count, stream.count + entries.shape[0], device=entries.device)
        stream.append(
            self.ops.norm_rope_pack(
                entries,
                self.norm,
                self.config.rms_norm_eps,
                places * self.layer.ratio,  # where a group's first token stands
                self.frequencies,
                self.layout,
                self.spread,
            )
        )


class Indexer:
    """Chooses the compressed rows each query attends to (spec 2.5)."""

    def __init__(self, config: DeepseekV4Config, layer: LayerSpec, bind: Binder, prefix: str) -> None:
        self.config, self.layer, self.ops = config, layer, bind.ops
        self.wq_b, self.weights_proj = bind(prefix + "wq_b.weight"), bind(prefix + "weights_proj.weight")
        self.compressor = Compressor(config, layer, bind, prefix + "compressor.", "index_keys", "index_state")
        self.inputs = (*self.compressor.inputs, self.weights_proj)
        self.factor = float((config.index_head_dim * config.index_n_heads) ** -0.5)

    def select(self, values: Tensor, gates: Tensor, weights: Tensor, q_latent: Tensor, step: Step) -> list[Tensor]:
        """New keys, of what `inputs` make of the tokens, enter the streams.

        Then int32 [tokens, up to index_topk] rows for each span, -1 = none.
        """
        c, ops, compressor = self.config, self.ops, self.compressor
        compressor.append(values, gates, step)
        q = ops.linear(q_latent, self.wq_b).view(-1, c.index_n_heads, c.index_head_dim)
        q = ops.rope_round(q, step.positions, compressor.frequencies, compressor.layout, compressor.spread)
        return [self._select(q[span.rows], weights[span.rows], span, step) for span in step.spans]

    def _select(self, q: Tensor, weights: Tensor, span: Span | BatchSpan, step: Step) -> Tensor:
        keys = span.streams.rows(self.layer.index, "index_keys")
        _, visible = span.entries(self.layer.ratio)
        return select(self.ops, step, q, weights, keys, visible, self.config.index_topk, self.factor)

    def select_fused(self, one: FusedOps, q: Tensor, weights: Tensor, batch: BatchSpan) -> Tensor:
        """The same for a batch, whose keys are in the streams, of queries as `enter` makes them."""
        return select_fused(one, q, weights, batch, self.layer, self.config.index_topk, self.factor)


class MoE:
    """Routed experts plus the shared one (spec 2.7); the first layers route by token id."""

    def __init__(self, config: DeepseekV4Config, layer: LayerSpec, bind: Binder, prefix: str) -> None:
        self.config, self.ops = config, bind.ops
        self.gate = bind(prefix + "gate.weight")
        self.tid2eid = bind(prefix + "gate.tid2eid") if layer.router == "hash" else None
        if self.tid2eid is not None and self.tid2eid.data.numel():
            _check_table(self.tid2eid, config.n_routed_experts)
        self.bias = None if layer.router == "hash" else bind(prefix + "gate.bias")
        self.experts = bind.experts(prefix + "experts.", config.n_routed_experts, ("w1", "w2", "w3"))
        self.shared_experts = bind.shared_expert(prefix + "shared_experts.", ("w1", "w2", "w3"))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        ids, weights = self._route(x, step)
        one, limit = fused(self.ops, step), self.config.swiglu_limit
        run = self.ops.experts if one is None else one.experts_apart  # which the merge adds up
        return run(x, ids, weights, self.experts, limit=limit, weigh_first=True, shared=self.shared_experts)

    def forward_wide(self, x: Tensor, step: Step) -> Tensor:
        """The same of more tokens than a tile has."""
        (ids, weights), limit = self._route(x, step), self.config.swiglu_limit
        y = self.ops.experts(x, ids, weights, self.experts, limit=limit, weigh_first=True, breathe=step.breathe)
        return add_shared(self.ops, y, x, self.shared_experts, limit, step)

    def _route(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        c, ops = self.config, self.ops
        return ops.route(
            x,
            self.gate,
            scoring="sqrtsoftplus",
            topk=c.num_experts_per_tok,
            scaling=c.routed_scaling_factor,
            bias=self.bias,
            chosen=None if self.tid2eid is None else ops.look_up(step.ids, self.tid2eid),
        )


def _check_table(table: Weight, num_experts: int) -> None:
    """An expert that is not there would be another tensor's memory; passes do not look again."""
    low, high = (int(bound) for bound in table.data.aminmax())
    if low < 0 or high >= num_experts:
        raise CheckpointError(
            f"{table.name} names expert {low if low < 0 else high}, expected 0 to {num_experts - 1}: the checkpoint is "
            "damaged or of another model; download it again"
        )
