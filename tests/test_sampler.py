"""The sampler against a naive numpy version, its distribution, its errors; stop strings in any pieces."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenfold.errors import RunError, UsageError
from tenfold.sampler import Sampled, Sampler, SamplingParams
from tenfold.stops import StopStrings

INF = math.inf


def logits(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def draws(params: SamplingParams, values: torch.Tensor, count: int) -> Counter[int]:
    """Tokens drawn independently: penalties would make each draw depend on those before."""
    sampler = Sampler(params)
    return Counter(sampler.sample(values).id for _ in range(count))


def naive_probabilities(values: torch.Tensor, params: SamplingParams) -> np.ndarray[Any, Any]:
    """What `Sampler` should draw from, by sorting and looping; without penalties and bias."""
    scaled = values.double().numpy() / params.temperature
    weights = np.exp(scaled - scaled.max())
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    kept = order[: params.top_k or None]
    total, before, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if before < params.top_p * total:
            nucleus.append(i)
        before += weights[i]
    kept = [i for i in nucleus if weights[i] >= params.min_p * weights.max()]
    result = np.zeros(len(weights))
    result[kept] = weights[kept] / weights[kept].sum()
    return result


def assert_drawn_from(counts: Counter[int], expected: np.ndarray[Any, Any]) -> None:
    """Pearson's chi-square below its mean plus six deviations; nothing of probability 0."""
    num_draws = counts.total()
    assert all(expected[token_id] > 0 for token_id in counts)
    drawn = [(counts[i] - num_draws * p) ** 2 / (num_draws * p) for i, p in enumerate(expected) if p > 0]
    degrees = len(drawn) - 1
    assert sum(drawn) <= degrees + 6 * math.sqrt(2 * degrees)


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 2.0, "top_k": 6, "top_p": 0.8, "min_p": 0.3},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_follow_the_naive_distribution(filters: dict[str, Any]) -> None:
    values = torch.randn(10, generator=torch.Generator().manual_seed(1)) * 2
    params = SamplingParams(seed=2, **filters)
    assert_drawn_from(draws(params, values, 3000), naive_probabilities(values, params))


def test_the_chi_square_notices_a_wrong_temperature() -> None:
    values = torch.randn(10, generator=torch.Generator().manual_seed(1)) * 2
    wrong = naive_probabilities(values, SamplingParams(temperature=1.2))
    with pytest.raises(AssertionError):
        assert_drawn_from(draws(SamplingParams(seed=2), values, 3000), wrong)


coarse_logits = st.lists(st.sampled_from([-INF, -2.0, 0.0, 0.0, 1.0, 1.5, 3.0]), min_size=1, max_size=12).filter(
    lambda values: max(values) > -INF
)


@given(
    values=coarse_logits,
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**63 - 1),
)
def test_filters_keep_what_the_naive_version_keeps(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    counts = draws(params, logits(*values), 20)
    expected = naive_probabilities(logits(*values), params)
    assert all(expected[token_id] > 0 for token_id in counts)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.9999])
