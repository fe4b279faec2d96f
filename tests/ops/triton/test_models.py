"""Whole tiny networks of all three shapes in the interpreter: greedy tokens are the reference's, or as good as tied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.test_engine import NETWORKS, text
from torch import Tensor

from tenfold import Engine
from tenfold import config as configuration
from tenfold.synth import synth


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("checkpoints") / name for name in NETWORKS}
    for seed, (name, folder) in enumerate(made.items()):
        synth(configuration.parse(NETWORKS[name]), folder, seed=seed)
    return made


def greedy(folder: Path, numerics: str, prompt: int, count: int) -> tuple[Tensor, Tensor]:
    """Logits of reference and triton, [count, vocab] each, at the positions the reference's greedy tokens lead to."""
    law, engine = (Engine.load(folder, backend=name, numerics=numerics) for name in ("reference", "triton"))  # type: ignore[arg-type]
    sessions = law.session(prompt + count), engine.session(prompt + count)
    last = [session.feed(text(prompt)) for session in sessions]
    found = [[logits] for logits in last]
    for _ in range(count - 1):
        token = int(found[0][-1].argmax())
        for logits, session in zip(found, sessions, strict=True):
            logits.append(session.feed([token]).cpu())
    return torch.stack(found[0]), torch.stack(found[1])


def check(expected: Tensor, found: Tensor, numerics: str) -> None:
    error = (found - expected).abs().amax(1)
    if numerics == "exact":
        assert (error <= 1e-4 * expected.abs().amax(1)).all(), float((error / expected.abs().amax(1)).max())
    best = expected.topk(2, dim=1).values
    tied = best[:, 0] - best[:, 1] <= 2 * error
    assert ((found.argmax(1) == expected.argmax(1)) | tied).all()
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.9
    assert error.median() < (1e-5 if numerics == "exact" else 0.1) * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_greedy_tokens_are_those_of_the_reference(folders: dict[str, Path], name: str) -> None:
    check(*greedy(folders[name], "exact", 20, 4), "exact")


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["exact", "deployed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_five_hundred_greedy_tokens(folders: dict[str, Path], name: str, numerics: str) -> None:
    check(*greedy(folders[name], numerics, 140, 500), numerics)
