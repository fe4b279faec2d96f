"""Trains the embedded model: data order, optimisers, schedule, checkpoints. Knows nothing of the export.

    python -m training.train --minutes 75

Everything is set by the seed and the step but the length of the run: the learning rate follows the processor time of
the first worker, so that it reaches zero when the minutes are over whatever the machine does, and the run may be
paused. Started again it goes on from build/training/ckpt (of V3.2: build/training/ckpt-v3.2).

bfloat16 where the processor multiplies it, else float32.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing import connection
from pathlib import Path
from threading import Barrier

import numpy as np
import torch
import torch._dynamo
from torch import Tensor

from tenfold import checkpoint
from tenfold.config import DeepseekV32Config, ModelConfig
from tenfold.errors import RunError
from tenfold.formats import BF16, FP8_BLOCK, MXFP4, WeightFormat
from training.bpe import END_ID
from training.data import WORK
from training.model import Batch, initial, stack_name, tiny_config
from training.model_v32 import training_model
from training.models import CONFIGS
from training.ops import TrainingOps

__all__ = ["Plan", "Weights", "Worker", "packed", "rounded", "run"]

CHECKPOINT_EVERY_S = 180.0
LOG_EVERY_STEPS = 20
VALID_EVERY_STEPS = 200
BALANCE_RATE = 0.002
MUON_MOMENTUM, MUON_DECAY = 0.95, 0.1
ADAM_BETAS = (0.9, 0.95)
HALF = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32  # of products


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run goes; shares are of the wall clock."""

    minutes: float
    seed: int = 0
    workers: int = 2
    tokens_per_step: int = 4096
    length: int = 2048
    long_length: int = 8192
    long_from: float = 0.84
    quantise_from: float = 0.60
    select_from: float = 0.25
    warmup_steps: int = 60
    decay_from: float = 0.30
    muon_rate: float = 0.02
    embed_rate: float = 6e-3
    head_rate: float = 3e-3
    vector_rate: float = 3e-3
    index_loss_weight: float = 0.1
    dense_every: int = 4

    def rate(self, step: int, share: float) -> float:
        """Factor of all learning rates."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return warm * min(1.0, max(0.0, (1.0 - share) / (1.0 - self.decay_from)))


# ------------------------------------------------------------------------------------------------ data


def packed(tokens: np.ndarray, sources: list[str], length: int, rng: np.random.Generator) -> np.ndarray:
    """One epoch: int64 [sequences, length + 1], each of documents of one package, in random order."""
    stops = np.flatnonzero(tokens == END_ID) + 1
    documents = np.split(tokens, stops[:-1])
    assert len(documents) == len(sources)
    rows = []
    for source in sorted(set(sources)):
        mine = [document for document, name in zip(documents, sources, strict=True) if name == source]
        text = np.concatenate([mine[i] for i in rng.permutation(len(mine))])
        text = text[int(rng.integers(length)) :]
        count = (len(text) - 1) // length
        starts = np.arange(count)[:, None] * length
        rows.append(text[starts + np.arange(length + 1)])
    epoch = np.concatenate(rows).astype(np.int64)
    return epoch[rng.permutation(len(epoch))]


class Feed:
    """Batches without end; the epoch in use is made again from its number after a restart."""

    def __init__(self, work: Path, seed: int) -> None:
        self.tokens = np.load(work / "train.npy")
        self.sources: list[str] = json.loads((work / "train_sources.json").read_text(encoding="utf-8"))
        self.seed, self.epoch, self.row, self.length = seed, 0, 0, 0
        self.rows = np.empty((0, 1), dtype=np.int64)

    def next(self, sequences: int, length: int) -> Tensor:
        """int64 [sequences, length + 1]."""
        if length != self.length or self.row + sequences > len(self.rows):
            self.epoch += 1
            self._pack(length)
            self.row = 0
        self.row += sequences
        return torch.from_numpy(self.rows[self.row - sequences : self.row])

    def _pack(self, length: int) -> None:
        self.length = length
        self.rows = packed(self.tokens, self.sources, length, np.random.default_rng([self.seed, self.epoch]))

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "row": self.row, "length": self.length}

    def restore(self, state: dict[str, int]) -> None:
        self.epoch, self.row = state["epoch"], state["row"]
        if state["length"]:
            self._pack(state["length"])


# ------------------------------------------------------------------------------------------------ rounding


def rounded(master: Tensor, form: WeightFormat) -> Tensor:
    """float32 [..., out, in] -> the nearest values the format can hold, as `quantise` would store them."""
    if form is FP8_BLOCK:
        return _rounded_fp8(master)
    if form is MXFP4:
        return _rounded_mxfp4(master)
    return master.bfloat16().float() if form is BF16 else master


def _power_of_two(amax: Tensor, limit: float, floor: float) -> Tensor:
    """2^ceil(log2(amax / limit))."""
    mantissa, exponent = torch.frexp(amax.clamp(min=floor) * torch.tensor(1.0 / limit, dtype=torch.float32))
    return torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())


def _rounded_fp8(master: Tensor) -> Tensor:
    rows, columns = master.shape[-2:]
    # zeros fill up the blocks at the edges and change no block's largest value
    whole = torch.nn.functional.pad(master, (0, -columns % 128, 0, -rows % 128))
    blocks = whole.unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))
    scale = _power_of_two(blocks.abs().amax((-3, -1), keepdim=True), 448.0, 1e-4)
    kept: Tensor = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return kept.flatten(-4, -3).flatten(-2)[..., :rows, :columns]


def _rounded_mxfp4(master: Tensor) -> Tensor:
    blocks = master.unflatten(-1, (-1, 32))
    scale = _power_of_two(blocks.abs().amax(-1, keepdim=True), 6.0, 6.0 * 2.0**-126)
    scaled = blocks / scale
    size = scaled.abs()
    # Steps of 1/2 below 2, of 1 below 4, of 2 above; halves go to the even multiple, which is the even code.
    spacing = 0.5 + 0.5 * (size >= 2.0) + (size >= 4.0)
    kept: Tensor = (scaled / spacing).round() * spacing * scale
    return kept.flatten(-2)


# ------------------------------------------------------------------------------------------------ optimisers


@torch.no_grad()
def orthogonal(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrices of [n, out, in]."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).to(HALF)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(HALF)
    for a, b, c in ((3.4445, -4.7750, 2.0315),) * 5:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    found: Tensor = x if wide else x.mT
    return found.float()


def _shared(value: Tensor) -> Tensor:
    shared: Tensor = value.clone().share_memory_()
    return shared


class MatrixGroup:
    """Matrices of one shape and format as [n, out, in], trained by Muon; each worker has its share of them."""

    def __init__(self, form: WeightFormat, values: dict[str, Tensor], workers: int) -> None:
        self.form, self.names = form, list(values)
        self.counts = [value.numel() // value[..., :, :].shape[-1] // value.shape[-2] for value in values.values()]
        self.shapes = [value.shape for value in values.values()]
        self.master = _shared(torch.cat([value.view(-1, *value.shape[-2:]) for value in values.values()]))
        self.momentum = _shared(torch.zeros_like(self.master))
        self.leaf = _shared(self.master.to(HALF))
        self.grads = _shared(torch.zeros(workers, *self.master.shape, dtype=HALF))

    def split(self, stacked: Tensor) -> dict[str, Tensor]:
        """Views of a tensor like `master`, by name."""
        parts = stacked.split(self.counts)
        return {n: part.view(s) for n, part, s in zip(self.names, parts, self.shapes, strict=True)}

    @torch.no_grad()
    def step(self, mine: slice, rate: float, quantised: bool) -> None:
        grads = self.grads[:, mine].float().mean(0)
        momentum, master = self.momentum[mine], self.master[mine]
        momentum.lerp_(grads, 1.0 - MUON_MOMENTUM)
        update = orthogonal(grads.lerp(momentum, MUON_MOMENTUM))
        rows, columns = update.shape[1:]
        master.mul_(1.0 - rate * MUON_DECAY)
        master.sub_(update, alpha=rate * max(1.0, rows / columns) ** 0.5)
        self.leaf[mine] = (rounded(master, self.form) if quantised else master).to(HALF)


class Vector:
    """One tensor trained by Adam: embeddings, head, routers, norms, hyper-connections."""

    def __init__(self, form: WeightFormat, value: Tensor, workers: int) -> None:
        self.form = form
        self.master = _shared(value)
        self.mean, self.square = _shared(torch.zeros_like(value)), _shared(torch.zeros_like(value))
        half = form is BF16 and value.dim() > 1
        self.leaf = _shared(value.to(HALF) if half else value)
        self.grads = _shared(torch.zeros(workers, *value.shape))

    @torch.no_grad()
    def step(self, number: int, rate: float, quantised: bool) -> None:
        grad = self.grads.mean(0)
        grad = grad / grad.norm().clamp(min=1.0)
        self.mean.lerp_(grad, 1.0 - ADAM_BETAS[0])
        self.square.lerp_(grad.square(), 1.0 - ADAM_BETAS[1])
        mean, square = self.mean / (1.0 - ADAM_BETAS[0] ** number), self.square / (1.0 - ADAM_BETAS[1] ** number)
        self.master.sub_(mean / (square.sqrt() + 1e-8), alpha=rate)
        self.leaf.copy_(rounded(self.master, self.form) if quantised else self.master)


def _is_matrix(name: str) -> bool:
    """Whether Muon trains it: linear maps, but neither embeddings, routers nor hyper-connections."""
    if not name.removeprefix("model.").startswith("layers.") or "hc_" in name or not name.endswith(".weight"):
        return False
    return not name.endswith(("norm.weight", "gate.weight", "weights_proj.weight"))


class Weights:
    """Masters in float32 and the leaves the model reads, in memory all workers share.

    Each worker adds its gradients, then trains its own part of the weights for all.
    """

    def __init__(self, config: ModelConfig, plan: Plan) -> None:
        self.plan = plan
        forms = {stack_name(s.name)[0]: s.formats[0] for s in checkpoint.tensors(config)}
        grouped: dict[tuple[int, int, str], dict[str, Tensor]] = {}
        self.vectors: dict[str, Vector] = {}
        self.fixed: dict[str, Tensor] = {}
        self.loads: dict[str, Tensor] = {}
        for name, value in initial(config, plan.seed).items():
            if _is_matrix(name):
                grouped.setdefault((*value.shape[-2:], forms[name].name), {})[name] = value
            elif name.endswith(("gate.bias", "e_score_correction_bias", "tid2eid")):
                self.fixed[name] = _shared(value)
            else:
                self.vectors[name] = Vector(forms[name], value, plan.workers)
            if name.endswith(("gate.bias", "e_score_correction_bias")):
                self.loads[name] = _shared(torch.zeros(plan.workers, *value.shape))
        self.groups = [MatrixGroup(forms[next(iter(g))], g, plan.workers) for g in grouped.values()]

    def leaves(self) -> dict[str, Tensor]:
        """What one worker's model reads; its gradients are the worker's own."""
        found = {name: vector.leaf for name, vector in self.vectors.items()}
        for group in self.groups:
            found |= group.split(group.leaf)
        return self.fixed | {name: leaf.detach().requires_grad_() for name, leaf in found.items()}

    @torch.no_grad()
    def give(self, worker: int, leaves: dict[str, Tensor], loads: dict[str, Tensor]) -> None:
        """Hands in a worker's gradients and expert loads."""
        into = {name: vector.grads[worker] for name, vector in self.vectors.items()}
        for group in self.groups:
            into |= group.split(group.grads[worker])
        for name, target in into.items():
            grad = leaves[name].grad
            target.zero_() if grad is None else target.copy_(grad)
            leaves[name].grad = None
        for name, load in loads.items():
            self.loads[name][worker] = load

    def update(self, worker: int, number: int, factor: float, quantised: bool) -> None:
        """This worker's part of step `number`, counted from 1."""
        plan = self.plan
        for group in self.groups:
            count = group.master.shape[0]
            mine = slice(count * worker // plan.workers, count * (worker + 1) // plan.workers)
            group.step(mine, plan.muon_rate * factor, quantised)
        rates = dict.fromkeys(("embed.weight", "model.embed_tokens.weight"), plan.embed_rate)
        rates |= dict.fromkeys(("head.weight", "lm_head.weight"), plan.head_rate)
        for place, (name, vector) in enumerate(self.vectors.items()):
            if place % plan.workers == worker:
                vector.step(number, factor * rates.get(name, plan.vector_rate), quantised)
        for place, (name, load) in enumerate(self.loads.items()):
            if place % plan.workers == worker:  # noaux_tc: up where an expert got less than its share
                total = load.sum(0)
                self.fixed[name] += BALANCE_RATE * torch.sign(total.mean() - total)

    def state(self) -> dict[str, Tensor]:
        """All there is to save, by name; the tensors themselves."""
        found = dict(self.fixed)
        for name, vector in self.vectors.items():
            found |= {name: vector.master, f"mean {name}": vector.mean, f"square {name}": vector.square}
        for group in self.groups:
            found |= group.split(group.master)
            found |= {f"momentum {name}": part for name, part in group.split(group.momentum).items()}
        return found

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        parts: list[Vector | MatrixGroup] = [*self.vectors.values(), *self.groups]
        for part in parts:
            part.leaf.copy_(part.master)


# ------------------------------------------------------------------------------------------------ the run


@dataclass(slots=True)
class Progress:
    """Where a run stands; `share` is the part of its time that has passed."""

    step: int = 0
    tokens: int = 0
    trained_s: float = 0.0
    share: float = 0.0


def _checkpoints(config: ModelConfig, work: Path) -> Path:
    return work / ("ckpt-v3.2" if isinstance(config, DeepseekV32Config) else "ckpt")


class Worker:
    """One process of a run: half of each batch, half of the weights' updates. Worker 0 keeps the log and the files."""

    def __init__(self, number: int, config: ModelConfig, weights: Weights, work: Path, compiled: bool) -> None:
        self.number, self.config, self.plan, self.work = number, config, weights.plan, work
        self.weights, self.leaves = weights, weights.leaves()
        self.feed = Feed(work, self.plan.seed)
        ops = TrainingOps(HALF, compiled)
        self.models = [training_model(config, self.leaves, ops, quantised) for quantised in (False, True)]
        self.progress = Progress()

    def gradients(self) -> dict[str, float]:
        """Forward and backward over this worker's sequences; what it found, for the log."""
        plan, at = self.plan, self.progress
        length = plan.long_length if at.share >= plan.long_from else plan.length
        per_worker = max(1, plan.tokens_per_step // length // plan.workers)
        ids = self.feed.next(per_worker * plan.workers, length)[self.number * per_worker :][:per_worker]
        batch = Batch.of(ids[:, :-1], dense=at.share < plan.select_from or at.step % plan.dense_every == 0)
        loss, each = self.models[self.quantised].loss(batch, ids[:, 1:])
        index_loss = sum(batch.index_losses, torch.zeros(())) / max(len(batch.index_losses), 1)
        (loss + plan.index_loss_weight * index_loss).backward()
        self.weights.give(self.number, self.leaves, batch.loads)
        at.tokens += plan.workers * batch.ids.shape[0]
        found = {"loss": float(loss.detach()), "later": _second_half(each, batch)} | _imbalance(batch)
        return found | ({"index": float(index_loss.detach())} if batch.index_losses else {})

    @property
    def quantised(self) -> bool:
        return self.progress.share >= self.plan.quantise_from

    def update(self) -> None:
        """This worker's part of the weights, once all workers have given their gradients."""
        at = self.progress
        at.step += 1
        factor = self.plan.rate(at.step, at.share)
        self.weights.update(self.number, at.step, factor, self.quantised)

    @torch.no_grad()
    def valid(self, length: int, num_tokens: int = 32768) -> float:
        """Bits per byte on the first tokens of the validation text, in sequences of `length`."""
        tokens = torch.from_numpy(np.load(self.work / "valid.npy")[: num_tokens + 1].astype(np.int64))
        num_bytes = torch.from_numpy(np.load(self.work / "token_bytes.npy").astype(np.int64))[tokens[1:]]
        shape = (-1, max(1, self.plan.tokens_per_step // self.plan.workers // length), length)
        nats = 0.0
        for ids, targets in zip(tokens[:-1].view(shape), tokens[1:].view(shape), strict=True):
            _, each = self.models[self.quantised].loss(Batch.of(ids, dense=False), targets)
            nats += float(each[targets.flatten() != END_ID].sum())
        return nats / math.log(2.0) / float(num_bytes[tokens[1:] != END_ID].sum())

    def save(self) -> None:
        folder = _checkpoints(self.config, self.work)
        folder.mkdir(exist_ok=True)
        state = {"plan": asdict(self.plan), "config": json.dumps(dict(self.config.raw))}
        state |= {"progress": asdict(self.progress), "feed": self.feed.state(), "weights": self.weights.state()}
        partial = folder / "last.pt.partial"
        torch.save(state, partial)
        os.replace(partial, folder / "last.pt")

    def resume(self, state: dict[str, dict[str, int]]) -> None:
        self.progress = Progress(**state["progress"])
        self.feed.restore(state["feed"])


def _second_half(each: Tensor, batch: Batch) -> float:
    """Loss of the later half of each sequence less that of the earlier: what longer contexts are worth."""
    halves = each.view(batch.sequences, 2, -1).mean((0, 2))
    return float(halves[1] - halves[0])


def _imbalance(batch: Batch) -> dict[str, float]:
    """The largest load of an expert over the mean."""
    return {"imbalance": max((float(load.max() / load.mean()) for load in batch.loads.values()), default=1.0)}


class Log:
    """Means over the steps since the last line; JSON on the screen and in train.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recent: list[dict[str, float]] = []

    def write(self, line: dict[str, float]) -> None:
        for key in sorted({key for found in self.recent for key in found}):
            line[key] = round(float(np.mean([found[key] for found in self.recent if key in found])), 4)
        self.recent.clear()
        print(json.dumps(line), flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _work(number: int, config: ModelConfig, weights: Weights, work: Path, clock: Tensor, meet: Barrier) -> None:
    """The life of one worker; worker 0 holds the clock."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # one for each shape; beyond it dynamo goes on uncompiled
    worker = Worker(number, config, weights, work, compiled=True)
    last = _checkpoints(config, work) / "last.pt"
    if last.is_file():
        worker.resume(torch.load(last, weights_only=True, mmap=True))
    log, saved_s, at = Log(work / "train.jsonl"), time.monotonic(), worker.progress
    while at.share < 1.0:
        start_s = time.process_time()
        log.recent.append(worker.gradients())
        meet.wait()
        worker.update()
        if number == 0:
            at.trained_s += time.process_time() - start_s if at.step > 3 else 0.0  # compiling is not training
            clock[0] = at.trained_s / (60.0 * weights.plan.minutes)
        meet.wait()
        at.share = float(clock[0])
        if number == 0 and (at.step % LOG_EVERY_STEPS == 0 or at.step <= 3 or at.share >= 1.0):
            _report(worker, log)
            if time.monotonic() - saved_s > CHECKPOINT_EVERY_S or at.share >= 1.0:
                worker.save()
                saved_s = time.monotonic()


def _report(worker: Worker, log: Log) -> None:
    at, plan = worker.progress, worker.plan
    line = {"step": at.step, "tokens": at.tokens, "trained_s": round(at.trained_s, 1)}
    line["tps"] = round(at.tokens / max(at.trained_s, 1.0))
    if at.step % VALID_EVERY_STEPS == 0 or at.share >= 1.0:
        line["valid_bits_per_byte"] = round(worker.valid(plan.length), 4)
    if at.share >= 1.0:
        line["valid_long_bits_per_byte"] = round(worker.valid(plan.long_length), 4)
    log.write(line)


def run(config: ModelConfig, plan: Plan, work: Path) -> None:
    """Trains until the time is over, on `plan.workers` processes of one thread each."""
    weights = Weights(config, plan)
    last = _checkpoints(config, work) / "last.pt"
    clock = torch.zeros(1).share_memory_()
    if last.is_file():
        state = torch.load(last, weights_only=True)
        weights.restore(state["weights"])
        clock[0] = state["progress"]["share"]
        print(f"goes on from step {state['progress']['step']}", flush=True)
    context = multiprocessing.get_context("spawn")
    meet = context.Barrier(plan.workers)
    arguments = [(number, config, weights, work, clock, meet) for number in range(plan.workers)]
    workers = [context.Process(target=_work, args=values) for values in arguments]
    for process in workers:
        process.start()
    while alive := [process.sentinel for process in workers if process.is_alive()]:
        connection.wait(alive)
        if any(process.exitcode for process in workers):
            meet.abort()  # else the others would wait for it for ever
    if any(process.exitcode for process in workers):
        raise RunError(
            "a worker of the training run failed, its error stands above; expected all to train until the time is "
            "over: mend the cause and start again, the run goes on from its last checkpoint"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="train the embedded models' first stage")
    parser.add_argument("--model", choices=("text", "tiny-v3.2"), default="text", help="text: that of both V4 models")
    parser.add_argument("--minutes", type=float, default=75.0, help="training time; the schedule follows it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    arguments = parser.parse_args()
    plan = Plan(arguments.minutes, arguments.seed, arguments.workers)
    if arguments.model == "text":
        run(tiny_config(), plan, WORK)
    else:
        # its attention is to all tokens: an eighth of the length, so that most of the work is the network's
        run(CONFIGS[arguments.model], replace(plan, tokens_per_step=2048, length=256, long_length=1024), WORK)


if __name__ == "__main__":
    main()
