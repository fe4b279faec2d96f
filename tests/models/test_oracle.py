"""A few tiny networks against transformers; `benchmarks/oracle.py` does the same at full length and in number."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.models.oracle_cases import LIMIT, Case, Choices, Family, Followed, Network, judge, make_case

from tenfold import Engine, ops
from tenfold import config as configuration
from tenfold.errors import ConfigError
from tenfold.formats import exact_layout, index_key_fp4
from tenfold.ops import reference

pytestmark = pytest.mark.filterwarnings("default")  # the oracle's own affair

PROMPTS, DECODED = (1, 4, 129, 300), 20
NOISE = 2e-5
"""What float32 alone may do to a tiny network; a fifth of what is allowed."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny matrices only lose by a second one."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("seed", [1, 3, 12, 15])
def test_v4_agrees_with_transformers(seed: int, tmp_path: Path, backend: str) -> None:
    expect_agreement(make_case("v4", seed), tmp_path, backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("seed", [1, 2, 3, 11])
def test_v32_agrees_with_transformers(seed: int, tmp_path: Path, backend: str) -> None:
    expect_agreement(make_case("v3.2", seed), tmp_path, backend)


def expect_agreement(case: Case, folder: Path, backend: str) -> None:
    for outcome in judge(Network.build(case, folder), PROMPTS, DECODED, backend):
        assert outcome.positions == DECODED + 1
        assert outcome.max_logit > 0.1, "logits this small prove nothing"
        assert outcome.relative <= NOISE < LIMIT, outcome
        assert outcome.bitwise, outcome


@pytest.mark.parametrize("family", ["v4", "v3.2"])
def test_the_cases_are_what_they_should_be(family: Family) -> None:
    cases = [make_case(family, seed) for seed in range(40)]
    assert len({repr(case.words) for case in cases}) == 40
    assert all(case.words["index_n_heads"] >= 16 for case in cases)
    most_visible = 740 // 4 if family == "v4" else 740
    assert all(case.words["index_topk"] < most_visible for case in cases)
    if family == "v4":
        assert {4, 128} <= {case.words["sliding_window"] for case in cases}
        assert {8, 128} <= {max(case.words["compress_ratios"]) for case in cases}
        assert any(0 in case.words["compress_ratios"] for case in cases)
        assert {0, 1, 2} <= {case.words["num_hash_layers"] for case in cases}
    else:
        assert any(case.words["n_group"] > case.words["topk_group"] for case in cases)


@pytest.mark.parametrize("family", ["v4", "v3.2"])
def test_the_oracle_tells_a_damaged_network(family: Family, tmp_path: Path) -> None:
    """A comparison that cannot fail proves nothing: one expert's weights of the oracle are changed a little."""
    network = Network.build(make_case(family, 1), tmp_path)
    with torch.no_grad():
        next(p for name, p in network.oracle.named_parameters() if "down_proj" in name).mul_(1.01)
    ids = network.random_ids(40)
    found = Engine.load(network.official, numerics="exact").session(40).feed(ids, logits="all")
    expected = network.logits(ids)
    assert float((found - expected).abs().max() / expected.abs().max()) > LIMIT


def test_a_choice_that_is_no_tie_is_not_followed() -> None:
    layout = exact_layout(index_key_fp4(32))
    keys = reference.pack_rows(torch.eye(3, 32), layout)
    q, weights, visible = torch.ones(1, 1, 32), torch.ones(1, 1), torch.tensor([3])
    tied = Followed(Choices(rows=[torch.tensor([[2]])]), ops.select("reference", exact=True)[1])
    assert tied.select_rows(q, weights, keys, layout, visible, 1).tolist() == [[2]]
    assert tied.ties == 1
    q[0, 0, 2] = 0.9
    with pytest.raises(AssertionError, match="no tie"):
        Followed(Choices(rows=[torch.tensor([[2]])]), ops.select("reference", exact=True)[1]).select_rows(
            q, weights, keys, layout, visible, 1
        )


def test_latent_norms_of_v32_keep_their_own_eps(tmp_path: Path) -> None:
    """They are 1e-6 in transformers whatever `rms_norm_eps` says."""
    case = make_case("v3.2", 1)
    case = dataclasses.replace(case, words=case.words | {"rms_norm_eps": 1e-2})
    network = Network.build(case, tmp_path)
    ids = network.random_ids(40)
    found = Engine.load(network.official, numerics="exact").session(40).feed(ids, logits="all")
    expected = network.logits(ids)
    assert float((found - expected).abs().max() / expected.abs().max()) <= LIMIT


@pytest.mark.parametrize(("mscale", "mscale_all_dim"), [(1.0, 0.5), (0.707, 1.0), (1.0, 0.0)])
def test_a_scaled_rotation_of_v32_is_refused(mscale: float, mscale_all_dim: float) -> None:
    """transformers multiplies cos and sin by their ratio, so ignoring it gives another network."""
    words = make_case("v3.2", 1).words
    scaling = words["rope_scaling"] | {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
    with pytest.raises(ConfigError, match="mscale_all_dim"):
        configuration.parse(words | {"rope_scaling": scaling})
