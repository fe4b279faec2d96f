"""Second stage of training: the network learns to find facts planted in text. Knows nothing of where it runs.

    python -m training.recall --model tiny-v4-flash --start src/tenfold/demo/tiny-v4-flash

One process, one thread, float32; the schedule counts tokens, so that it may be paused. Started again it goes on from
build/training/MODEL/last.pt. `--start` is a checkpoint of an earlier network, which is grown to the new shape; with
`--tokens` it is one of this stage that had read so many.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch._dynamo
from torch import Tensor

from tenfold import checkpoint
from tenfold.config import DeepseekV4Config, ModelConfig
from training.data import WORK
from training.facts import DIGITS, Lessons, Teacher
from training.grow import grown
from training.model import Asked, Batch, Crowd, TrainingModel, initial, stack_name
from training.model_v32 import TrainingModelV32, training_model
from training.models import CONFIGS
from training.ops import TrainingOps
from training.train import BALANCE_RATE, rounded

__all__ = ["Plan", "Pupil", "Stage", "token_weights"]

CHECKPOINT_EVERY_S = 60.0
LOG_EVERY_STEPS = 10
CROWD_COPIES = 4.0


@dataclass(frozen=True, slots=True)
class Stage:
    """Lessons of one shape, until `until` tokens have been read."""

    until: int
    length: int
    count: int
    facts: tuple[int, int]
    rates: tuple[float, float]  # factor of all learning rates at the beginning and at the end
    looking_up: bool = False  # only the layers up to the one that looks up, and the tokens that ask
    selects: bool = False  # attends to what the indexer chooses, but for every fourth step
    quantised: bool = False  # weights and rows as they will be stored
    far: float = 0.0  # share of lessons that reach far into a million positions
    crowd: int = 0  # entries of earlier text that a look-up must tell from the right one, each counted four times


STAGES = (
    Stage(700_000, 256, 4, (5, 7), (1.0, 0.5), looking_up=True),
    Stage(850_000, 512, 2, (7, 14), (0.7, 0.7)),
    Stage(1_000_000, 1024, 1, (10, 28), (0.7, 0.4), selects=True),
    Stage(1_150_000, 1024, 1, (10, 28), (0.4, 0.02), selects=True, quantised=True),
    Stage(1_750_000, 1024, 1, (10, 28), (0.3, 0.01), selects=True, quantised=True),
    Stage(2_200_000, 1024, 2, (14, 28), (0.3, 0.01), selects=True, quantised=True),  # more to mix up
    Stage(2_700_000, 1024, 2, (14, 28), (0.4, 0.01), selects=True, quantised=True, far=0.5, crowd=65_536),
)

# V3.2 has no entries that pool four tokens: two layers have to gather what belongs to a digit.
STAGES_V32 = (
    Stage(4_100_000, 256, 4, (5, 7), (1.0, 0.8), looking_up=True),
    Stage(4_450_000, 256, 4, (5, 7), (0.8, 0.7)),
    Stage(4_550_000, 512, 2, (7, 14), (0.8, 0.7)),
    Stage(4_800_000, 1024, 1, (10, 28), (0.7, 0.5), selects=True),
    Stage(5_150_000, 1024, 1, (10, 28), (0.5, 0.02), selects=True, quantised=True),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run goes; everything is counted in tokens."""

    stages: tuple[Stage, ...] = STAGES
    seed: int = 0
    warmup_steps: int = 20  # of every stage
    attention_rate: float = 1.5e-3
    expert_rate: float = 7e-4
    other_rate: float = 1e-3
    text_weight: float = 1.0
    answer_weight: float = 1.0
    form_weight: float = 0.1
    recall_weight: float = 1.0
    index_weight: float = 0.3
    before_weight: float = 0.3
    dense_every: int = 4

    @property
    def tokens(self) -> int:
        return self.stages[-1].until

    def at(self, tokens: int) -> tuple[Stage, float]:
        """The stage, and the factor of all learning rates."""
        start = 0
        for stage in self.stages:
            if tokens < stage.until:
                break
            start = stage.until
        share = (tokens - start) / (stage.until - start)
        warm = min(1.0, ((tokens - start) / (stage.length * stage.count) + 1) / self.warmup_steps)
        return stage, warm * (stage.rates[0] + share * (stage.rates[1] - stage.rates[0]))


