"""Random tiny networks, and the comparison of this engine with transformers' implementation of them.

Shared by the tests and by `benchmarks/oracle.py`. Knows nothing of how either side computes: a network is a config
in the checkpoint's words and a value for each of its tensors, a judgement is two tables of logits. Where the two
sides take different rows or experts, `Followed` shows whether the border was a tie in float32 (spec 6.9).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import transformers
from torch import Tensor

from tenfold import Engine, ops
from tenfold import config as configuration
from tenfold.checkpoint import TensorSpec
from tenfold.config import ModelConfig
from tenfold.formats import F32, FP8_BLOCK, I64, MXFP4, RowLayout, WeightFormat
from tenfold.ops import Weight, reference
from tenfold.quantise import quantize
from tenfold.synth import write_checkpoint

__all__ = [
    "LIMIT",
    "PROMPTS",
    "Case",
    "Choices",
    "Family",
    "Followed",
    "Network",
    "Outcome",
    "judge",
    "make_case",
]

LIMIT = 1e-4
"""Largest difference allowed, as a share of the largest logit."""

PROMPTS = (1, 3, 4, 5, 7, 8, 127, 128, 129, 255, 256, 600)
TIE = 2e-5
"""Two scores no further apart than this share of the largest one are a tie for float32."""

Family = Literal["v4", "v3.2"]


# ---------------------------------------------------------------------------------------------- random networks


@dataclass(frozen=True, slots=True)
class Case:
    """One network: a config in the checkpoint's words, and how large its random weights are."""

    family: Family
    seed: int
    words: dict[str, Any]
    linear_gain: float
    expert_gain: float
    hc_spread: float

    @property
    def name(self) -> str:
        return f"{self.family}-{self.seed}"


def make_case(family: Family, seed: int) -> Case:
    """The network number `seed` of a family."""
    dice = random.Random(f"{family}/{seed}")
    words = _words_v4(dice) if family == "v4" else _words_v32(dice)
    return Case(
        family,
        seed,
        words,
        linear_gain=dice.uniform(0.8, 1.3),
        expert_gain=dice.choice((1.0, 2.0, 6.0)),
        hc_spread=dice.uniform(0.3, 1.5),
    )


