"""The training forward against the engine's, its hand-written gradients against autograd, rounding, export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from training.bpe import BEGIN_ID, END_ID
from training.evaluate import summary
from training.export import export
from training.model import Batch, TrainingModel, best_entries, initial, stack_name, tiny_config
from training.ops import TILE, TrainingOps, attend, head_loss
from training.train import Plan, Weights, Worker, orthogonal, packed, rounded

from tenfold import config as configuration
from tenfold.config import DeepseekV4Config
from tenfold.formats import BF16, F32, FP8_BLOCK, I64, MXFP4, WeightFormat, exact_layout, index_key_fp4
from tenfold.models import Binder, build
from tenfold.ops import Experts, Weight, reference
from tenfold.quantise import quantize
from tenfold.step import Span, Step
from tenfold.streams import Streams
from tenfold.weights import open_weights

PLAIN = TrainingOps(torch.float32, compiled=False)


def small_config(**changes: int) -> DeepseekV4Config:
    # sixteen index heads: with few, scores of exactly zero tie and the choice among them is free
    sizes = {"hidden_size": 64, "q_lora_rank": 64, "moe_intermediate_size": 64, "index_n_heads": 16, "index_topk": 32}
    return tiny_config(**(sizes | changes))


def shaken(config: DeepseekV4Config, seed: int) -> dict[str, Tensor]:
    """First values with noise, so that nothing is at zero or one by chance."""
    generator = torch.Generator().manual_seed(seed)
    values = initial(config, seed)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in values.items()
    }


def engine_logits(config: DeepseekV4Config, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    def take(name: str) -> Weight:
        stack, place = stack_name(name)
        value = weights[stack] if place is None else weights[stack][place]
        return Weight(name, tuple(value.shape), F32 if value.is_floating_point() else I64, value)

    model = build(config, Binder(take, reference, resident=True, exact=True))
    length = ids.shape[0]
    streams = Streams(config, length, exact=True)
    everything = torch.arange(length)
    return model.forward(Step(ids, everything, (Span(streams, 0, length, 0),), everything, length))


def test_training_forward_is_the_engines() -> None:
    config = small_config(index_topk=512)  # all that is visible; what a smaller one chooses is tested below
    weights = shaken(config, 0)
    ids = torch.randint(config.vocab_size, (2, 5 * TILE), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained = TrainingModel(config, weights, PLAIN, quantised=False).logits(ids).view(2, 5 * TILE, -1)
        for row in range(2):
            wanted = engine_logits(config, weights, ids[row])
            assert (trained[row] - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_selection_is_the_references() -> None:
    generator = torch.Generator().manual_seed(0)
    length, entries, topk = 2 * TILE, TILE // 2, 16
    q, weights = (torch.randn(1, length, *shape, generator=generator) for shape in ((16, 32), (16,)))
    keys = torch.randn(1, entries, 32, generator=generator)
    layout = exact_layout(index_key_fp4(32))
    visible = (torch.arange(length) + 1) // 4
    rows = reference.select_rows(q[0], weights[0], reference.pack_rows(keys[0], layout), layout, visible, topk)
    mine = best_entries(q, weights, keys, topk)[0]
    assert torch.equal(mine.sum(1), visible.clamp(max=topk))
    assert not (mine & (torch.arange(entries) >= visible[:, None])).any()
    wanted = torch.zeros(length, entries + 1, dtype=torch.bool).scatter_(1, rows.long() % (entries + 1), True)
    scores = ((q[0] @ keys[0].t()).relu() * weights[0][:, :, None]).sum(1)
    # sums, since the one of two scores that differ by a rounding error may be taken
    torch.testing.assert_close((scores * mine).sum(1), (scores * wanted[:, :entries]).sum(1), rtol=1e-4, atol=1e-4)


def naive_attention(
    q: Tensor, rows: Tensor, entries: Tensor, sink: Tensor, ratio: int, chosen: Tensor | None, scale: float
) -> Tensor:
    length, count = q.shape[1], entries.shape[1]
    t = torch.arange(length)[:, None]
    window = (torch.arange(length) <= t) & (torch.arange(length) > t - TILE)
    visible = (torch.arange(count) < (t + 1) // ratio).expand(q.shape[0], -1, -1)
    visible = visible if chosen is None else visible & chosen
    seen = torch.cat([window.expand(q.shape[0], -1, -1), visible], -1)
    keys = torch.cat([rows, entries], 1)
    scores = torch.einsum("bthd,bkd->bhtk", q, keys) * scale
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    own = sink[None, :, None, None].expand(q.shape[0], -1, length, 1)
    share = torch.cat([scores, own], -1).softmax(-1)[..., :-1]
    return torch.einsum("bhtk,bkd->bthd", share, keys)


@pytest.mark.parametrize(("ratio", "select"), [(4, False), (4, True), (128, False)])
def test_attention_gradients(ratio: int, select: bool) -> None:
    torch.manual_seed(ratio)
    length, heads, width = 3 * TILE, 2, 8
    shapes = (2, length, heads, width), (2, length, width), (2, length // ratio, width), (heads,)
    mine = [torch.randn(shape).requires_grad_() for shape in shapes]
    twins = [value.detach().clone().requires_grad_() for value in mine]
    visible = torch.arange(length // ratio) < (torch.arange(length)[:, None] + 1) // ratio
    chosen = (torch.rand(2, length, length // ratio) < 0.5) & visible if select else None
    q, rows, entries, sink = mine
    out, shares = attend(q, rows, entries, sink, chosen, ratio, 0.3, True)
    q, rows, entries, sink = twins
    wanted = naive_attention(q, rows, entries, sink, ratio, chosen, 0.3)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    weight = torch.randn(out.shape)
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    for value, twin in zip(mine, twins, strict=True):
        torch.testing.assert_close(value.grad, twin.grad, rtol=1e-3, atol=1e-4)
    assert not shares.requires_grad
    assert float(shares[:, ratio - 2].sum()) == 0.0  # no entry is complete yet
    assert (shares[:, -1] > 0).sum() == (2 * visible.shape[1] if chosen is None else chosen[:, -1].sum())


def test_expert_gradients() -> None:
    torch.manual_seed(0)
    tokens, topk, experts, hidden, inner = 40, 2, 3, 16, 32
    shapes = (experts, inner, hidden), (experts, hidden, inner), (experts, inner, hidden), (tokens, hidden)
    mine = [torch.randn(shape).requires_grad_() for shape in shapes]
    twins = [value.detach().clone().requires_grad_() for value in mine]
    ids = torch.rand(tokens, experts - 1).argsort(1)[:, :topk] + 1  # nobody asks for expert 0
    weights = torch.rand(tokens, topk)

    def weight(value: Tensor) -> Weight:
        return Weight("w", tuple(value.shape), F32, value)

    stacks = Experts(*((weight(value),) for value in mine[:3]))
    bank = Experts(*(tuple(weight(part) for part in twin) for twin in twins[:3]))
    out = PLAIN.experts(mine[3], ids, weights, stacks, limit=1.0, weigh_first=True)
    wanted = reference.experts(twins[3], ids, weights, bank, limit=1.0, weigh_first=True)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    out.square().sum().backward()
    wanted.square().sum().backward()
    for value, twin in zip(mine, twins, strict=True):
        torch.testing.assert_close(value.grad, twin.grad, rtol=1e-3, atol=1e-2)


def test_head_loss_is_cross_entropy() -> None:
    torch.manual_seed(0)
    x, head = torch.randn(700, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(50, (700,))
    loss, each = head_loss(x, head, targets)
    grads = torch.autograd.grad(3.0 * loss, (x, head))
    wanted = functional.cross_entropy(x @ head.t(), targets)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(each.mean(), wanted)
    torch.testing.assert_close(grads, torch.autograd.grad(3.0 * wanted, (x, head)))


@pytest.mark.parametrize("form", [FP8_BLOCK, MXFP4, BF16, F32], ids=lambda form: str(form.name))
def test_rounding_is_what_is_stored(form: WeightFormat) -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(2, 256, 384, generator=generator) * torch.logspace(-6, 3, 384)
    matrix[0, :, :64] = (matrix[0, :, :64].sign() * 0.25 * torch.arange(64)).clamp(-6, 6)  # ties of e2m1
    matrix[1, :128] = 0.0
    kept = rounded(matrix, form)
    for part, mine in zip(matrix, kept, strict=True):
        torch.testing.assert_close(mine, reference.dequantize(quantize("w", part, form)), rtol=0, atol=0)


def test_a_short_matrix_rounds_in_partial_blocks() -> None:
    matrix = torch.randn(192, 320, generator=torch.Generator().manual_seed(0))
    wanted = reference.dequantize(quantize("w", matrix, FP8_BLOCK))
    assert torch.equal(rounded(matrix, FP8_BLOCK), wanted)


def test_orthogonal_brings_singular_values_near_one() -> None:
    matrices = torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.shape == (3, 32)
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.5


def test_packed_rows_keep_to_one_package() -> None:
    tokens = np.concatenate([[*range(base, base + 30), END_ID] for base in (100, 200, 300, 400)]).astype(np.uint16)
    rows = packed(tokens, ["a", "b", "a", "b"], 8, np.random.default_rng(0))
    assert rows.shape[1] == 9
    assert len(rows) >= 12
    for row in rows:
        packages = {int(token) // 100 % 2 for token in row if token != END_ID}
        assert len(packages) == 1
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    plan = Plan(minutes=1.0)
    assert plan.rate(0, 0.0) < 0.1
    assert plan.rate(1000, plan.decay_from) == pytest.approx(1.0)
    assert plan.rate(1000, 1.0) == 0.0


def corpus(folder: Path) -> None:
    """A text that repeats itself, as the recipe would leave it."""
    text = np.tile(np.arange(5, 21, dtype=np.uint16), 64)
    np.save(folder / "train.npy", np.append(text, np.uint16(END_ID)))
    (folder / "train_sources.json").write_text(json.dumps(["only"]))


def test_training_learns_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    corpus(tmp_path)
    config = small_config(vocab_size=32, index_topk=8)
    plan = Plan(minutes=1.0, workers=1, tokens_per_step=256, length=256, select_from=0.0, warmup_steps=1)
    worker = Worker(0, config, Weights(config, plan), tmp_path, compiled=False)
    losses = []
    for _ in range(6):
        losses.append(worker.gradients()["loss"])
        worker.update()
    assert losses[-1] < 0.8 * losses[0]

    worker.save()
    state = torch.load(tmp_path / "ckpt" / "last.pt", weights_only=True)
    again = Worker(0, config, Weights(config, plan), tmp_path, compiled=False)
    again.weights.restore(state["weights"])
    again.resume(state)
    assert again.progress == worker.progress
    assert again.gradients()["loss"] == pytest.approx(worker.gradients()["loss"], rel=1e-3)


def test_the_indexer_learns_from_attention_and_nothing_else_does() -> None:
    config = small_config()
    weights = {n: v.requires_grad_() if v.is_floating_point() else v for n, v in shaken(config, 0).items()}
    batch = Batch.of(torch.randint(config.vocab_size, (1, 2 * TILE)), dense=True)
    TrainingModel(config, weights, PLAIN, quantised=True).hidden(batch)
    assert len(batch.index_losses) == 2
    sum(batch.index_losses, torch.zeros(())).backward()
    taught = {name for name, value in weights.items() if value.grad is not None}
    assert taught == {name for name in weights if ".indexer." in name}


def test_export_holds_what_training_rounded_to(tmp_path: Path) -> None:
    config = small_config(hidden_size=128, moe_intermediate_size=128)
    weights = shaken(config, 2)
    assert export(config, weights, tmp_path) == (tmp_path / "model.safetensors").stat().st_size
    opened = open_weights(tmp_path, configuration.load(tmp_path))
    forms = set()
    for name in [info.name for info in opened]:
        weight = opened.take(name)
        forms.add(weight.format.name)
        stack, place = stack_name(name)
        value = weights[stack] if place is None else weights[stack][place]
        wanted = value if weight.format is I64 else rounded(value, weight.format)
        if name.endswith(("embed.weight", "gate.tid2eid")):
            wanted[BEGIN_ID] = wanted[END_ID]  # a prompt begins as a document of the training text did
        got = weight.data if weight.format is I64 else reference.dequantize(weight)
        assert torch.equal(got, wanted), name
    opened.finish()
    assert forms == {"fp8", "mxfp4", "bf16", "f32", "i64"}
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_summary_leaves_end_marks_out() -> None:
    ids = np.array([5, END_ID, 6, 6])
    token_bytes = np.array([0, 0, 0, 0, 0, 2, 4])
    found = summary(np.array([4.0, 100.0, 8.0, 8.0]), ids, token_bytes)
    assert found["bytes"] == 10
    assert found["bits_per_byte"] == pytest.approx(2.0)
