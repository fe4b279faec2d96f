"""The engine through its public surface: chunks, batches, rewinding, snapshots, failures. Knows no layer's mathematics.

Whatever way a timeline came about, its logits are those of one pass over its tokens, to the last bit.
"""

from __future__ import annotations

import inspect
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tenfold import Engine, SamplingParams, ops, step
from tenfold import config as configuration
from tenfold.engine import Session, _Reports, parse_bytes
from tenfold.errors import ConfigError, ContextTooLong, InputError, StoreError, UsageError
from tenfold.machine import this_machine
from tenfold.ops import cpu_linear
from tenfold.synth import synth

SHARED: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "q_lora_rank": 16,
    "num_attention_heads": 2,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 3,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "topk_method": "noaux_tc",
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "qk_rope_head_dim": 8,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 256, "mscale": 1.0},
    "eos_token_id": 1,
}
V4: dict[str, Any] = SHARED | {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "o_groups": 2,
    "o_lora_rank": 8,
    "sliding_window": 8,
    "compress_ratios": [0, 4, 8, 4],
    "num_hash_layers": 1,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 3,
    "hc_eps": 1e-6,
    "compress_rope_theta": 160000.0,
}
V32: dict[str, Any] = SHARED | {
    "model_type": "deepseek_v32",
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "index_topk": 6,
    "rope_scaling": SHARED["rope_scaling"] | {"mscale_all_dim": 1.0},
}
NETWORKS: dict[str, dict[str, Any]] = {
    "v4": V4,
    "v4-128": V4 | {"num_hidden_layers": 2, "sliding_window": 128, "compress_ratios": [4, 128], "index_topk": 8},
    "v3.2": V32,
}
NUMERICS = ("deployed", "exact")
EVERY = [(name, numerics) for name in NETWORKS for numerics in NUMERICS]