def _shared_words(dice: random.Random, hidden: int) -> dict[str, Any]:
    return {
        "vocab_size": dice.randint(48, 160),
        "hidden_size": hidden,
        "q_lora_rank": dice.choice((16, 24, 32, 48)),
        "index_n_heads": dice.choice((16, 17, 24, 32)),
        "index_head_dim": dice.choice((32, 64, 128)),
        "norm_topk_prob": True,
        "routed_scaling_factor": dice.choice((1.0, 1.5, 2.5)),
        "topk_method": "noaux_tc",
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rms_norm_eps": dice.choice((1e-6, 1e-5)),
        "max_position_embeddings": 1 << 16,
        "num_nextn_predict_layers": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _words_v4(dice: random.Random) -> dict[str, Any]:
    layers, heads, experts = dice.randint(3, 6), dice.choice((2, 3, 4, 6, 8)), dice.randint(4, 16)
    hca = dice.choice((8, 12, 16, 32, 64, 128))
    ratios = [4, hca, *(dice.choice((0, 4, hca)) for _ in range(layers - 2))]
    dice.shuffle(ratios)
    words = _shared_words(dice, dice.choice((32, 64, 96)))
    rope_dim = dice.choice([dim for dim in (8, 16, 32, 64) if dim <= words["index_head_dim"]])
    return words | {
        "model_type": "deepseek_v4",
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": rope_dim + dice.choice((8, 24, 32, 64, 96)),
        "qk_rope_head_dim": rope_dim,
        "o_groups": dice.choice([groups for groups in range(1, heads + 1) if heads % groups == 0]),
        "o_lora_rank": dice.choice((8, 16, 24)),
        "sliding_window": dice.choice((4, 5, 8, 16, 31, 64, 128)),
        "compress_ratios": ratios,
        "index_topk": dice.choice((1, 2, 4, 8, 16, 32)),
        "moe_intermediate_size": dice.choice((32, 64)),
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": dice.randint(1, min(6, experts)),
        "num_hash_layers": dice.randint(0, layers - 1),
        "scoring_func": "sqrtsoftplus",
        "swiglu_limit": dice.choice((10.0, 10.0, 2.0, 0.5)),
        "hc_mult": dice.choice((4, 4, 4, 2)),
        "hc_sinkhorn_iters": dice.choice((20, 20, 3, 1)),
        "hc_eps": 1e-6,
        "rope_theta": dice.choice((10000.0, 500.0)),
        "compress_rope_theta": dice.choice((160000.0, 40000.0)),
        "rope_scaling": _yarn(dice),
        "expert_dtype": dice.choice(("fp4", "fp4", "fp8")),
    }


def _words_v32(dice: random.Random) -> dict[str, Any]:
    layers, heads = dice.randint(2, 4), dice.choice((2, 3, 4, 8))
    groups, group_size = dice.choice((1, 2, 4, 8)), dice.choice((2, 3, 4))
    kept = dice.randint(1, groups)
    words = _shared_words(dice, dice.choice((32, 64, 96)))
    mscale = dice.choice((1.0, 0.707))
    return words | {
        "model_type": "deepseek_v32",
        "num_hidden_layers": layers,
        "first_k_dense_replace": dice.randint(0, layers - 1),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": dice.choice((64, 96)),
        "moe_intermediate_size": dice.choice((24, 32, 64)),
        "kv_lora_rank": dice.choice((32, 64, 96, 160)),
        "qk_rope_head_dim": dice.choice([dim for dim in (8, 16, 32, 64) if dim <= words["index_head_dim"]]),
        "qk_nope_head_dim": dice.choice((16, 24, 32)),
        "v_head_dim": dice.choice((8, 24, 32)),
        "n_routed_experts": groups * group_size,
        "n_shared_experts": dice.choice((1, 1, 2)),
        "num_experts_per_tok": dice.randint(1, min(8, kept * group_size)),
        "n_group": groups,
        "topk_group": kept,
        "scoring_func": "sigmoid",
        "index_topk": dice.choice((1, 4, 8, 32, 128)),
        "rope_theta": dice.choice((10000.0, 500.0)),
        "rope_scaling": _yarn(dice) | {"mscale": mscale, "mscale_all_dim": mscale},
    }


def _yarn(dice: random.Random) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": dice.choice((4, 16, 40)),
        "original_max_position_embeddings": dice.choice((64, 256, 1024, 65536)),
        "beta_fast": dice.choice((32, 16)),
        "beta_slow": dice.choice((1, 2)),
    }


_VECTORS = (
    ("norm.weight", 1.0, 0.1),
    ("layernorm.weight", 1.0, 0.1),
    ("norm.bias", 0.0, 0.2),
    ("attn_sink", 0.0, 1.0),
    ("gate.bias", 0.0, 0.3),
    ("e_score_correction_bias", 0.0, 0.3),
    (".ape", 0.0, 1.0),
    ("embed.weight", 0.0, 1.0),
    ("embed_tokens.weight", 0.0, 1.0),
)
"""Mean and spread by the end of a name."""


