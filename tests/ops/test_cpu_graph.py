"""Recorded passes: what is noted, what is done again, and what cannot be recorded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from tests.ops.cases import randn
from torch import Tensor

from tenfold.formats import F32
from tenfold.ops import Weight, cpu

WEIGHT = Weight("w", (33, 65), F32, randn(33, 65))


def test_kernels_and_torch_are_done_again_on_what_lies_there_now() -> None:
    x = randn(3, 65)
    marks: list[float] = []

    def run(mark: Callable[[float], None]) -> Tensor:
        y = cpu.linear(x, WEIGHT)
        mark(0.5)
        y = torch.cat([y, y[:, ::2].contiguous()], 1)
        norm, mean, _ = torch.native_layer_norm(y, (y.shape[1],), None, None, 1e-6)
        norm += mean  # in place
        return cpu.rms_norm(norm, None, 1e-6)

    recording = cpu.recordings().record(run)
    for seed in (1, 2, 3):
        x.copy_(randn(3, 65, seed=seed))
        found = recording.replay(marks.append).clone()
        assert torch.equal(found, run(lambda share: None))
        assert torch.equal(found, recording.replay(None))
    assert marks == [0.5] * 3


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_stay_together_for_a_program_and_change_nothing(threads: int) -> None:
    """Also more of them than cores, and kernels that one thread runs between those that all do."""
    x, weight = randn(2, 512), Weight("w", (512, 512), F32, randn(512, 512) / 16)

    def run(mark: Callable[[float], None]) -> Tensor:
        y = x
        for _ in range(20):
            y = cpu.rms_norm(cpu.linear(y, weight), None, 1e-6)
        return y

    before = torch.get_num_threads()
    expected = {}
    for seed in range(5):
        x.copy_(randn(2, 512, seed=seed))
        expected[seed] = run(lambda share: None).clone()
    torch.set_num_threads(threads)
    try:
        recording = cpu.recordings().record(run)
        for _ in range(20):
            for seed in expected:
                x.copy_(randn(2, 512, seed=seed))
                assert torch.equal(recording.replay(None), expected[seed])
    finally:
        torch.set_num_threads(before)


def test_what_is_asked_of_numbers_cannot_be_recorded() -> None:
    x = randn(3, 65)
    with pytest.raises(AssertionError, match="asks for a number"):
        cpu.recordings().record(lambda mark: x * float(x.max()))
    assert torch.equal(cpu.linear(x, WEIGHT), cpu.linear(x, WEIGHT))  # nothing records any more


def test_recordings_share_memory_that_one_layer_needs() -> None:
    """Each in turn on other numbers, so that what the others leave behind is seen to be nothing."""
    recordings, sizes = cpu.recordings(), (5, 64, 1, 33)
    weight = Weight("w", (512, 512), F32, randn(512, 512) / 16)
    given = {n: randn(n, 512) for n in sizes}

    def run(n: int) -> Tensor:
        x = given[n]
        for _ in range(40):
            x = torch.cat([cpu.rms_norm(cpu.linear(x, weight), None, 1e-6), x[:, :7]], 1)[:, 7:] + x
        return x

    made = {}
    for n in sizes:
        recording = recordings.record(lambda mark, n=n: run(n))  # type: ignore[misc]
        assert torch.equal(recording.out, run(n))
        made[n] = recording
    for seed in (1, 2):
        for n in (1, 64, 33, 5):
            given[n].copy_(randn(n, 512, seed=seed))
            assert torch.equal(made[n].replay(None), run(n))
    assert recordings.num_bytes <= 12 * given[64].nbytes  # of 160 tensors of this size


def test_recording_loads_no_compiler() -> None:
    """torch's compiler takes seconds to import, and a hundred megabytes."""
    code = (
        "import sys; from tenfold import Engine; e = Engine.load('tiny-v4-flash', backend='cpu'); s = e.session(64);"
        "[e.step({s: [i]}) for i in range(5, 9)]; assert e.decoder._passes; sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
