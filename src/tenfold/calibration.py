"""This machine's figures for `tenfold plan`, from a few seconds of measuring: peaks, disk, and what no peak tells.

The fixed costs are fitted to the embedded model: what its steps take beyond the planner's roofline is a cost of each
layer (calls, threads) and of each token (norms, packing, mixing); its few index heads show the cost of a key.
Knows nothing of how plans are made.
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
from tenfold import config as configuration
from tenfold.config import ModelConfig
from tenfold.engine import Engine, Session
from tenfold.formats import FP8_BLOCK, MXFP4, index_key_fp4, kv_row_v4
from tenfold.machine import anonymous_bytes, this_machine
from tenfold.ops import Rows, Weight, cpu, cpu_linear
from tenfold.planner import roofline_seconds, step_work
from tenfold.planner.anatomy import dissect
from tenfold.planner.clocks import index_tile, residual_channels
from tenfold.planner.machines import Measured, measured_path

__all__ = ["calibrate"]

_MODEL = "tiny-v4-flash"
_CONTEXT, _DECODES, _CHUNKS, _CHUNK_TOKENS = 1024, 1000, 5, 2048  # over seconds: neighbours come and go
_WIDTH, _ROWS = 2048, 512
_KEYS, _QUERIES, _KEY_TILE, _CALLS = 1 << 18, 512, 1 << 12, 7  # tiles of queries enough to end together
_INDEX_HEADS, _INDEX_DIM, _INDEX_TOPK = 64, 128, 512  # V4's own
_HEADS, _HEAD_DIM, _ROPE_DIM, _SEEN, _SEEING = 64, 512, 64, 640, 64  # V4-Flash's rows, and queries of a tile
_LEAST_S = 0.5
_DISK_BYTES, _DISK_BLOCK = 1 << 28, 1 << 22


def calibrate() -> Measured:
    """Measures with the kernels and threads that engines use; raises BackendMissing where there are no kernels."""
    found = peaks.measure()
    measured = Measured(
        read_bytes_per_s=found.read_bytes_per_s,
        float32_flops_per_s=found.float32_flops_per_s,
        int8_ops_per_s=found.int8_ops_per_s,
        float_product_flops_per_s=_product_flops_per_s(rounded=False),
        fp8_product_flops_per_s=_product_flops_per_s(rounded=True),
        int8_product_ops_per_s=_int8_product_ops_per_s(),
        attention_ops_per_s=_attention_ops_per_s(),
        index_ops_per_s=0.0,
        disk_bytes_per_s=_disk_bytes_per_s(measured_path().parent),
        layer_floor_s=0.0,
        token_floor_s=0.0,
        key_floor_s=0.0,
        key_tile_s=0.0,
        base_bytes=0,
        cpu_model=this_machine().cpu_model,
        threads=_native.num_threads(),
        measured_on=datetime.date.today().isoformat(),
    )
    return _with_floors(_with_index(measured, configuration.load(_MODEL)))


def _with_floors(measured: Measured) -> Measured:
    """Fits the two fixed costs: single steps give the layer's, long steps what is left for each token."""
    engine = Engine.load(_MODEL, backend="cpu")
    base_bytes = anonymous_bytes()
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
    token_s = statistics.median(rests)
    return replace(measured, layer_floor_s=max(0.0, layer_s), token_floor_s=max(0.0, token_s), base_bytes=base_bytes)