class _Values:
    """The value of each tensor, such that its official format holds it exactly."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def make(self, spec: TensorSpec, form: WeightFormat) -> Weight:
        """The tensor in `form`, which is its official format or float32."""
        if form is I64:
            return Weight(spec.name, spec.shape, I64, self._distinct_experts(spec))
        official = spec.formats[0]
        if official is MXFP4 and self.case.words["expert_dtype"] == "fp8":
            official = FP8_BLOCK
        coded = quantize(spec.name, self._random(spec), official)
        if form is official:
            return coded
        assert form is F32, form
        return Weight(spec.name, spec.shape, F32, reference.dequantize(coded))

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.case.name}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def _random(self, spec: TensorSpec) -> Tensor:
        mean, spread = self._moments(spec)
        return torch.randn(spec.shape, generator=self._generator(spec.name)) * spread + mean

    def _moments(self, spec: TensorSpec) -> tuple[float, float]:
        case = self.case
        for end, mean, spread in _VECTORS:
            if spec.name.endswith(end):
                return mean, spread
        if "hc_" in spec.name:
            # A combination far from symmetric shows whether it is transposed.
            return 0.0, case.hc_spread * (spec.shape[-1] ** -0.5 if spec.name.endswith("_fn") else 1.0)
        inner = (".w1.", ".w3.", ".gate_proj.", ".up_proj.")
        gain = case.expert_gain if any(part in spec.name for part in inner) else case.linear_gain
        return 0.0, gain * spec.shape[-1] ** -0.5

    def _distinct_experts(self, spec: TensorSpec) -> Tensor:
        scores = torch.rand(spec.shape[0], self.case.words["n_routed_experts"], generator=self._generator(spec.name))
        return scores.topk(spec.shape[1]).indices


@dataclass(frozen=True, slots=True)
class Network:
    """A case on disk, written by transformers and in the official layout, and the oracle in memory."""

    case: Case
    config: ModelConfig
    by_transformers: Path
    official: Path
    oracle: Any

    @classmethod
    def build(cls, case: Case, folder: Path) -> Network:
        """Writes both checkpoints below `folder`; transformers reads official names in float32, and saves its own."""
        values = _Values(case)
        config = configuration.parse(case.words)
        official, plain, saved = folder / "official", folder / "float32", folder / "transformers"
        write_checkpoint(config, official, values.make)
        write_checkpoint(config, plain, values.make, fmt="f32")
        oracle = _read_by_transformers(case, plain)
        oracle.save_pretrained(saved)
        return cls(case, configuration.load(saved), saved, official, oracle)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """The oracle's logits of every position, float32 [len(ids), vocab]."""
        with torch.no_grad():
            logits: Tensor = self.oracle(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return logits

    def random_ids(self, count: int, salt: object = 0) -> list[int]:
        dice = random.Random(f"{self.case.name}/{count}/{salt}")
        return [dice.randrange(self.config.vocab_size) for _ in range(count)]


def _read_by_transformers(case: Case, folder: Path) -> Any:
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    words = dict(case.words)
    if case.family == "v4":
        hca = max(words["compress_ratios"])
        words["compress_ratios"] = [128 if ratio > 4 else ratio for ratio in words["compress_ratios"]]
        del words["expert_dtype"]
        config: Any = transformers.DeepseekV4Config(**words, **{"compress_rate_hca": hca})
        model: Any = transformers.DeepseekV4ForCausalLM
    else:
        config, model = transformers.DeepseekV32Config(**words), transformers.DeepseekV32ForCausalLM
    oracle, report = model.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: names for kind, names in report.items() if names}
    assert not wrong, f"{case.name}: transformers reports {wrong}"
    return oracle.eval()


