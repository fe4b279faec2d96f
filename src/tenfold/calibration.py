"""This machine's figures for `tenfold plan`, from a few seconds of measuring: peaks, disk, and what no peak tells.

The fixed costs are fitted to the embedded model: what its steps take beyond the planner's roofline is a cost of each
layer (calls, threads) and of each token (norms, packing, mixing). Knows nothing of how plans are made.
"""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from tenfold import _native, peaks
from tenfold.config import ModelConfig
from tenfold.engine import Engine, Session
from tenfold.machine import this_machine
from tenfold.ops import cpu
from tenfold.planner import roofline_seconds, step_work
from tenfold.planner.anatomy import dissect
from tenfold.planner.clocks import residual_channels
from tenfold.planner.machines import Measured, measured_path

__all__ = ["calibrate"]

_MODEL = "tiny-v4-flash"
_CONTEXT, _DECODES, _CHUNKS, _CHUNK_TOKENS = 1024, 40, 3, 2048
_KEYS, _KEY_TILE, _CALLS = 1 << 18, 1 << 12, 9
_DISK_BYTES, _DISK_BLOCK = 1 << 28, 1 << 22


def calibrate() -> Measured:
    """Measures with the kernels and threads that engines use; raises BackendMissing where there are no kernels."""
    found = peaks.measure()
    measured = Measured(
        read_bytes_per_s=found.read_bytes_per_s,
        float32_flops_per_s=found.float32_flops_per_s,
        int8_ops_per_s=found.int8_ops_per_s,
        disk_bytes_per_s=_disk_bytes_per_s(measured_path().parent),
        layer_floor_s=0.0,
        token_floor_s=0.0,
        key_floor_s=0.0,
        cpu_model=this_machine().cpu_model,
        threads=_native.num_threads(),
        measured_on=datetime.date.today().isoformat(),
    )
    return _with_floors(measured)


def _with_floors(measured: Measured) -> Measured:
    """Fits the two fixed costs: single steps give the layer's, long steps what is left for each token."""
    engine = Engine.load(_MODEL, backend="cpu")
    anatomy, channels = dissect(engine.config), residual_channels(engine.config)
    session = engine.session()
    session.feed([2] * _CONTEXT)
    decode_s = statistics.median(_timed(session, 1) for _ in range(_DECODES))
    layer_s = (
        decode_s - roofline_seconds(step_work(engine.config, session.length, 1), measured.peaks)
    ) / anatomy.layers
    rests = []
    for _ in range(_CHUNKS):
        position = session.length
        took_s = _timed(session, _CHUNK_TOKENS)
        bound_s = roofline_seconds(step_work(engine.config, position, _CHUNK_TOKENS), measured.peaks)
        rests.append((took_s - bound_s - anatomy.layers * layer_s) / (_CHUNK_TOKENS * anatomy.layers * channels / 1000))
    token_s, key_s = statistics.median(rests), _key_floor_s(engine.config, measured)
    return replace(
        measured,
        layer_floor_s=max(0.0, layer_s),
        token_floor_s=max(0.0, token_s),
        key_floor_s=max(0.0, key_s),
    )


def _key_floor_s(config: ModelConfig, measured: Measured) -> float:
    """Seconds a key takes beyond its scores, from one query of the embedded model over many keys."""
    layout = next(spec.layout for spec in config.streams if spec.component == "index_keys")
    heads, dim = config.index_n_heads, config.index_head_dim
    generator = torch.Generator().manual_seed(0)
    tile = cpu.pack_rows(torch.randn(_KEY_TILE, dim, generator=generator), layout)
    keys = tile.repeat(_KEYS // _KEY_TILE, 1)
    query = cpu.unpack_rows(cpu.pack_rows(torch.randn(heads, dim, generator=generator), layout), layout)[None]
    weights, visible = torch.ones(1, heads), torch.tensor([_KEYS])
    took_s = statistics.median(
        _seconds(lambda: cpu.select_rows(query, weights, keys, layout, visible, config.index_topk))
        for _ in range(_CALLS)
    )
    bound_s = 2 * _KEYS * heads * dim / measured.int8_ops_per_s
    return (took_s - bound_s) / _KEYS


def _timed(session: Session, num_tokens: int) -> float:
    """Seconds of one pass of so many tokens."""
    ids = [3 + i % 500 for i in range(num_tokens)]
    return _seconds(lambda: session.engine.step({session: ids}))


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _disk_bytes_per_s(folder: Path) -> float | None:
    """Reading a file of 256 MiB that was dropped from the page cache; None where the system cannot drop it."""
    if not hasattr(os, "posix_fadvise"):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"disk-{os.getpid()}"
    try:
        with path.open("wb") as file:
            for _ in range(_DISK_BYTES // _DISK_BLOCK):
                file.write(os.urandom(_DISK_BLOCK))
            file.flush()
            os.fsync(file.fileno())
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            block = bytearray(_DISK_BLOCK)
            return _DISK_BYTES / _seconds(lambda: _read_all(file.readinto, block))
    finally:
        path.unlink(missing_ok=True)


def _read_all(readinto: Callable[[bytearray], int], block: bytearray) -> None:
    while readinto(block):
        pass
