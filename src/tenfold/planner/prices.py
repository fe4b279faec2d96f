"""What tokens cost where somebody else computes: dated list prices, and a workload's bill. Knows no hardware."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from tenfold.errors import UsageError

__all__ = [
    "Price",
    "Workload",
    "hosted_usd",
    "latest_price",
    "launch_price",
    "parse_price",
    "parse_tokens",
    "parse_workload",
    "prices",
]


@dataclass(frozen=True, slots=True)
class Price:
    """Dollars per million tokens: read from the cache, read anew, written."""

    model: str
    since: str
    label: str
    hit: float
    miss: float
    output: float
    source: str


@cache
def prices(model: str | None = None) -> tuple[Price, ...]:
    """The dated list prices, oldest first; of one preset where it is named."""
    text = resources.files("tenfold").joinpath("planner", "data", "prices.json").read_text(encoding="utf-8")
    entries: list[dict[str, Any]] = json.loads(text)["prices"]
    found = tuple(Price(since=entry.pop("from"), **entry) for entry in entries)
    return tuple(price for price in found if model in (None, price.model))


def launch_price(model: str) -> Price | None:
    """The first list price of a preset."""
    return next(iter(prices(model)), None)


def parse_price(text: str) -> Price:
    """HIT/MISS/OUTPUT in dollars per million, such as 0.022/0.66/1.98."""
    parts = text.split("/")
    try:
        hit, miss, output = (float(part) for part in parts)
    except ValueError:
        raise UsageError(f"--price is {text!r}, expected HIT/MISS/OUTPUT in $ per million: 0.022/0.66/1.98") from None
    if not all(0 <= value < 1e6 for value in (hit, miss, output)):
        nearest = "/".join(f"{abs(value):g}" for value in (hit, miss, output))
        raise UsageError(f"--price is {text!r}, expected three amounts from 0; the nearest is {nearest}")
    return Price("", "", "given", hit, miss, output, "--price")


def latest_price(model: str | None) -> Price | None:
    """The last list price of a preset."""
    return next(iter(reversed(prices(model))), None) if model else None


_UNITS = {"": 1, "K": 1024, "M": 1_000_000, "KI": 1024, "MI": 1_048_576}


def parse_tokens(text: str | int, option: str = "--context") -> int:
    """Tokens from 4096, 128K (131,072), 1M (1,000,000, as the report counts) or 1Mi (1,048,576)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KI|MI|K|M)?", str(text).strip().replace(",", "").upper())
    if match is None:
        raise UsageError(f"{option} is {text!r}, expected a number of tokens such as 4096, 128K, 1M or 1Mi")
    tokens = float(match.group(1)) * _UNITS[match.group(2) or ""]
    if tokens != int(tokens) or not 1 <= tokens <= 1 << 40:
        raise UsageError(
            f"{option} is {text!r}, expected whole tokens from 1; the nearest is {max(1, round(tokens)):,}"
        )
    return int(tokens)


@dataclass(frozen=True, slots=True)
class Workload:
    """A text of `read` tokens, read once, then `asks` questions of `question` tokens, answered with `answer` each.

    Every question is put to the text alone, as one fork of it: questions and answers do not pile up.
    """

    read: int
    asks: int = 0
    question: int = 0
    answer: int = 0

    @property
    def context(self) -> int:
        """Tokens of the longest session: the text, one question, its answer."""
        return self.read + (self.question + self.answer if self.asks else 0)


_WORKLOAD = re.compile(
    r"read\s+(?P<read>\S+?)(?:\s+once)?(?:\s*,\s*ask\s+(?P<asks>\d+)\s*x\s*(?P<question>[^\s:,]+)"
    r"(?:\s*,?\s*answer\s+(?P<answer>\S+))?)?",
    re.IGNORECASE,
)


def parse_workload(text: str) -> Workload:
    """A workload from "read 1M once, ask 50 x 1K"; answers are as long as questions unless "answer 300" follows."""
    match = _WORKLOAD.fullmatch(text.strip())
    if match is None:
        raise UsageError(f'--workload is {text!r}, expected words such as "read 1M once, ask 50 x 1K, answer 300"')
    read = parse_tokens(match["read"], "--workload")
    if match["asks"] is None:
        return Workload(read)
    question = parse_tokens(match["question"], "--workload")
    answer = parse_tokens(match["answer"], "--workload") if match["answer"] else question
    return Workload(read, int(match["asks"]), question, answer)


def hosted_usd(workload: Workload, price: Price) -> float:
    """The bill of a host that caches perfectly: the text missed once and hit by every question after the first."""
    missed = workload.read + workload.asks * workload.question
    hit = max(0, workload.asks - 1) * workload.read
    written = workload.asks * workload.answer
    return (missed * price.miss + hit * price.hit + written * price.output) / 1e6
