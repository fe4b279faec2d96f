"""What this machine has: cores, instruction sets, memory, disk, GPUs. Imports no torch, measures no speed.

On Linux everything comes from /proc, /sys and the limits of the control group (version 1 or 2) this process
runs in, so a container sees its own share. Elsewhere (macOS) the operating system gives the numbers of cores
and the memory in total; what cannot be asked there keeps the widest value: physical cores = logical cores,
available memory = total memory, no instruction sets.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tenfold.errors import UsageError

__all__ = [
    "Gpu",
    "Machine",
    "anonymous_bytes",
    "cache_folder",
    "parse_bytes",
    "peak_bytes",
    "restart_peak",
    "shrink_heap",
    "this_machine",
    "tidy_heap",
]

_ROOT = Path("/")
_GPU_TIMEOUT_S = 2.0
_MIB = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_OWN_PAGES_BYTES = 2 << 20
# The words of /proc/cpuinfo that kernels are or may be written for.
_AVX_WORDS = ("sse2", "avx", "avx2", "fma", "f16c", "avx_vnni")
_AVX512_WORDS = ("avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
_ARM_WORDS = ("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2")


def parse_bytes(text: str | int, what: str = "memory") -> int:
    """Bytes from "12G", "512M" or a number; K, M, G and T are powers of 1024. An error calls it `what`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(text).strip(), re.IGNORECASE)
    if match is None or float(match.group(1)) <= 0:
        raise UsageError(f"{what} is {text!r}, expected a positive size such as 12G or 512M")
    return int(float(match.group(1)) * 1024 ** " KMGT".index(match.group(2).upper() or " "))


def cache_folder() -> Path:
    """Where programs keep what they can make again for this user."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "tenfold"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as its driver describes it; a value the driver does not tell is None."""

    name: str
    memory_total_bytes: int | None
    memory_free_bytes: int | None
    compute_capability: str | None


@dataclass(frozen=True, slots=True)
class Machine:
    """The hardware within this process's limits; `usable_cores` honours affinity and the CPU quota."""

    cpu_model: str
    physical_cores: int
    logical_cores: int
    usable_cores: int
    isas: tuple[str, ...]
    ram_total_bytes: int
    ram_available_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...]

    def threads(self, wanted: int | None = None) -> int:
        """`wanted` if this machine has so many logical cores, else a UsageError; by default the physical cores it may
        use, since hyper-threads share what the kernels need."""
        if wanted is None:
            return min(self.physical_cores, self.usable_cores)
        if not 1 <= wanted <= self.logical_cores:
            raise UsageError(f"threads is {wanted}, expected 1 to {self.logical_cores} on this machine")
        return wanted


def this_machine(path: Path = Path(), *, root: Path = _ROOT) -> Machine:
    """The machine this process runs on; `path` says whose disk to ask, `root` where /proc and /sys hang."""
    cpuinfo = _read_fields(root / "proc/cpuinfo")
    ram_total_bytes, ram_available_bytes = _ram_bytes(root)
    logical_cores = _logical_cores(root)
    return Machine(
        cpu_model=cpuinfo.get("model name") or platform.processor() or platform.machine() or "unknown",
        physical_cores=_physical_cores(root) or logical_cores,
        logical_cores=logical_cores,
        usable_cores=_usable_cores(root, logical_cores),
        isas=_isas(cpuinfo),
        ram_total_bytes=ram_total_bytes,
        ram_available_bytes=ram_available_bytes,
        disk_free_bytes=_disk_free_bytes(path),
        gpus=_gpus(),
    )


def anonymous_bytes(*, root: Path = _ROOT) -> int:
    """Memory of this process that is its own: what is resident less the pages of mapped files; 0 where unknown."""
    fields = _read_fields(root / "proc/self/status")
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem") if name in fields)


