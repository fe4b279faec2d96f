"""What works on this machine, what is missing, and the command that mends it. Speeds are `calibration`'s."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tenfold import _native, calibration, ops
from tenfold.errors import BackendMissing, TenfoldError
from tenfold.machine import Machine, this_machine
from tenfold.planner.machines import store_measured

__all__ = ["Check", "examine", "measure"]

_REQUIRED = ("torch", "numpy", "safetensors", "tokenizers", "deepseek-recipe", "huggingface_hub", "typer", "rich")
_EXTRAS = {"serve": ("starlette", "uvicorn", "llguidance"), "gpu": ("triton",), "test": ("pytest", "transformers")}


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: `state` is ok, missing (an optional part) or broken; `mend` is the command to run."""

    name: str
    state: str
    detail: str
    mend: str = ""


def examine(threads: int | None = None) -> dict[str, Any]:
    """The machine and all checks, as plain data. `threads`: as the engine would be told, or a UsageError."""
    machine = this_machine()
    kernels = _kernels()
    checks = [_python(), *_packages(), kernels, _threads(machine, threads), *_backends(machine, kernels)]
    return {"machine": asdict(machine), "checks": [asdict(check) for check in checks]}


def measure() -> dict[str, Any]:
    """This machine's speeds, measured now and kept for `tenfold plan`."""
    found = calibration.calibrate()
    return asdict(found) | {"kept_in": str(store_measured(found))}


def _python() -> Check:
    return Check("python", "ok", platform.python_version())


def _packages() -> list[Check]:
    checks = []
    for name in _REQUIRED:
        version = _version(name)
        mend = "" if version else "pip install -c constraints.txt -e ."
        checks.append(Check(name, "ok" if version else "broken", version or "not installed", mend))
    for extra, names in _EXTRAS.items():
        absent = [name for name in names if _version(name) is None]
        detail = f"without {', '.join(absent)}" if absent else ", ".join(f"{n} {_version(n)}" for n in names)
        mend = f"pip install -c constraints.txt -e '.[{extra}]'" if absent else ""
        checks.append(Check(f"extra {extra}", "missing" if absent else "ok", detail, mend))
    return checks


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernels() -> Check:
    """The native library: built, loadable, and the instruction set it would use."""
    try:
        chosen, available = _native.isa(), _native.available_isas()
    except TenfoldError as exc:
        return Check("native kernels", "broken", str(exc), "pip install -e .")
    return Check("native kernels", "ok", f"{chosen} (this machine can run {', '.join(available)})")


def _threads(machine: Machine, wanted: int | None) -> Check:
    """What the engine would compute with."""
    cores = f"{machine.physical_cores} physical and {machine.logical_cores} logical cores"
    return Check("threads", "ok", f"{machine.threads(wanted)} ({cores}, {machine.usable_cores} for this process)")


def _backends(machine: Machine, kernels: Check) -> list[Check]:
    gpus = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU found"
    built = kernels.state == "ok"
    return [
        Check(
            "backend cpu",
            kernels.state,
            "the native kernels; what `auto` chooses; deployed numerics: rounded activations" if built else "not built",
        ),
        Check("backend reference", "ok", "plain torch, float32" + ("" if built else "; what `auto` chooses")),
        _triton(gpus),
        *_accelerators(),
    ]


def _accelerators() -> list[Check]:
    """Kernels of others that may take the place of the GPU backend's: which are here, and what becomes of them."""
    if _version("triton") is None:
        return []
    from tenfold.ops.triton.accelerators import ACCELERATORS

    checks = []
    for one in ACCELERATORS:
        if one.version is None:
            detail = f"not installed, and nothing needs it ({one.purpose})"
        else:
            detail = f"{one.version}, {one.purpose}: {f'not used, {one.why_not}' if one.why_not else _tried()}"
        checks.append(Check(f"accelerator {one.package}", "ok", detail))
    return checks


def _tried() -> str:
    """The verdict on this machine's GPU, where there is one."""
    if not torch.cuda.is_available():
        return "tried on a GPU when a V3.2 model is loaded, and used only if right and faster there"
    from tenfold.ops.triton.accelerators import try_attention

    verdict, _ = try_attention(torch.device("cuda"), 128)
    return f"{'used' if verdict.taken else 'not used'}: {verdict.why}"


def _triton(gpus: str) -> Check:
    """Whether the GPU kernels would run, on a GPU or in Triton's interpreter."""
    try:
        ops.select("triton", exact=True)
    except BackendMissing as exc:
        return Check("backend triton", "missing", f"{exc} ({gpus})")
    return Check("backend triton", "ok", f"Triton kernels, {importlib.metadata.version('triton')}; {gpus}")