def test_top_p_over_a_large_vocabulary(top_p: float) -> None:
    """The nucleus lies beyond the first tokens that are looked at."""
    values = torch.randn(5000, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(top_p=top_p, seed=4)
    expected = naive_probabilities(values, params)
    counts = draws(params, values, 40)
    assert all(expected[token_id] > 0 for token_id in counts)
    ranks = [int((expected > expected[token_id]).sum()) / (expected > 0).sum() for token_id in counts.elements()]
    assert max(ranks) > 0.7  # the far end of the nucleus is reached as well


def test_ties_at_the_boundary_go_to_the_smallest_ids() -> None:
    flat = torch.zeros(1000)
    assert set(draws(SamplingParams(top_k=2, seed=1), flat, 50)) == {0, 1}
    assert set(draws(SamplingParams(top_p=0.003, seed=1), flat, 100)) == {0, 1, 2}
    assert Sampler(SamplingParams(temperature=0)).sample(logits(1, 5, 5, 2, 5)).id == 1


def test_greedy_takes_the_largest_logit_and_no_random_number() -> None:
    assert Sampler(SamplingParams(temperature=0)).sample(logits(-3, 2, 1)).id == 1
    assert Sampler(SamplingParams(temperature=0)).sample(logits(-INF, -5, -INF)).id == 1


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    assert set(draws(SamplingParams(temperature=1e-300, seed=1), logits(3e38, -3e38, 2e38), 20)) == {0}


def test_forbidden_tokens_are_never_drawn() -> None:
    values = logits(-INF, 0, -INF, 0, -INF)
    assert set(draws(SamplingParams(seed=1), values, 100)) == {1, 3}
    assert set(draws(SamplingParams(seed=1, logit_bias={0: 100.0}), values, 100)) == {1, 3}


@pytest.mark.parametrize(("uniform", "token_id"), [(0.0, 1), (1 - 2**-53, 3)])  # the ends of torch.rand
def test_the_extreme_random_numbers_fall_on_allowed_tokens(
    uniform: float, token_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(uniform, dtype=torch.float64))
    assert Sampler(SamplingParams()).sample(logits(-INF, 0, 0, -2, -INF)).id == token_id


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, math.nan), "contain nan"),
        ((INF, 0.0), "contain inf"),
        ((-INF, -INF), "every token is forbidden"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_impossible_logits_are_errors(values: tuple[float, ...], message: str, temperature: float) -> None:
    with pytest.raises(RunError, match=message):
        Sampler(SamplingParams(temperature=temperature)).sample(logits(*values))


def test_a_seed_repeats_and_neighbours_do_not_matter() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(5))
    alone, beside, other = (Sampler(SamplingParams(seed=seed)) for seed in (6, 6, 7))
    expected = [alone.sample(values).id for _ in range(30)]
    mixed = []
    for _ in range(30):
        other.sample(values)
        torch.rand(3)  # nor does the global generator
        mixed.append(beside.sample(values).id)
    assert mixed == expected
    assert len(set(expected)) > 5


def test_without_a_seed_one_is_chosen_and_can_be_repeated() -> None:
    values = torch.zeros(1000)
    one, two = Sampler(SamplingParams()), Sampler(SamplingParams())
    assert one.seed != two.seed
    repeated = Sampler(SamplingParams(seed=one.seed))
    assert [repeated.sample(values).id for _ in range(9)] == [one.sample(values).id for _ in range(9)]


def test_repetition_penalty_covers_prompt_and_completion() -> None:
    """Positive logits are divided, negative ones multiplied; the prompt's tokens count once however often."""
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=2.0), prompt=[1, 1, 3])
    values = logits(3.0, 5.0, 2.8, -1.0)
    assert sampler.sample(values).id == 0  # 5.0 counts as 2.5
    assert sampler.sample(values).id == 2  # 3.0 counts as 1.5 by now
    assert sampler.sample(values).id == 1  # 2.5 against 1.5, 1.4 and -2
    assert sampler.sample(values).id == 1
    below_zero = Sampler(SamplingParams(temperature=0, repetition_penalty=2.0), prompt=[0])
    assert below_zero.sample(logits(-1.0, -1.5)).id == 1  # -1.0 counts as -2.0


def test_presence_and_frequency_cover_the_completion_only() -> None:
    values = logits(1.0, 0.5, 0.0)
    presence = Sampler(SamplingParams(temperature=0, presence_penalty=0.6), prompt=[0])
    assert [presence.sample(values).id for _ in range(4)] == [0, 1, 0, 0]  # 1.0-0.6 against 0.5-0.6 and 0.0
    frequency = Sampler(SamplingParams(temperature=0, frequency_penalty=0.3), prompt=[0])
    assert [frequency.sample(values).id for _ in range(5)] == [0, 0, 1, 0, 1]  # each time 0.3 more


