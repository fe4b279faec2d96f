"""Whole tiny networks on the GPU backend: logits, greedy tokens, batches and hand-over against the other backends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from tests.test_engine import V4, V32, text

from tenfold import Engine
from tenfold import config as configuration
from tenfold.engine import Session
from tenfold.ops.triton import Triton
from tenfold.synth import synth

DEVICE = Triton(exact=False).device
NETWORKS: dict[str, dict[str, Any]] = {
    "v4-flash": V4 | {"compress_ratios": [0, 4, 8], "num_hidden_layers": 3, "index_topk": 2},
    "v4-pro": V4
    | {"compress_ratios": [8, 4], "num_hidden_layers": 2, "num_attention_heads": 4, "o_groups": 4, "index_topk": 2},
    "v3.2": V32,
}
TOLERANCE = 0.03
"""Of a logit, relative to the largest: activations are rounded to bf16 before each product."""

Load = Callable[..., Engine]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp("checkpoints") / name for name in NETWORKS}
    for seed, (name, folder) in enumerate(made.items()):
        synth(configuration.parse(NETWORKS[name]), folder, seed=seed)
    return made


@pytest.fixture(scope="module")
def load(folders: dict[str, Path]) -> Load:
    engines: dict[tuple[str, str, str], Engine] = {}

    def get(name: str, backend: str = "triton", numerics: str = "deployed") -> Engine:
        key = name, backend, numerics
        if key not in engines:
            engines[key] = Engine.load(folders[name], backend=backend, numerics=numerics)  # type: ignore[arg-type]
        return engines[key]

    return get


def near(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=tolerance)


def greedy(session: Session, prompt: list[int], count: int) -> tuple[list[int], list[Tensor]]:
    """The tokens of highest logit, and the logits each was chosen by."""
    logits, ids, seen = session.feed(prompt), [], []
    for _ in range(count):
        seen.append(logits)
        ids.append(int(logits.argmax()))
        logits = session.feed(ids[-1:])
    return ids, seen


def assert_same_choices(ours: Session, prompt: list[int], ids: list[int], seen: list[Tensor]) -> None:
    """Every token is the reference's, unless its best two stood closer than rounding can tell apart."""
    logits = ours.feed(prompt)
    for token, expected in zip(ids, seen, strict=True):
        near(logits, expected)
        first, second = expected.topk(2).values
        if first - second > 2 * TOLERANCE * expected.abs().max():
            assert int(logits.argmax()) == token
        logits = ours.feed([token])


