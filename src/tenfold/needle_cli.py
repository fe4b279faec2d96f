"""The body of `tenfold eval needle`: options to a grid, haystacks one after another, the table, JSON, the heat-map.

Reads no model itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold import charts, retrieval, terminal
from tenfold import config as configuration
from tenfold.endpoint import EndpointReader, checked_api
from tenfold.errors import UsageError
from tenfold.haystack import Straw, embedded_document
from tenfold.needle_grid import Cell, Grid, Plan, Reader, Results, ask
from tenfold.planner.prices import parse_tokens
from tenfold.store import Store
from tenfold.tokenizer import Tokenizer

__all__ = ["Asked", "draw", "evaluate"]

_MEASURE = "tiny-v4-flash"
"""Whose tokenizer counts where the model is elsewhere."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Who is asked, as the options say it."""

    model: str | None
    endpoint: str | None
    api: str
    api_key: str | None
    backend: str
    numerics: str
    memory: str | None
    threads: int | None
    store: Path | None


def evaluate(
    asked: Asked, lengths: str, grid: tuple[int, int, int], text: str | None, out: Path | None, plot: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Asks what is not answered yet, then prints the cells; `grid` is depths, facts a cell, seed."""
    wanted = Grid(tuple(parse_tokens(part, "--lengths") for part in lengths.split(",")), *grid)
    if plot is not None:
        charts.check_name(plot)
    reader = _reader(asked)
    reader.room_for(wanted.lengths[-1], [])  # too long a text is refused before a shorter one is read
    straw_text = embedded_document() if text is None else text
    about = {
        "model": reader.name,
        "identity": reader.identity,
        "text": hashlib.sha256(straw_text.encode()).hexdigest()[:16],
        "depths": wanted.depths,
        "per_cell": wanted.per_cell,
        "seed": wanted.seed,
    }
    results = Results(about, out)
    _ask_all(wanted, results.missing(wanted), reader, Straw(straw_text, reader.encode), results)
    cells = results.cells(wanted.lengths)
    if plot is not None:
        draw(reader.name, wanted, cells, plot)
    found = _summary(about, wanted, cells)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _show(reader.name, wanted, cells)


def _reader(asked: Asked) -> Reader:
    if asked.endpoint is not None:
        tokenizer = Tokenizer.load(configuration.locate(_MEASURE))
        return EndpointReader(asked.endpoint, asked.model, tokenizer, checked_api(asked.api), asked.api_key)
    if asked.model is None:
        raise UsageError("nothing says who is asked; give a model, or --endpoint URL")
    store = None if asked.store is None else Store(asked.store, warn=terminal.warn)
    return retrieval.open_reader(asked.model, asked.backend, asked.numerics, asked.memory, asked.threads, store)


def _ask_all(grid: Grid, missing: Sequence[Plan], reader: Reader, straw: Straw, results: Results) -> None:
    """Reads haystack after haystack; a line on stderr behind each."""
    known = sum(1 for _ in grid.plans()) - len(missing)
    if known:
        terminal.talk.print(f"{known} haystacks are answered in {results.path}; {len(missing)} to go", soft_wrap=True)
    elif results.path is None:
        terminal.talk.print("--out FILE would keep the answers and let a second start go on", style="dim")
    for number, plan in enumerate(missing, 1):
        with terminal.reading(plan.length, f"{number} of {len(missing)}") as clock:
            record = ask(plan, grid.depths, reader, straw, clock)
        results.add(record)
        right = sum(question["right"] for question in record["questions"])
        terminal.talk.print(
            f"{plan.length:>9,} tokens: {right} of {len(plan.plant)} found; read in"
            f" {terminal.duration_text(record['read_s'])}, answered in {terminal.duration_text(record['answer_s'])}",
            soft_wrap=True,
        )


def _summary(about: dict[str, Any], grid: Grid, cells: Sequence[Cell]) -> dict[str, Any]:
    by_length = {
        length: [sum(count) for count in zip(*((c.asked, c.found) for c in cells if c.length == length), strict=True)]
        for length in grid.lengths
    }
    return {
        **about,
        "lengths": [
            {"length": length, "asked": asked, "found": found, "share": round(found / asked, 4)}
            for length, (asked, found) in by_length.items()
        ],
        "cells": [
            {
                "length": cell.length,
                "depth_from": cell.depth / grid.depths,
                "depth_to": (cell.depth + 1) / grid.depths,
                "asked": cell.asked,
                "found": cell.found,
            }
            for cell in cells
        ],
    }


def _show(name: str, grid: Grid, cells: Sequence[Cell]) -> None:
    counts = {(cell.length, cell.depth): f"{cell.found} of {cell.asked}" for cell in cells}
    rows = [
        (_band(depth, grid.depths), *(counts[length, depth] for length in grid.lengths)) for depth in range(grid.depths)
    ]
    totals = []
    for length in grid.lengths:
        column = [cell for cell in cells if cell.length == length]
        totals.append(f"{sum(cell.found for cell in column) / sum(cell.asked for cell in column):.1%}")
    columns = ("depth", *(charts.tokens_text(length) for length in grid.lengths))
    terminal.out.print(f"{name}: needles found, by depth and tokens", style="bold", markup=False, soft_wrap=True)
    terminal.out.print(terminal.table("", columns, [*rows, ("all", *totals)]))


def draw(name: str, grid: Grid, cells: Sequence[Cell], path: Path) -> None:
    """The heat-map, the beginning of the text on top."""
    shares = {(cell.length, cell.depth): cell.found / cell.asked for cell in cells}
    rows = [
        (_band(depth, grid.depths), [shares.get((length, depth)) for length in grid.lengths])
        for depth in range(grid.depths)
    ]
    columns = [charts.tokens_text(length) for length in grid.lengths]
    title = f"{name}: needles found, %, {grid.per_cell} a cell"
    charts.write([charts.Heat(title, "context, tokens", "depth", columns, rows)], path)


def _band(depth: int, depths: int) -> str:
    return f"{100 * depth / depths:.0f}-{100 * (depth + 1) / depths:.0f}%"
