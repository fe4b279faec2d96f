"""Hyper-connections against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ops.cases import f32, randn
from tests.ops.triton.card import on_card
from torch import Tensor

from tenfold.ops import reference
from tenfold.ops.triton import hyper as kernels

hyper = on_card(kernels, "hc_mix", "hc_merge", "hc_merge_mix", "hc_collapse")
pytestmark = pytest.mark.usefixtures("poisoned")


def assert_near(found: Tensor, expected: Tensor, limit: float = 5e-6) -> None:
    assert found.shape == expected.shape
    if expected.numel():
        assert (found - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize(
    ("n", "m", "d"), [(0, 4, 64), (1, 4, 1024), (3, 4, 100), (63, 2, 48), (129, 4, 24), (5, 3, 40)]
)
def test_mapping_merge_and_collapse(n: int, m: int, d: int) -> None:
    streams, y, norm = randn(n, m, d), randn(n, d, seed=5), f32(randn(d, seed=6) + 1)
    fn = randn((2 + m) * m, m * d, seed=1) * 0.2
    base, scale = randn((2 + m) * m, seed=2), randn(3, seed=3)
    words: dict[str, Any] = {"norm_eps": 1e-6, "eps": 1e-6}
    given = (streams, f32(fn), f32(base), f32(scale), norm)
    found, expected = (ops.hc_mix(*given, iterations=20, **words) for ops in (hyper, reference))
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b)
    _, post, combination = expected
    assert_near(hyper.hc_merge(streams, y, post, combination), reference.hc_merge(streams, y, post, combination))
    parts = torch.stack([y / 2, y / 4, y / 4], 1)
    for added in (y, parts):
        merged = reference.hc_merge(streams, y, post, combination)
        assert_near(hyper.hc_merge(streams, added, post, combination), merged)
        both = hyper.hc_merge_mix(streams, added, post, combination, *given[1:], iterations=20, **words)
        for a, b in zip(both, (merged, *reference.hc_mix(merged, *given[1:], iterations=20, **words)), strict=True):
            assert_near(a, b, 1e-5)
    given = (streams, f32(fn[:m]), f32(base[:m]), f32(scale[:1]), norm)
    assert_near(hyper.hc_collapse(*given, **words), reference.hc_collapse(*given, **words))


def test_the_mapping_is_doubly_stochastic() -> None:
    n, m, d = 7, 4, 32
    given = (f32(randn((2 + m) * m, m * d)), f32(randn((2 + m) * m)), f32(randn(3)), f32(torch.ones(d)))
    _, _, combination = hyper.hc_mix(randn(n, m, d), *given, norm_eps=1e-6, eps=1e-6, iterations=20)
    assert (combination.sum(1) - 1).abs().max() < 1e-4
    assert (combination.sum(2) - 1).abs().max() < 0.1


def test_unlike_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="another shape"):
        hyper.hc_merge(randn(2, 4, 8), randn(2, 9), randn(2, 4), randn(2, 4, 4))
