"""The bodies of `tenfold compare` and `tenfold plan`: options to questions, answers to tables, JSON, charts, a page.

Computes nothing itself and imports no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.config import PRESETS
from tenfold.errors import UsageError
from tenfold.planner import compare as comparing
from tenfold.planner import machines, prices
from tenfold.planner import plan as planning

__all__ = ["Asked", "compare", "plan"]


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of `tenfold plan` as they were given."""

    context: str
    machine: str
    gpus: int
    fields: Sequence[str]
    workload: str | None
    price: str | None
    hourly: float | None
    power_price: float
    utilisation: float


def compare(
    sources: Sequence[str],
    against: str,
    context: str,
    by: str | None,
    why: bool,
    fields: Sequence[str],
    plot: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Prints the comparison; charts and the page go to files."""
    if by not in (None, "component"):
        raise UsageError(f"--by is {by!r}, expected component")
    tokens = prices.parse_tokens(context)
    models = _models(sources, against, fields)
    found = comparing.compare(models, tokens)
    if why:
        found["why"] = [comparing.explain(model, models[0], tokens) for model in models[1:]]
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _show(found, by)
    _write(models, tokens, plot, html)


def _models(sources: Sequence[str], against: str, fields: Sequence[str]) -> list[comparing.Compared]:
    """The base first; with changed fields each model comes as it is and changed."""
    names = [against, *(source for source in sources or PRESETS if source != against)]
    models = [comparing.load(name) for name in names]
    if not fields:
        return models
    return [models[0], *(m for name, model in zip(names[1:], models[1:], strict=True)
                         for m in (model, comparing.load(name, fields)))]  # fmt: skip


def _show(found: dict[str, Any], by: str | None) -> None:
    from tenfold import planner_views
    from tenfold.terminal import out

    if "why" in found:
        for explained in found["why"]:
            planner_views.show_why(explained)
            out.print()
    elif by == "component":
        planner_views.show_by_component(found)
    else:
        planner_views.show_comparison(found)


def _write(models: Sequence[comparing.Compared], tokens: int, plot: Path | None, html: Path | None) -> None:
    if plot is not None:
        from tenfold import charts

        charts.write(charts.comparison(models, tokens), plot)
        print(f"wrote {plot}", file=sys.stderr)
    if html is not None:
        from tenfold import report

        report.write(models, tokens, html)
        print(f"wrote {html}", file=sys.stderr)


def plan(source: str, asked: Asked, as_json: bool) -> None:
    """Prints the plan."""
    model = comparing.load(source, asked.fields)
    preset = source if source in PRESETS else None
    terms = planning.Terms(
        hardware=machines.find(asked.machine),
        count=asked.gpus,
        usd_per_hour=asked.hourly,
        usd_per_kwh=asked.power_price,
        utilisation=asked.utilisation,
        price=prices.parse_price(asked.price) if asked.price else prices.latest_price(preset),
        workload=prices.parse_workload(asked.workload) if asked.workload else None,
    )
    found = planning.plan(model, prices.parse_tokens(asked.context), terms)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    from tenfold import planner_views

    planner_views.show_plan(found)
