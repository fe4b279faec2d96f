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

    recording = cpu.record(run)
    for seed in (1, 2, 3):
        x.copy_(randn(3, 65, seed=seed))
        found = recording.replay(marks.append).clone()
        assert torch.equal(found, run(lambda share: None))
        assert torch.equal(found, recording.replay(None))
    assert marks == [0.5] * 3


def test_what_is_asked_of_numbers_cannot_be_recorded() -> None:
    x = randn(3, 65)
    with pytest.raises(AssertionError, match="asks for a number"):
        cpu.record(lambda mark: x * float(x.max()))
    assert torch.equal(cpu.linear(x, WEIGHT), cpu.linear(x, WEIGHT))  # nothing records any more


def test_recording_loads_no_compiler() -> None:
    """torch's compiler takes seconds to import, and a hundred megabytes."""
    code = (
        "import sys; from tenfold import Engine; e = Engine.load('tiny-v4-flash', backend='cpu'); s = e.session(64);"
        "[e.step({s: [i]}) for i in range(5, 9)]; assert e.decoder._passes; sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
