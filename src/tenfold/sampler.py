"""Logits -> one token: sampling parameters and the sampler of a session.

Order of operations: repetition penalty (tokens of prompt and completion), frequency and presence penalty
(tokens of the completion), logit_bias, tokens that are not allowed, temperature, top_k, top_p, min_p, draw.
Temperature 0 takes the largest logit after penalties and bias; of equal ones, the smallest id. Log-probabilities
are OpenAI's: the log-softmax of the logits as the model gave them, before all of this. Knows nothing of models and
tokenizers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tenfold.errors import RunError, UsageError

__all__ = ["Sampled", "Sampler", "SamplingParams"]

_ABOVE_ZERO = math.ulp(0.0)  # the lower end of a range that excludes 0
_NOTHING = "every token is forbidden, nothing can be sampled; relax the constraint on the output"
_FIRST_GUESS = 256  # tokens looked at first for top_p; sorting a whole vocabulary takes milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. A value outside its range is a UsageError; 0 of `top_k` and `min_p` means off.

    `logprobs` asks for that many of the likeliest tokens beside each sampled one. `stop` strings are for
    whoever has the text (`StopStrings`), `max_tokens` and `ignore_eos` for whoever drives the session.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int = 1024
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, _ABOVE_ZERO, 1.0)
        _check_integer("top_k", self.top_k, 0, 2**31 - 1)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, 2**63 - 1)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, 20)
        _check_stop(self.stop)
        _check_bias(self.logit_bias)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses a `logit_bias` for ids the model does not have."""
        for token_id in self.logit_bias:
            if token_id >= vocab_size:
                raise UsageError(f"logit_bias names token {token_id}, expected 0..{vocab_size - 1}; remove it")


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token, its log-probability, and as many likeliest tokens as `logprobs` asks for."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The sampler of one session: its parameters, its random numbers, and the tokens it has seen.

    One random number per token, from a generator of its own: what a seed gives does not depend on neighbours.
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int] = ()) -> None:
        self.params = params
        self._generator = torch.Generator()
        self.seed = self._generator.seed() >> 1 if params.seed is None else params.seed
        self._generator.manual_seed(self.seed)
        repeats = params.repetition_penalty != 1.0
        self._prompt_ids = torch.tensor(sorted(set(prompt)) if repeats else [], dtype=torch.int64)
        self._counts: Counter[int] = Counter()
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float64)

    def sample(self, logits: Tensor, allowed: Tensor | None = None) -> Sampled:
        """The next token from `logits`, float32 [vocab]; it joins the tokens seen.

        A logit of -inf forbids a token, and so does `allowed`, bool [vocab], whatever penalties and bias say.
        RunError if a logit is NaN or +inf, or if nothing is allowed.
        """
        raw = _checked(logits)
        return self._report(raw, self._choose(raw, allowed))

    def choose(self, logits: Tensor, allowed: Tensor | None = None) -> int:
        """The token alone, as `sample` chooses it: log-probabilities cost several times as much."""
        return self._choose(_checked(logits), allowed)

    def _choose(self, raw: Tensor, allowed: Tensor | None) -> int:
        self.params.check_vocabulary(len(raw))
        adjusted = self._adjusted(raw)
        if allowed is not None:
            adjusted = adjusted.masked_fill(~allowed, -math.inf)
            if float(adjusted.max()) == -math.inf:
                raise RunError(_NOTHING)
        # torch's argmax looks at one number at a time: milliseconds for a whole vocabulary.
        token_id = int(adjusted.numpy().argmax()) if self.params.temperature == 0 else self._draw(adjusted)
        self._counts[token_id] += 1
        return token_id

    def _adjusted(self, raw: Tensor) -> Tensor:
        """Logits after penalties and bias; where there are none, the logits themselves."""
        params = self.params
        if not (self._penalises or params.logit_bias):
            return raw
        adjusted, generated = raw.clone(), torch.tensor(list(self._counts), dtype=torch.int64)
        if params.repetition_penalty != 1.0:
            seen = torch.cat([self._prompt_ids, generated])  # an id in both is written twice, with one value
            values = raw[seen]
            penalty = params.repetition_penalty
            adjusted[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if params.frequency_penalty or params.presence_penalty:
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float64)
            adjusted[generated] -= params.frequency_penalty * counts + params.presence_penalty
        adjusted[self._bias_ids] += self._bias
        return adjusted

    @property
    def _penalises(self) -> bool:
        params = self.params
        return params.repetition_penalty != 1.0 or bool(params.frequency_penalty or params.presence_penalty)

    def _draw(self, adjusted: Tensor) -> int:
        """Inverse of the cumulative distribution over the tokens that pass the filters."""
        scaled = (adjusted - adjusted.max()) / self.params.temperature  # the largest is 0: no overflow
        ids = _filtered(scaled, self.params)
        cumulative = scaled[ids].exp().cumsum(0)
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64)
        # At most 1 - 2**-53, so the product stays below the total: never a token of weight 0.
        return int(ids[torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)])

    def _report(self, raw: Tensor, token_id: int) -> Sampled:
        norm = raw.logsumexp(0)
        top = _leading(raw, self.params.logprobs) if self.params.logprobs else torch.empty(0, dtype=torch.int64)
        top = top[raw[top] > -math.inf]
        pairs = zip(top.tolist(), (raw[top] - norm).tolist(), strict=True)
        return Sampled(token_id, float(raw[token_id] - norm), tuple(pairs))


