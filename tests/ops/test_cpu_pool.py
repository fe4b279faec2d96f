"""Memory of passes and of large results: taken again, never given twice, given back."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import Tensor

from tenfold import Engine, _native
from tenfold.ops import cpu_pool
from tenfold.ops.cpu_pool import Pool

LARGE = cpu_pool._LARGE_BYTES // 4


@pytest.fixture
def results() -> Iterator[Pool]:
    """The pool that this thread's large results come from, empty."""
    cpu_pool.release()
    pool = cpu_pool._results.pool
    assert pool.num_bytes == 0
    yield pool
    cpu_pool.release()


def test_memory_is_taken_again_once_nothing_shows_it() -> None:
    pool = Pool()
    one = pool.like(torch.empty(3, 100))
    part, other = one.view(300)[5:7], pool.unowned(one)
    address = one.data_ptr()
    assert one.shape == (3, 100)
    assert one.is_contiguous()
    del one
    assert pool.like(torch.empty(3, 100)).data_ptr() != address
    part[:] = 3.0
    assert bool((other.view(300)[5:7] == 3.0).all())
    del part
    assert pool.like(torch.empty(3, 100)).data_ptr() == address  # although `other` shows it still
    assert pool.num_bytes == 1 << 20


@pytest.mark.parametrize("seed", range(3))
def test_memory_is_never_given_twice(seed: int) -> None:
    """Tensors of all sizes come and go; each keeps its numbers, and free parts become one again."""
    pool, dice = Pool(), random.Random(seed)
    held: list[tuple[Tensor, int]] = []
    for number in range(600):
        if held and dice.randrange(2):
            del held[dice.randrange(len(held))]
        tensor = pool.like(torch.empty(dice.choice([1, 7, 64, 1000, 40_000]), dtype=torch.int64))
        held.append((tensor.fill_(number), number))
        assert all(bool((one == expected).all()) for one, expected in held[-9:])
    assert all(bool((one == expected).all()) for one, expected in held)
    before = pool.num_bytes
    held.clear()
    del tensor
    slabs = [pool.like(torch.empty(1 << 20, dtype=torch.uint8)) for _ in range(before >> 20)]
    assert (len(slabs), pool.num_bytes) == (before >> 20, before)


def test_large_results_take_the_memory_of_those_that_are_gone(results: Pool) -> None:
    one, other = cpu_pool.empty(2, LARGE), cpu_pool.empty(LARGE)
    assert one.shape == (2, LARGE)
    assert one.dtype is torch.float32
    part, address = one[1, 5:], one.data_ptr()
    del one
    assert cpu_pool.empty(2, LARGE).data_ptr() != address  # a part of it is still shown
    del part
    assert cpu_pool.empty(2, LARGE).data_ptr() == address
    assert cpu_pool.empty(LARGE // 2, 3).data_ptr() == address  # a smaller one too
    before = results.num_bytes
    for _ in range(1000):
        cpu_pool.empty(2, LARGE)
    assert results.num_bytes == before
    assert other.data_ptr() != address


def test_small_and_recorded_results_take_none_of_it(results: Pool) -> None:
    assert cpu_pool.empty(LARGE - 1).shape == (LARGE - 1,)
    assert cpu_pool.empty(0, LARGE).shape == (0, LARGE)
    recorder = cast(_native.Recorder, object())  # a result asks for none of what it does
    with _native.recorded_by(recorder):
        assert cpu_pool.empty(LARGE).shape == (LARGE,)
    assert results.num_bytes == 0


@pytest.mark.usefixtures("poisoned")
def test_large_results_are_poisoned_where_tests_ask_for_it(results: Pool) -> None:
    assert bool(cpu_pool.empty(LARGE).isnan().all())


def test_results_outlive_a_release_and_may_go_in_another_thread(results: Pool) -> None:
    held = [cpu_pool.empty(LARGE).fill_(7.0)]
    cpu_pool.release()
    assert results.num_bytes > 0
    assert bool((held[0] == 7.0).all())
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    cpu_pool.release()
    assert results.num_bytes == 0


def test_each_thread_has_results_of_its_own(results: Pool) -> None:
    found: list[Tensor] = []
    one = cpu_pool.empty(LARGE)
    thread = threading.Thread(target=lambda: found.append(cpu_pool.empty(LARGE).fill_(3.0)))
    thread.start()
    thread.join()
    one.fill_(4.0)
    assert bool((found[0] == 3.0).all())  # although its thread is gone


def test_a_pass_leaves_nothing_and_gives_the_same_from_whatever_memory(
    results: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ids = Engine.load("tiny-v4-flash", backend="cpu"), list(range(3, 303))
    expected = engine.session(512).feed(ids)
    monkeypatch.setattr(cpu_pool, "_LARGE_BYTES", 64)
    taken: list[int] = []
    take = results.take

    def counted(num_bytes: int) -> Tensor:
        taken.append(num_bytes)
        return take(num_bytes)

    monkeypatch.setattr(results, "take", counted)
    session = engine.session(512)
    assert torch.equal(session.feed(ids), expected)
    assert len(taken) > 50
    cpu_pool.release()
    assert results.num_bytes == 0  # although the session keeps its last logits