# ---------------------------------------------------------------------------------------------- judgement


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far one prompt and its decoded tokens are from the oracle.

    `ties` counts borders where rows or experts of equal score were chosen differently; then `relative` was measured
    with the oracle's choices, and `relative_unfollowed` without. `bitwise` says whether this engine's logits are the
    same in one pass.
    """

    prompt: int
    positions: int
    max_difference: float
    max_logit: float
    relative_unfollowed: float
    ties: int
    bitwise: bool

    @property
    def relative(self) -> float:
        return self.max_difference / self.max_logit


def judge(network: Network, prompts: Sequence[int], decoded: int, backend: str = "reference") -> list[Outcome]:
    """All prompts batched through `Engine.step`, then `decoded` tokens one by one, against the oracle.

    Also checks that the official layout gives the same logits: to the bit on the reference backend.
    """
    texts = {prompt: network.random_ids(prompt + decoded) for prompt in prompts}
    engine = Engine.load(network.by_transformers, backend=backend, numerics="exact")
    stepwise = _decode_batched(engine, texts, decoded)
    _check_official(network, engine, texts[max(prompts)])
    return [
        _compare(network, engine, network.by_transformers, ids, stepwise[prompt], prompt)
        for prompt, ids in texts.items()
    ]


def _decode_batched(engine: Engine, texts: dict[int, list[int]], decoded: int) -> dict[int, Tensor]:
    """Logits after the prompt and after each token behind it: float32 [decoded + 1, vocab] of each prompt."""
    sessions = {prompt: engine.session(len(ids)) for prompt, ids in texts.items()}
    first = engine.step({sessions[prompt]: ids[:prompt] for prompt, ids in texts.items()})
    rows = {prompt: [first[session]] for prompt, session in sessions.items()}
    for place in range(decoded):
        logits = engine.step({sessions[prompt]: [ids[prompt + place]] for prompt, ids in texts.items()})
        for prompt, session in sessions.items():
            rows[prompt].append(logits[session])
    return {prompt: torch.stack(found) for prompt, found in rows.items()}


def _check_official(network: Network, engine: Engine, ids: list[int]) -> None:
    """The same weights in the official layout: to the bit on the reference backend, which unpacks them first.

    A kernel may sum in another order over other codes; there the oracle decides, ties followed.
    """
    official = Engine.load(network.official, backend=engine.backend, numerics="exact")
    if engine.backend != "reference":
        found = official.session(len(ids)).feed(ids, logits="all")
        outcome = _compare(network, official, network.official, ids, found, 1)
        assert outcome.relative <= LIMIT, f"{network.case.name}: the official layout gives other logits: {outcome}"
        return
    found, expected = (each.session(len(ids)).feed(ids, logits="all") for each in (official, engine))
    assert torch.equal(found, expected), f"{network.case.name}: the official layout gives other logits"


def _compare(network: Network, engine: Engine, folder: Path, ids: list[int], found: Tensor, prompt: int) -> Outcome:
    choices, reference_logits = _record(network, ids)
    expected = reference_logits[prompt - 1 :]
    bitwise = torch.equal(engine.session(len(ids)).feed(ids, logits="all")[prompt - 1 :], found)
    largest = float(expected.abs().max())
    difference = unfollowed = float((found - expected).abs().max())
    ties = 0
    if not difference <= LIMIT * largest:
        found, ties = _follow(folder, engine.backend, ids, choices, prompt)
        difference = float((found - expected).abs().max())
    return Outcome(prompt, len(found), difference, largest, unfollowed / largest, ties, bitwise)


# ---------------------------------------------------------------------------------------------- ties


@dataclass(slots=True)
class Choices:
    """What the oracle chose for one text: rows by layer with an indexer, experts by layer with learned routing."""

    rows: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)


def _record(network: Network, ids: list[int]) -> tuple[Choices, Tensor]:
    """The oracle's choices and logits of one text."""
    choices = Choices()
    kinds = {"Indexer": choices.rows, "TopKRouter": choices.experts, "TopkRouter": choices.experts}
    hooks = []
    for module in network.oracle.modules():
        for end, kept in kinds.items():
            if type(module).__name__.endswith(end):
                hooks.append(module.register_forward_hook(_keep(kept)))
    logits = network.logits(ids)
    for hook in hooks:
        hook.remove()
    return choices, logits


def _keep(kept: list[Tensor]) -> Any:
    def hook(module: object, inputs: object, output: Any) -> None:
        kept.append(output[2] if isinstance(output, tuple) else output[0].long())

    return hook