def test_penalties_come_before_the_bias_and_the_bias_before_temperature() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2.0, logit_bias={0: 1.0})
    assert Sampler(params, prompt=[0]).sample(logits(4.0, 2.9)).id == 0  # 4/2 + 1, not (4 + 1)/2
    params = SamplingParams(temperature=2.0, logit_bias={0: 2.0}, seed=1)
    expected = np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()  # (0 + 2)/2, not 0/2 + 2
    assert_drawn_from(draws(params, logits(0.0, 0.0), 2000), expected)


@given(
    values=st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=30),
    penalty=st.sampled_from([0.5, 1.0, 1.3]),
    presence=st.sampled_from([0.0, 0.7, -0.7]),
    frequency=st.sampled_from([0.0, 0.4, -0.4]),
    prompt=st.lists(st.integers(0, 1)),
)
def test_greedy_with_penalties_agrees_with_a_naive_version(
    values: list[float], penalty: float, presence: float, frequency: float, prompt: list[int]
) -> None:
    params = SamplingParams(
        temperature=0, repetition_penalty=penalty, presence_penalty=presence, frequency_penalty=frequency
    )
    sampler = Sampler(params, prompt)
    generated: list[int] = []
    for _ in range(6):
        adjusted = np.array(values, dtype=np.float64)
        for i in {*prompt, *generated}:
            adjusted[i] = adjusted[i] / penalty if adjusted[i] > 0 else adjusted[i] * penalty
        for i, n in Counter(generated).items():
            adjusted[i] -= frequency * n + presence
        generated.append(sampler.sample(logits(*values)).id)
        assert generated[-1] == int(adjusted.argmax())


def test_logprobs_are_of_the_raw_logits() -> None:
    params = SamplingParams(temperature=0, logit_bias={2: 100.0}, logprobs=3, top_k=1)
    sampled = Sampler(params).sample(logits(2.0, 1.0, 0.0, 1.0))
    expected = logits(2.0, 1.0, 0.0, 1.0).double().log_softmax(0)
    assert sampled.id == 2
    assert sampled.logprob == pytest.approx(float(expected[2]), abs=1e-12)
    assert [token_id for token_id, _ in sampled.top] == [0, 1, 3]
    assert [logprob for _, logprob in sampled.top] == pytest.approx(expected[[0, 1, 3]].tolist(), abs=1e-12)


def test_logprobs_only_when_asked_and_never_infinite() -> None:
    values = logits(0.0, -INF, 0.0)
    assert Sampler(SamplingParams(temperature=0)).sample(values) == Sampled(0, -math.log(2), ())
    assert Sampler(SamplingParams(temperature=0, logprobs=0)).sample(values).top == ()
    top = Sampler(SamplingParams(temperature=0, logprobs=20)).sample(values).top
    assert [token_id for token_id, _ in top] == [0, 2]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {},
        {"top_p": 0.7},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5},
        {"logit_bias": {3: 2}},
    ],
    ids=str,
)
def test_a_token_alone_is_the_one_that_is_sampled(params: dict[str, Any]) -> None:
    alone, other = (Sampler(SamplingParams(**params, seed=4), prompt=[1, 2]) for _ in range(2))
    dice = torch.Generator().manual_seed(2)
    for step in range(60):
        values = torch.randn(40, generator=dice)
        before, allowed = values.clone(), None if step % 3 else torch.rand(40, generator=dice) < 0.5
        assert alone.choose(values, allowed) == other.sample(values, allowed).id
        assert torch.equal(values, before)


