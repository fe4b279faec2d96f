"""How many launches a layer takes in a pass of one token each: their number sets the pace of writing on a GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from tests.ops.triton.card import DEVICE
from tests.ops.triton.test_whole_models import NETWORKS
from tests.test_engine import text
from triton.runtime import interpreter

from tenfold import Engine
from tenfold import config as configuration
from tenfold.decoding import Place
from tenfold.ops.triton import attention, topk
from tenfold.synth import synth

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter's launches are counted")

MOST = {"swa": 15, "csa": 17, "hca": 15, "dsa": 15}
"""By the kind of attention, for one session. One comes on top where experts are looked up by token, one, the order of
tokens by expert, of several sessions, and four of the choice among over 8,192 keys."""
NO_WORK = ("alias", "detach", "empty", "empty_like", "empty_strided", "new_empty")


class Launches(TorchDispatchMode):
    """Notes what is launched in each layer: kernels, and operations of torch's own that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[int, list[str]] = defaultdict(list)
        self.layer, self.aside = -1, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)
        if not self.aside and name not in NO_WORK and (func._schema.is_mutable or not is_view):
            self.layers[self.layer].append(name)
        return func(*args, **(kwargs or {}))

    def quietly(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """What happens in here is not noted."""

        def call(*arguments: Any, **words: Any) -> Any:
            self.aside += 1
            try:
                return real(*arguments, **words)
            finally:
                self.aside -= 1

        return call

    def inside(self, layer: int, real: Callable[..., Any], *arguments: Any) -> Any:
        self.layer = layer
        try:
            return real(*arguments)
        finally:
            self.layer = -1


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches()
    run = found.quietly(interpreter.GridExecutor.__call__)  # the interpreter copies with torch

    def launched(self: Any, *arguments: Any, **words: Any) -> None:
        found.layers[found.layer].append(self.fn.__name__)
        run(self, *arguments, **words)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(attention, "_splits", lambda *_: 2)  # as where a few queries do not fill a GPU
    return found


@pytest.mark.parametrize(("name", "places"), [("v4-flash", 1), ("v4-pro", 2), ("v3.2", 1)])
def test_launches_of_a_layer(
    name: str, places: int, launches: Launches, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = configuration.parse(NETWORKS[name])
    synth(config, tmp_path / name)
    engine = Engine.load(tmp_path / name, backend="triton")
    layers: Any = engine.model.layers if name == "v3.2" else engine.model.blocks  # type: ignore[attr-defined]
    for index, layer in enumerate(layers):
        method = "forward" if name == "v3.2" else "forward_fused"
        monkeypatch.setattr(layer, method, partial(launches.inside, index, getattr(layer, method)))
    sessions = [engine.session(64) for _ in range(places)]
    for session in sessions:
        session.feed(text(9))
    launches.layers.clear()
    assert engine.decoder is not None
    with launches:
        engine.decoder.run([Place(session.streams, 5, session.length) for session in sessions])
    for spec in config.layers:
        found = launches.layers[spec.index]
        if spec.router == "dense":  # nothing to choose from
            most = MOST[spec.attention] - 2
        else:
            most = MOST[spec.attention] + (spec.router == "hash") + (places > 1)
        assert len(found) <= most, f"{spec.attention}: {len(found)} launches, {' '.join(found)}"


def test_of_many_keys_the_choice_takes_four_more(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, visible = torch.randn(1, 70), torch.tensor([70])
    topk.top_rows(scores, visible, 5)
    short = len(launches.layers[-1])
    monkeypatch.setattr(topk, "_AT_ONCE", 16)
    bins = topk.bins_for(1, 70, DEVICE)
    assert bins is not None
    topk.top_rows(scores, visible, 5, bins.zero_())
    assert (short, len(launches.layers[-1]) - short) == (1, 5)