def tidy_heap() -> None:
    """From now on large blocks go back to the system when they are freed.

    glibc lets the size from which they do rise to 32 MiB by what it sees, and what lies between small blocks that stay
    is then never given back: a chunk of a full-width V4-Flash took 2.4 times what was in use. Without glibc nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _OWN_PAGES_BYTES)


def shrink_heap() -> None:
    """What is free between small blocks goes back to the system too: a few milliseconds, for seconds of work."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def restart_peak(*, root: Path = _ROOT) -> bool:
    """Lets `peak_bytes` begin anew at what is resident now; False where the system cannot do that."""
    try:
        (root / "proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_bytes(*, root: Path = _ROOT) -> int | None:
    """The most memory of this process that was ever resident, pages of mapped files included; None where unknown."""
    value = _read_fields(root / "proc/self/status").get("VmHWM")
    return None if value is None else _kib(value)


def _read_fields(path: Path) -> dict[str, str]:
    """`key: value` lines as a dictionary, the first of each key; empty where the file is missing."""
    fields: dict[str, str] = {}
    for line in _read(path).splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_int(path: Path) -> int | None:
    """The number in a one-number file; None where there is no file or no number ("max")."""
    text = _read(path).strip()
    return int(text) if text.removeprefix("-").isdigit() else None


def _isas(cpuinfo: dict[str, str]) -> tuple[str, ...]:
    words = (cpuinfo.get("flags") or cpuinfo.get("Features", "")).split()
    return tuple(word for word in _AVX_WORDS + _AVX512_WORDS + _ARM_WORDS if word in words)


def _logical_cores(root: Path) -> int:
    listed = [line for line in _read(root / "proc/cpuinfo").splitlines() if line.startswith("processor")]
    return len(listed) or os.cpu_count() or 1


def _physical_cores(root: Path) -> int:
    """How many groups of hyper-thread siblings /sys lists; 0 where it lists none."""
    cpus = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    return len({_read(siblings).strip() for siblings in cpus})


def _usable_cores(root: Path, logical_cores: int) -> int:
    limits = [logical_cores]
    if root == _ROOT and hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    for group in _cgroup_folders(root, "cpu"):
        quota_us, period_us = _cpu_quota_us(group)
        if quota_us is not None and quota_us > 0 and period_us:
            limits.append(math.ceil(quota_us / period_us))
    return max(1, min(limits))


def _cpu_quota_us(group: Path) -> tuple[int | None, int | None]:
    """(quota, period) of one control group, version 2 or 1; a quota that is None or negative is no limit."""
    words = _read(group / "cpu.max").split()
    if len(words) == 2:
        return (int(words[0]) if words[0].isdigit() else None), int(words[1])
    return _read_int(group / "cpu.cfs_quota_us"), _read_int(group / "cpu.cfs_period_us")


def _ram_bytes(root: Path) -> tuple[int, int]:
    """(total, available): the machine's memory, cut down to what every control group above us leaves."""
    meminfo = _read_fields(root / "proc/meminfo")
    if "MemTotal" not in meminfo:
        total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total_bytes, total_bytes
    total_bytes = _kib(meminfo["MemTotal"])
    available_bytes = _kib(meminfo.get("MemAvailable") or meminfo["MemFree"])
    for group in _cgroup_folders(root, "memory"):
        limit_bytes, used_bytes = _memory_limit_bytes(group)
        if limit_bytes is not None:
            total_bytes = min(total_bytes, limit_bytes)
            available_bytes = min(available_bytes, max(0, limit_bytes - used_bytes))
    return total_bytes, available_bytes


def _kib(value: str) -> int:
    return int(value.split()[0]) * 1024


def _memory_limit_bytes(group: Path) -> tuple[int | None, int]:
    """(limit, used) of one control group; file pages that would be dropped first do not count as used."""
    v2 = (group / "memory.max").exists()
    limit_bytes = _read_int(group / ("memory.max" if v2 else "memory.limit_in_bytes"))
    used_bytes = _read_int(group / ("memory.current" if v2 else "memory.usage_in_bytes")) or 0
    stat = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines() if " " in line)
    droppable_bytes = int(stat.get("inactive_file" if v2 else "total_inactive_file", "0"))
    return limit_bytes, max(0, used_bytes - droppable_bytes)


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """This process's control group and every one above it, in both hierarchies.

    Inside a container the path in /proc/self/cgroup may be the host's and not exist here; its parents are
    tried up to the mount point, which is then the container's own group.
    """
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            bases = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            bases = [mount / controllers, mount / controller]
        else:
            continue
        for base in dict.fromkeys(bases):
            group = base / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(base))


def _disk_free_bytes(path: Path) -> int:
    """Free space on the disk of `path`, or of its nearest parent that exists."""
    existing = next(folder for folder in (path.resolve(), *path.resolve().parents) if os.path.exists(folder))
    return shutil.disk_usage(existing).free


def _gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that nvidia-smi lists within two seconds; none where it is absent, hangs or fails."""
    query = "--query-gpu=name,memory.total,memory.free,compute_cap"
    try:
        answer = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_GPU_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = (line.rsplit(",", 3) for line in answer.stdout.splitlines())
    return tuple(_gpu(*(field.strip() for field in row)) for row in rows if len(row) == 4)


def _gpu(name: str, total_mib: str, free_mib: str, compute_capability: str) -> Gpu:
    """One line of nvidia-smi; "[N/A]" (memory shared with the CPU) and the like become None."""
    total_bytes = int(total_mib) * _MIB if total_mib.isdigit() else None
    free_bytes = int(free_mib) * _MIB if free_mib.isdigit() else None
    capability = compute_capability if compute_capability[:1].isdigit() else None
    return Gpu(name, total_bytes, free_bytes, capability)