Load = Callable[[str, str], Engine]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random checkpoints in the official layout."""
    made = {name: tmp_path_factory.mktemp("checkpoints") / name for name in NETWORKS}
    for seed, (name, folder) in enumerate(made.items()):
        synth(configuration.parse(NETWORKS[name]), folder, seed=seed)
    return made


@pytest.fixture(scope="module", params=["reference", "cpu"])
def load(folders: dict[str, Path], request: pytest.FixtureRequest) -> Load:
    """Engines of one backend by network and numerics, each loaded once."""
    backend: str = request.param
    engines: dict[tuple[str, str], Engine] = {}

    def get(name: str, numerics: str = "deployed") -> Engine:
        if (name, numerics) not in engines:
            engines[name, numerics] = Engine.load(folders[name], backend=backend, numerics=numerics)  # type: ignore[arg-type]
        return engines[name, numerics]

    return get


@pytest.fixture
def v4(load: Load) -> Engine:
    return load("v4", "deployed")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices only lose by a second thread; the tests that need one ask for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text(count: int, seed: int = 0) -> list[int]:
    """Random token ids, the end of sequence not among them."""
    dice = random.Random(seed)
    return [dice.randrange(2, 61) for _ in range(count)]


def in_chunks_of(engine: Engine, tokens: int) -> Engine:
    return Engine(
        engine.config,
        engine.model,
        backend=engine.backend,
        exact=engine.exact,
        budget=engine.budget,
        chunk_tokens=tokens,
    )


def in_one_pass(engine: Engine, ids: Sequence[int]) -> Tensor:
    """Logits of every position, [len(ids), vocab], from a new session."""
    session = engine.session(max(1, len(ids)))
    assert len(ids) <= session.need.chunk_tokens
    return session.feed(ids, logits="all")


def in_pieces(session: Session, ids: Sequence[int], lengths: Iterator[int]) -> Tensor:
    parts, place = [], 0
    while place < len(ids):
        piece = ids[place : place + next(lengths)]
        parts.append(session.feed(piece, logits="all"))
        place += len(piece)
    return torch.cat(parts)


def random_lengths(seed: int) -> Iterator[int]:
    dice = random.Random(seed)
    while True:
        yield dice.choice((1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 64, 127, 128, 129))


# ---------------------------------------------------------------------------------------------- chunks and batches


@pytest.mark.parametrize(("name", "numerics"), EVERY)
@pytest.mark.parametrize("threads", [1, 2])
def test_any_chunking_is_one_shot(load: Load, name: str, numerics: str, threads: int) -> None:
    torch.set_num_threads(threads)
    engine, ids = load(name, numerics), text(400)
    whole = in_one_pass(engine, ids)
    assert whole.shape == (400, 61)
    assert whole.isfinite().all()
    for seed in range(3):
        assert torch.equal(in_pieces(engine.session(400), ids, random_lengths(seed)), whole)


@pytest.mark.parametrize(("name", "numerics"), EVERY)
def test_token_by_token_is_one_shot(load: Load, name: str, numerics: str) -> None:
    count = 140 if name == "v4-128" else 50
    engine, ids = load(name, numerics), text(count, seed=1)
    session = engine.session(count)
    one_by_one = torch.stack([session.feed([token]) for token in ids])
    assert torch.equal(one_by_one, in_one_pass(engine, ids))


def test_a_long_text_is_read_in_chunks(v4: Engine) -> None:
    small = in_chunks_of(v4, 16)
    ids = text(100)
    reports: list[int] = []
    session = small.session(100)
    assert torch.equal(session.feed(ids, logits="all", progress=reports.append), in_one_pass(v4, ids))
    assert reports == [16, 32, 48, 64, 80, 96, 100]
    assert session.tokens == tuple(ids)


@pytest.mark.parametrize(("name", "numerics"), EVERY)
def test_sessions_in_a_batch_are_as_alone(load: Load, name: str, numerics: str) -> None:
    engine = load(name, numerics)
    texts = {engine.session(200): text(140, seed) for seed in range(4)}
    alone = {session: in_one_pass(engine, ids) for session, ids in texts.items()}
    lengths = {session: random_lengths(seed) for seed, session in enumerate(texts)}
    while texts:
        batch = {session: ids[session.length :][: next(lengths[session])] for session, ids in texts.items()}
        logits = engine.step(batch)
        assert set(logits) == set(batch)
        for session, row in logits.items():
            assert torch.equal(row, alone[session][session.length - 1])
            assert torch.equal(session.last_logits, row)
        texts = {session: ids for session, ids in texts.items() if session.length < 140}


def test_numerics_make_a_difference(load: Load) -> None:
    for name in NETWORKS:
        deployed, exact = (in_one_pass(load(name, numerics), text(60)) for numerics in NUMERICS)
        assert not torch.equal(deployed, exact)
        assert float(torch.cosine_similarity(deployed, exact).mean()) > 0.8


def test_little_memory_gives_the_same_logits(folders: dict[str, Path], load: Load) -> None:
    for name, folder in folders.items():
        lean = Engine.load(folder, backend=load(name, "deployed").backend)
        least = lean.need(70)
        lean.budget = replace(lean.budget, memory_bytes=least.total_bytes - 1)
        ids = text(70)
        assert lean.need(70).tile_tokens < least.tile_tokens
        assert torch.equal(lean.session(70).feed(ids, logits="all"), in_one_pass(load(name, "deployed"), ids))


# ---------------------------------------------------------------------------------------------- rewinding


@pytest.mark.parametrize("name", ["v4", "v3.2"])
def test_rewinding_to_every_length(load: Load, name: str) -> None:
    engine, ids, others = load(name, "deployed"), text(41), text(9, seed=9)
    whole = in_one_pass(engine, ids)
    session = engine.session(200)
    for length in range(26):
        session.rewind(0)
        in_pieces(session, ids, random_lengths(length + 100))
        session.feed(others[: 1 + length % 7])  # what is rewound over need not be the same text
        session.rewind(length)
        assert session.tokens == tuple(ids[:length])
        assert session.kv_bytes() == engine.config.kv_bytes(length)
        assert length == 0 or torch.equal(session.last_logits, whole[length - 1])
        assert torch.equal(session.feed(ids[length:], logits="all"), whole[length:])


def test_rewinding_by_1_to_300_at_every_phase_of_128(load: Load) -> None:
    engine, ids = load("v4-128", "deployed"), text(303)
    whole = in_one_pass(engine, ids)
    session = engine.session(400)
    in_pieces(session, ids[:302], random_lengths(3))
    for length in range(301, 172, -1):  # each phase of 128
        session.rewind(length)
        assert torch.equal(session.last_logits, whole[length - 1])
        assert torch.equal(session.feed([ids[length]]), whole[length])
    for distance in (1, 2, 3, 4, 5, 100, 127, 128, 129, 255, 256, 257, 300):
        session.rewind(0)
        session.feed(ids[:302])
        session.rewind(302 - distance)
        assert torch.equal(session.feed(ids[302 - distance :], logits="all"), whole[302 - distance :])


def test_rewinding_a_long_timeline(v4: Engine) -> None:
    """Many restore points were made and dropped on the way."""
    small = in_chunks_of(v4, 100)
    ids = text(2500)
    whole = in_one_pass(v4, ids)
    session = small.session(2500)
    session.feed(ids)
    dice = random.Random(0)
    for length in sorted((dice.randrange(1, 2500) for _ in range(12)), reverse=True):
        session.rewind(length)
        assert torch.equal(session.feed(ids[length : length + 3]), whole[min(length + 3, 2500) - 1])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_used_session_forgets_a_text_that_was_rewound(v4: Engine, count: int) -> None:
    """A prompt shorter than a group must not pool the rows of the one before it (spec 9.5, 4)."""
    session, ids = v4.session(100), text(count + 20, seed=5)
    for start_over in (lambda: session.rewind(0), lambda: session.restore(v4.session(5).snapshot())):
        session.feed(text(43))
        start_over()
        assert session.length == 0
        assert session.kv_bytes() == v4.config.kv_bytes(0)
        with pytest.raises(UsageError, match="no tokens"):
            _ = session.last_logits
        found = torch.cat([session.feed(ids[:count], logits="all"), session.feed(ids[count:], logits="all")])
        assert torch.equal(found, in_one_pass(v4, ids))
        session.rewind(0)


# ---------------------------------------------------------------------------------------------- snapshots


@pytest.mark.parametrize(("name", "numerics"), EVERY)
def test_forks_of_one_snapshot(load: Load, name: str, numerics: str) -> None:
    engine, trunk = load(name, numerics), text(53)
    origin = engine.session(120)
    in_pieces(origin, trunk, random_lengths(1))
    state, sizes = origin.snapshot(), origin.kv_bytes()
    whole = in_one_pass(engine, trunk)
    origin.feed(text(30, seed=7))  # a snapshot is a copy
    for seed in range(3):
        branch, fork = text(40, seed=20 + seed), engine.session(93)
        fork.feed(text(1 + seed * 20))  # whatever was there is replaced
        fork.restore(state)
        assert fork.tokens == tuple(trunk)
        assert fork.kv_bytes() == sizes
        assert torch.equal(fork.feed(branch, logits="all"), in_one_pass(engine, trunk + branch)[53:])
        fork.rewind(51)
        assert torch.equal(fork.feed(trunk[51:]), whole[-1])


def test_a_snapshot_needs_room(v4: Engine) -> None:
    session = v4.session(30)
    session.feed(text(20))
    small = v4.session(19)
    small.feed(text(4))
    with pytest.raises(ContextTooLong, match="20 tokens"):
        small.restore(session.snapshot())
    assert small.length == 4


@pytest.mark.parametrize("other", [("v4", "exact"), ("v3.2", "deployed"), ("v4-128", "deployed")])
def test_a_snapshot_of_another_engine_is_refused(load: Load, v4: Engine, other: tuple[str, str]) -> None:
    stranger, session, ids = load(*other).session(30), v4.session(30), text(25)
    stranger.feed(ids)
    session.feed(ids)
    with pytest.raises(UsageError, match="engine"):
        session.restore(stranger.snapshot())
    assert torch.equal(session.feed(ids[:5], logits="all"), in_one_pass(v4, ids + ids[:5])[25:])


@pytest.mark.parametrize("name", NETWORKS)
def test_kv_bytes_are_those_of_the_config(load: Load, name: str) -> None:
    engine = load(name, "deployed")
    session, ids = engine.session(300), text(300)
    assert session.kv_bytes() == engine.config.kv_bytes(0)
    for length in (1, 2, 3, 4, 5, 7, 8, 9, 127, 128, 129, 131, 132, 255, 256, 300):
        session.feed(ids[session.length : length])
        assert session.kv_bytes() == engine.config.kv_bytes(length)
    for length in (299, 256, 200, 130, 127, 9, 8, 3, 0):
        session.rewind(length)
        assert session.kv_bytes() == engine.config.kv_bytes(length)


# ---------------------------------------------------------------------------------------------- passes that fail

SITES = {
    "v4": (
        "linear",
        "norm_rope_pack",
        "compress",
        "select_rows",
        "sparse_attention",
        "hc_merge",
        "experts",
        "rms_norm",
    ),
    "v3.2": ("linear", "pack_rows", "select_rows", "sparse_attention", "grouped_linear", "experts", "layer_norm"),
}


class Tripwire:
    """Raises at the k-th call of an operation, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str, site: str) -> None:
        _, operations = ops.select(backend, exact=False)
        self.operation = getattr(operations, site)
        self.calls, self.trip_at, self.error = 0, 0, RuntimeError("tripped")
        monkeypatch.setattr(operations, site, self)

    def arm(self, call: int, error: BaseException) -> None:
        self.calls, self.trip_at, self.error = 0, call, error  # type: ignore[assignment]

    def __call__(self, *args: Any, **words: Any) -> Any:
        self.calls += 1
        if self.calls == self.trip_at:
            raise self.error
        return self.operation(*args, **words)