@pytest.mark.parametrize("name", ["v4-pro"])
def test_greedy_tokens_are_those_of_the_reference(load: Load, name: str) -> None:
    """Of the other networks in `test_models.py`."""
    prompt = text(13)
    ids, seen = greedy(load(name, "reference").session(64), prompt, 4)
    assert_same_choices(load(name).session(64), prompt, ids, seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_five_hundred_greedy_tokens(load: Load, name: str) -> None:
    """All are chosen by passes of one token, of eight sessions that stand 63 tokens apart on one timeline: the
    interpreter takes seconds a pass. Nothing is rounded: in a network of random weights a rounded activation chooses
    other experts and rows now and then, and then logits are others (docs/concepts/gpu.md). With `-s` it tells."""
    prompt, apart, places = text(40), 63, 8
    ids, seen = greedy(load(name, "reference", "exact").session(640), prompt, apart * places)
    engine = load(name, "triton", "exact")
    reader, sessions = engine.session(640), [engine.session(640) for _ in range(places)]
    reader.feed(prompt)
    for place, session in enumerate(sessions):
        session.restore(reader.snapshot())
        if place + 1 < places:
            reader.feed(ids[place * apart : (place + 1) * apart])
    ties, furthest = [], 0.0
    for i in range(apart - 1):
        found = engine.step({session: [ids[place * apart + i]] for place, session in enumerate(sessions)})
        for place, session in enumerate(sessions):
            at = place * apart + i + 1
            largest = seen[at].abs().max()
            furthest = max(furthest, float((found[session] - seen[at]).abs().max() / largest))
            first, second = seen[at].topk(2).values
            if int(found[session].argmax()) != ids[at]:
                ties.append((at, float((first - second) / largest)))
    print(
        f"{name}: {places * (apart - 1)} tokens, {len(ties)} not the reference's {ties}; logits within {furthest:.2e}"
    )
    assert furthest <= 1e-3
    assert all(margin <= 2e-3 for _, margin in ties), ties


@pytest.mark.slow
def test_writing_and_reading_agree(load: Load) -> None:
    """One token at a time over tables, against a chunk over streams."""
    engine, ids = load("v4-flash"), text(14)
    whole, single = engine.session(64), engine.session(64)
    logits = whole.feed(ids)
    single.feed(ids[:6])
    for token in ids[6:]:
        last = single.feed([token])
    near(last, logits)
    assert single.kv_bytes() == whole.kv_bytes()


def test_a_batch_of_ragged_sessions(load: Load) -> None:
    """Three in four places: each gets what it would get alone, but for the order of sums."""
    engine = load("v4-flash", "triton", "exact")
    prompts = text(7), text(3, seed=1), text(5, seed=2)
    together, alone = ([engine.session(64) for _ in prompts] for _ in range(2))
    for sessions in (together, alone):
        for session, prompt in zip(sessions, prompts, strict=True):
            session.feed(prompt)
    found = engine.step({session: [5 + i] for i, session in enumerate(together)})
    for i, (session, other) in enumerate(zip(together, alone, strict=True)):
        near(found[session], other.feed([5 + i]), 1e-5)
        assert session.tokens == other.tokens


class NothingAsked(TorchDispatchMode):
    """Fails where the host would wait for the device: no such pass can be captured."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "_local_scalar_dense" in name or "nonzero" in name or "aten.unique" in name:
            raise AssertionError(f"{name} asks the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["v4-flash", "v3.2"])
def test_writing_asks_the_device_nothing(load: Load, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(name)
    session = engine.session(64)
    session.feed(text(5))
    real = engine.model.forward

    def watched(step: Any) -> Tensor:
        with NothingAsked():
            return real(step)

    monkeypatch.setattr(engine.model, "forward", watched)
    session.feed([3])


@pytest.mark.slow
def test_rewinding_and_snapshots(load: Load) -> None:
    engine, ids = load("v4-flash"), text(12)
    session = engine.session(64)
    session.feed(ids)
    logits, state = session.last_logits, session.snapshot()
    session.feed([9])
    session.feed([4])
    session.rewind(12)
    assert torch.equal(session.last_logits, logits)
    other = engine.session(64)
    other.restore(state)
    near(other.feed([9]), session.feed([9]), 1e-6)


@pytest.mark.parametrize("name", ["v4-flash", pytest.param("v3.2", marks=pytest.mark.slow)])
def test_a_context_goes_from_the_cpu_to_the_gpu_and_back(
    folders: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one backend stored another goes on with; what it holds then is what the first stored, to the byte."""
    prompt, more = text(21), text(3, seed=3)
    first = Engine.load(folders[name], backend="cpu", store=tmp_path)
    begun = first.session(128)
    begun.feed(prompt)
    gpu = Engine.load(folders[name], backend="triton", store=tmp_path)
    middle = gpu.session(128)
    match = middle.resume([*prompt, *more])
    assert match is not None
    assert match.position == len(prompt)
    near(middle.last_logits, begun.last_logits, 1e-6)
    for spec in middle.streams.specs:
        if spec.ratio:
            here, there = (s.streams.rows(spec.layer, spec.name).packed.cpu() for s in (middle, begun))
            assert torch.equal(here, there)
    states = (session.streams.live_state(len(prompt)) for session in (middle, begun))
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    middle.feed(more)
    last = Engine.load(folders[name], backend="cpu", store=tmp_path).session(128)
    match = last.resume([*prompt, *more, 2])
    assert match is not None
    assert match.position == len(prompt) + len(more)
    for spec in last.streams.specs:
        if spec.ratio:
            here, there = (s.streams.rows(spec.layer, spec.name).packed.cpu() for s in (last, middle))
            assert torch.equal(here, there)
    begun.feed(more)
    near(last.feed([2]), begun.feed([2]))