def _checked(logits: Tensor) -> Tensor:
    """The logits in float64 on the CPU, where neither penalties nor exponentials overflow."""
    assert logits.ndim == 1
    largest = float(logits.max())  # NaN if any is
    if math.isnan(largest) or largest == math.inf:
        raise RunError(f"the model's logits contain {largest}; check the weights, and try the reference backend")
    if largest == -math.inf:
        raise RunError(_NOTHING)
    return logits.detach().to("cpu", torch.float64)


def _filtered(scaled: Tensor, params: SamplingParams) -> Tensor:
    """Ids that pass top_k, top_p and min_p, in an order that depends on nothing but `scaled`."""
    if params.top_k:
        ids = _leading(scaled, params.top_k)
        weights = scaled[ids].exp()
        ids = ids[: _nucleus_size(weights, params.top_p, float(weights.sum()))]
    elif params.top_p < 1.0:
        ids = _nucleus(scaled, params.top_p)
    else:
        ids = torch.arange(len(scaled))
    return ids[scaled[ids] >= math.log(params.min_p)] if params.min_p else ids


def _nucleus(scaled: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest tokens that hold `top_p` of the probability; sorts only as many as it takes."""
    total = float(scaled.exp().sum())
    num_looked_at = _FIRST_GUESS
    while True:
        ids = _leading(scaled, num_looked_at)
        size = _nucleus_size(scaled[ids].exp(), top_p, total)
        if size < len(ids) or len(ids) == len(scaled):
            return ids[:size]
        num_looked_at *= 8


def _nucleus_size(weights: Tensor, top_p: float, total: float) -> int:
    """How many of the descending `weights` are kept: those with less than `top_p` of `total` before them."""
    before = weights.cumsum(0)[:-1]
    return 1 + int((before < top_p * total).sum())


def _leading(values: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest values, the largest first; equal ones by id."""
    if count >= len(values):
        return values.argsort(descending=True, stable=True)
    candidates = (values >= values.topk(count).values[-1]).nonzero().flatten()
    return candidates[values[candidates].argsort(descending=True, stable=True)][:count]


def _check_number(name: str, value: object, lowest: float, highest: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        above = "above 0" if lowest == _ABOVE_ZERO else f"{lowest:g}"
        raise UsageError(f"{name} is {value!r}, expected a number from {above} to {highest:g}")


def _check_integer(name: str, value: object, lowest: int, highest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise UsageError(f"{name} is {value!r}, expected an integer from {lowest} to {highest}")


def _check_stop(stop: object) -> None:
    if not isinstance(stop, tuple) or not all(isinstance(one, str) and one for one in stop):
        raise UsageError(f"stop is {stop!r}, expected a tuple of strings, none of them empty")


def _check_bias(bias: object) -> None:
    if not isinstance(bias, Mapping):
        raise UsageError(f"logit_bias is {bias!r}, expected a mapping of token ids to numbers")
    for token_id, value in bias.items():
        _check_integer("a token id of logit_bias", token_id, 0, 2**31 - 1)
        _check_number(f"logit_bias[{token_id}]", value, -100.0, 100.0)