def _product_flops_per_s(rounded: bool) -> float:
    """Many rows times FP8 weights, activations float32 or as deployed numerics have them."""
    codes = torch.randint(0x08, 0x70, (_WIDTH, _WIDTH), dtype=torch.uint8)  # no code is NaN or subnormal
    weight = Weight(
        "probe", (_WIDTH, _WIDTH), FP8_BLOCK, codes, torch.full((_WIDTH // 128,) * 2, 127, dtype=torch.uint8)
    )
    x = torch.randn(_ROWS, _WIDTH)
    return 2 * _ROWS * _WIDTH**2 / _median_s(lambda: cpu_linear.linear(x, weight, rounded=rounded))


def _int8_product_ops_per_s() -> float:
    """Many rows through one expert in MXFP4, activations int8."""
    scale = torch.full((_WIDTH, _WIDTH // 32), 127, dtype=torch.uint8)
    codes = [torch.randint(0, 256, (_WIDTH, _WIDTH // 2), dtype=torch.uint8) for _ in range(3)]
    w1, w2, w3 = (Weight("probe", (_WIDTH, _WIDTH), MXFP4, code.view(torch.int8), scale) for code in codes)
    x = torch.randn(_ROWS, _WIDTH)
    return 6 * _ROWS * _WIDTH**2 / _median_s(lambda: cpu_linear.feed_forward(x, w1, w2, w3, None, rounded=True))


def _attention_ops_per_s() -> float:
    """Many queries, each to rows of its own."""
    layout, generator = kv_row_v4(_HEAD_DIM, _ROPE_DIM), torch.Generator().manual_seed(0)
    rows = cpu.pack_rows(torch.randn(_KEY_TILE, _HEAD_DIM, generator=generator), layout)
    chosen = [torch.randperm(_KEY_TILE, generator=generator)[:_SEEN].sort().values for _ in range(_SEEING)]
    q = torch.randn(_SEEING, _HEADS, _HEAD_DIM, generator=generator)
    source = Rows(rows, layout, index=torch.stack(chosen).int())
    operations = 4 * _SEEING * _HEADS * _SEEN * _HEAD_DIM
    return operations / _median_s(lambda: cpu.sparse_attention(q, [source], None, _HEAD_DIM**-0.5, _HEAD_DIM, 0))


def _with_index(measured: Measured, config: ModelConfig) -> Measured:
    """Three unknowns from three times of a query and a key: with V4's many heads, with the embedded model's few, and
    with one query alone, for which a key is unpacked every time."""
    heads, dim, topk = config.index_n_heads, config.index_head_dim, config.index_topk
    queries, keys = _QUERIES // 4, _KEYS // 4  # so many that choosing the best is little beside scores
    many_s = _select_s(queries, keys, _INDEX_HEADS, _INDEX_DIM, _INDEX_TOPK) / (queries * keys)
    few_s = _select_s(_QUERIES, _KEYS, heads, dim, topk) / (_QUERIES * _KEYS)
    alone_s = _select_s(1, _KEYS, heads, dim, topk) / _KEYS
    shared_by_few = index_tile(_QUERIES, heads, measured.threads)
    shared_by_many = index_tile(queries, _INDEX_HEADS, measured.threads)
    tile_s = max(0.0, (alone_s - few_s) / (1 - 1 / shared_by_few)) if shared_by_few > 1 else 0.0
    many, few = 2 * _INDEX_HEADS * _INDEX_DIM, 2 * heads * dim
    of_more_heads_s = many_s - tile_s / shared_by_many - (few_s - tile_s / shared_by_few)
    ops_per_s = (many - few) / max(of_more_heads_s, many_s / many)
    floor_s = max(0.0, few_s - few / ops_per_s - tile_s / shared_by_few)
    return replace(measured, index_ops_per_s=ops_per_s, key_floor_s=floor_s, key_tile_s=tile_s)


def _select_s(queries: int, num_keys: int, heads: int, dim: int, topk: int) -> float:
    """Seconds to choose the best of many random keys."""
    layout, generator = index_key_fp4(dim), torch.Generator().manual_seed(0)
    starts = range(0, num_keys, _KEY_TILE)
    keys = torch.cat([cpu.pack_rows(torch.randn(_KEY_TILE, dim, generator=generator), layout) for _ in starts])
    packed = cpu.pack_rows(torch.randn(queries, heads, dim, generator=generator), layout)
    q, weights = cpu.unpack_rows(packed, layout), torch.ones(queries, heads)
    visible = torch.full((queries,), num_keys)
    return _median_s(lambda: cpu.select_rows(q, weights, keys, layout, visible, topk))


def _median_s(run: Callable[[], object]) -> float:
    """At least seven calls and half a second: a neighbour's burst is no median."""
    run()
    found: list[float] = []
    while len(found) < _CALLS or sum(found) < _LEAST_S:
        found.append(_seconds(run))
    return statistics.median(found)


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
