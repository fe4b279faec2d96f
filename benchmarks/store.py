"""The disk store: a Flash-shaped context of 1,048,576 tokens written and restored, and writers killed.

    python benchmarks/store.py               write, restore, raw read, bytes on disk (3.5 GB, twice in RAM)
    python benchmarks/store.py --kills 200   kill -9 at random points: nothing corrupt, nothing finished lost

The context grows as a long conversation does: chunks of --chunk tokens with an automatic restore point after each, and
message ends at random places. Restores, into fresh memory, are cold (the page cache is dropped) and alternate with
raw reads of the same files into one buffer again and again, by one reader (`raw`) and by two (`raw_two`), as the
store has. Random rows.
Results: results/store.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runs import commit, machine_name
from torch import Tensor

from tenfold import config as configuration
from tenfold.config import StreamSpec
from tenfold.store import Store, Timeline

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "store.json"
MESSAGES = 24
PIECE_BYTES = 16 << 20
PAUSE_S = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build"), help="where the store is made, and removed again")
    parser.add_argument("--kills", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="store-", dir=options.folder))
    try:
        if options.kills:
            save("kills", kills(folder, options.kills))
        else:
            found = context(folder, options.tokens, options.chunk, options.repeats)
            save(f"context, chunks of {options.chunk}", found)
    finally:
        shutil.rmtree(folder)


def save(name: str, found: dict[str, Any]) -> None:
    found = {"commit": commit(), "machine": machine_name(), **found}
    print(json.dumps({name: found}, indent=1))
    every = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**every, name: found}, indent=1) + "\n", encoding="utf-8")


def kills(folder: Path, count: int) -> dict[str, Any]:
    """The tests' harness, as a program of its own: it forks, which nobody should who has threads."""
    command = [sys.executable, "-m", "tests.store.kills", str(folder.resolve()), str(count), "0"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def context(folder: Path, tokens: int, chunk: int, repeats: int) -> dict[str, Any]:
    config = configuration.preset("v4-flash")
    growing = {(spec.layer, spec.name): spec.layout.row_bytes for spec in config.streams if spec.ratio}
    timeline = Timeline("benchmark", "v4-flash", config.streams, growing)
    generator = np.random.default_rng(0)
    ids = generator.integers(0, config.vocab_size, tokens, np.int32)
    rows = {
        (spec.layer, spec.name): torch.from_numpy(
            generator.integers(0, 256, (spec.rows_at(tokens), spec.layout.row_bytes), np.uint8)
        )
        for spec in timeline.growing
    }
    ends = sorted({*generator.integers(1, tokens, MESSAGES - 1).tolist(), tokens})
    store = Store(folder / "store")
    began = time.perf_counter()
    points_s = write(store, timeline, ids, rows, ends, chunk)
    write_s = time.perf_counter() - began
    files = [path for path in (folder / "store").rglob("*") if path.is_file()]
    disk_bytes = sum(path.stat().st_size for path in files)
    live_bytes = sum(config.kv_bytes(tokens).values())
    found = {
        "tokens": tokens,
        "segments": len(store.index.segments()),
        "points": {kind: sum(row.kind == kind for row in store.index.points()) for kind in ("end", "auto")},
        "live_bytes": live_bytes,
        "disk_bytes": disk_bytes,
        "disk_to_live": round(disk_bytes / live_bytes, 4),
        "write_s": round(write_s, 2),
        "of_which_points_s": round(points_s, 2),
        "write_bytes_per_s": round(disk_bytes / write_s),
    }
    segments = [path for path in files if path.parent.parent.name == "segments"]
    return {**found, **reading(store, timeline, ids, rows, segments, repeats)}


def write(store: Store, timeline: Timeline, ids: Any, rows: dict[Any, Tensor], ends: list[int], chunk: int) -> float:
    """Chunk by chunk with a point after each; returns the seconds that points took."""
    chain, start, points_s = (), 0, 0.0
    for stop in sorted({*range(chunk, len(ids), chunk), *ends}):
        new = {
            (spec.layer, spec.name): rows[spec.layer, spec.name][spec.rows_at(start) : spec.rows_at(stop)]
            for spec in timeline.growing
        }
        chain = store.append(timeline, chain, ids[start:stop], new)
        assert chain[-1].stop == stop
        began = time.perf_counter()
        kind = "end" if stop in ends else "auto"
        store.add_point(timeline, chain, stop, fixed_at(timeline, stop), torch.randn(129280), kind)
        points_s += time.perf_counter() - began
        start = stop
    return points_s


def fixed_at(timeline: Timeline, position: int) -> dict[tuple[int, str], Tensor]:
    """Rings, and the live part of the compressors' state."""
    return {(spec.layer, spec.name): live(spec, position) for spec in timeline.streams if not spec.ratio}


def live(spec: StreamSpec, position: int) -> Tensor:
    if spec.component != "state":
        return torch.randint(0, 256, (spec.fixed_rows, spec.layout.row_bytes), dtype=torch.uint8)
    ratio = spec.fixed_rows // 2 if spec.overlap else spec.fixed_rows
    return torch.randn(position % ratio + ratio * spec.overlap, spec.layout.width)


def reading(
    store: Store, timeline: Timeline, ids: Any, rows: dict[Any, Tensor], segments: list[Path], repeats: int
) -> dict[str, Any]:
    """Cold reads in turns, each after the same pause: the disk of a rented machine saves up credit while it rests."""
    actions: dict[str, Callable[[], object]] = {
        "restore": lambda: restore(store, timeline, ids),
        "raw": lambda: read_raw(segments, 1),
        "raw_two": lambda: read_raw(segments, 2),
    }
    memory = restore(store, timeline, ids)
    assert all(torch.equal(memory[key], rows[key]) for key in rows)
    memory.clear()
    rows.clear()
    times: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    for turn in range(repeats * len(names)):
        name = names[(turn + turn // len(names)) % len(names)]  # each comes first, second and third as often
        forget(segments)
        time.sleep(PAUSE_S)
        began = time.perf_counter()
        actions[name]()
        times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    total = sum(path.stat().st_size for path in segments)
    return {
        "segment_bytes": total,
        **{f"{name}_s": round(value, 3) for name, value in medians.items()},
        "raw_bytes_per_s": round(total / medians["raw"]),
        "restore_to_raw": round(medians["restore"] / medians["raw"], 3),
        "restore_to_raw_two": round(medians["restore"] / medians["raw_two"], 3),
        "runs": {name: [round(value, 3) for value in values] for name, values in times.items()},
    }


def restore(store: Store, timeline: Timeline, ids: Any) -> dict[tuple[int, str], Tensor]:
    """Match and load into fresh memory."""
    memory: dict[tuple[int, str], Tensor] = {}

    def fresh(key: tuple[int, str], count: int) -> Tensor:
        return memory.setdefault(key, torch.empty(count, timeline.row_bytes[key], dtype=torch.uint8))

    match = store.match(timeline, ids)
    store.load(timeline, match, fresh)
    assert match.position == len(ids)
    return memory


def forget(files: list[Path]) -> None:
    """Drops the files from the page cache."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("1\n", encoding="ascii")


def read_raw(files: list[Path], readers: int) -> int:
    """Reads the files in pieces into one buffer a reader; returns the bytes."""
    with ThreadPoolExecutor(readers) as pool:
        return sum(pool.map(lambda first: sum(map(_reader(), files[first::readers])), range(readers)))


def _reader() -> Callable[[Path], int]:
    buffer = memoryview(bytearray(PIECE_BYTES))

    def read(path: Path) -> int:
        count = 0
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                count += got
        return count

    return read


if __name__ == "__main__":
    main()
