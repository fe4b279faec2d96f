"""V3.2 as it is trained: the engine's blocks over dense attention to whole sequences; the indexer learns from it.

The same interface as `training.model.TrainingModel`. Knows nothing of optimisers and of files.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tenfold.config import DeepseekV4Config, DeepseekV32Config, LayerSpec, ModelConfig
from tenfold.formats import F32
from tenfold.models.blocks import Binder
from tenfold.models.deepseek_v32 import Attention, DeepseekV32
from tenfold.ops import Weight, reference
from tenfold.step import Step
from training.facts import DIGITS
from training.model import (
    Asked,
    Batch,
    Noted,
    StackBinder,
    TrainingModel,
    index_loss,
    recall_loss,
    scores_of_asked,
)
from training.ops import TrainingOps, head_loss, stored_rows

__all__ = ["TrainingModelV32", "training_model"]

EPS = 1e-6
# Words before the first digit of a fact, and of an answer before the token that asks for it: attribute, first, second.
NAMES_TOLD, NAMES_ASKED = (8, 4, 3), (10, 6, 5)
LOOKING_BACK = 3  # heads of the first layer: enough to tell the four digits of a number apart by what precedes them


class TrainingModelV32:
    """Forward and loss over `weights`, which the caller keeps; `quantised` rounds rows as the streams do."""

    def __init__(
        self, config: DeepseekV32Config, weights: dict[str, Tensor], ops: TrainingOps, quantised: bool
    ) -> None:
        self.config, self.ops, self.quantised = config, ops, quantised
        self.recall_layer = 2  # two layers gather what belongs to a token, the third looks it up
        self.recall_heads = config.num_attention_heads // 2

        def take(name: str) -> Weight:
            return Weight(name, tuple(weights[name].shape), F32, weights[name])

        bind = StackBinder(take, ops, resident=True, exact=True)  # type: ignore[arg-type]
        self.network = DeepseekV32(config, bind)
        for block, layer in zip(self.network.layers, config.layers, strict=True):
            prefix = f"model.layers.{layer.index}."
            block.self_attn = TrainingAttentionV32(config, layer, bind, prefix + "self_attn.", self)
            if layer.router == "learned":
                block.mlp.ops = Noted(ops, prefix + "mlp.gate.e_score_correction_bias")  # type: ignore[assignment]

    def hidden(self, batch: Batch) -> Tensor:
        """The last normed activations [n, hidden]."""
        network, ops = self.network, self.ops
        h = ops.embed(batch.ids, network.embed_tokens)
        for block in network.layers:
            if isinstance(block.mlp.ops, Noted):
                block.mlp.ops.loads = batch.loads
            h = block.forward(h, batch)
        return ops.rms_norm(h, network.norm, self.config.rms_norm_eps)

    def logits(self, ids: Tensor) -> Tensor:
        """ids [sequences, length] -> [sequences * length, vocab]."""
        return self.ops.linear(self.hidden(Batch.of(ids, dense=False)), self.network.lm_head)

    def loss(self, batch: Batch, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cross entropy in nats, its mean or its sum under `weights`, and each token's."""
        head = self.network.lm_head.data.to(self.ops.dtype)
        return head_loss(self.hidden(batch), head, targets.flatten(), weights)

    def recall_loss(self, batch: Batch, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy in nats of what is asked for, read off behind the layer that looks up, and each one's."""
        network, ops = self.network, self.ops
        assert batch.asked is not None
        h = ops.embed(batch.ids, network.embed_tokens)
        for block in network.layers[: self.recall_layer]:
            h = block.forward(h, batch)
        block = network.layers[self.recall_layer]
        found = block.self_attn.forward(ops.rms_norm(h, block.input_layernorm, block.eps), batch)
        h = (h + found)[batch.asked.tokens]
        h = h + block.mlp.forward(ops.rms_norm(h, block.post_attention_layernorm, block.eps))
        h = ops.rms_norm(h, network.norm, self.config.rms_norm_eps)
        return head_loss(h, network.lm_head.data.to(ops.dtype), targets)


def training_model(
    config: ModelConfig, weights: dict[str, Tensor], ops: TrainingOps, quantised: bool
) -> TrainingModel | TrainingModelV32:
    """The network of either architecture."""
    if isinstance(config, DeepseekV32Config):
        return TrainingModelV32(config, weights, ops, quantised)
    assert isinstance(config, DeepseekV4Config)
    return TrainingModel(config, weights, ops, quantised)


class TrainingAttentionV32(Attention):
    """`Attention` over whole sequences (spec 5.2-5.4)."""

    def __init__(
        self, config: DeepseekV32Config, layer: LayerSpec, bind: Binder, prefix: str, owner: TrainingModelV32
    ) -> None:
        super().__init__(config, layer, bind, prefix)
        self.owner = owner
        self.fast: TrainingOps = bind.ops  # type: ignore[assignment]
        self.kv_b_proj = bind(prefix + "kv_b_proj.weight")
        self.row, self.key = (layer.stream(name).layout for name in ("rows", "index_keys"))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        assert isinstance(step, Batch)
        c, ops = self.config, self.fast
        shape = step.sequences, step.length
        # absorbed anew each time: what the engine does once at load has to pass gradients
        heads = self.kv_b_proj.data.view(c.num_attention_heads, -1, c.kv_lora_rank)
        k_up, v_up = heads.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        cos, sin = step.rope(self.layer.rope)
        q_latent = ops.rms_norm(ops.linear(x, self.q_a_proj), self.q_a_layernorm, EPS)
        q = ops.linear(q_latent, self.q_b_proj).view(*shape, c.num_attention_heads, -1)
        nope = torch.einsum("bshd,hdc->bshc", q[..., : c.qk_nope_head_dim], k_up)
        q = torch.cat([nope, ops.rotate(q[..., c.qk_nope_head_dim :], cos, sin)], -1) * c.softmax_scale
        latent, rope = ops.linear(x, self.kv_a_proj_with_mqa).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=1)
        latent = ops.rms_norm(latent, self.kv_a_layernorm, EPS).view(*shape, 1, -1)
        rows = torch.cat([latent, ops.rotate(rope.view(*shape, 1, -1), cos, sin)], -1)[:, :, 0]
        rows = stored_rows(rows, self.row) if self.owner.quantised else rows
        scores = torch.einsum("bshc,btc->bhst", q, rows)
        index = self._index(x.detach(), q_latent.detach(), step)
        future = torch.ones(step.length, step.length, dtype=torch.bool).triu(1)
        hidden = future.expand(step.sequences, -1, -1)
        if not step.dense and step.length > c.index_topk:
            hidden = hidden | _unchosen(*index, future, c.index_topk)
        shares = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
        if step.dense:
            step.index_losses.append(index_loss(*index, shares.detach().sum(1)))
        if step.asked is not None and self.layer.index == 0:
            step.recall_losses["before"] = _loss_before(shares[:, :LOOKING_BACK], step)
        if step.asked is not None and self.layer.index == 1:
            near = scores.masked_fill(hidden[:, None], -torch.inf).transpose(1, 2).flatten(0, 1)
            step.recall_losses["names"] = _loss_names(near, step.asked, step.length)
        if step.asked is not None and self.layer.index == self.owner.recall_layer:
            mine = q[:, :, : self.owner.recall_heads].flatten(0, 1)[step.asked.tokens]
            every = torch.einsum("nhc,tc->nht", mine, rows.flatten(0, 1))
            step.recall_losses["attention"] = recall_loss(step, every)
            step.recall_losses["indexer"] = recall_loss(step, scores_of_asked(step, *index)[:, None])
        out = torch.einsum("bhst,btc->bshc", shares, rows[..., : c.kv_lora_rank])
        out = torch.einsum("bshc,hdc->bshd", out, v_up).flatten(2)
        return ops.linear(out.flatten(0, 1), self.o_proj)

    def _index(self, x: Tensor, q_latent: Tensor, step: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Index queries [B, S, heads, dim], weights [B, S, heads] and keys [B, S, dim]; only they learn from these."""
        c, ops, indexer = self.config, self.fast, self.indexer
        shape = step.sequences, step.length
        q = self._half_rotated(ops.linear(q_latent, indexer.wq_b).view(*shape, c.index_n_heads, -1), step)
        keys = functional.layer_norm(
            ops.linear(x, indexer.wk), (c.index_head_dim,), indexer.k_norm_weight.data, indexer.k_norm_bias.data, EPS
        )
        keys = self._half_rotated(keys.view(*shape, 1, -1), step)[:, :, 0]
        if self.owner.quantised:
            q, keys = (stored_rows(reference.hadamard(t.float()), self.key) for t in (q, keys))
        weights = ops.linear(x, indexer.weights_proj) * (c.index_head_dim * c.index_n_heads) ** -0.5
        return q, weights.view(*shape, -1), keys

    def _half_rotated(self, x: Tensor, step: Batch) -> Tensor:
        """The rope channels come first here and pair (i, i + rope / 2)."""
        cos, sin = step.rope(self.layer.rope)
        first, second, plain = x.split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos, plain], -1)


def _loss_before(shares: Tensor, step: Batch) -> Tensor:
    """Minus the logarithm of the share that head i of shares [B, heads, S, S] gives to the token i + 1 before.

    So the third layer's keys tell what stands before a token, which is all that tells one digit of a number from
    another; alone the network does not come upon it.
    """
    positions = step.positions.view(step.sequences, -1)
    losses = []
    for head in range(shares.shape[1]):
        back = head + 1
        follows = positions[:, back:] - positions[:, :-back] == back  # no leap between
        share = shares[:, head].diagonal(-back, 1, 2)[follows]
        losses.append(-share.clamp(min=1e-6).log().mean())
    return torch.stack(losses).mean()


def _loss_names(scores: Tensor, asked: Asked, length: int) -> Tensor:
    """Minus the logarithm of the shares that digits of facts and the tokens that ask for them give to the words that
    name the fact, one head to each; `scores` are those of attention, [tokens, heads, S] of all sequences.

    So the third layer finds in a key and in a query whose digit it is, beside which digit.
    """
    losses = []
    for tokens, words in ((asked.told, NAMES_TOLD), (asked.tokens, NAMES_ASKED)):
        digit = torch.arange(len(tokens)) % DIGITS
        for head, back in enumerate(words):
            losses.append(functional.cross_entropy(scores[tokens, head], tokens % length - digit - back))
    return torch.stack(losses).mean()


@torch.no_grad()
def _unchosen(q: Tensor, weights: Tensor, keys: Tensor, future: Tensor, topk: int) -> Tensor:
    """Bool [B, S, S]: not among the topk tokens the indexer would choose."""
    scores = torch.einsum("bsh,bsht->bst", weights, torch.einsum("bshd,btd->bsht", q, keys).relu())
    scores = scores.masked_fill(future, -torch.inf)
    best = scores.topk(topk, -1, sorted=False).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, best, False)
