"""The chart of benchmarks/peers.py: prefill and decode over the length of the context, both axes logarithmic.

Needs matplotlib. Colours and a transparent ground that read on white and on black. Knows nothing of measuring.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

TENFOLD = "tenfold"
GREY = "#8b949e"
COLOURS = ("#e8590c", "#1c7ed6", "#4dabf7", "#7950f2", "#2f9e44", "#c2a300", "#d6336c", "#12b886")
MARKERS = "oDsv^P"
PANELS = (
    ("reading: tokens/s in 512-token chunks at that depth, or from the start up to 16K", ("prefill", "chunk")),
    ("writing: tokens/s behind that context", ("decode",)),
)


def draw(rows: list[dict[str, str]], folder: Path) -> None:
    """Writes peers.svg and peers.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "font.size": 10, "text.color": GREY})
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6))
    names = list(dict.fromkeys(row["engine"] for row in rows))
    for panel, (title, tasks) in zip(axes, PANELS, strict=True):
        for place, name in enumerate(names):
            points = [
                (int(row["tokens"]), float(row["tokens_per_s"]))
                for row in rows
                if row["engine"] == name and row["task"] in tasks
            ]
            if points:
                line(panel, name, place, sorted(points))
        style(panel, title)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, labelcolor=GREY)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    for ending in ("svg", "png"):
        figure.savefig(folder / f"peers.{ending}", transparent=True, dpi=160)
    pyplot.close(figure)


def line(panel: object, name: str, place: int, points: list[tuple[int, float]]) -> None:
    strong = name == TENFOLD
    panel.plot(
        *zip(*points, strict=True),
        color=COLOURS[place % len(COLOURS)],
        marker=MARKERS[place % len(MARKERS)],
        linewidth=3 if strong else 1.6,
        markersize=7 if strong else 5,
        zorder=3 if strong else 2,
        label=name,
    )
    if strong:
        for tokens, rate in points:
            text = f"{rate:,.0f}"
            panel.annotate(text, (tokens, rate), (0, 8), textcoords="offset points", ha="center", color=COLOURS[0])


def style(panel: object, title: str) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    ticks = {1 << 10: "1K", 1 << 12: "4K", 1 << 14: "16K", 1 << 16: "64K", 1 << 18: "256K", 1 << 20: "1M"}
    panel.set_xticks(list(ticks), list(ticks.values()))
    panel.set_title(title, fontsize=9, color=GREY)
    panel.set_xlabel("tokens of context", color=GREY)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.margins(y=0.12)
    panel.grid(which="major", color=GREY, alpha=0.3, linewidth=0.6)
    panel.minorticks_off()
    panel.tick_params(colors=GREY)
    panel.set_facecolor("none")
    for spine in panel.spines.values():
        spine.set_color(GREY)


if __name__ == "__main__":
    results = Path(__file__).parents[1] / "results"
    with (results / "peers.csv").open(encoding="utf-8") as table:
        draw(list(csv.DictReader(table)), results)
    sys.exit(0)
