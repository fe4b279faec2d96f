"""Line charts with logarithmic axes, bars and heat-maps, as SVG or PNG, legible on light and on dark ground.

A chart is data (`Chart`); drawing it needs no package for SVG, Pillow for PNG. Knows nothing of models but in
`comparison`, which says what is drawn of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from tenfold.errors import InputError, RunError
from tenfold.planner.compare import CONTEXTS, Compared
from tenfold.planner.memory import kv_bytes
from tenfold.planner.prices import launch_price
from tenfold.planner.work import FP8_EQUIVALENT, by_component, step_work, total_flops

__all__ = ["Bars", "Chart", "Heat", "Lines", "check_name", "comparison", "svg", "tokens_text", "write"]

COLOURS = ("#8a8f98", "#0b84a5", "#e07a1f", "#6f4e9c", "#3f9b4f", "#c2415d", "#b59b00", "#4a6fd1", "#00a08a")
"""Of middling lightness, so that each stands out from white and from black alike."""

WIDTH, HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 16, 40, 64


@dataclass(frozen=True, slots=True)
class Lines:
    """Curves over a shared x, None where one has no value; both axes are logarithmic."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    curves: Sequence[tuple[str, Sequence[float | None]]]


@dataclass(frozen=True, slots=True)
class Bars:
    """Each column a name and its parts: stacked as shares of the whole, or side by side on a linear axis."""

    title: str
    y_label: str
    columns: Sequence[tuple[str, Sequence[tuple[str, float]]]]
    shares: bool = True


@dataclass(frozen=True, slots=True)
class Heat:
    """Shares from 0 to 1 over two named axes, the first row on top; None where nothing is known."""

    title: str
    x_label: str
    y_label: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]


Chart = Lines | Bars | Heat


def comparison(models: Sequence[Compared], context: int) -> list[Chart]:
    """KV cache and FLOPs over context, what FLOPs are made of, and launch prices."""
    lengths = [length for length in CONTEXTS if length != 1_048_576]

    def curves(figure: Callable[[Compared, int], float]) -> list[tuple[str, Sequence[float | None]]]:
        return [(model.name, [figure(model, length) for length in lengths]) for model in models]

    charts: list[Chart] = [
        Lines("KV cache of one session", "context, tokens", "bytes", lengths,
              curves(lambda m, n: kv_bytes(m.anatomy, n))),
        Lines("FLOPs of one decoded token, fp8-equivalent", "context, tokens", "FLOP", lengths,
              curves(lambda m, n: total_flops(step_work(m.anatomy, n - 1, 1)))),
        Bars(f"What a token's FLOPs go to at {context:,} tokens", "share",
             [(model.name, _grouped(by_component(step_work(model.anatomy, context - 1, 1), FP8_EQUIVALENT)))
              for model in models]),
    ]  # fmt: skip
    listed = [(model.name, price) for model in models if (price := launch_price(model.name)) is not None]
    if listed:
        columns = [(name, [("cache miss", price.miss), ("output", price.output)]) for name, price in listed]
        charts.append(Bars("List price at launch, $ per million tokens", "$", columns, shares=False))
    return charts


_GROUPS = {
    "attn_core": "attention",
    "indexer_score": "index scores",
    "indexer_proj": "index scores",
    "indexer_gate": "index scores",
    "attn_proj": "projections",
    "compressor": "projections",
    "moe_routed": "experts",
    "moe_shared": "experts",
    "dense_ffn": "experts",
    "router": "experts",
}


def _grouped(flops: dict[str, float]) -> list[tuple[str, float]]:
    found = dict.fromkeys(("index scores", "attention", "projections", "experts", "rest"), 0.0)
    for name, value in flops.items():
        found[_GROUPS.get(name, "rest")] += value
    return list(found.items())


def check_name(path: Path) -> None:
    """An InputError for a file that `write` would refuse by its name: said before anything is measured."""
    if path.suffix.lower() not in (".svg", ".png"):
        raise InputError(f"{path.name!r} ends neither in .svg nor in .png; name the file {path.stem or 'chart'}.svg")


def write(charts: Sequence[Chart], path: Path) -> None:
    """All charts below one another into one .svg or .png file."""
    check_name(path)
    try:
        if path.suffix.lower() == ".svg":
            path.write_text(svg(charts), encoding="utf-8")
        else:
            _write_png(charts, path)
    except OSError as exc:
        raise InputError(f"{path} cannot be written: {exc.strerror or exc}; check the folder") from None


# ---------------------------------------------------------------------------------------------- drawing


Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True, slots=True)
class _Mark:
    """One stroke of a drawing: a line through points, a filled rectangle, or words. `colour` "ink" fits the ground."""

    kind: Literal["line", "box", "words"]
    points: tuple[tuple[float, float], ...]
    colour: str = "ink"
    weight: float = 1.0
    text: str = ""
    anchor: Anchor = "start"


def _marks(chart: Chart) -> list[_Mark]:
    title = _Mark("words", ((_LEFT - 58, 22),), weight=2, text=chart.title)
    draw: dict[type[Chart], Callable[[Any], list[_Mark]]] = {Lines: _lines, Bars: _bars, Heat: _heat}
    return [title, *draw[type(chart)](chart)]


