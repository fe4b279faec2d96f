"""How the disk store looks on a terminal. Decides nothing and reads no store."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tenfold.terminal import bytes_text, duration_text, out, table

__all__ = ["show_context", "show_contexts", "show_moved", "show_pruned", "show_verified"]


def show_contexts(found: Mapping[str, Any]) -> None:
    """The table of `tenfold store list`."""
    rows = [
        (
            row["id"],
            row["model"],
            f"{row['tokens']:,}",
            bytes_text(row["bytes"]),
            str(row["points"]),
            f"{duration_text(max(0.0, time.time() - row['used_s']))} ago",
            str(row["hits"]),
        )
        for row in found["contexts"]
    ]
    columns = ("id", "model", "tokens", "bytes", "restore points", "last used", "hits")
    out.print(table(f"{found['store']}: {bytes_text(found['bytes'])}, shared text stored once", columns, rows))


def show_context(found: Mapping[str, Any]) -> None:
    """One context: its segments, then its restore points."""
    out.print(f"{found['key']}\nmodel {found['model']}, {found['tokens']:,} tokens, {bytes_text(found['bytes'])}, "
              f"used {found['hits']} times", soft_wrap=True, markup=False)  # fmt: skip
    segments = [
        (row["key"][:12], f"{row['start']:,}", f"{row['stop']:,}", bytes_text(row["bytes"]), str(row["hits"]))
        for row in found["segments"]
    ]
    out.print(table("Segments", ("segment", "from token", "to token", "bytes", "hits"), segments))
    points = [(row["kind"], f"{row['position']:,}", bytes_text(row["bytes"])) for row in found["restore_points"]]
    out.print(table("Restore points", ("kind", "after token", "bytes"), points))


def show_verified(found: Mapping[str, Any]) -> None:
    out.print(f"{found['files']:,} files, {bytes_text(found['bytes'])} read: {len(found['damaged'])} damaged or "
              f"missing and dropped, {found['adopted']} taken into the index", soft_wrap=True)  # fmt: skip
    for row in found["damaged"]:
        out.print(f"{row['file']}: {row['problem']}", soft_wrap=True, markup=False)


def show_pruned(found: Mapping[str, Any]) -> None:
    out.print(f"removed {found['segments']:,} segments, {bytes_text(found['bytes'])}; "
              f"{bytes_text(found['bytes_left'])} left", soft_wrap=True)  # fmt: skip


def show_moved(found: Mapping[str, Any]) -> None:
    """One line about an export or an import."""
    facts = [f"{value:,} {name}" for name, value in found.items() if name in ("segments", "points", "tokens", "files")]
    size = [bytes_text(found["bytes"])] if "bytes" in found else []
    out.print(f"{found['file']}: {', '.join(facts + size)}", soft_wrap=True, markup=False)
