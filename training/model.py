"""The embedded model as it is trained: the engine's own blocks over dense, differentiable attention.

Sequences of equal length from position 0, no sessions and no packed rows. Knows nothing of optimisers and of files.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tenfold import checkpoint
from tenfold.checkpoint import TensorSpec
from tenfold.config import DeepseekV4Config, LayerSpec, ModelConfig, RopeSpec, parse
from tenfold.formats import F32, I64, kv_row_v4
from tenfold.models.blocks import Binder, rope_frequencies
from tenfold.models.deepseek_v4 import Attention, Compressor, DeepseekV4
from tenfold.ops import Experts, Weight, reference
from tenfold.step import Step
from training.ops import TILE, TrainingOps, attend, head_loss, rope_tables, stored_rows

__all__ = [
    "Asked",
    "Batch",
    "Crowd",
    "Noted",
    "StackBinder",
    "TrainingModel",
    "best_entries",
    "index_loss",
    "initial",
    "recall_loss",
    "scores_of_asked",
    "stack_name",
    "tiny_config",
]

INDEX_LOSS_STRIDE = 4  # one query in so many teaches the indexer


def tiny_config(**changes: object) -> DeepseekV4Config:
    """The embedded model's configuration, in the words of config.json."""
    raw: dict[str, object] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "compress_ratios": [0, 4, 128, 4, 0],
        "compress_rope_theta": 160000,
        "eos_token_id": 1,
        "expert_dtype": "fp4",
        "hc_eps": 1e-06,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 256,
        "index_head_dim": 64,
        "index_n_heads": 4,
        "index_topk": 64,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "model_type": "deepseek_v4",
        "moe_intermediate_size": 256,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hash_layers": 1,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 0,
        "o_groups": 2,
        "o_lora_rank": 128,
        "q_lora_rank": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 2048,
    }
    config = parse(raw | changes)
    assert isinstance(config, DeepseekV4Config)
    return config


# ------------------------------------------------------------------------------------------------ weights


def stack_name(name: str) -> tuple[str, int | None]:
    """The name of the stack an expert's weight lies in, and its place there; other weights stand alone."""
    match = re.fullmatch(r"(.*\.experts\.)(\d+)\.(\w+\.weight)", name)
    return (match[1] + match[3], int(match[2])) if match else (name, None)


def initial(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """First values of all weights, float32 by name (expert stacks, and the int64 tables of hash layers)."""
    generator = torch.Generator().manual_seed(seed)
    stacks: dict[str, list[Tensor]] = {}
    for spec in checkpoint.tensors(config):
        stacks.setdefault(stack_name(spec.name)[0], []).append(_first_values(spec, config, generator))
    return {name: torch.stack(parts) if ".experts." in name else parts[0] for name, parts in stacks.items()}


def _first_values(spec: TensorSpec, config: ModelConfig, generator: torch.Generator) -> Tensor:
    name, shape = spec.name, spec.shape
    noise: Tensor = torch.randn(shape, generator=generator) if spec.formats[0] is not I64 else torch.empty(0)
    if name.endswith("tid2eid"):
        table = torch.rand(shape[0], config.n_routed_experts, generator=generator)
        return table.argsort(1)[:, : shape[1]].contiguous()
    if "hc_" in name:
        assert isinstance(config, DeepseekV4Config)
        return _first_hyper(name, shape, config.hc_mult, noise)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(("attn_sink", "gate.bias", "k_norm.bias", "e_score_correction_bias")):
        return torch.zeros(shape)
    if name.endswith(".ape"):
        return 0.02 * noise
    if name in ("embed.weight", "model.embed_tokens.weight"):
        return 0.5 * noise
    quiet = name.endswith(("head.weight", ".wo_b.weight", ".w2.weight", ".o_proj.weight", ".down_proj.weight"))
    return noise * ((0.1 if quiet else 1.0) / math.sqrt(shape[1]))


def _first_hyper(name: str, shape: tuple[int, ...], m: int, noise: Tensor) -> Tensor:
    """Reads the mean of the streams, writes to all alike, keeps each; noise tells the streams apart."""
    if name.endswith("_fn"):
        return 0.02 * noise
    if name.endswith("_scale"):
        return torch.full(shape, 0.1)
    base = 0.3 * noise
    base[:m] -= 1.1  # sigmoid: a quarter
    if "head" not in name:
        base[2 * m :] += 3.0 * torch.eye(m).flatten()
    return base


class StackBinder(Binder):
    """Binds the experts of a layer as stacks."""

    __slots__ = ()

    def experts(self, prefix: str, count: int, names: tuple[str, str, str]) -> Experts:
        gate, down, up = ((self(f"{prefix}{name}.weight"),) for name in names)
        return Experts(gate, down, up)


# ------------------------------------------------------------------------------------------------ the network


@dataclass(frozen=True, slots=True)
class Asked:
    """Tokens that have to find something, as flat indices into a batch, and the tokens that hold it."""

    tokens: Tensor
    told: Tensor


@dataclass(slots=True)
class Crowd:
    """Entries of text from earlier batches, which hold nothing that is asked for: so many more that a query must tell
    from the right one. Each counts `copies` times; of more than `most` the oldest go."""

    most: int
    copies: float
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    keys: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, rows: Tensor, keys: Tensor) -> None:
        """rows [n, head_dim] and index keys [n, dim]."""
        self.rows = torch.cat([self.rows.view(-1, rows.shape[1]), rows.detach()])[-self.most :]
        self.keys = torch.cat([self.keys.view(-1, keys.shape[1]), keys.detach()])[-self.most :]


