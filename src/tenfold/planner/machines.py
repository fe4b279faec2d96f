"""Machines as data: well-known ones from a file with its sources, and this one from its own measurements.

Knows peaks and prices per hour; nothing of models. Measuring is `measure.py`'s part, which needs torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from tenfold.errors import UsageError
from tenfold.machine import this_machine
from tenfold.planner.anatomy import Precision
from tenfold.planner.work import Peaks

__all__ = ["HERE", "Hardware", "Measured", "find", "known", "measured", "measured_path", "store_measured"]

_FLOAT_PRECISIONS: tuple[Precision, ...] = ("bf16", "f32")

HERE = "this"
"""The name under which this machine is asked for."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device: memory, dense peaks, what an hour costs. None is n/a; `kind` cpu runs tenfold's own kernels."""

    name: str
    kind: Literal["gpu", "unified", "cpu", "this"]
    memory_bytes: float
    read_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float | None
    fp4_flops: float | None
    disk_bytes_per_s: float | None
    watts: float | None
    usd_per_hour: float | None
    usd_per_hour_owned: float | None
    source: str

    @property
    def is_measured(self) -> bool:
        """Whether times can be told: data sheets tell all rates, this machine none before its measurement."""
        return self.read_bytes_per_s > 0

    def peak(self, precision: Precision) -> float:
        """FLOPs a second of a precision; where its units are missing the next wider one serves."""
        fp8 = self.fp8_flops or self.bf16_flops
        if precision == "fp4":
            return self.fp4_flops or fp8
        return fp8 if precision in ("fp8", "fp4xfp8") else self.bf16_flops


@dataclass(frozen=True, slots=True)
class Measured:
    """What `tenfold doctor --measure` found here: peaks, what kernels reach, and costs that no component counts.

    The kernels are FP8 weights with float32 activations (`float_product_flops_per_s`, which attention to float32 rows
    reaches too) and with those of deployed numerics (`fp8_product_flops_per_s`), experts in MXFP4 with int8 ones,
    attention of many heads to V4's rows, fp4 index scores.
    `layer_floor_s` is a layer's fixed cost in a step, `token_floor_s` what each token of a long step adds in a layer
    for every 1,000 channels of its residual streams (norms, packing, mixing). Beyond its scores with all heads, an
    index key takes `key_floor_s` of each query, and `key_tile_s` of each tile of queries that share it once unpacked.
    `base_bytes` is the process with an engine and no session.
    """

    read_bytes_per_s: float
    float32_flops_per_s: float
    int8_ops_per_s: float
    float_product_flops_per_s: float
    fp8_product_flops_per_s: float
    int8_product_ops_per_s: float
    attention_ops_per_s: float
    index_ops_per_s: float
    disk_bytes_per_s: float | None
    layer_floor_s: float
    token_floor_s: float
    key_floor_s: float
    key_tile_s: float
    base_bytes: int
    cpu_model: str
    threads: int
    measured_on: str

    @property
    def peaks(self) -> Peaks:
        """With the rates that kernels reach; experts in MXFP4 and fp4 index keys are multiplied as integers."""
        achieved: dict[Precision, float] = {
            **dict.fromkeys(_FLOAT_PRECISIONS, self.float_product_flops_per_s),
            "fp8": self.fp8_product_flops_per_s,
            "fp4xfp8": self.int8_product_ops_per_s,
            "fp8rows": self.attention_ops_per_s,
            "fp4": self.index_ops_per_s,
        }
        return Peaks(self.read_bytes_per_s, self.float32_flops_per_s, self.int8_ops_per_s, achieved=achieved)


@cache
def known() -> dict[str, Hardware]:
    """The machines of the data file by name."""
    text = resources.files("tenfold").joinpath("planner", "data", "machines.json").read_text(encoding="utf-8")
    return {entry["name"]: Hardware(**entry) for entry in json.loads(text)["machines"]}


def find(name: str) -> Hardware:
    """The machine of this name; `this` is the one at hand, its rates 0 until they were measured."""
    if name == HERE:
        return _here()
    lowered = {known_name.lower(): hardware for known_name, hardware in known().items()}
    key = name.lower().replace(" ", "-").replace("_", "-")
    if key in lowered:
        return lowered[key]
    near = difflib.get_close_matches(key, [*lowered, HERE], 1, cutoff=0.5)
    hint = f"; did you mean {lowered[near[0]].name if near[0] in lowered else HERE}?" if near else ""
    raise UsageError(f"unknown machine {name!r}{hint} Known are {HERE}, {', '.join(known())}")


def _here() -> Hardware:
    machine, found = this_machine(), measured()
    return Hardware(
        name=found.cpu_model if found else machine.cpu_model,
        kind="this",
        memory_bytes=machine.ram_available_bytes,
        read_bytes_per_s=found.read_bytes_per_s if found else 0.0,
        bf16_flops=found.float32_flops_per_s if found else 0.0,
        fp8_flops=None,
        fp4_flops=found.int8_ops_per_s if found else None,
        disk_bytes_per_s=found.disk_bytes_per_s if found else None,
        watts=None,
        usd_per_hour=None,
        usd_per_hour_owned=None,
        source=f"measured here on {found.measured_on} with {found.threads} threads" if found else "not measured yet",
    )


def measured_path() -> Path:
    """Where this machine's figures are kept: the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "tenfold" / "machine.json"


def measured() -> Measured | None:
    """This machine's figures; None before the first measurement or where the file is of another version."""
    try:
        raw: dict[str, Any] = json.loads(measured_path().read_text(encoding="utf-8"))
        return Measured(**raw)
    except (OSError, ValueError, TypeError):
        return None


def store_measured(found: Measured) -> Path:
    """Keeps figures for later plans; the file appears whole or not at all."""
    path = measured_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path
