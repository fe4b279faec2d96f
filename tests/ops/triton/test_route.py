"""Routing, the compressor's pooling and look-ups against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ops.cases import f32, randint, randn
from tests.ops.triton.card import on_card
from torch import Tensor

from tenfold.formats import BF16
from tenfold.ops import Weight, reference
from tenfold.ops.triton import compress, route

pooling, router = on_card(compress, "compress", "embed"), on_card(route, "route")
pytestmark = pytest.mark.usefixtures("poisoned")


def assert_near(found: Tensor, expected: Tensor, limit: float = 2e-6) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if expected.numel():
        assert (found - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("n", [0, 1, 127])
@pytest.mark.parametrize(
    ("scoring", "count", "groups", "topk", "biased"),
    [("sqrtsoftplus", 9, 1, 3, True), ("sqrtsoftplus", 256, 1, 6, False), ("sigmoid", 24, 4, 5, True)],
)
def test_the_best_experts(scoring, count: int, groups: int, topk: int, biased: bool, n: int) -> None:
    x, gate, bias = randn(n, 96), f32(randn(count, 96, seed=1)), f32(randn(count, seed=2) * 0.2)
    words: dict[str, Any] = {
        "scoring": scoring,
        "topk": topk,
        "scaling": 1.5,
        "groups": groups,
        "topk_group": groups // 2 or 1,
    }
    words["bias"] = bias if biased else None
    found, expected = (ops.route(x, gate, **words) for ops in (router, reference))
    assert torch.equal(found[0], expected[0])
    assert_near(found[1], expected[1])


@pytest.mark.parametrize("n", [0, 3, 17])
def test_the_best_experts_of_a_normed_row(n: int) -> None:
    x, gate, norm = 5 * randn(n, 96), f32(randn(24, 96, seed=1)), f32(randn(96, seed=2))
    words: dict[str, Any] = {"scoring": "sigmoid", "topk": 5, "scaling": 2.5, "groups": 4, "topk_group": 2}
    found = router.route(x, gate, norm=norm, eps=1e-6, **words)
    expected = reference.route(reference.rms_norm(x, norm, 1e-6), gate, **words)
    assert torch.equal(found[0], expected[0])
    assert_near(found[1], expected[1], 5e-6)


def test_of_equal_experts_the_smaller_wins() -> None:
    gate, x = f32(torch.zeros(24, 8)), randn(3, 8)
    for groups in (1, 4):
        words: dict[str, Any] = {
            "scoring": "sigmoid",
            "topk": 4,
            "scaling": 1.0,
            "groups": groups,
            "topk_group": groups // 2 or 1,
        }
        ids, weights = router.route(x, gate, **words)
        assert torch.equal(ids, reference.route(x, gate, **words)[0])
        assert torch.equal(weights, torch.full((3, 4), 0.25))


def test_experts_chosen_beforehand_and_tiny_scores() -> None:
    x, gate, chosen = randn(33, 32) * 6, f32(randn(10, 32, seed=1)), randint(0, 10, (33, 3))
    words = {"scoring": "sqrtsoftplus", "topk": 3, "scaling": 2.5, "chosen": chosen}
    found, expected = (ops.route(x, gate, **words) for ops in (router, reference))
    assert torch.equal(found[0], chosen)
    assert reference.linear(x, gate).min() < -20  # there softplus is e^x: 1 + e^x is 1
    assert ((found[1] - expected[1]).abs() <= 1e-4 * expected[1] + 1e-18).all()


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot choose 11 of 10"):
        router.route(randn(1, 8), f32(randn(10, 8)), scoring="sigmoid", topk=11, scaling=1.0)


@pytest.mark.parametrize(("ratio", "width"), [(4, 24), (4, 224), (128, 64), (6, 16)])
@pytest.mark.parametrize("groups", [1, 2, 9])
def test_groups_are_pooled(ratio: int, width: int, groups: int) -> None:
    both = randn(groups, ratio, 2 * width)
    values, gates = both.split(width, 2)
    gates[0] = -torch.inf
    for overlap in (False, True):
        given = (values[1:], gates[1:]) if not overlap else (values, gates)
        assert_near(pooling.compress(*given, overlap), reference.compress(*given, overlap))


def test_rows_are_looked_up() -> None:
    data = randn(50, 40)
    for weight in (f32(data), Weight("w", (50, 40), BF16, data.bfloat16())):
        for n in (0, 1, 129):
            ids = randint(0, 50, (n,))
            assert torch.equal(pooling.embed(ids, weight), reference.embed(ids, weight))