@dataclass(frozen=True, eq=False)
class Batch(Step):
    """A step of `sequences` texts of equal length; `dense` attends to all entries and teaches the indexer."""

    sequences: int = 1
    dense: bool = True
    asked: Asked | None = None
    crowd: Crowd | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)  # rows and keys of the layer that looks up
    index_losses: list[Tensor] = field(default_factory=list)
    recall_losses: dict[str, Tensor] = field(default_factory=dict)
    loads: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[RopeSpec, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        ids: Tensor,
        dense: bool,
        positions: Tensor | None = None,
        asked: Asked | None = None,
        crowd: Crowd | None = None,
    ) -> Batch:
        """From token ids [sequences, length]; positions of the same shape rise, by ones within a tile."""
        sequences, length = ids.shape
        if positions is None:
            positions = torch.arange(length).repeat(sequences, 1)
        wanted = torch.arange(ids.numel())
        return cls(
            ids.flatten(),
            positions.flatten(),
            (),
            wanted,
            ids.numel(),
            sequences=sequences,
            dense=dense,
            asked=asked,
            crowd=crowd,
        )

    @property
    def length(self) -> int:
        return self.ids.shape[0] // self.sequences

    @cached_property
    def leaps(self) -> Tensor | None:
        """Bool [sequences, tiles]: this tile does not follow the one before; None if all do."""
        places = self.positions.view(self.sequences, -1)
        behind = places[:, TILE::TILE] - places[:, TILE - 1 : -1 : TILE]
        leaps = torch.nn.functional.pad(behind != 1, (1, 0))
        return leaps if leaps.any() else None

    @cached_property
    def copies(self) -> Tensor | None:
        """How many tokens each of a sequence stands for, [sequences]: those left out by leaps are spread over all."""
        if self.leaps is None:
            return None
        return (self.positions.view(self.sequences, -1)[:, -1] + 1) / float(self.length)

    def rope(self, spec: RopeSpec) -> tuple[Tensor, Tensor]:
        """Cosines and sines [sequences, length, 1, dim / 2]."""
        if spec not in self.tables:
            cos, sin = rope_tables(self.positions.view(self.sequences, -1), rope_frequencies(spec))
            self.tables[spec] = cos[:, :, None], sin[:, :, None]
        return self.tables[spec]