@dataclass(slots=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    tokens: int = 0
    trained_s: float = 0.0


def token_weights(lessons: Lessons, plan: Plan) -> Tensor:
    """What each token's loss counts, [n]: text, answers with their ends, and the form of facts and questions."""
    text = lessons.is_text.flatten()
    answers = torch.zeros_like(text).index_fill_(0, lessons.asked, True)
    answers[lessons.asked.view(-1, DIGITS)[:, -1] + 1] = True  # what follows the last digit
    form = ~(text | answers)
    parts = ((text, plan.text_weight), (answers, plan.answer_weight), (form, plan.form_weight))
    return sum((mask * (weight / mask.sum().clamp(min=1)) for mask, weight in parts), torch.zeros(()))


class Pupil:
    """The weights, their optimiser, and one step after the other."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], plan: Plan, teacher: Teacher) -> None:
        self.config, self.plan, self.teacher = config, plan, teacher
        self.forms = {stack_name(s.name)[0]: s.formats[0] for s in checkpoint.tensors(config)}
        self.masters = {n: v.clone().requires_grad_() if v.is_floating_point() else v for n, v in weights.items()}
        self.fixed = {
            n: v
            for n, v in self.masters.items()
            if not v.is_floating_point() or n.endswith(("gate.bias", "correction_bias"))
        }
        for value in self.fixed.values():
            value.requires_grad_(False)
        self.learnt = {n: v for n, v in self.masters.items() if n not in self.fixed}
        groups: dict[float, list[Tensor]] = {}
        for name, value in self.learnt.items():
            groups.setdefault(self._rate(name), []).append(value)
        parts = [{"params": values, "lr": rate, "rate": rate} for rate, values in groups.items()]
        self.optimiser = torch.optim.AdamW(parts, betas=(0.9, 0.97), weight_decay=0.01, fused=True)
        self.leaves = dict(self.masters)
        self.ops = TrainingOps(torch.float32, compiled=False)
        self.progress = Progress()
        self.crowd: Crowd | None = None  # not kept: a run that goes on gathers another

    def _rate(self, name: str) -> float:
        if ".experts." in name:
            return self.plan.expert_rate
        return self.plan.attention_rate if ".attn." in name or "self_attn" in name else self.plan.other_rate

    def step(self) -> dict[str, float]:
        """One step of learning."""
        at = self.progress
        stage, rate = self.plan.at(at.tokens)
        lessons = self.teacher.batch(at.step, stage.count, stage.length, facts=stage.facts, far=stage.far)
        if stage.crowd and self.crowd is None:
            self.crowd = Crowd(stage.crowd, CROWD_COPIES)
        if stage.looking_up:
            found = self._look_up(lessons, stage.quantised)
        else:
            dense = not stage.selects or at.step % self.plan.dense_every == 0
            found = self._learn(lessons, dense, stage.quantised)
        torch.nn.utils.clip_grad_norm_(list(self.learnt.values()), 1.0, foreach=True)
        for group in self.optimiser.param_groups:
            group["lr"] = group["rate"] * rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        at.step += 1
        at.tokens += stage.count * stage.length
        return found

    def model(self, quantised: bool) -> TrainingModel | TrainingModelV32:
        """Over the weights as they are, or as they will be stored."""
        weights = dict(self.fixed)
        for name, value in self.learnt.items():
            weights[name] = value
            if quantised:
                weights[name] = value + (rounded(value.detach(), self.forms[name]) - value).detach()
        return training_model(self.config, weights, self.ops, quantised)

    def _look_up(self, lessons: Lessons, quantised: bool) -> dict[str, float]:
        batch = Batch.of(lessons.ids[:, :-1], True, lessons.positions, Asked(lessons.asked, lessons.told))
        loss, each = self.model(quantised).recall_loss(batch, lessons.ids[:, 1:].flatten()[lessons.asked])
        recall = batch.recall_losses
        (loss + self._recall_loss(recall)).backward()
        return _found(each, recall)

    def _recall_loss(self, recall: dict[str, Tensor]) -> Tensor:
        """Of where attention and indexer look; V3.2's first two layers, which gather, among it."""
        plan = self.plan
        total = plan.recall_weight * recall["attention"] + plan.index_weight * recall["indexer"]
        return total + plan.before_weight * sum(recall[name] for name in ("before", "names") if name in recall)

    def _learn(self, lessons: Lessons, dense: bool, quantised: bool) -> dict[str, float]:
        plan = self.plan
        asked = Asked(lessons.asked, lessons.told)
        batch = Batch.of(lessons.ids[:, :-1], dense, lessons.positions, asked, self.crowd)
        targets = lessons.ids[:, 1:].flatten()
        loss, each = self.model(quantised).loss(batch, targets, token_weights(lessons, plan))
        recall = batch.recall_losses
        total = loss + self._recall_loss(recall)
        if batch.index_losses:
            total = total + 0.1 * sum(batch.index_losses)
        total.backward()
        if self.crowd is not None:
            text = _entries_of_text(lessons.is_text, len(batch.seen["keys"]))
            self.crowd.add(batch.seen["rows"][text], batch.seen["keys"][text])
        for name, load in batch.loads.items():  # noaux_tc: up where an expert got less than its share
            self.fixed[name] += BALANCE_RATE * torch.sign(load.mean() - load)
        found = _found(each[lessons.asked], recall) | {"text": float(each[lessons.is_text.flatten()].mean())}
        if batch.index_losses:
            found["index"] = float(torch.stack(batch.index_losses).detach().mean())
        return found

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {"plan": asdict(self.plan), "config": json.dumps(dict(self.config.raw))}
        weights = {name: value.detach() for name, value in self.masters.items()}
        state |= {"progress": asdict(self.progress), "weights": weights, "optimiser": self.optimiser.state_dict()}
        torch.save(state, folder / "last.pt.partial")
        os.replace(folder / "last.pt.partial", folder / "last.pt")

    def restore(self, state: dict[str, dict[str, Tensor]]) -> None:
        with torch.no_grad():
            for name, value in self.masters.items():
                value.copy_(state["weights"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.progress = Progress(**state["progress"])  # type: ignore[arg-type]


def _entries_of_text(is_text: Tensor, entries: int) -> Tensor:
    """Bool [entries of all sequences]: neither the entry's tokens nor those before, which it pools too, are of a fact
    or a question. `is_text` [n, length] speaks of the tokens behind each."""
    ratio = is_text.numel() // entries
    groups = is_text.roll(1, 1).view(is_text.shape[0], -1, ratio).all(2)
    return (groups & groups.roll(1, 1)).flatten()


def _found(each: Tensor, recall: dict[str, Tensor]) -> dict[str, float]:
    """Figures of a step: nats a digit, answers whose digits are all the likeliest, how well they were looked up."""
    nats = each.view(-1, DIGITS)
    # a digit of more than half is the likeliest, most others are not
    found = {"answer": float(nats.mean()), "right": float((nats < math.log(2.0)).all(1).float().mean())}
    return found | {f"find_{name}": float(value.detach()) for name, value in recall.items()}


def _log(folder: Path, recent: list[dict[str, float]], at: Progress) -> None:
    line: dict[str, float] = {"step": at.step, "tokens": at.tokens, "trained_s": round(at.trained_s, 1)}
    for key in sorted({key for found in recent for key in found}):
        values = [found[key] for found in recent if key in found]
        line[key] = round(sum(values) / len(values), 4)
    recent.clear()
    print(json.dumps(line), flush=True)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def run(name: str, start: Path, plan: Plan, work: Path, tokens: int = 0) -> None:
    """Trains model `name` from a checkpoint, at `tokens` of the plan, to the end of it."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    config, folder = CONFIGS[name], work / name
    folder.mkdir(parents=True, exist_ok=True)
    pupil = Pupil(config, grown(start, config, initial(config, plan.seed)), plan, Teacher(work, plan.seed))
    pupil.progress = Progress(step=tokens // 1024, tokens=tokens)  # fresh lessons, not those of the first steps
    if (folder / "last.pt").is_file():
        pupil.restore(torch.load(folder / "last.pt", weights_only=True))
    recent: list[dict[str, float]] = []
    saved_s, at = time.process_time(), pupil.progress
    while at.tokens < plan.tokens:
        start_s = time.process_time()
        recent.append(pupil.step())
        at.trained_s += time.process_time() - start_s
        if at.step % LOG_EVERY_STEPS == 0 or at.step == 1:
            _log(folder, recent, at)
        if time.process_time() - saved_s > CHECKPOINT_EVERY_S:
            pupil.save(folder)
            saved_s = time.process_time()
    pupil.save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="teach an embedded model to find facts")
    parser.add_argument("--model", choices=sorted(CONFIGS), default="tiny-v4-flash")
    parser.add_argument("--start", type=Path, required=True, help="checkpoint to begin with")
    parser.add_argument("--tokens", type=int, default=0, help="that the checkpoint has read in this stage")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    stages = STAGES if isinstance(CONFIGS[arguments.model], DeepseekV4Config) else STAGES_V32
    run(arguments.model, arguments.start, Plan(stages, arguments.seed), WORK, arguments.tokens)


if __name__ == "__main__":
    main()