def _lines(chart: Lines) -> list[_Mark]:
    present = [value for _, values in chart.curves for value in values if value is not None]
    high, low = max(present), min(present)
    y_decades = (math.floor(math.log10(low)), math.ceil(math.log10(high)))
    x_range = (math.log2(chart.x[0]), math.log2(chart.x[-1]))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - x_range[0]) / (x_range[1] - x_range[0])
        up = (math.log10(y) - y_decades[0]) / (y_decades[1] - y_decades[0])
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    marks = []
    for decade in range(y_decades[0], y_decades[1] + 1):
        left, right = place(chart.x[0], 10.0**decade), place(chart.x[-1], 10.0**decade)
        marks.append(_Mark("line", (left, right), "grid"))
        marks.append(
            _Mark("words", ((_LEFT - 6, left[1] + 4),), text=_amount(10.0**decade, chart.y_label), anchor="end")
        )
    for x in chart.x:
        foot = place(x, 10.0 ** y_decades[0])
        marks.append(_Mark("line", (foot, (foot[0], foot[1] + 4))))
        marks.append(_Mark("words", ((foot[0], foot[1] + 17),), text=tokens_text(x), anchor="middle"))
    for i, (_, values) in enumerate(chart.curves):
        points = tuple(place(x, y) for x, y in zip(chart.x, values, strict=True) if y is not None)
        marks.append(_Mark("line", points, COLOURS[i % len(COLOURS)], 2.5))
    marks.append(_Mark("words", ((WIDTH - _RIGHT, HEIGHT - 32),), text=chart.x_label, anchor="end"))
    return marks + _legend([name for name, _ in chart.curves])


def _bars(chart: Bars) -> list[_Mark]:
    names = list(dict.fromkeys(name for _, parts in chart.columns for name, _ in parts))
    totals = [sum(value for _, value in parts) for _, parts in chart.columns]
    top = 1.0 if chart.shares else _rounded_up(max(value for _, parts in chart.columns for _, value in parts))
    height, base = HEIGHT - _TOP - _BOTTOM, HEIGHT - _BOTTOM
    marks = []
    for i in range(5):
        y, value = base - height * i / 4, top * i / 4
        text = f"{100 * value:.0f} %" if chart.shares else f"{value:.2f}"
        marks += [_Mark("line", ((_LEFT, y), (WIDTH - _RIGHT, y)), "grid"),
                  _Mark("words", ((_LEFT - 6, y + 4),), text=text, anchor="end")]  # fmt: skip
    slot = (WIDTH - _LEFT - _RIGHT) / len(chart.columns)
    for i, (column, parts) in enumerate(chart.columns):
        left, wide = _LEFT + slot * (i + 0.2), slot * 0.6
        done = 0.0
        for j, (name, value) in enumerate(parts):
            tall = height * (value / totals[i] if chart.shares else value / top)
            x = left if chart.shares else left + wide * j / len(parts)
            breadth = wide if chart.shares else wide / len(parts)
            colour = COLOURS[1 + names.index(name) % (len(COLOURS) - 1)]
            foot = base - (done if chart.shares else 0.0)
            marks.append(_Mark("box", ((x, foot - tall), (x + breadth, foot)), colour))
            if not chart.shares:
                marks.append(_Mark("words", ((x + breadth / 2, foot - tall - 4),), text=f"{value:g}", anchor="middle"))
            done += tall
        marks.append(_Mark("words", ((left + wide / 2, base + 17),), text=column, anchor="middle"))
    return marks + _legend(names, 1)


_RAMP = ((0x7F, 0x27, 0x04), (0xF5, 0xA3, 0x5A), (0xB7, 0xE4, 0xC7))
"""The colours of 0, one half and 1: ever lighter, for eyes that see no hues."""
_NOTHING = COLOURS[0]


def _heat(chart: Heat) -> list[_Mark]:
    wide = (WIDTH - _LEFT - _RIGHT) / len(chart.columns)
    tall = (HEIGHT - _TOP - _BOTTOM) / len(chart.rows)
    marks = []
    for i, (name, values) in enumerate(chart.rows):
        top = _TOP + tall * i
        marks.append(_Mark("words", ((_LEFT - 6, top + tall / 2 + 4),), text=name, anchor="end"))
        for j, value in enumerate(values):
            left = _LEFT + wide * j
            corners = ((left + 1, top + 1), (left + wide - 1, top + tall - 1))
            marks.append(_Mark("box", corners, _NOTHING if value is None else _blended(value)))
            if value is not None and tall >= 12:
                middle = ((left + wide / 2, top + tall / 2 + 4),)
                colour = "#ffffff" if value < 0.25 else "#000000"
                marks.append(_Mark("words", middle, colour, text=f"{100 * value:.0f}", anchor="middle"))
    for j, name in enumerate(chart.columns):
        place = ((_LEFT + wide * (j + 0.5), HEIGHT - _BOTTOM + 17),)
        marks.append(_Mark("words", place, text=name, anchor="middle"))
    marks.append(_Mark("words", ((WIDTH - _RIGHT, HEIGHT - 32),), text=chart.x_label, anchor="end"))
    marks.append(_Mark("words", ((_LEFT - 58, HEIGHT - 32),), text=chart.y_label))
    return marks