class TrainingModel:
    """Forward and loss over `weights`, which the caller keeps; `quantised` rounds rows as the streams do."""

    def __init__(self, config: DeepseekV4Config, weights: dict[str, Tensor], ops: TrainingOps, quantised: bool) -> None:
        self.config, self.ops = config, ops
        self.quantised = quantised
        # Facts are looked up in the first layer that selects, by the first half of its heads.
        self.recall_layer = next(layer.index for layer in config.layers if layer.attention == "csa")
        self.recall_heads = config.num_attention_heads // 2

        def take(name: str) -> Weight:
            return Weight(name, tuple(weights[name].shape), I64 if name.endswith("tid2eid") else F32, weights[name])

        bind = StackBinder(take, ops, resident=True, exact=True)  # type: ignore[arg-type]
        self.network = DeepseekV4(config, bind)
        for block, layer in zip(self.network.blocks, config.layers, strict=True):
            prefix = f"layers.{layer.index}."
            block.attn = TrainingAttention(config, layer, bind, prefix + "attn.", self)
            if layer.router == "learned":
                block.ffn.ops = Noted(ops, prefix + "ffn.gate.bias")  # type: ignore[assignment]

    def hidden(self, batch: Batch) -> Tensor:
        """The last normed activations [n, hidden]."""
        network, c, ops = self.network, self.config, self.ops
        h = ops.embed(batch.ids, network.embed)[:, None, :].repeat(1, c.hc_mult, 1)
        for block in network.blocks:
            if isinstance(block.ffn.ops, Noted):
                block.ffn.ops.loads = batch.loads
            h = block.forward(h, batch)
        head = network.hc_head_fn, network.hc_head_base, network.hc_head_scale, network.norm
        return ops.hc_collapse(h, *head, norm_eps=c.rms_norm_eps, eps=c.hc_eps)

    def recalled(self, batch: Batch) -> Tensor:
        """Normed activations [asked, hidden] behind the layer that looks up, of the tokens that ask alone.

        The layers before it go through their attention alone; but a first one that an earlier network had is whole,
        and learns nothing.
        """
        network, c, ops = self.network, self.config, self.ops
        assert batch.asked is not None
        fixed = c.layers[0].attention == "swa"
        with torch.set_grad_enabled(not fixed):
            h = ops.embed(batch.ids, network.embed)[:, None, :].repeat(1, c.hc_mult, 1)
            if fixed:
                h = network.blocks[0].forward(h, batch)
        for block in network.blocks[fixed : self.recall_layer]:
            x, post, combination = block.hc_attn.mix(h, block.attn_norm)
            h = ops.hc_merge(h, block.attn.forward(x, batch), post, combination)
        block, asked = network.blocks[self.recall_layer], batch.asked.tokens
        x, post, combination = block.hc_attn.mix(h, block.attn_norm)
        h = ops.hc_merge(h[asked], block.attn.look_up(x, batch), post[asked], combination[asked])  # type: ignore[attr-defined]
        x, post, combination = block.hc_ffn.mix(h, block.ffn_norm)
        few = Batch(batch.ids[asked], batch.positions[asked], (), asked, asked.shape[0])
        h = ops.hc_merge(h, block.ffn.forward(x, few), post, combination)
        head = network.hc_head_fn, network.hc_head_base, network.hc_head_scale, network.norm
        return ops.hc_collapse(h, *head, norm_eps=c.rms_norm_eps, eps=c.hc_eps)

    def recall_loss(self, batch: Batch, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy in nats of what is asked for, and each one's."""
        head = self.network.head.data.to(self.ops.dtype)
        return head_loss(self.recalled(batch), head, targets)

    def logits(self, ids: Tensor) -> Tensor:
        """ids [sequences, length] -> [sequences * length, vocab]."""
        return self.ops.linear(self.hidden(Batch.of(ids, dense=False)), self.network.head)

    def loss(self, batch: Batch, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cross entropy in nats, its mean or its sum under `weights`, and each token's."""
        head = self.network.head.data.to(self.ops.dtype)
        return head_loss(self.hidden(batch), head, targets.flatten(), weights)


class Noted:
    """The operations of a layer with a learned router, which notes how many tokens each expert was given."""

    def __init__(self, ops: TrainingOps, bias_name: str) -> None:
        self._ops, self._bias_name = ops, bias_name
        self.loads: dict[str, Tensor] = {}
        self.experts = ops.experts

    def route(self, x: Tensor, gate: Weight, **options: object) -> tuple[Tensor, Tensor]:
        ids, weights = self._ops.route(x, gate, **options)
        self.loads[self._bias_name] = torch.bincount(ids.flatten(), minlength=gate.shape[0]).float()
        return ids, weights


class TrainingAttention(Attention):
    """`Attention` over whole sequences: banded window, dense or selected entries (spec 2.2-2.6)."""

    def __init__(
        self, config: DeepseekV4Config, layer: LayerSpec, bind: Binder, prefix: str, owner: TrainingModel
    ) -> None:
        super().__init__(config, layer, bind, prefix)
        assert config.sliding_window == TILE
        self.owner = owner
        self.fast: TrainingOps = bind.ops  # type: ignore[assignment]
        self.row = kv_row_v4(config.head_dim, config.qk_rope_head_dim)
        self.key = layer.stream("index_keys").layout if layer.attention == "csa" else None

    def forward(self, x: Tensor, step: Step) -> Tensor:
        assert isinstance(step, Batch)
        c, ops = self.config, self.fast
        shape = step.sequences, step.length
        cos, sin = step.rope(self.layer.rope)
        q_latent = ops.rms_norm(ops.linear(x, self.wq_a), self.q_norm, c.rms_norm_eps)
        q = ops.linear(q_latent, self.wq_b).view(*shape, c.num_attention_heads, c.head_dim)
        q = ops.norm_rope(q, torch.ones(c.head_dim), c.rms_norm_eps, cos, sin)
        kv = ops.linear(x, self.wkv).view(*shape, 1, c.head_dim)
        rows = self._kept(ops.norm_rope(kv, self.kv_norm.data, c.rms_norm_eps, cos, sin)[:, :, 0])
        out = self._attend(q, rows, x, q_latent, step)
        out = ops.rotate(out, cos, -sin)
        return ops.linear(ops.grouped_linear(out.view(x.shape[0], c.o_groups, -1), self.wo_a), self.wo_b)

    def _attend(self, q: Tensor, rows: Tensor, x: Tensor, q_latent: Tensor, step: Batch) -> Tensor:  # type: ignore[override]
        entries, chosen = rows[:, :0], None
        if self.compressor is not None:
            entries = self._kept(self._entries(self.compressor, x, step))
        teach = self.indexer is not None and step.dense
        recall = step.asked is not None and self.layer.index == self.owner.recall_layer
        if self.indexer is not None and (teach or recall or entries.shape[1] > self.config.index_topk):
            index = self._index(x.detach(), q_latent.detach(), step)
            chosen = None if step.dense else best_entries(*index, self.config.index_topk)
        scale = float(self.config.head_dim) ** -0.5
        copies = step.copies if self.layer.attention == "hca" else None
        out, shares = attend(
            q, rows, entries, self.attn_sink.data, chosen, self.layer.ratio, scale, teach, step.leaps, copies
        )
        if teach:
            step.index_losses.append(index_loss(*index, shares))
        if recall:
            mine, every = _of_asked(step, q[:, :, : self.owner.recall_heads] * scale, entries)
            step.seen.update(rows=every, keys=index[2].flatten(0, 1))
            others = strange = None
            if step.crowd is not None and len(step.crowd.keys):
                others = torch.einsum("nhd,ed->nhe", mine, step.crowd.rows)
                strange = scores_of_asked(step, *index[:2], step.crowd.keys)[:, None]
            step.recall_losses["attention"] = recall_loss(step, torch.einsum("nhd,ed->nhe", mine, every), others)
            step.recall_losses["indexer"] = recall_loss(step, scores_of_asked(step, *index)[:, None], strange)
        return out

    def look_up(self, x: Tensor, step: Batch) -> Tensor:
        """`forward` for the tokens that ask alone, over the entries of all sequences at once: [asked, hidden]."""
        c, ops = self.config, self.fast
        assert self.compressor is not None
        assert step.asked is not None
        asked = step.asked.tokens
        cos, sin = step.rope(self.layer.rope)
        mine_cos, mine_sin = (table.flatten(0, 1)[asked] for table in (cos, sin))
        q_latent = ops.rms_norm(ops.linear(x, self.wq_a), self.q_norm, c.rms_norm_eps)
        q = ops.linear(q_latent[asked], self.wq_b).view(-1, c.num_attention_heads, c.head_dim)
        q = ops.norm_rope(q, torch.ones(c.head_dim), c.rms_norm_eps, mine_cos, mine_sin) * c.head_dim**-0.5
        kv = ops.linear(x, self.wkv).view(step.sequences, step.length, 1, c.head_dim)
        rows = self._kept(ops.norm_rope(kv, self.kv_norm.data, c.rms_norm_eps, cos, sin)[:, :, 0]).flatten(0, 1)
        entries = self._kept(self._entries(self.compressor, x, step)).flatten(0, 1)
        scores = torch.einsum("nhd,ed->nhe", q, entries)
        step.recall_losses["attention"] = recall_loss(step, scores[:, : self.owner.recall_heads])
        index = self._index(x.detach(), q_latent.detach(), step)
        step.recall_losses["indexer"] = recall_loss(step, scores_of_asked(step, *index)[:, None])
        near = asked[:, None] - torch.arange(TILE)
        outside = (near < 0) | (step.positions[near.clamp(min=0)] <= step.positions[asked, None] - TILE)
        outside |= near // step.length != asked[:, None] // step.length
        window = rows[near.clamp(min=0)]  # [asked, TILE, head_dim]
        nearby = torch.einsum("nhd,nwd->nhw", q, window).masked_fill(outside[:, None], -torch.inf)
        _, late = _own_and_late(step, scores.shape[2])
        sink = self.attn_sink.data.expand(asked.shape[0], -1)[:, :, None]
        shares = torch.cat([nearby, scores.masked_fill(late[:, None], -torch.inf), sink], 2).softmax(2)
        out = torch.einsum("nhw,nwd->nhd", shares[:, :, :TILE], window) + shares[:, :, TILE:-1] @ entries
        out = ops.rotate(out, mine_cos, -mine_sin)
        return ops.linear(ops.grouped_linear(out.reshape(asked.shape[0], c.o_groups, -1), self.wo_a), self.wo_b)

    def _kept(self, rows: Tensor) -> Tensor:
        return stored_rows(rows, self.row) if self.owner.quantised else rows

    def _entries(self, compressor: Compressor, x: Tensor, step: Batch) -> Tensor:
        """All complete groups of each sequence, pooled, normed and rotated: [sequences, entries, width]."""
        ops, ratio = self.fast, self.layer.ratio
        count = step.length // ratio
        values, gates = (
            ops.linear(x, w).view(step.sequences, step.length, -1)[:, : count * ratio].unflatten(1, (count, ratio))
            for w in (compressor.wkv, compressor.wgate)
        )
        pooled = ops.pool(values, gates, compressor.ape.data, self.layer.attention == "csa")[:, :, None]
        cos, sin = (table[:, : count * ratio : ratio] for table in step.rope(self.layer.rope))
        out: Tensor = ops.norm_rope(pooled, compressor.norm.data, self.config.rms_norm_eps, cos, sin)[:, :, 0]
        return out

    def _index(self, x: Tensor, q_latent: Tensor, step: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Index queries [B, S, heads, dim], weights [B, S, heads] and keys [B, E, dim]; only they learn from these."""
        c, ops, indexer = self.config, self.fast, self.indexer
        assert indexer is not None
        assert self.key is not None
        keys = self._entries(indexer.compressor, x, step)
        q = ops.linear(q_latent, indexer.wq_b).view(step.sequences, step.length, c.index_n_heads, c.index_head_dim)
        q = ops.rotate(q, *step.rope(self.layer.rope))
        if self.owner.quantised:
            q, keys = (stored_rows(reference.hadamard(t.float()).to(t.dtype), self.key) for t in (q, keys))
        weights = ops.linear(x, indexer.weights_proj) * (c.index_head_dim * c.index_n_heads) ** -0.5
        return q, weights.view(step.sequences, step.length, -1), keys


def _scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Sum over heads of weight * relu(q . key): [B, queries, E]."""
    sequences, queries, heads, dim = q.shape
    raw = torch.bmm(q.reshape(sequences, queries * heads, dim), keys.mT).relu_()
    return torch.bmm(weights.reshape(sequences * queries, 1, heads), raw.view(sequences * queries, heads, -1)).view(
        sequences, queries, -1
    )


def _of_asked(step: Batch, q: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """The queries that ask [n, ...], and the entries of all sequences [entries, width]."""
    assert step.asked is not None
    return q.flatten(0, 1)[step.asked.tokens], entries.flatten(0, 1)


def scores_of_asked(step: Batch, q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Index scores [n, entries] of keys [..., entries, dim], of all sequences or a crowd."""
    assert step.asked is not None
    mine, weights = (t.flatten(0, 1)[step.asked.tokens] for t in (q, weights))
    raw = (mine @ keys.flatten(0, -2).t()).relu()
    return (weights[:, :, None] * raw).sum(1)


def recall_loss(step: Batch, scores: Tensor, others: Tensor | None = None) -> Tensor:
    """Minus the logarithm of the share that goes to the entries which hold what is asked for.

    scores [n, heads, entries of all sequences]: the other sequences' are so many more that are none; `others` those of
    the crowd.
    """
    asked = step.asked
    assert asked is not None
    own, late = _own_and_late(step, scores.shape[2])
    ratio = step.sequences * step.length // scores.shape[2]
    scores = scores.masked_fill(late[:, None], -torch.inf)
    # an entry of ratio 4 pools its own tokens and the four before
    behind = torch.arange(scores.shape[2]) - (asked.told // ratio)[:, None]
    holds = own & (behind >= 0) & (behind <= (1 if ratio == 4 else 0)) & ~late
    right = scores.masked_fill(~holds[:, None], -torch.inf)
    every = scores.logsumexp(2)
    if others is not None and step.crowd is not None:
        every = torch.logaddexp(every, others.logsumexp(2) + math.log(step.crowd.copies))
    return (every - right.logsumexp(2)).mean()


def _own_and_late(step: Batch, entries: int) -> tuple[Tensor, Tensor]:
    """Bool [asked, entries of all sequences]: those of the same sequence, and of these the incomplete ones."""
    assert step.asked is not None
    per_sequence = entries // step.sequences
    ratio = step.length // per_sequence
    entry = torch.arange(entries)
    sequence, place = step.asked.tokens // step.length, step.asked.tokens % step.length
    own = entry // per_sequence == sequence[:, None]
    return own, own & (entry % per_sequence >= ((place + 1) // ratio)[:, None])


def _hidden(positions: Tensor, entries: int, ratio: int) -> Tensor:
    return torch.arange(entries) >= ((positions + 1) // ratio)[:, None]


@torch.no_grad()
def best_entries(q: Tensor, weights: Tensor, keys: Tensor, topk: int) -> Tensor:
    """The visible entries with the topk best scores, as bool [B, S, E]."""
    sequences, length, entries = q.shape[0], q.shape[1], keys.shape[1]
    ratio = length // entries
    chosen = torch.zeros(sequences, length, entries, dtype=torch.bool)
    for first in range(0, length, 512):
        part = slice(first, min(first + 512, length))
        count = min(part.stop // ratio, entries)
        hidden = _hidden(torch.arange(part.start, part.stop), count, ratio)
        scores = _scores(q[:, part], weights[:, part], keys[:, :count]).masked_fill_(hidden, -torch.inf)
        best = scores.topk(min(topk, count), -1, sorted=False).indices
        chosen[:, part, :count].scatter_(-1, best, True)
        chosen[:, part, :count] &= ~hidden
    return chosen


def index_loss(q: Tensor, weights: Tensor, keys: Tensor, shares: Tensor) -> Tensor:
    """Cross entropy of the indexer's softmax against the attention's shares, for a part of the queries."""
    length, entries = q.shape[1], keys.shape[1]
    positions = torch.arange(INDEX_LOSS_STRIDE - 1, length, INDEX_LOSS_STRIDE)
    hidden = _hidden(positions, entries, length // entries)
    scores = _scores(q[:, positions], weights[:, positions], keys).float().masked_fill(hidden, -1e9)
    target = shares[:, positions].float()
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-6)
    loss = -(target * scores.log_softmax(-1)).sum(-1).mean()
    entropy = -(target * target.clamp(min=1e-9).log()).sum(-1).mean()
    return loss - entropy