def test_the_logits_are_left_as_they_are() -> None:
    values = logits(1.0, 2.0, 3.0)
    Sampler(SamplingParams(repetition_penalty=2.0, logit_bias={0: 5.0}), prompt=[2]).sample(values)
    assert values.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("field", "bad", "expected"),
    [
        ("temperature", -0.1, "a number from 0 to 100"),
        ("temperature", math.nan, "a number from 0 to 100"),
        ("temperature", INF, "a number from 0 to 100"),
        ("temperature", "1", "a number from 0 to 100"),
        ("temperature", True, "a number from 0 to 100"),
        ("top_p", 0.0, "a number from above 0 to 1"),
        ("top_p", 1.1, "a number from above 0 to 1"),
        ("top_k", -1, "an integer from 0"),
        ("top_k", 1.5, "an integer from 0"),
        ("min_p", math.nan, "a number from 0 to 1"),
        ("repetition_penalty", 0.0, "a number from 0.01 to 100"),
        ("presence_penalty", 2.5, "a number from -2 to 2"),
        ("frequency_penalty", -INF, "a number from -2 to 2"),
        ("seed", -1, "an integer from 0"),
        ("seed", 2**63, "an integer from 0"),
        ("max_tokens", 0, "an integer from 1"),
        ("logprobs", 21, "an integer from 0 to 20"),
        ("stop", "end", "a tuple of strings"),
        ("stop", ("end", ""), "none of them empty"),
        ("stop", (3,), "a tuple of strings"),
        ("logit_bias", [1], "a mapping"),
    ],
)
def test_bad_parameters_are_named(field: str, bad: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=rf"^{field} is .*expected {expected}|^{field} is .*{expected}$"):
        SamplingParams(**{field: bad})


@pytest.mark.parametrize("bias", [{-1: 0.0}, {"1": 0.0}, {1: 101.0}, {1: math.nan}, {True: 1.0}])
def test_bad_biases_are_named(bias: Any) -> None:
    with pytest.raises(UsageError, match="logit_bias"):
        SamplingParams(logit_bias=bias)


def test_a_bias_for_a_token_the_model_lacks_is_refused() -> None:
    params = SamplingParams(logit_bias={3: 1.0})
    params.check_vocabulary(4)
    with pytest.raises(UsageError, match=r"token 3, expected 0\.\.2"):
        Sampler(params).sample(logits(0, 0, 0))


@pytest.mark.parametrize(
    ("stops", "text", "shown", "matched"),
    [
        (("END",), "all of it", "all of it", None),
        (("END",), "before END after", "before ", "END"),
        (("END",), "EEND", "E", "END"),
        (("END",), "EN", "EN", None),
        (("abcab",), "abcabcab", "", "abcab"),
        (("abcabd",), "abcabcabd", "abc", "abcabd"),
        (("aab",), "aaab", "a", "aab"),
        (("aabaaac",), "aabaaabaaac", "aaba", "aabaaac"),
        (("b", "ab"), "xab", "x", "ab"),
        (("abc", "b"), "abc", "a", "b"),
        (("\n\n", "。"), "句。", "句", "。"),
        ((), "anything", "anything", None),
    ],
)
def test_stop_strings(stops: tuple[str, ...], text: str, shown: str, matched: str | None) -> None:
    for size in (1, 2, 3, 100):
        stop = StopStrings(stops)
        pieces = [stop.push(text[i : i + size]) for i in range(0, len(text), size)]
        assert "".join(pieces) + stop.finish() == shown
        assert stop.matched == matched
        assert stop.finish() == ""


def naive_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


@given(data=st.data())
def test_stop_strings_agree_with_a_naive_version_in_any_pieces(data: st.DataObject) -> None:
    letters = st.text("ab", max_size=12)
    stops = data.draw(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
    pieces = data.draw(st.lists(letters, max_size=8))
    stop = StopStrings(stops)
    shown = "".join(map(stop.push, pieces)) + stop.finish()
    assert (shown, stop.matched) == naive_stop("".join(pieces), stops)


def test_nothing_is_held_back_longer_than_needed() -> None:
    stop = StopStrings(("STOP",))
    assert [stop.push(piece) for piece in ("text S", "T", "x", "STO")] == ["text ", "", "STx", ""]
    assert stop.finish() == "STO"
