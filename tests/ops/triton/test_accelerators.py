"""Kernels of others: taken only where right and faster. The libraries here are made up; none was ever run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.ops.triton.card import DEVICE
from torch import Tensor

from tenfold.ops import Rows, reference
from tenfold.ops.triton import Triton, accelerators, attention
from tenfold.ops.triton.accelerators import Trial, judge

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def trial(theirs: Callable[[], Tensor]) -> Trial:
    return Trial("a shape", lambda: X, theirs)


def clock(*times: float) -> Callable[[Callable[[], Tensor]], float]:
    """Theirs are timed before ours."""
    left = list(times)
    return lambda call: left.pop(0)


def broken() -> Tensor:
    raise RuntimeError("no kernel image is available\nmore of it")


@pytest.mark.parametrize(
    ("theirs", "times", "why"),
    [
        (lambda: X + 1e-4, (1.0, 2.0), None),
        (lambda: X + 1e-4, (1.9, 2.0), None),
        (lambda: X + 1e-4, (1.95, 2.0), "ours takes"),
        (lambda: X + 0.1, (1.0, 2.0), "differs from ours by"),
        (lambda: torch.full_like(X, torch.nan), (1.0, 2.0), "differs from ours by nan"),
        (lambda: X[:4], (1.0, 2.0), "not as ours"),
        (broken, (1.0, 2.0), "it fails: no kernel image is available"),
    ],
    ids=["faster", "a little faster", "no faster", "wrong", "not a number", "another shape", "fails"],
)
def test_it_is_taken_only_if_right_and_faster(
    theirs: Callable[[], Tensor], times: Sequence[float], why: str | None
) -> None:
    verdict = judge("it", [trial(theirs)], clock=clock(*times))
    assert verdict.taken == (why is None)
    assert (why or "") in verdict.why
    assert "more of it" not in verdict.why


def test_it_must_be_right_every_time() -> None:
    found = iter((X, X + 1, X))
    assert not judge("it", [trial(lambda: next(found))], clock=clock(1.0, 2.0)).taken


class FlashMla:
    """What FlashMLA's documentation says of it, by the reference; `wrong` forgets the scale."""

    def __init__(self, wrong: bool = False) -> None:
        self.wrong, self.calls = wrong, 0

    def get_mla_metadata(self) -> tuple[object, None]:
        return object(), None

    def flash_mla_with_kvcache(
        self, q: Tensor, k_cache: Tensor, block_table: None, cache_seqlens: None, head_dim_v: int, meta: object, *,
        softmax_scale: float, is_fp8_kvcache: bool, indices: Tensor, use_legacy: bool,
    ) -> tuple[Tensor, None]:  # fmt: skip
        self.calls += 1
        assert q.dtype is torch.bfloat16
        assert k_cache.shape[1:] == (64, 1, 656)
        assert (head_dim_v, is_fp8_kvcache, use_legacy, indices.dtype) == (512, True, True, torch.int32)
        source = Rows(k_cache.flatten(0, 2).cpu(), accelerators.ROWS, index=indices[0].cpu())
        scale = 1.0 if self.wrong else softmax_scale
        out = reference.sparse_attention(q[0].float().cpu(), [source], None, scale, head_dim_v, 0)
        return out.bfloat16()[None].to(DEVICE), None


@pytest.mark.parametrize("wrong", [False, True])
def test_flash_mla_reads_rows_as_they_lie_here(wrong: bool) -> None:
    library = FlashMla(wrong)
    tried: Any = accelerators.try_attention(DEVICE, 64, library, clock(1.0, 2.0), [(2, 192, 64)])
    assert library.calls == 2 - wrong
    assert tried[0].taken != wrong, tried[0]
    assert (tried[1] is attention.sparse_attention) == wrong


def test_flash_mla_is_not_asked_what_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of sessions, few heads, lists that fill no page, a last page that is not there, a sink."""
    library, asked = FlashMla(), []
    monkeypatch.setattr(accelerators, "sparse_attention", lambda *words: asked.append(words))
    run, layout = accelerators.flash_mla_attention(library), accelerators.ROWS
    room = torch.zeros(128, layout.row_bytes, dtype=torch.uint8)
    index = torch.zeros(2, 64, dtype=torch.int32)
    q, sink = torch.zeros(2, 64, layout.width), SimpleNamespace(data=torch.zeros(64))
    cases: list[tuple[Tensor, Rows, Any]] = [
        (q, Rows(torch.zeros(2, dtype=torch.int64), layout, index=index, most=128), None),
        (q[:, :16], Rows(room, layout, index=index), None),
        (q, Rows(room, layout, index=index[:, :40].contiguous()), None),
        (q, Rows(room[64:101].clone(), layout, index=index), None),
        (q, Rows(room, layout, index=index), sink),
    ]
    for queries, source, given_sink in cases:
        run(queries, [source], given_sink, 1.0, 512, 0)
    assert (len(asked), library.calls) == (5, 0)
    run(q, [Rows(room[:101], layout, index=index)], None, 1.0, 512, 0)
    assert (len(asked), library.calls) == (5, 1)


def test_without_a_library_nothing_changes() -> None:
    verdict, chosen = accelerators.try_attention(DEVICE, 64)
    assert not verdict.taken
    assert "cannot be imported" in verdict.why
    assert chosen is attention.sparse_attention
    assert Triton(exact=False).sparse_attention is attention.sparse_attention
