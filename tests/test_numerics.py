"""What deployed numerics cost on the embedded model: rounded activations, beside float32 ones."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from tenfold import Engine, completion, ops
from tenfold import config as configuration
from tenfold.demo import embedded_document
from tenfold.ops import Ops, cpu, cpu_rounded, reference

NUM_TOKENS = 2048


def nats(engine: Engine, ids: list[int]) -> Tensor:
    """What each token after the first costs."""
    logits = engine.session().feed(ids[:-1], logits="all")
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def test_rounded_activations_cost_less_than_a_thousandth() -> None:
    rounded = Engine.load("tiny-v4-flash", backend="cpu")
    with mock.patch.object(ops, "select", return_value=("cpu", cpu)):
        unrounded = Engine.load("tiny-v4-flash")
    tokenizer = completion.load_tokenizer(configuration.locate("tiny-v4-flash"), rounded)
    ids = tokenizer.encode(embedded_document())[:NUM_TOKENS]
    found, expected = nats(rounded, ids), nats(unrounded, ids)
    assert not torch.equal(found, expected)
    assert float(found.mean()) == pytest.approx(float(expected.mean()), rel=1e-3)


def test_numerics_choose_the_operations() -> None:
    assert ops.select("cpu", exact=True) == ("cpu", cpu)
    assert ops.select("cpu", exact=False) == ("cpu", cpu_rounded)
    assert ops.select("reference", exact=False) == ops.select("reference", exact=True) == ("reference", reference)


@pytest.mark.parametrize("backend", [reference, cpu, cpu_rounded])
def test_a_backend_has_every_operation(backend: object) -> None:
    operations = {name for name in vars(Ops) if not name.startswith("_")}
    assert len(operations) >= 20
    assert operations <= set(dir(backend))
