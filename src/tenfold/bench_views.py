"""How the figures of `tenfold bench` are shown: a table as they come, CSV, charts."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tenfold import charts, terminal
from tenfold.bench import Frontier, frontiers, sample, walk
from tenfold.engine import Engine
from tenfold.terminal import bytes_text

__all__ = ["draw", "name", "run", "write_csv"]


def run(
    model: str,
    longest: int,
    backend: str = "auto",
    memory: str | None = None,
    threads: int | None = None,
    *,
    keep: bool = True,
    sampled: bool = False,
    quiet: bool = False,
) -> list[Frontier]:
    """Walks one model, or samples it; a line on stderr at each frontier unless quiet.

    Raises what `Engine.load` and `session` do.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) if keep and not sampled else None
        engine = Engine.load(model, backend, "deployed", memory, store, threads=threads)
        figures = sample if sampled else walk
        with terminal.reading(longest) as clock:
            clock.weigh(engine.reading_cost())
            for frontier in figures(engine, frontiers(longest), progress=clock.advance):
                found.append(frontier)
                if not quiet:
                    terminal.talk.print(_line(frontier), soft_wrap=True)
    return found


def name(model: str) -> str:
    """What a model is called in tables and charts: its folder's name."""
    return Path(model).name


def _line(one: Frontier) -> str:
    share = one.peak_rss_bytes / one.plan_bytes - 1
    eta = "" if one.eta_error is None else f"; time left told from a tenth on was off by at most {one.eta_error:.0%}"
    return (
        f"{one.context:>9,} tokens: prefill {one.prefill_tps:,.0f} tokens/s, decode {one.decode_tps:,.1f};"
        f" KV {bytes_text(one.kv_bytes)}, on disk {bytes_text(one.stored_bytes)},"
        f" peak memory {bytes_text(one.peak_rss_bytes)} ({share:+.1%} of the plan){eta}"
    )


def write_csv(found: Mapping[str, Sequence[Frontier]], path: Path) -> None:
    rows = [{"model": model, **one.report()} for model, frontiers in found.items() for one in frontiers]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw(found: Mapping[str, Sequence[Frontier]], path: Path) -> None:
    """Prefill, decode, live KV and bytes on disk against the context, all models on each chart."""
    x = sorted({one.context for frontiers in found.values() for one in frontiers})
    about = (
        ("Prefill, new tokens/s", "", "prefill_tps"),
        ("Decode, tokens/s", "", "decode_tps"),
        ("Live KV cache", "B", "kv_bytes"),
        ("On disk", "B", "stored_bytes"),
    )
    drawn = []
    for title, unit, field in about:
        at = {model: {one.context: float(getattr(one, field)) for one in found[model]} for model in found}
        curves = [(model, [values.get(length) or None for length in x]) for model, values in at.items()]
        if any(value for _, values in curves for value in values):
            drawn.append(charts.Lines(title, "context, tokens", unit, x, curves))
    charts.write(drawn, path)
