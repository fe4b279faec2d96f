"""How the demo's figures look: one column a model, the answers below, charts. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tenfold import charts, terminal
from tenfold.demo import Task
from tenfold.terminal import bytes_text, duration_text

__all__ = ["draw", "introduce", "show"]


def introduce(task: Task, name: str) -> None:
    """What is about to happen, on stderr."""
    terminal.talk.print(
        f"{task.context:,} tokens of {name} with {task.needles} facts hidden in them (seed {task.seed}); each is asked "
        "for when all is read.",
        markup=False,
        soft_wrap=True,
    )


def show(found: Mapping[str, Any]) -> None:
    """The table, what was answered, and what the figures mean."""
    models = found["models"]
    components = sorted({part for figures in models.values() for part in figures["kv_bytes"]})
    rows = [
        _row("tokens read", models, _read_text),
        _row("found", models, lambda one: _or(one["found"], lambda n: f"{n} of {len(one['answers'])}")),
        _row("seconds", models, lambda one: _or(one["seconds"], lambda s: f"{s:,.1f}")),
        _row("tokens/s", models, _speed_text),
        _row("peak memory", models, lambda one: _or(one["peak_bytes"], bytes_text)),
        *((f"KV {part}", *(f"{one['kv_bytes'].get(part, 0):,}" for one in models.values())) for part in components),
        _row("KV bytes, all", models, lambda one: f"{one['kv_bytes_total']:,}"),
        _row("KV per further token", models, lambda one: f"{one['kv_bytes_per_token']:,.1f}"),
        _row("GFLOP to read it all", models, lambda one: f"{one['flops'] / 1e9:,.0f}"),
    ]  # fmt: skip
    terminal.out.print(terminal.table("", ("", *models), rows))
    _show_answers(found)
    for line in _remarks(models):
        terminal.out.print(line, markup=False, soft_wrap=True)


def _row(name: str, models: Mapping[str, Any], text: Callable[[Any], str]) -> tuple[str, ...]:
    return (name, *(text(one) for one in models.values()))


def _or(value: Any, text: Callable[[Any], str]) -> str:
    return "-" if value is None else text(value)


def _read_text(one: Mapping[str, Any]) -> str:
    if one["answers"] is None:
        return "sample"
    return f"{one['tokens'] - one['stored_tokens']:,}"


def _speed_text(one: Mapping[str, Any]) -> str:
    speed = _or(one["tokens_per_s"], lambda tps: f"{tps:,.0f}")
    return speed if one["answers"] is not None else f"{speed} at the end"


def _show_answers(found: Mapping[str, Any]) -> None:
    readers = {name: one for name, one in found["models"].items() if one["answers"] is not None}
    rows = []
    for i, hidden in enumerate(found["needles"]):
        said = (f"{one['answers'][i] or '(nothing)'} {'✓' if one['right'][i] else '✗'}" for one in readers.values())
        what = f"{hidden['attribute']} of the {hidden['place']}"
        rows.append((what, f"{hidden['depth']:.0%}", hidden["value"], *said))
    if rows:
        terminal.out.print(terminal.table("Answers", ("", "depth", "hidden", *readers), rows))


def _remarks(models: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, one in models.items():
        if one["stored_tokens"]:
            lines.append(
                f"{name}: {one['stored_tokens']:,} of {one['tokens']:,} tokens came from the store, all was there in "
                f"{duration_text(one['seconds'])}; --no-store reads them again."
            )
    most = max(models, key=lambda name: float(models[name]["kv_bytes_total"]))
    for name, one in models.items():
        if name != most:
            share = one["kv_bytes_total"] / models[most]["kv_bytes_total"]
            lines.append(f"{name}'s memory of the text is {share:.1%} of {most}'s.")
    if any(one["answers"] is None for one in models.values()):
        lines.append(
            '"sample": not read but filled with random rows, then the last tokens timed; --all reads with every '
            "embedded model."
        )
    return lines


def draw(found: Mapping[str, Any], path: Path) -> None:
    """KV bytes and FLOPs of all models, seconds and needles of those that read."""
    models = found["models"]
    readers = {name: one for name, one in models.items() if one["answers"] is not None}
    tokens = charts.tokens_text(found["context"])
    drawn: list[charts.Chart] = [
        _bars(f"KV cache after {tokens} tokens, MB", "KV", models, lambda one: one["kv_bytes_total"] / 1e6),
        _bars(f"Reading {tokens} tokens, TFLOP", "FLOPs", models, lambda one: one["flops"] / 1e12),
        _bars(f"Seconds to read {tokens} tokens", "seconds", readers, lambda one: one["seconds"]),
        _bars("Needles found, %", "found", readers, lambda one: 100 * one["found"] / max(1, len(one["answers"]))),
    ]
    charts.write(drawn, path)


def _bars(title: str, name: str, models: Mapping[str, Any], figure: Callable[[Any], float]) -> charts.Bars:
    columns = [(model, [(name, float(f"{figure(one):.3g}"))]) for model, one in models.items()]
    return charts.Bars(title, "", columns, shares=False)