def _follow(folder: Path, backend: str, ids: list[int], choices: Choices, prompt: int) -> tuple[Tensor, int]:
    """This engine's logits from the prompt's end on with the oracle's choices wherever the border is a tie."""
    followed = Followed(choices, ops.select(backend, exact=True)[1])
    with mock.patch.object(ops, "select", return_value=(backend, followed)):
        engine = Engine.load(folder, numerics="exact")
    session = engine.session(len(ids))
    followed.start()
    logits = [session.feed(ids[:prompt])]
    for token in ids[prompt:]:
        followed.start(session.length)
        logits.append(session.feed([token]))
    return torch.stack(logits), followed.ties


class Followed:
    """A backend's operations, but of equal scores the oracle's choice wins. For one session at a time."""

    def __init__(self, choices: Choices, operations: ops.Ops) -> None:
        self.choices, self.operations = choices, operations
        self.ties = 0
        self.start()

    def start(self, position: int = 0) -> None:
        """A pass begins at `position`."""
        self.position = position
        self._rows, self._experts = iter(self.choices.rows), iter(self.choices.experts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.operations, name)

    def select_rows(
        self, q: Tensor, weights: Tensor, keys: Tensor, layout: RowLayout, visible: Tensor, topk: int
    ) -> Tensor:
        chosen = self.operations.select_rows(q, weights, keys, layout, visible, topk)
        theirs = next(self._rows)[self.position : self.position + len(q)]
        for query, rows in enumerate(chosen):
            seen = int(visible[query])
            wanted = sorted({row for row in theirs[query].tolist() if 0 <= row < seen})
            ours = rows[rows >= 0].tolist()
            if wanted != ours:
                self._expect_tie(_scores(q[query], weights[query], keys[:seen], layout), ours, wanted)
                chosen[query] = torch.tensor(wanted + [-1] * (len(rows) - len(wanted)))
        return chosen

    def route(self, x: Tensor, gate: Weight, **words: Any) -> tuple[Tensor, Tensor]:
        ids, weights = self.operations.route(x, gate, **words)
        if words.get("chosen") is not None:
            return ids, weights
        theirs = next(self._experts)[self.position : self.position + len(x)]
        for token in range(len(x)):
            ours, wanted = sorted(ids[token].tolist()), sorted(theirs[token].tolist())
            if ours != wanted:
                self._expect_expert_tie(x[token], gate, words, ours, wanted)
                ids[token] = theirs[token]
        words["chosen"] = ids
        return self.operations.route(x, gate, **words)

    def _expect_tie(self, scores: Tensor, ours: list[int], wanted: list[int]) -> None:
        swapped = scores[sorted(set(ours) ^ set(wanted))]
        assert len(ours) == len(wanted), f"chose {ours}, the oracle {wanted}"
        gap = float(swapped.max() - swapped.min())
        assert gap <= TIE * float(scores.abs().max()), f"chose {ours}, the oracle {wanted}: no tie, {gap} apart"
        self.ties += 1

    def _expect_expert_tie(
        self, x: Tensor, gate: Weight, words: dict[str, Any], ours: list[int], wanted: list[int]
    ) -> None:
        logits = gate.data.double() @ x.double()
        scores = logits.sigmoid() if words["scoring"] == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()
        scores = scores + words["bias"].data
        groups, kept = words.get("groups", 1), words.get("topk_group", 1)
        if kept < groups:
            order = scores.view(groups, -1).topk(2).values.sum(1).sort(descending=True).values
            if float(order[kept - 1] - order[kept]) <= TIE:
                self.ties += 1
                return
        self._expect_tie(scores, ours, wanted)


def _scores(q: Tensor, weights: Tensor, keys: Tensor, layout: RowLayout) -> Tensor:
    """Index scores of one query in float64."""
    dense = reference.unpack_rows(keys, layout).double()
    return ((q.double() @ dense.t()).relu() * weights.double()[:, None]).sum(0)