@pytest.mark.parametrize(("name", "site"), [(name, site) for name, sites in SITES.items() for site in sites])
def test_a_pass_cut_short_leaves_no_trace(load: Load, monkeypatch: pytest.MonkeyPatch, name: str, site: str) -> None:
    engine, ids = load(name, "deployed"), text(60)
    whole = in_one_pass(engine, ids)
    session = engine.session(60)
    wire = Tripwire(monkeypatch, engine.backend, site)
    for length, count in ((0, 13), (27, 2), (31, 14), (3, 2)):
        session.rewind(0)
        if length:
            session.feed(ids[:length])
        wire.arm(0, RuntimeError())
        session.feed(ids[length : length + count])
        calls = wire.calls
        assert calls > 0
        for call in {1, calls // 2 + 1, calls}:
            session.rewind(length)
            wire.arm(call, KeyboardInterrupt() if call % 2 else RuntimeError("tripped"))
            with pytest.raises((KeyboardInterrupt, RuntimeError)):
                session.feed(ids[length : length + count])
            assert session.tokens == tuple(ids[:length])
            assert torch.equal(session.feed(ids[length:], logits="all"), whole[length:])


@pytest.mark.parametrize(("name", "numerics"), EVERY)
def test_a_token_cut_short_leaves_no_trace(load: Load, name: str, numerics: str) -> None:
    """Of one session and of two, the first pass of a size, which is recorded, and the replays alike."""
    engine, ids = load(name, numerics), text(60)
    whole = in_one_pass(engine, ids)
    session, other = engine.session(60), engine.session(60)
    for batch in ({session: ids[31:32]}, {session: ids[31:32], other: ids[15:16]}):
        stopped = 0
        for most in range(200):
            session.rewind(0)
            other.rewind(0)
            session.feed(ids[:31])
            other.feed(ids[:15])
            ticks = iter(range(most))
            with suppress(StopIteration):
                engine.step(batch, tick=lambda share, ticks=ticks: next(ticks))  # type: ignore[misc]
            if session.length == 32:
                break
            stopped += 1
            assert (session.length, other.length) == (31, 15)
            assert torch.equal(session.feed(ids[31:33], logits="all"), whole[31:33])
            assert torch.equal(other.feed(ids[15:17]), whole[16])
        assert stopped >= len(engine.config.layers)
        assert torch.equal(session.last_logits, whole[31])


@pytest.mark.parametrize(("name", "numerics"), EVERY)
def test_sessions_that_come_and_go_write_as_one_does(load: Load, name: str, numerics: str) -> None:
    """Each number of them is met before it is recorded, then, and as a replay; of more than one pass takes, too.

    They stand at places of their own, some passes are cut short, and now and then one leaves and another comes.
    """
    engine, dice = load(name, numerics), random.Random(5)
    ids = text(160)
    whole = in_one_pass(engine, ids)

    def newcomer() -> Session:
        session = engine.session(160)
        session.feed(ids[: dice.randrange(1, 140)])
        return session

    sessions = [newcomer() for _ in range(35)]
    for count in [1, 2, 3, 5, 32, 35] * 3:
        sessions[dice.randrange(35)] = newcomer()
        if dice.randrange(2):
            most = iter(range(dice.randrange(len(engine.config.layers))))
            before = {session: session.length for session in sessions[:count]}
            with pytest.raises(StopIteration):
                engine.step({one: [7] for one in before}, tick=lambda share, most=most: next(most))  # type: ignore[misc]
            assert {session: session.length for session in before} == before
        dice.shuffle(sessions)
        batch = {session: [ids[session.length]] for session in sessions[:count]}
        for session, logits in engine.step(batch).items():
            assert torch.equal(logits, whole[session.length - 1])
        sessions = [newcomer() if session.length == 160 else session for session in sessions]


@pytest.mark.parametrize("way", ["snapshot", "rewind", "step", "restore", "kv_bytes"])
def test_whatever_follows_a_pass_cut_short_is_right(v4: Engine, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    ids = text(60)
    whole = in_one_pass(v4, ids)
    session, other = v4.session(60), v4.session(60)
    session.feed(ids[:30])
    state = session.snapshot()
    wire = Tripwire(monkeypatch, other.engine.backend, "hc_merge")
    wire.arm(5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        v4.step({session: ids[30:40], other: ids[:7]})
    assert (session.length, other.length) == (30, 0)
    if way == "snapshot":
        copy = v4.session(60)
        copy.restore(session.snapshot())
        session = copy
    elif way == "rewind":
        session.rewind(29)
        session.feed(ids[29:30])
    elif way == "step":
        logits = v4.step({other: ids[:9], session: ids[30:33]})
        assert torch.equal(logits[other], whole[8])
        session.rewind(30)
    elif way == "restore":
        session.restore(state)
    else:
        session.snapshot()
        assert session.kv_bytes() == v4.config.kv_bytes(30)
    assert torch.equal(session.last_logits, whole[29])
    assert torch.equal(session.feed(ids[30:], logits="all"), whole[30:])


@pytest.mark.parametrize("length", [20, 150])
def test_a_recovery_that_is_cut_short_loses_no_tokens(load: Load, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Ctrl-C twice: the second one falls into the replay that puts the first one right."""
    engine, ids = load("v4", "deployed"), text(200)
    whole = in_one_pass(engine, ids)
    session = engine.session(200)
    for token in ids[:length]:
        session.feed([token])
    wire = Tripwire(monkeypatch, session.engine.backend, "hc_merge")
    for _ in range(3):
        wire.arm(3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            session.feed(ids[length : length + 2])
        assert session.length == length
    assert session.tokens == tuple(ids[:length])
    assert torch.equal(session.feed(ids[length:], logits="all"), whole[length:])


def test_a_rewind_that_is_cut_short_can_be_repeated(v4: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = text(100)
    whole = in_one_pass(v4, ids)
    session = v4.session(100)
    session.feed(ids)
    wire = Tripwire(monkeypatch, session.engine.backend, "hc_merge")
    wire.arm(3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        session.rewind(90)
    session.rewind(90)
    assert torch.equal(session.feed(ids[90:], logits="all"), whole[90:])


def test_progress_within_a_chunk_follows_the_time_of_the_chunk_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two layers the second takes nine tenths of the time."""
    now = [0.0]
    monkeypatch.setattr("tenfold.engine.time", SimpleNamespace(monotonic=lambda: now[0]))
    told: list[int] = []
    reports = _Reports(told.append)
    for start in (0, 1000):
        tick = reports.chunk(start, 1000)
        now[0] += 1.0
        tick(0.5)
        tick(0.5)  # in the middle of a layer: no further
        now[0] += 9.0
        tick(1.0)
    assert told == [500, 1100]


def test_a_progress_report_that_fails_leaves_what_was_read(v4: Engine) -> None:
    small = in_chunks_of(v4, 16)
    session, ids = small.session(100), text(100)

    def stop(tokens_read: int) -> None:
        if tokens_read >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.feed(ids, progress=stop)
    assert session.tokens == tuple(ids[:32])
    assert torch.equal(session.feed(ids[32:], logits="all"), in_one_pass(v4, ids)[32:])


@pytest.mark.parametrize(("name", "numerics"), EVERY)
@pytest.mark.parametrize("flops", [1, 30_000])
def test_attention_in_parts_is_attention_at_once(
    load: Load, monkeypatch: pytest.MonkeyPatch, name: str, numerics: str, flops: int
) -> None:
    """As in long contexts, where many queries at once would take too long: also the choice of rows, from the first."""
    engine, ids = load(name, numerics), text(150)
    whole = in_one_pass(engine, ids)
    calls = []
    for seen in (step._PART_FLOPS, flops):
        monkeypatch.setattr(step, "_PART_FLOPS", seen)
        shares: list[float] = []
        assert torch.equal(engine._run({engine.session(150): array("i", ids)}, every=True, tick=shares.append), whole)
        assert shares == sorted(shares)
        calls.append(len(shares))
    assert calls[1] > 2 * calls[0]


def in_tiles(session: Session, tile_tokens: int, wide_tokens: int) -> Session:
    """The same session with tiles of its own."""
    assert session.need.chunk_tokens >= wide_tokens
    session.need = replace(session.need, tile_tokens=tile_tokens, most_tile_tokens=tile_tokens, wide_tokens=wide_tokens)
    return session


@pytest.mark.parametrize(("name", "numerics"), EVERY)
@pytest.mark.parametrize("threads", [1, 2])
def test_experts_may_take_more_tokens_than_attention(
    load: Load, monkeypatch: pytest.MonkeyPatch, name: str, numerics: str, threads: int
) -> None:
    """All of a chunk or not, in one call or one for each expert: the same bits, and ticks in between."""
    torch.set_num_threads(threads)
    engine, ids = load(name, numerics), text(150)
    whole = in_one_pass(engine, ids)
    calls = []
    for flops in (cpu_linear._PART_FLOPS, 1):
        monkeypatch.setattr(cpu_linear, "_PART_FLOPS", flops)
        for tile, wide in ((16, 16), (16, 48), (40, 80), (7, 150)):
            session, shares = in_tiles(engine.session(150), tile, wide), list[float]()
            assert torch.equal(engine._run({session: array("i", ids)}, every=True, tick=shares.append), whole)
            assert shares == sorted(shares)
            assert shares[-1] == 1.0
        calls.append(len(shares))
    assert calls[1] > calls[0] or engine.backend == "reference"


def test_sessions_share_what_their_experts_take(v4: Engine) -> None:
    texts = {in_tiles(v4.session(150), 16, 48): text(150, seed) for seed in range(3)}
    found = v4.step(texts)
    for session, ids in texts.items():
        assert torch.equal(found[session], in_one_pass(v4, ids)[-1])


@pytest.mark.parametrize("wide", [16, 40])
def test_a_pass_can_be_stopped_within_a_layer(v4: Engine, monkeypatch: pytest.MonkeyPatch, wide: int) -> None:
    monkeypatch.setattr(step, "_PART_FLOPS", 1)
    monkeypatch.setattr(cpu_linear, "_PART_FLOPS", 1)
    ids = text(60)
    whole = in_one_pass(v4, ids)
    for most in range(0, 300, 13):
        session = in_tiles(v4.session(60), 16, wide)
        session.feed(ids[:20])
        ticks = iter(range(most))
        with suppress(StopIteration):
            v4._run({session: array("i", ids[20:50])}, every=False, tick=lambda share, ticks=ticks: next(ticks))  # type: ignore[misc]
        assert session.length in (20, 50)
        assert torch.equal(session.feed(ids[session.length :]), whole[-1])


# ---------------------------------------------------------------------------------------------- generating

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def test_greedy_text_is_the_argmax_each_time(v4: Engine) -> None:
    prompt = text(20)
    runs = []
    for _ in range(2):
        session = v4.session(100)
        session.feed(prompt)
        runs.append([sampled.id for sampled in session.generate(GREEDY)])
        assert session.tokens == (*prompt, *runs[-1])
    assert runs[0] == runs[1]
    assert 1 not in runs[0]
    logits = in_one_pass(v4, prompt + runs[0])[19:-1]
    assert runs[0] == logits.argmax(1).tolist()
    assert len(runs[0]) == 12


def test_a_seed_repeats_its_text_and_another_does_not(v4: Engine) -> None:
    def sample(seed: int) -> list[int]:
        session = v4.session(100)
        session.feed(text(20))
        return [s.id for s in session.generate(SamplingParams(seed=seed, max_tokens=20, temperature=2.0))]

    assert sample(1) == sample(1) != sample(2)


def test_generating_stops_at_the_end_of_sequence(v4: Engine) -> None:
    bias = {1: 100.0}
    session = v4.session(50)
    session.feed(text(5))
    assert list(session.generate(SamplingParams(temperature=0, logit_bias=bias))) == []
    assert session.length == 5
    params = SamplingParams(temperature=0, logit_bias=bias, ignore_eos=True, max_tokens=3)
    assert [s.id for s in session.generate(params)] == [1, 1, 1]
    assert session.length == 8


def test_generating_stops_when_the_context_is_full(v4: Engine) -> None:
    session = v4.session(24)
    session.feed(text(20))
    found = [s.id for s in session.generate(SamplingParams(temperature=0, ignore_eos=True))]
    assert len(found) == 4
    assert session.length == 24
    assert list(session.generate(GREEDY)) == []
    with pytest.raises(ContextTooLong, match="25 tokens"):
        session.feed([2])
    session.rewind(22)
    assert [s.id for s in session.generate(SamplingParams(temperature=0, ignore_eos=True))] == found[2:]


def test_generating_needs_a_prompt(v4: Engine) -> None:
    with pytest.raises(UsageError, match="prompt"):
        next(v4.session(10).generate(GREEDY))


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("ids", "error", "named"),
    [
        ([61], InputError, "61"),
        ([3, -1], InputError, "-1"),
        ([2] * 31, ContextTooLong, "31 tokens"),
        ("123", InputError, "123"),
        ([1.5], InputError, "1.5"),
        (["7"], InputError, "7"),
        ([None], InputError, "None"),
    ],
)
def test_tokens_that_cannot_be_fed(v4: Engine, ids: Any, error: type[Exception], named: str) -> None:
    session = v4.session(30)
    for feed in (session.feed, lambda ids: v4.step({session: ids})):
        with pytest.raises(error, match=named):
            feed(ids)
        assert session.length == 0


def test_tokens_may_come_as_any_sequence_of_integers(v4: Engine) -> None:
    import numpy as np

    ids = text(9)
    expected = in_one_pass(v4, ids)[-1]
    forms: list[Any] = [tuple(ids), torch.tensor(ids), np.array(ids), np.array(ids, dtype=np.uint16)]
    for form in forms:
        assert torch.equal(v4.session(9).feed(form), expected)


def test_empty_input(v4: Engine) -> None:
    session = v4.session(30)
    with pytest.raises(UsageError, match="no tokens"):
        session.feed([])
    assert session.feed([], logits="all").shape == (0, 61)
    with pytest.raises(InputError, match="no tokens"):
        v4.step({session: []})
    logits = session.feed([5, 6])
    assert torch.equal(session.feed([]), logits)
    assert session.length == 2


def test_a_step_of_no_sessions(v4: Engine) -> None:
    assert v4.step({}) == {}


def test_a_step_takes_sessions_of_its_own_engine_only(load: Load, v4: Engine) -> None:
    stranger = load("v4", "exact").session(30)
    with pytest.raises(UsageError, match="engine"):
        v4.step({stranger: [3]})
    assert stranger.length == 0


def test_one_bad_session_spoils_no_other(v4: Engine) -> None:
    good, full = v4.session(30), v4.session(2)
    full.feed([3, 4])
    with pytest.raises(ContextTooLong):
        v4.step({good: text(5), full: [2]})
    assert good.length == 0
    assert torch.equal(good.feed(text(5)), in_one_pass(v4, text(5))[-1])


def test_lengths_that_cannot_be(v4: Engine) -> None:
    session = v4.session(30)
    session.feed(text(5))
    for length in (-1, 6):
        with pytest.raises(UsageError, match="5"):
            session.rewind(length)
    for context in (0, -3, 4097):
        with pytest.raises(ContextTooLong, match="4,096"):
            v4.session(context)
    assert v4.session().context == 4096
    with pytest.raises(UsageError, match="'some'"):
        session.feed([3], logits="some")  # type: ignore[arg-type]
    assert session.length == 5


def test_arguments_of_load_are_checked(folders: dict[str, Path], tmp_path: Path) -> None:
    for words, error, named in (
        ({"numerics": "fast"}, UsageError, "'fast'"),
        ({"backend": "gpu"}, UsageError, "'gpu'"),
        ({"memory": "lots"}, UsageError, "'lots'"),
        ({"memory": 0}, UsageError, "'?0"),
        ({"store": __file__}, StoreError, "test_engine"),
        ({"threads": 0}, UsageError, "threads is 0"),
        ({"threads": 100_000}, UsageError, "threads is 100000"),
    ):
        with pytest.raises(error, match=named):
            Engine.load(folders["v4"], **words)
    with pytest.raises(ConfigError, match=r"config\.json"):
        Engine.load(tmp_path)
    with pytest.raises(UsageError, match="without weights"):
        Engine.load("v4-flash")


@pytest.mark.parametrize("wanted", [1, 2])
def test_threads_are_those_of_torch(folders: dict[str, Path], wanted: int) -> None:
    """And change no bit of what is computed."""
    whole = in_one_pass(Engine.load(folders["v4"]), text(60))
    assert torch.get_num_threads() == 1  # what it was, being less than the cores
    engine = Engine.load(folders["v4"], threads=min(wanted, this_machine().logical_cores))
    assert torch.get_num_threads() == min(wanted, this_machine().logical_cores)
    assert torch.equal(in_one_pass(engine, text(60)), whole)


@pytest.mark.parametrize(
    ("size", "expected"), [("12G", 12 << 30), ("512M", 512 << 20), (1000, 1000), ("1.5 KiB", 1536)]
)
def test_sizes_of_memory(size: str | int, expected: int) -> None:
    assert parse_bytes(size) == expected


def test_a_size_that_is_none_is_named() -> None:
    with pytest.raises(UsageError, match="--store-limit is '0', expected a positive size"):
        parse_bytes("0", "--store-limit")


def test_the_public_surface_is_that_of_the_design() -> None:
    loaded = list(inspect.signature(Engine.load).parameters)
    assert loaded == ["source", "backend", "numerics", "memory", "store", "count", "threads"]
    for owner, names in (
        (Session, ("feed", "tokens", "length", "kv_bytes", "rewind", "snapshot", "restore", "generate")),
        (Engine, ("load", "session", "step")),
    ):
        for name in names:
            assert getattr(owner, name).__doc__ or name in ("tokens", "length")
