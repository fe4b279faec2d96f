"""How findings look on a terminal: tables for people. Decides nothing and measures nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from tenfold.budget import Need
from tenfold.chat import Event
from tenfold.terminal import bytes_text, duration_text, out, table, talk

__all__ = ["show_doctor", "show_event", "show_inspection", "show_summary", "show_written", "writing"]


def show_event(event: Event) -> None:
    """A piece of an answer: reasoning goes to stderr, content and tool calls to stdout."""
    if event.kind == "reasoning":
        talk.print(event.text, end="", style="dim", markup=False, soft_wrap=True)
        return
    text = f"\n{event.name}(" if event.kind == "tool_call" and event.name else ""
    sys.stdout.write(text + event.text)
    sys.stdout.flush()


def show_plan(need: Need, weights: str | None = None) -> None:
    """Two lines on stderr before anything is read: the memory this will take, and for what; where `weights` lie."""
    parts = (
        ("program", need.base_bytes),
        ("KV", need.kv_bytes),
        ("token ids", need.ids_bytes),
        ("restore points", need.points_bytes),
        ("residual", need.residual_bytes),
        ("scratch", need.scratch_bytes),
    )
    told = ", ".join(f"{name} {bytes_text(count)}" for name, count in parts)
    talk.print(
        f"plan: {need.context:,} tokens in chunks of {need.chunk_tokens:,}; memory {bytes_text(need.total_bytes)}"
        f" ({told}), " + (weights or f"beside {bytes_text(need.weights_bytes)} of mapped weights"),
        style="dim",
        soft_wrap=True,
    )


def show_prefix(report: Mapping[str, Any]) -> None:
    """What of the prompt came from the store, and why no more."""
    if not report["prefix_ends"]:
        return
    stored, total = report["stored_tokens"], report["prompt_tokens"]
    why = "" if stored == total else f"; {report['prefix_ends']}"
    talk.print(f"prefix: {stored:,} of {total:,} tokens from the store{why}", style="dim", soft_wrap=True)


def show_summary(report: Mapping[str, Any]) -> None:
    """What a finished answer took, on stderr."""
    show_prefix(report)
    kv_bytes = sum(report["kv_bytes"].values())
    talk.print(
        f"read {report['prompt_tokens'] - report['reused_tokens']:,} tokens in {duration_text(report['prefill_s'])}"
        f" ({report['prefill_tps']:,.0f} tokens/s), wrote {report['completion_tokens']:,}"
        f" in {duration_text(report['decode_s'])} ({report['decode_tps']:,.1f} tokens/s, {report['finish_reason']});"
        f" KV {bytes_text(kv_bytes)}; backend {report['backend']}",
        style="dim",
        soft_wrap=True,
    )


def show_inspection(model: str, found: Mapping[str, Any]) -> None:
    """The tables of `tenfold inspect`."""
    _show_architecture(model, found)
    counts = found["parameters"]["by_component"]
    rows = [(name, f"{count:,}") for name, count in sorted(counts.items(), key=lambda item: -item[1])]
    out.print(table("Parameters", ("component", "parameters"), rows))
    if "formats" in found:
        rows_f = [
            (row["format"], f"{row['tensors']:,}", f"{row['parameters']:,}", bytes_text(row["bytes"]))
            for row in found["formats"]
        ]
        out.print(table("Stored formats", ("format", "tensors", "parameters", "bytes"), rows_f))
    for tensor in found.get("tensors", ()):
        out.print(f"{tensor['name']}  {tensor['shape']}  {tensor['format']}  {tensor['bytes']:,} B  {tensor['shard']}",
                  soft_wrap=True)  # fmt: skip
    _show_streams(found)


def _show_architecture(model: str, found: Mapping[str, Any]) -> None:
    parameters = found["parameters"]
    layers = ", ".join(f"{count} {kind}" for kind, count in found["layer_kinds"].items())
    routers = ", ".join(f"{count} {kind}" for kind, count in found["router_kinds"].items())
    rows = (
        ("architecture", found["architecture"]),
        ("parameters", f"{parameters['total'] / 1e9:,.3f} B, {parameters['active'] / 1e9:,.3f} B active"),
        ("layers", f"{found['layers']} ({layers}; routers: {routers})"),
        ("hidden size", f"{found['hidden_size']:,}"),
        ("experts", f"{found['experts']['routed']} routed, {found['experts']['active']} active, 1 shared"),
        ("context", f"{found['context']:,} tokens"),
        ("draft head", f"{found['draft_head']}" + ("" if found["draft_head"] == "none" else " (left aside)")),
        ("official size", bytes_text(found["official_bytes"])),
    )
    for name, value in rows:
        out.print(f"{name:<14}{value}", soft_wrap=True)


def _show_streams(found: Mapping[str, Any]) -> None:
    rows = [
        (
            row["component"],
            row["layout"],
            str(row["layers"]),
            f"{row['row_bytes']:,}",
            f"a row every {row['tokens_per_row']}" if row["tokens_per_row"] else f"{row['fixed_rows']} rows",
        )
        for row in found["streams"]
    ]
    out.print(table("Streams of a session", ("component", "layout", "layers", "B/row", "tokens"), rows))
    contexts = list(found["kv_bytes"])
    components = sorted({name for parts in found["kv_bytes"].values() for name in parts})
    rows_kv = [(name, *(f"{found['kv_bytes'][context].get(name, 0):,}" for context in contexts)) for name in components]
    rows_kv.append(("total", *(f"{sum(found['kv_bytes'][context].values()):,}" for context in contexts)))
    title = f"KV bytes at a context of ... tokens ({found['kv_bytes_per_token']:,.2f} B per further token)"
    out.print(table(title, ("component", *(f"{int(context):,}" for context in contexts)), rows_kv))


def show_doctor(found: Mapping[str, Any]) -> None:
    """The machine, then one line a check, with the command that mends it."""
    machine = found["machine"]
    out.print(f"{machine['cpu_model']}: {machine['physical_cores']} cores ({machine['usable_cores']} usable), "
              f"{', '.join(machine['isas']) or 'no known instruction set'}", soft_wrap=True)  # fmt: skip
    out.print(f"RAM {bytes_text(machine['ram_total_bytes'])}, {bytes_text(machine['ram_available_bytes'])} available; "
              f"disk {bytes_text(machine['disk_free_bytes'])} free", soft_wrap=True)  # fmt: skip
    for check in found["checks"]:
        out.print(f"{check['state']:<8} {check['name']:<18} {check['detail']}", soft_wrap=True)
        if check["mend"]:
            out.print(f"{'':<28}hint: {check['mend']}", soft_wrap=True, markup=False)
    if "measured" in found:
        _show_measured(found["measured"])


def _show_measured(figures: Mapping[str, Any]) -> None:
    """Speeds that were measured, and where they are kept."""
    disk = figures["disk_bytes_per_s"]
    rows = (
        ("memory read", f"{figures['read_bytes_per_s'] / 1e9:,.1f} GB/s"),
        ("float32", f"{figures['float32_flops_per_s'] / 1e9:,.0f} GFLOP/s"),
        ("int8", f"{figures['int8_ops_per_s'] / 1e9:,.0f} Gop/s"),
        ("FP8 weights", f"{figures['float_product_flops_per_s'] / 1e9:,.0f} GFLOP/s, float32 activations"),
        ("FP8, as deployed", f"{figures['fp8_product_flops_per_s'] / 1e9:,.0f} GFLOP/s"),
        ("MXFP4 experts", f"{figures['int8_product_ops_per_s'] / 1e9:,.0f} Gop/s, rounded activations"),
        ("attention", f"{figures['attention_ops_per_s'] / 1e9:,.0f} Gop/s, V4's rows and heads"),
        ("index scores", f"{figures['index_ops_per_s'] / 1e9:,.0f} Gop/s"),
        ("disk read", "n/a" if disk is None else f"{disk / 1e9:,.2f} GB/s"),
        ("a layer", f"{1e6 * figures['layer_floor_s']:,.0f} µs beyond these in each step"),
        ("a token", f"{1e6 * figures['token_floor_s']:,.2f} µs a layer and 1,000 channels in long steps"),
        (
            "an index key",
            f"{1e9 * figures['key_floor_s']:,.2f} ns a query, {1e9 * figures['key_tile_s']:,.2f} ns a tile of queries",
        ),
    )
    out.print(f"measured with {figures['threads']} threads, kept in {figures['kept_in']}", soft_wrap=True)
    for name, value in rows:
        out.print(f"{'':<9}{name:<17}{value}", soft_wrap=True)


def show_written(found: Mapping[str, Any]) -> None:
    out.print(f"wrote {found['tensors']:,} tensors, {bytes_text(found['bytes'])}, to {found['folder']}", soft_wrap=True)


@contextmanager
def writing(*, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar for bytes written, of bytes to write."""
    if quiet:
        yield None
        return
    columns = (TextColumn("writing"), BarColumn(bar_width=30), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=talk)
    task = bar.add_task("writing", total=None)

    def show(done: int, total: int) -> None:
        bar.start()  # the first time only: what is refused before anything is written shows no bar
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