def _blended(share: float) -> str:
    """The colour of a share, between its neighbours of the ramp."""
    place = share * (len(_RAMP) - 1)
    low = min(int(place), len(_RAMP) - 2)
    parts = (round(a + (place - low) * (b - a)) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)


def _rounded_up(value: float) -> float:
    """The top of a linear axis: 1, 2, 4 or 8 times a power of ten; 1 where nothing is above 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value)


def _legend(names: Sequence[str], first: int = 0) -> list[_Mark]:
    """Below the axis, from the left; as wide as the words are."""
    marks, x = [], float(_LEFT)
    for i, name in enumerate(names):
        colour = COLOURS[first + i % (len(COLOURS) - first)]
        marks.append(_Mark("box", ((x, HEIGHT - 19), (x + 12, HEIGHT - 9)), colour))
        marks.append(_Mark("words", ((x + 17, HEIGHT - 9),), text=name))
        x += 33 + 6.6 * len(name)
    return marks


def tokens_text(x: float) -> str:
    """A length as its axis names it: 64K, 1M for 1,000,000 as well as for 1,048,576."""
    million = 1e6 if x % 1e6 == 0 else 1 << 20
    if x < 1e6:
        return f"{x / 1024:g}K" if x % 1024 == 0 else f"{x:,g}"
    return f"{x / million:.3g}M"


def _amount(value: float, unit: str) -> str:
    short = {"bytes": "B", "FLOP": "F"}.get(unit, unit)
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {prefix}{short}"
    return f"{value:g} {short}".rstrip()


_STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-size:14px;font-weight:600}"
    ".ink{stroke:#24292f}.grid{stroke:#d0d7de}.ground{fill:#ffffff}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.ink{stroke:#e6edf3}.grid{stroke:#3d444d}"
    ".ground{fill:#0d1117}}</style>"
)


def svg(charts: Sequence[Chart], *, ground: bool = True) -> str:
    """One SVG document with the charts below one another; its colours follow the reader's light or dark theme."""
    height = HEIGHT * len(charts)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
             f'height="{height}" role="img">{_STYLE}']  # fmt: skip
    if ground:
        parts.append(f'<rect class="ground" width="{WIDTH}" height="{height}"/>')
    for i, chart in enumerate(charts):
        strokes = "".join(_svg_mark(mark) for mark in _marks(chart))
        parts.append(f'<g transform="translate(0 {HEIGHT * i})">{strokes}</g>')
    return "\n".join([*parts, "</svg>\n"])


def _svg_mark(mark: _Mark) -> str:
    if mark.kind == "words":
        (x, y), title = mark.points[0], ' class="title"' if mark.weight > 1 else ""
        fill = (
            "" if mark.colour == "ink" else f' style="fill:{mark.colour}"'
        )  # an attribute would lose against the style
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{mark.anchor}"{title}{fill}>{escape(mark.text)}</text>'
    if mark.kind == "box":
        (left, top), (right, bottom) = mark.points
        size = f'width="{right - left:.1f}" height="{bottom - top:.1f}"'
        return f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="{mark.colour}"/>'
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.points)
    named = mark.colour in ("ink", "grid")
    stroke = f'class="{mark.colour}"' if named else f'stroke="{mark.colour}"'
    return f'<polyline points="{points}" fill="none" {stroke} stroke-width="{mark.weight:g}"/>'


_PNG_SCALE = 2
_PNG_INK = {"ink": "#24292f", "grid": "#d0d7de"}


def _write_png(charts: Sequence[Chart], path: Path) -> None:
    """The same drawing by Pillow, on white and at twice the size."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise RunError("charts as PNG need Pillow; run `pip install 'tenfold[png]'`, or write .svg") from None
    scale = _PNG_SCALE
    image = Image.new("RGB", (WIDTH * scale, HEIGHT * scale * len(charts)), "#ffffff")
    draw: Any = ImageDraw.Draw(image)
    fonts = {False: ImageFont.load_default(12 * scale), True: ImageFont.load_default(14 * scale)}
    for i, chart in enumerate(charts):
        for mark in _marks(chart):
            points = [(x * scale, (y + HEIGHT * i) * scale) for x, y in mark.points]
            colour = _PNG_INK.get(mark.colour, mark.colour)
            if mark.kind == "words":
                anchor = {"start": "ls", "middle": "ms", "end": "rs"}[mark.anchor]
                draw.text(points[0], mark.text, fill=colour, font=fonts[mark.weight > 1], anchor=anchor)
            elif mark.kind == "box":
                draw.rectangle([*points[0], *points[1]], fill=colour)
            else:
                draw.line(points, fill=colour, width=round(mark.weight * scale), joint="curve")
    image.save(path)
