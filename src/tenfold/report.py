"""One self-contained HTML page of a comparison: tables, charts, and sliders that compute in the page itself.

The page's script repeats the closed forms of `planner.work` and `planner.serving`; nothing is loaded from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from tenfold import charts
from tenfold.errors import InputError, UsageError
from tenfold.planner.compare import DEFINITIONS, Compared, compare, explain
from tenfold.planner.machines import known
from tenfold.planner.plan import table_bytes
from tenfold.planner.prices import prices

__all__ = ["page", "write"]


def write(models: Sequence[Compared], context: int, path: Path) -> None:
    """Writes the page."""
    try:
        path.write_text(page(models, context), encoding="utf-8")
    except OSError as exc:
        raise InputError(f"{path} cannot be written: {exc.strerror or exc}; check the folder") from None


def page(models: Sequence[Compared], context: int) -> str:
    """The page with its sliders standing at `context`."""
    template = resources.files("tenfold").joinpath("planner", "data", "report.html").read_text(encoding="utf-8")
    filled = {
        "/*definition*/": escape(DEFINITIONS["flops"]),
        "/*sections*/": _sections(models, context),
        "/*data*/": json.dumps(_data(models, context)).replace("</", "<\\/"),
        "/*colours*/": json.dumps(charts.COLOURS),
    }
    for place, text in filled.items():
        template = template.replace(place, text)
    return template


def _data(models: Sequence[Compared], context: int) -> dict[str, Any]:
    return {
        "context": context,
        "models": [{**asdict(model.anatomy), "table_bytes": table_bytes(model.config)} for model in models],
        "machines": [asdict(hardware) for hardware in known().values()],
    }


def _sections(models: Sequence[Compared], context: int) -> str:
    """What stands still: claims, causes, shares, prices."""
    found = compare(models, context)
    parts = []
    if found["claims"]:
        rows = [(f"{c['model']}: {c['what']}", f"{100 * c['claimed']:.0f} %", f"{100 * c['computed']:.2f} %")
                for c in found["claims"]]  # fmt: skip
        parts.append(_table("Claimed and computed, at 1,000,000 tokens", ("", "claimed", "computed"), rows))
    parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in found["notes"]) + "</ul>")
    parts += [_why(model, models[0], context) for model in models[1:]]
    shares = [chart for chart in charts.comparison(models, context) if isinstance(chart, charts.Bars)]
    parts.append('<div class="charts">' + "".join(charts.svg([chart], ground=False) for chart in shares) + "</div>")
    listed = [(p.model, p.since, p.label, f"{p.hit:g}", f"{p.miss:g}", f"{p.output:g}", p.source) for p in prices()]
    columns = ("model", "from", "", "hit", "miss", "output", "source")
    parts.append(_table("List prices, $ per million tokens", columns, listed))
    return "\n".join(parts)


def _why(model: Compared, base: Compared, context: int) -> str:
    """The shares of the saving, where the two models are of the architectures it is explained for."""
    try:
        found = explain(model, base, context)
    except UsageError:
        return ""
    rows = [(s["cause"], f"{s['saved'] / 1e9:+,.1f}", f"{100 * s['share']:+.1f} %") for s in found["flops"]["shares"]]
    kv = [(s["cause"], f"{s['saved'] / 1e9:+,.3f}", f"{100 * s['share']:+.2f} %") for s in found["kv"]["shares"]]
    head = f"Why {model.name} is cheaper than {base.name} at {context:,} tokens"
    return _table(head, ("cause", "GFLOP saved a token", "share"), rows) + _table(
        "", ("cause", "GB of KV saved", "share"), kv
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f'{heading}<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
