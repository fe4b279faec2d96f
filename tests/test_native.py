"""The native library: which build runs, what it refuses, and every build against torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tenfold import _native
from tenfold.errors import BackendMissing, UsageError

ROWS = (0, 1, 63, 127, 128, 129, 1000)
WIDTHS = (1, 2, 7, 8, 31, 32, 33, 64, 129, 512)
EPS = 1e-6


def law(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The norm in float64, rounded once."""
    x64 = x.double()
    return (weight.double() * x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + EPS)).float()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    without = {key: value for key, value in os.environ.items() if key != _native.ISA_VARIABLE}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=without | environment, check=False
    )


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("poisoned")
def test_rms_norm_agrees_with_float64(isa: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(width, generator=generator)
    for rows in ROWS:
        x = torch.randn(rows, width, generator=generator)
        kept = x.clone()
        out = _native.rms_norm(x, weight, EPS, isa=isa)
        torch.testing.assert_close(out, law(x, weight), rtol=1e-6, atol=1e-6)
        assert torch.equal(x, kept)


@pytest.mark.parametrize("isa", _native.available_isas())
def test_rms_norm_of_every_row_is_that_of_the_row_alone(isa: str) -> None:
    """Bit for bit, and with enough rows that threads share them."""
    x, weight = torch.randn(129, 513), torch.randn(513)
    together = _native.rms_norm(x, weight, EPS, isa=isa)
    alone = torch.cat([_native.rms_norm(row, weight, EPS, isa=isa)[None] for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("isa", _native.available_isas())
def test_rms_norm_takes_any_leading_axes_and_writes_only_out(isa: str) -> None:
    x, weight = torch.randn(2, 3, 5, 17), torch.randn(17)
    frame = torch.full((32, 17), float("nan"))
    out = frame[1:31].view(2, 3, 5, 17)
    assert _native.rms_norm(x, weight, EPS, out, isa=isa) is out
    torch.testing.assert_close(out, law(x, weight), rtol=1e-6, atol=1e-6)
    assert frame[0].isnan().all()
    assert frame[31].isnan().all()


@pytest.mark.parametrize("isa", _native.available_isas())
def test_rms_norm_in_place(isa: str) -> None:
    x, weight = torch.randn(40, 33), torch.randn(33)
    expected = law(x, weight)
    _native.rms_norm(x, weight, EPS, x, isa=isa)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("isa", _native.available_isas())
def test_rms_norm_reads_memory_at_any_multiple_of_four_bytes(isa: str) -> None:
    memory, weight = torch.randn(1 + 9 * 37), torch.randn(37)
    x = memory[1:].view(9, 37)
    assert x.data_ptr() % 32
    torch.testing.assert_close(_native.rms_norm(x, weight, EPS, isa=isa), law(x, weight), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_builds_agree_on_rows_that_are_not_finite(bad: float) -> None:
    x, weight = torch.randn(3, 40), torch.randn(40)
    x[1, 35] = bad
    results = [_native.rms_norm(x, weight, EPS, isa=isa) for isa in _native.available_isas()]
    for result in results:
        torch.testing.assert_close(result, law(x, weight), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_refuses_the_wrong_dtype_device_and_kind() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    with pytest.raises(TypeError, match=r"x: expected a tensor of torch\.float32, got torch\.float64"):
        _native.rms_norm(x.double(), weight, EPS)
    with pytest.raises(TypeError, match=r"weight: expected a tensor of torch\.float32, got torch\.bfloat16"):
        _native.rms_norm(x, weight.bfloat16(), EPS)
    with pytest.raises(TypeError, match=r"weight: expected a tensor of torch\.float32, got list"):
        _native.rms_norm(x, [1.0] * 8, EPS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"weight: expected a tensor on cpu, got one on meta"):
        _native.rms_norm(x, weight.to("meta"), EPS)


def test_refuses_the_wrong_shape() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    with pytest.raises(ValueError, match=r"weight: expected shape \(width=8\), got \(7,\)"):
        _native.rms_norm(x, weight[:7], EPS)
    with pytest.raises(ValueError, match=r"weight: expected shape \(width=8\), got \(1, 8\)"):
        _native.rms_norm(x, weight[None], EPS)
    with pytest.raises(ValueError, match=r"out: expected shape \(\*rows=4, width=8\), got \(3, 8\)"):
        _native.rms_norm(x, weight, EPS, torch.empty(3, 8))
    with pytest.raises(ValueError, match=r"x: expected shape \(\*rows, width\), got \(\)"):
        _native.rms_norm(torch.tensor(1.0), weight, EPS)
    with pytest.raises(ValueError, match="at least one element"):
        _native.rms_norm(torch.empty(4, 0), torch.empty(0), EPS)


def test_refuses_memory_that_is_not_dense_or_not_aligned() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    with pytest.raises(ValueError, match=r"x: expected contiguous memory, got strides \(1, 4\)"):
        _native.rms_norm(torch.randn(8, 4).T, weight, EPS)
    with pytest.raises(ValueError, match=r"weight: expected contiguous memory, got strides \(2,\)"):
        _native.rms_norm(x, torch.randn(16)[::2], EPS)
    shifted = torch.frombuffer(bytearray(33 + 4), dtype=torch.float32, count=8, offset=1)
    if shifted.data_ptr() % 4:
        with pytest.raises(ValueError, match="weight: its memory is not aligned to 4 bytes"):
            _native.rms_norm(x, shifted, EPS)


def test_isas_are_consistent() -> None:
    assert set(_native.available_isas()) <= set(_native.built_isas())
    assert _native.available_isas()[-1] == "scalar"
    assert _native.isa() in _native.available_isas()
    assert ("avx2" in _native.available_isas()) == {"avx2", "fma", "f16c"}.issubset(_native.cpu_features())


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the kernel's list of CPU flags is Linux's")
def test_the_probe_agrees_with_the_kernel() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    avx512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512vbmi", "avx512_bf16")
    known = ("sse2", "avx2", "fma", "f16c", *avx512, "amx_tile", "amx_int8", "amx_bf16")
    assert set(_native.cpu_features()) == {feature for feature in known if feature in flags}


@pytest.mark.parametrize("isa", _native.available_isas())
def test_the_variable_chooses_the_isa_without_torch(isa: str) -> None:
    done = run_python(
        "import sys; from tenfold import _native; print(_native.isa(), 'torch' in sys.modules)",
        TENFOLD_ISA=isa,
    )
    assert (done.stdout.split(), done.stderr) == ([isa, "False"], "")


def test_without_the_variable_the_best_isa_runs() -> None:
    done = run_python("from tenfold import _native; print(_native.isa())")
    assert done.stdout.strip() == _native.available_isas()[0]


def test_an_unknown_isa_is_an_error_naming_the_choice() -> None:
    done = run_python("from tenfold import _native; _native.isa()", TENFOLD_ISA="avx1024")
    assert done.returncode == 1
    assert "UsageError: There are no 'avx1024' kernels in this build; set TENFOLD_ISA to" in done.stderr
    with pytest.raises(UsageError, match="avx1024"):
        _native.rms_norm(torch.ones(1), torch.ones(1), EPS, isa="avx1024")


def test_an_isa_that_this_cpu_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "available_isas", lambda: ("scalar",))
    monkeypatch.setattr(_native, "built_isas", lambda: ("avx2", "scalar"))
    with pytest.raises(BackendMissing, match="cannot run the avx2 kernels; set TENFOLD_ISA to one of scalar"):
        _native._usable_isa("avx2")


def test_a_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(_native.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(sys.modules["tenfold"], "__path__", [str(tmp_path)])
    with pytest.raises(BackendMissing, match=r"not built: looked in .*make env.*pip install -e \."):
        _native.library_path()


def test_the_variable_names_another_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(_native.LIBRARY_VARIABLE, str(tmp_path / "other.so"))
    with pytest.raises(BackendMissing, match=r"TENFOLD_LIBRARY names .*other\.so, which is no file"):
        _native.library_path()
    (tmp_path / "other.so").touch()
    assert _native.library_path() == tmp_path / "other.so"


def test_a_library_that_does_not_load_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libtenfold.so").write_bytes(b"not a library")
    monkeypatch.setattr(_native, "library_path", lambda: tmp_path / "libtenfold.so")
    with pytest.raises(BackendMissing, match=r"does not load.*pip install -e \."):
        _native._library.__wrapped__()


def test_a_library_of_another_version_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_ABI_VERSION", -1)
    with pytest.raises(BackendMissing, match=r"has interface \d+, expected -1; .*pip install -e \."):
        _native._library.__wrapped__()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the list of mapped files is Linux's")
def test_one_openmp_runtime_is_mapped_and_shared() -> None:
    """After torch and a kernel that forks, the process holds torch's OpenMP runtime and no other."""
    done = run_python(
        "import os, re, torch; from tenfold import _native\n"
        "def tasks(): return len(os.listdir('/proc/self/task'))\n"
        "torch.set_num_threads(2); x = torch.randn(512, 512); torch.ones(1 << 20).exp_(); before = tasks()\n"
        "_native.rms_norm(x, torch.ones(512), 1e-6)\n"
        "mapped = {line.split()[-1] for line in open('/proc/self/maps')}\n"
        "print(_native.num_threads(), tasks() - before,"
        " sum(bool(re.match(r'lib(gomp|i?omp)', os.path.basename(path))) for path in mapped))"
    )
    assert (done.stdout.split(), done.stderr) == (["2", "0", "1"], "")


def test_threads_follow_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert _native.num_threads() == 3
    monkeypatch.setattr(_native, "_shares_torch_threads", lambda: False)
    assert _native.num_threads() == 1
