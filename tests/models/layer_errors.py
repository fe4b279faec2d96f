"""Two backends side by side: the residual after every layer, and the tokens they would choose.

For tests/models/test_layers.py and benchmarks/layers.py. Knows no bound: what is allowed is said there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tenfold import Engine, SamplingParams, ops
from tenfold.config import ModelConfig
from tenfold.synth import shrink, synth

SHAPES: dict[str, dict[str, int]] = {
    "v4-flash": {"layers": 6, "index_topk": 48, "num_attention_heads": 8},
    "v4-pro": {"layers": 6, "index_topk": 48, "num_attention_heads": 8},
    "v3.2": {"layers": 4, "index_topk": 128, "first_k_dense_replace": 1},
}
"""What a small network keeps of its preset: every kind of layer, and fewer selected rows than a short prompt has; as
many heads as attention to V4's rows has kernels of its own for."""


NUMERICS = ("exact", "deployed-f32", "deployed")
"""What the kernels run: as the engine has it, and deployed rows and keys with activations left in float32."""


@dataclass(frozen=True, slots=True)
class Error:
    """Norm of a difference relative to the norm of what it should be: over all tokens, and token by token."""

    all_tokens: float
    median_token: float
    most_tokens: float
    """Of the 99th of a hundred tokens: what a tie in one of them does is left out."""
    worst_token: float


@dataclass(frozen=True, slots=True)
class Layer:
    """What becomes of the residual in one layer.

    `fed`: the layer read what the reference's layer read. `run`: it read the output of its own predecessor, so errors
    compound. `nudged`: the reference against itself, every layer's input off by the median of `fed` in a random
    direction: what compounding does to errors of that size, whoever makes them.
    """

    index: int
    attention: str
    router: str
    fed: Error
    run: Error
    nudged: Error


@dataclass(frozen=True, slots=True)
class Tokens:
    """The likeliest next token at every position, judged against the reference's logits of the same tokens.

    Errors are absolute. `gaps`: by how much the reference prefers its own token where the two differ, by position.
    """

    positions: int
    gaps: dict[int, float]
    worst_logit_error: float
    median_logit_error: float
    median_gap: float


def small_network(preset: str, folder: Path, hidden: int) -> Path:
    """A random checkpoint in the shape of a preset, written to `folder`."""
    synth(shrink(preset, hidden=hidden, experts=16, vocab=1024, **SHAPES[preset]), folder)
    return folder


def engines(folder: Path, numerics: str) -> tuple[Engine, Engine]:
    """The reference and the kernels on one checkpoint, one of NUMERICS."""
    stored: Any = numerics.removesuffix("-f32")
    select = ops.select
    with mock.patch.object(ops, "select", lambda name, exact: select(name, exact=exact or stored != numerics)):
        return Engine.load(folder, "reference", stored), Engine.load(folder, "cpu", stored)


def random_ids(config: ModelConfig, count: int) -> list[int]:
    """`count` token ids, the same at every call."""
    return torch.randint(2, config.vocab_size, (count,), generator=torch.Generator().manual_seed(7)).tolist()


def layers(reference: Engine, other: Engine, ids: Sequence[int]) -> list[Layer]:
    """The errors of every layer of `other` over `ids`, which have to fit one chunk."""
    inputs, law = residuals(reference, ids, unchanged)

    def errors(engine: Engine, change: Change) -> list[Error]:
        return [error(*pair) for pair in zip(residuals(engine, ids, change)[1], law, strict=True)]

    fed, run = errors(other, lambda layer, h: inputs[layer]), errors(other, unchanged)
    off = errors(reference, lambda layer, h: nudged(h, fed[layer].median_token, seed=layer))
    return [
        Layer(spec.index, spec.attention, spec.router, *found)
        for spec, *found in zip(reference.config.layers, fed, run, off, strict=True)
    ]


Change = Callable[[int, Tensor], Tensor]
"""What a layer reads in place of its predecessor's output."""


def unchanged(layer: int, h: Tensor) -> Tensor:
    return h


def nudged(h: Tensor, by: float, seed: int) -> Tensor:
    """Every number a little larger or smaller, all by the same share."""
    signs = torch.randint(0, 2, h.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return h * (1 + by * signs)


def residuals(engine: Engine, ids: Sequence[int], change: Change) -> tuple[list[Tensor], list[Tensor]]:
    """What every layer read and wrote in one pass over `ids`."""
    before: list[Tensor] = []
    after: list[Tensor] = []
    model: Any = engine.model
    blocks = model.blocks if hasattr(model, "blocks") else model.layers
    for index, block in enumerate(blocks):
        block.forward = _watched(block.forward, index, change, before, after)
    try:
        session = engine.session(len(ids))
        session.need = replace(session.need, tile_tokens=len(ids), most_tile_tokens=len(ids))  # each layer once
        session.feed(ids)
    finally:
        for block in blocks:
            del block.forward  # the class's own comes back
    return before, after


def _watched(
    forward: Callable[..., Tensor], index: int, change: Change, before: list[Tensor], after: list[Tensor]
) -> Callable[..., Tensor]:
    def call(h: Tensor, *rest: Any) -> Tensor:
        before.append(change(index, h).clone())
        after.append(forward(before[-1].clone(), *rest))
        return after[-1].clone()

    return call


def error(found: Tensor, law: Tensor) -> Error:
    """Tokens are rows; whatever else there is belongs to the token."""
    difference, size = (found - law).double().flatten(1), law.double().flatten(1)
    each = difference.norm(dim=1) / size.norm(dim=1)
    total = difference.norm() / size.norm()
    return Error(*(float(number) for number in (total, each.median(), each.quantile(0.99), each.max())))


def tokens(reference: Engine, other: Engine, ids: Sequence[int], first: int = 0) -> Tokens:
    """Judges the positions of `ids` from `first` on."""
    law, found = (engine.session(len(ids)).feed(ids, logits="all")[first:] for engine in (reference, other))
    error, (best, choice) = (found - law).abs().amax(1), law.max(1)
    gaps = best - law.gather(1, found.argmax(1)[:, None])[:, 0]
    differ = (found.argmax(1) != choice).nonzero()[:, 0].tolist()
    top = law.topk(2, dim=1).values
    return Tokens(
        positions=len(ids) - first,
        gaps={first + i: float(gaps[i]) for i in differ},
        worst_logit_error=float(error.max()),
        median_logit_error=float(error.median()),
        median_gap=float((top[:, 0] - top[:, 1]).median()),
    )


def greedy(engine: Engine, prompt: Sequence[int], count: int) -> list[int]:
    """`prompt` and the `count` likeliest tokens after it, one by one."""
    session = engine.session(len(prompt) + count)
    session.feed(prompt)
    for _ in session.generate(SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)):
        pass
    return list(session.tokens)
