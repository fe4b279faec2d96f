"""What the store gives back is what one uninterrupted read would have made, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tenfold import Engine, SamplingParams, config
from tenfold.completion import read
from tenfold.engine import Session
from tenfold.store import Store
from tenfold.synth import synth

SHAPES: dict[str, dict[str, Any]] = {
    "v4-flash": {"head_dim": 128, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1, "hc_mult": 2,
                 "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 32, "sliding_window": 16},
    "v3.2": {"q_lora_rank": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "n_group": 2,
             "topk_group": 1, "first_k_dense_replace": 1, "intermediate_size": 64},
}  # fmt: skip
COMMON = {"vocab_size": 211, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "index_n_heads": 16,
          "index_head_dim": 64, "index_topk": 8, "moe_intermediate_size": 32, "n_routed_experts": 4,
          "num_experts_per_tok": 2, "num_nextn_predict_layers": 0}  # fmt: skip
Open = Callable[..., Engine]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, words in SHAPES.items():
        made[name] = tmp_path_factory.mktemp(name)
        synth(config.parse({**config.preset(name).raw, **COMMON, **words}), made[name] / "m", fmt="bf16")
    return made


@pytest.fixture(params=[(name, numerics) for name in SHAPES for numerics in ("deployed", "exact")])
def engine(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Engine:
    name, numerics = request.param
    return Engine.load(folders[name] / "m", numerics=numerics, store=tmp_path / "store")


def text(count: int, seed: int = 0) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(2, 200) for _ in range(count)]


def stored(session: Session, ids: list[int]) -> int:
    """How many tokens the store gave back when the session was brought to `ids`."""
    return read(session, ids).stored


def same(one: Session, ids: list[int]) -> bool:
    """Whether a session is in the state that reading `ids` in one go leaves, judged by what follows as well."""
    other = Engine(one.engine.config, one.engine.model, backend="x", exact=one.engine.exact, budget=one.engine.budget)
    whole = other.session()
    whole.feed(ids)
    more = text(150, seed=9)
    kept = one.engine.keeper
    one.engine.keeper = None
    equal = torch.equal(one.last_logits, whole.last_logits)
    equal = equal and torch.equal(one.feed(more, logits="all"), whole.feed(more, logits="all"))
    one.engine.keeper = kept
    return equal and one.kv_bytes() == whole.kv_bytes()


@pytest.mark.parametrize("length", [2, 3, 127, 128, 129, 700])
def test_a_prompt_read_once_comes_back_whole(engine: Engine, length: int) -> None:
    ids = text(length)
    engine.session().feed(ids)
    again = engine.session()
    assert stored(again, ids) == length
    assert same(again, ids)


def test_another_ending_replays_from_the_point_before(engine: Engine) -> None:
    ids = text(600)
    first = engine.session()
    first.feed(ids[:400])
    first.feed(ids[400:])
    other = ids[:500] + text(80, seed=5)
    again = engine.session()
    assert stored(again, other) == 400
    assert again.tokens == tuple(other)
    assert same(again, other)


def test_what_was_sampled_is_kept_too(engine: Engine) -> None:
    session = engine.session()
    session.feed(text(50))
    for _ in session.generate(SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)):
        pass
    again = engine.session()
    assert stored(again, list(session.tokens)) == session.length == 70
    assert same(again, list(session.tokens))


def test_editing_regenerating_and_going_on(engine: Engine) -> None:
    session, ids = engine.session(), text(300)
    for round_ in range(6):
        cut = random.Random(round_).randrange(1, len(ids))
        ids = ids[:cut] + text(40, seed=100 + round_)
        found = read(engine.session() if round_ % 2 else session, ids)
        assert found.reused <= len(ids)
    again = engine.session()
    assert stored(again, ids) == len(ids)
    assert same(again, ids)


def test_a_cancelled_read_resumes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenfold.engine._KEEP_EVERY_TOKENS", 64)
    engine.chunk_tokens, ids = 64, text(500)

    def stop(done: int) -> None:
        if done >= 256:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.session().feed(ids, progress=stop)
    engine.chunk_tokens = 100
    again = engine.session()
    match = again.resume(ids)
    assert match is not None
    assert match.position == again.length == 256
    again.feed(ids[again.length :])
    assert same(again, ids)


def test_models_and_numerics_do_not_share(folders: dict[str, Path], tmp_path: Path) -> None:
    ids = text(60)
    store = Store(tmp_path / "store")
    for name in SHAPES:
        for numerics in ("deployed", "exact"):
            engine = Engine.load(folders[name] / "m", numerics=numerics, store=store)
            assert stored(engine.session(), ids) == 0
            assert stored(engine.session(), ids) == 60


def test_backends_share(folders: dict[str, Path], tmp_path: Path) -> None:
    ids = text(60)
    for backend, found in (("cpu", 0), ("reference", 60)):
        engine = Engine.load(folders["v4-flash"] / "m", backend=backend, store=tmp_path / "store")
        assert stored(engine.session(), ids) == found


def test_damage_is_read_again(engine: Engine, tmp_path: Path) -> None:
    ids = text(400)
    first = engine.session()
    first.feed(ids[:200])
    first.feed(ids[200:])
    assert engine.keeper is not None
    warnings: list[str] = []
    engine.keeper.store.warn = warnings.append
    files = sorted((tmp_path / "store" / "segments").rglob("*"), key=lambda path: path.stat().st_mtime)
    victim = [path for path in files if path.is_file()][-1]
    data = bytearray(victim.read_bytes())
    data[-7] ^= 4
    victim.write_bytes(data)
    again = engine.session()
    read(again, ids)
    assert again.tokens == tuple(ids)
    assert len(warnings) == 1
    assert "damaged" in warnings[0]
    assert same(again, ids)


def test_a_full_disk_changes_no_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.keeper is not None
    warnings: list[str] = []
    engine.keeper.store.warn = warnings.append
    monkeypatch.setattr(type(engine.keeper.store.folder), "room_bytes", lambda self: 0)
    session, ids = engine.session(), text(300)
    session.feed(ids[:100])
    session.feed(ids[100:])
    assert len(warnings) == 1
    assert same(session, ids)
    monkeypatch.undo()
    session.keep()
    assert stored(engine.session(), list(session.tokens)) == session.length


def test_each_run_of_tokens_is_stored_once(engine: Engine, tmp_path: Path) -> None:
    ids = text(640)
    for cut in range(640, 0, -128):
        engine.session().feed(ids[:cut])
    names = [path for path in (tmp_path / "store" / "segments").rglob("*") if path.is_file()]
    assert len(names) == 1
