"""The machine as read from made-up /proc, /sys and control groups; nvidia-smi as a made-up program."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from tenfold import machine
from tenfold.errors import UsageError
from tenfold.machine import Gpu, this_machine

GIB = 1 << 30

X86_CPU = "processor\t: {i}\nmodel name\t: Example CPU\nflags\t\t: fpu sse2 avx avx2 fma f16c avx512f\n\n"
ARM_CPU = "processor\t: {i}\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp i8mm\nCPU part\t: 0xd40\n\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(autouse=True)
def _no_real_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight logical cores on four physical ones, 64 GiB of which 48 are available, no control group."""
    root = tmp_path / "root"
    write(root / "proc/cpuinfo", "".join(X86_CPU.format(i=i) for i in range(8)))
    write(
        root / "proc/meminfo",
        f"MemTotal:       {64 << 20} kB\nMemFree:  {10 << 20} kB\nMemAvailable:   {48 << 20} kB\n",
    )
    for i in range(8):
        siblings = f"{i % 4},{i % 4 + 4}\n"
        write(root / f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list", siblings)
    return root


def test_a_machine_without_limits(root: Path, tmp_path: Path) -> None:
    found = this_machine(tmp_path, root=root)
    assert found.cpu_model == "Example CPU"
    assert (found.physical_cores, found.logical_cores, found.usable_cores) == (4, 8, 8)
    assert found.isas == ("sse2", "avx", "avx2", "fma", "f16c", "avx512f")
    assert (found.ram_total_bytes, found.ram_available_bytes) == (64 * GIB, 48 * GIB)
    assert found.gpus == ()


def test_an_arm_machine_without_a_model_name(root: Path) -> None:
    write(root / "proc/cpuinfo", "".join(ARM_CPU.format(i=i) for i in range(2)))
    found = this_machine(root=root)
    assert found.isas == ("asimd", "asimddp", "i8mm")
    assert found.logical_cores == 2
    assert found.cpu_model


def test_a_machine_without_topology_counts_logical_cores(tmp_path: Path) -> None:
    root = tmp_path / "bare"
    write(root / "proc/cpuinfo", X86_CPU.format(i=0) * 3)
    write(root / "proc/meminfo", "MemTotal: 1024 kB\nMemFree: 512 kB\n")
    found = this_machine(root=root)
    assert (found.physical_cores, found.logical_cores) == (3, 3)
    assert found.ram_available_bytes == 512 * 1024


def test_without_proc_the_operating_system_is_asked(tmp_path: Path) -> None:
    found = this_machine(root=tmp_path / "nothing")
    assert found.logical_cores == found.physical_cores == os.cpu_count()
    assert found.ram_total_bytes == found.ram_available_bytes > 0
    assert found.isas == ()


def test_cgroup_v2_limits_of_the_group_and_of_those_above(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/slice/job\n")
    group = root / "sys/fs/cgroup/slice/job"
    write(group / "memory.max", "max\n")
    write(group / "memory.current", f"{3 * GIB}\n")
    write(group / "cpu.max", "250000 100000\n")
    write(group.parent / "memory.max", f"{16 * GIB}\n")
    write(group.parent / "memory.current", f"{6 * GIB}\n")
    write(group.parent / "memory.stat", f"anon {1 * GIB}\ninactive_file {2 * GIB}\n")
    write(group.parent / "cpu.max", "max 100000\n")
    found = this_machine(root=root)
    assert (found.ram_total_bytes, found.ram_available_bytes) == (16 * GIB, 12 * GIB)
    assert (found.logical_cores, found.usable_cores) == (8, 3)


def test_cgroup_v2_inside_a_container(root: Path) -> None:
    """The path is the host's; the container's own limits stand at the mount point."""
    write(root / "proc/self/cgroup", "0::/docker/0123456789abcdef\n")
    write(root / "sys/fs/cgroup/memory.max", f"{8 * GIB}\n")
    write(root / "sys/fs/cgroup/memory.current", f"{9 * GIB}\n")
    found = this_machine(root=root)
    assert (found.ram_total_bytes, found.ram_available_bytes) == (8 * GIB, 0)


def test_cgroup_v1_limits(root: Path) -> None:
    write(root / "proc/self/cgroup", "7:memory:/job\n3:cpu,cpuacct:/job\n1:name=systemd:/job\n0::/\n")
    memory, cpu = root / "sys/fs/cgroup/memory/job", root / "sys/fs/cgroup/cpu,cpuacct/job"
    write(memory / "memory.limit_in_bytes", f"{4 * GIB}\n")
    write(memory / "memory.usage_in_bytes", f"{3 * GIB}\n")
    write(memory / "memory.stat", f"total_inactive_file {1 * GIB}\ninactive_file 0\n")
    write(memory.parent / "memory.limit_in_bytes", "9223372036854771712\n")
    write(memory.parent / "memory.usage_in_bytes", f"{20 * GIB}\n")
    write(cpu / "cpu.cfs_quota_us", "150000\n")
    write(cpu / "cpu.cfs_period_us", "100000\n")
    write(cpu.parent / "cpu.cfs_quota_us", "-1\n")
    write(cpu.parent / "cpu.cfs_period_us", "100000\n")
    found = this_machine(root=root)
    assert (found.ram_total_bytes, found.ram_available_bytes) == (4 * GIB, 2 * GIB)
    assert found.usable_cores == 2


def test_a_group_larger_than_the_machine_changes_nothing(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/\n")
    write(root / "sys/fs/cgroup/memory.max", f"{512 * GIB}\n")
    write(root / "sys/fs/cgroup/memory.current", f"{GIB}\n")
    found = this_machine(root=root)
    assert (found.ram_total_bytes, found.ram_available_bytes) == (64 * GIB, 48 * GIB)


def test_disk_space_of_a_path_that_does_not_exist_yet(root: Path, tmp_path: Path) -> None:
    free_bytes = this_machine(tmp_path / "not" / "yet", root=root).disk_free_bytes
    assert 0 < free_bytes <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize


def fake_nvidia_smi(tmp_path: Path, script: str) -> None:
    program = tmp_path / "bin/nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_gpus_as_the_driver_lists_them(root: Path, tmp_path: Path) -> None:
    fake_nvidia_smi(tmp_path, "echo 'NVIDIA H200, 143771, 143008, 9.0'; echo 'Odd, with comma, [N/A], [N/A], [N/A]'")
    assert this_machine(root=root).gpus == (
        Gpu("NVIDIA H200", 143771 << 20, 143008 << 20, "9.0"),
        Gpu("Odd, with comma", None, None, None),
    )


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'"])
def test_a_driver_without_gpus(root: Path, tmp_path: Path, script: str) -> None:
    fake_nvidia_smi(tmp_path, script)
    assert this_machine(root=root).gpus == ()


def test_a_driver_that_hangs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_GPU_TIMEOUT_S", 0.05)
    fake_nvidia_smi(tmp_path, "while :; do :; done")
    assert this_machine(root=root).gpus == ()


def test_the_real_machine_answers() -> None:
    found = this_machine()
    assert 1 <= found.usable_cores <= found.logical_cores
    assert 1 <= found.physical_cores <= found.logical_cores
    assert 0 < found.ram_available_bytes <= found.ram_total_bytes
    assert found.cpu_model


def test_threads_are_physical_cores_unless_told() -> None:
    found = dataclasses.replace(this_machine(), physical_cores=4, logical_cores=8, usable_cores=6)
    assert found.threads() == 4
    assert dataclasses.replace(found, usable_cores=3).threads() == 3
    assert [found.threads(wanted) for wanted in (1, 8)] == [1, 8]
    for wanted in (0, 9):
        with pytest.raises(UsageError, match=f"threads is {wanted}, expected 1 to 8"):
            found.threads(wanted)


def test_the_peak_begins_anew_where_the_system_lets_it(root: Path) -> None:
    write(root / "proc/self/status", "VmHWM:\t  2048 kB\nVmRSS:\t 1024 kB\n")
    assert machine.peak_bytes(root=root) == 2 << 20
    assert machine.restart_peak(root=root)
    assert (root / "proc/self/clear_refs").read_text() == "5"
    assert not machine.restart_peak(root=root / "absent")
    assert machine.peak_bytes(root=root / "absent") is None


def test_the_peak_of_this_process_rises_with_what_it_takes() -> None:
    if not machine.restart_peak():
        pytest.skip("this system does not forget peaks")
    before = machine.peak_bytes() or 0
    taken = bytearray(b"x" * (64 << 20))
    after = machine.peak_bytes() or 0
    assert after - before >= len(taken)
    del taken
    machine.restart_peak()
    assert (machine.peak_bytes() or 0) < after
