"""The second stage: lessons with facts, leaps of positions, looking up, growing, going on where a run stopped."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from training.bpe import END_ID, TOKENIZER_DIR, encode
from training.data import DOCUMENT
from training.export import export
from training.facts import DIGITS, LONGEST, Lessons, Teacher
from training.model import Asked, Batch, Crowd, TrainingModel, initial, recall_loss, stack_name, tiny_config
from training.model_v32 import NAMES_ASKED, NAMES_TOLD, TrainingModelV32, _loss_before, _loss_names
from training.models import CONFIGS
from training.ops import TILE, TrainingOps, attend
from training.recall import Plan, Pupil, Stage, _entries_of_text, token_weights

from tenfold import config as configuration
from tenfold.config import DeepseekV32Config
from tenfold.formats import F32
from tenfold.models import Binder, build
from tenfold.needle import ATTRIBUTES, FIRST_WORDS, SECOND_WORDS
from tenfold.ops import Weight, reference
from tenfold.step import Span, Step
from tenfold.streams import Streams
from training import grow

PLAIN = TrainingOps(torch.float32, compiled=False)
TOKENIZER = Tokenizer.from_file(str(TOKENIZER_DIR / "tokenizer.json"))
SMALL = {"hidden_size": 64, "q_lora_rank": 64, "moe_intermediate_size": 64, "num_hash_layers": 1, "vocab_size": 2048}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    np.save(folder / "train.npy", encode(TOKENIZER, [DOCUMENT.read_text(encoding="utf-8")[:60_000]]))
    return folder


@pytest.fixture(scope="module")
def lessons(work: Path) -> Lessons:
    return Teacher(work, 0).batch(3, 2, 4 * TILE, facts=(6, 9))


def test_what_is_asked_is_what_is_told(lessons: Lessons) -> None:
    asked = lessons.ids[:, 1:].flatten()[lessons.asked]
    told = lessons.ids[:, :-1].flatten()[lessons.told]
    assert torch.equal(asked, told)
    assert len(asked) % DIGITS == 0
    assert (lessons.told < lessons.asked).all()
    assert not lessons.is_text.flatten()[lessons.asked].any()
    text = TOKENIZER.decode(lessons.ids[0].tolist())
    assert text.count("Q: What is the ") == text.count("\nA: ") > 1
    assert int(lessons.ids[0, 0]) == END_ID


def test_positions_leap_by_whole_tiles_and_never_within_a_fact(work: Path) -> None:
    teacher = Teacher(work, 1)
    furthest = 0
    for step in range(12):
        found = teacher.batch(step, 1, 4 * TILE, facts=(2, 4))
        steps = found.positions[0].diff()
        leaps = torch.nonzero(steps != 1)[:, 0] + 1
        assert (leaps % TILE == 0).all()
        assert (steps[leaps - 1] % TILE == 1).all()
        assert (steps >= 1).all()
        for asked, told in zip(found.asked.tolist(), found.told.tolist(), strict=True):
            assert found.positions[0, told] - found.positions[0, told - 10] == 10
            assert found.positions[0, asked] - found.positions[0, asked - 16] == 16
        furthest = max(furthest, int(found.positions.max()))
    assert LONGEST // 16 < furthest < LONGEST


def test_far_lessons_reach_beyond_a_quarter_of_all_positions(work: Path) -> None:
    teacher = Teacher(work, 2)

    def ends(far: float) -> list[int]:
        return [int(teacher.batch(n, 1, 4 * TILE, facts=(2, 4), far=far).positions.max()) for n in range(24)]

    near, far = (sum(end > LONGEST // 8 for end in ends(share)) for share in (0.0, 1.0))
    assert far > 2 * near


def test_a_crowd_is_so_many_more_to_tell_from_the_right_one(lessons: Lessons) -> None:
    asked = Asked(lessons.asked, lessons.told)
    scores = torch.randn(len(lessons.asked), 2, 2 * TILE)  # two lessons, an entry for four tokens
    others = torch.randn(len(lessons.asked), 2, 5)
    crowd = Crowd(5, 3.0)
    alone = Batch.of(lessons.ids[:, :-1], True, lessons.positions, asked)
    crowded = Batch.of(lessons.ids[:, :-1], True, lessons.positions, asked, crowd)
    threefold = torch.cat([scores, others.repeat(1, 1, 3)], 2)
    places = torch.arange(2 * TILE) - (lessons.told // 4)[:, None]
    right = scores.masked_fill(~((places >= 0) & (places <= 1))[:, None], -torch.inf).logsumexp(2)
    assert recall_loss(alone, scores) < recall_loss(crowded, scores, others)
    own = torch.arange(2 * TILE) // TILE == (lessons.asked // (4 * TILE))[:, None]
    late = own & (torch.arange(2 * TILE) % TILE >= ((lessons.asked % (4 * TILE) + 1) // 4)[:, None])
    visible = threefold.masked_fill(torch.nn.functional.pad(late, (0, 15))[:, None], -torch.inf)
    torch.testing.assert_close(recall_loss(crowded, scores, others), (visible.logsumexp(2) - right).mean())


def test_only_entries_of_text_join_the_crowd(lessons: Lessons) -> None:
    text = _entries_of_text(lessons.is_text, 2 * TILE)
    assert text.any()
    assert not text[lessons.told // 4].any()
    assert not text[lessons.asked // 4].any()
    crowd = Crowd(3, 1.0)
    for number in range(2):
        crowd.add(torch.full((2, 8), float(number)), torch.full((2, 4), float(number)))
    assert crowd.rows[:, 0].tolist() == [0, 1, 1]  # the oldest went
    assert crowd.keys.shape == (3, 4)


def test_the_weights_of_a_lesson_are_shared_out(lessons: Lessons) -> None:
    weights = token_weights(lessons, Plan(text_weight=1.0, answer_weight=2.0, form_weight=0.5))
    assert float(weights.sum()) == pytest.approx(3.5)
    assert float(weights[lessons.asked].sum()) == pytest.approx(1.6)  # four of five tokens of an answer


def test_a_copy_counts_as_an_entry() -> None:
    torch.manual_seed(0)
    q, rows, sink = torch.randn(1, 2 * TILE, 2, 8), torch.randn(1, 2 * TILE, 8), torch.randn(2)
    entry = torch.randn(1, 1, 8)
    once, _ = attend(q, rows, entry.expand(-1, 2, -1), sink, None, TILE, 0.3, False)
    copied, _ = attend(q, rows, entry, sink, None, TILE, 0.3, False, copies=torch.tensor([2.0]))
    torch.testing.assert_close(copied[:, -1], once[:, -1])  # the last query alone sees both entries


def test_behind_a_leap_the_window_begins_anew() -> None:
    torch.manual_seed(0)
    q, rows, sink = torch.randn(1, 2 * TILE, 2, 8), torch.randn(1, 2 * TILE, 8), torch.randn(2)
    leaps = torch.tensor([[False, True]])
    out, _ = attend(q, rows, rows[:, :0], sink, None, 0, 0.3, False, leaps)
    alone, _ = attend(q[:, TILE:], rows[:, TILE:], rows[:, :0], sink, None, 0, 0.3, False)
    torch.testing.assert_close(out[:, TILE:], alone)


def test_looking_up_is_attention_of_the_tokens_that_ask(lessons: Lessons) -> None:
    config = tiny_config(**SMALL)
    model = TrainingModel(config, initial(config, 0), PLAIN, quantised=False)
    here = lessons.asked < 4 * TILE
    asked = Asked(lessons.asked[here], lessons.told[here])
    batch = Batch.of(lessons.ids[:1, :-1], True, lessons.positions[:1], asked)
    x = torch.randn(4 * TILE, config.hidden_size)
    attention = model.network.blocks[model.recall_layer].attn
    wanted = attention.forward(x, batch)[asked.tokens]
    torch.testing.assert_close(attention.look_up(x, batch), wanted, rtol=1e-3, atol=1e-4)  # type: ignore[attr-defined]


def test_a_grown_network_computes_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grow, "QUIET", 0.0)
    config = tiny_config(**SMALL, index_topk=512)
    export(config, initial(config, 0), tmp_path)
    larger = tiny_config(**SMALL | {"num_hash_layers": 2}, **LARGER)
    ids = torch.randint(5, 2048, (1, 2 * TILE))
    _, weights = grow.loaded(tmp_path)
    with torch.no_grad():
        wanted = TrainingModel(config, weights, PLAIN, quantised=False).logits(ids)
        new = grow.grown(tmp_path, larger, initial(larger, 1))
        found = TrainingModel(larger, new, PLAIN, quantised=False).logits(ids)
    # the streams of a new layer keep almost to themselves
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_v32_is_trained_as_the_engine_computes_it() -> None:
    raw = dict(CONFIGS["tiny-v3.2"].raw) | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "index_topk": 512,
    }
    config = configuration.parse(raw)
    assert isinstance(config, DeepseekV32Config)
    generator = torch.Generator().manual_seed(0)
    weights = {n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in initial(config, 0).items()}

    def take(name: str) -> Weight:
        stack, place = stack_name(name)
        value = weights[stack] if place is None else weights[stack][place]
        return Weight(name, tuple(value.shape), F32, value)

    ids = torch.randint(64, (1, 200), generator=generator)
    everything = torch.arange(200)
    streams = Streams(config, 200, exact=True)
    step = Step(ids[0], everything, (Span(streams, 0, 200, 0),), everything, 200)
    with torch.no_grad():
        wanted = build(config, Binder(take, reference, resident=True, exact=True)).forward(step)
        found = TrainingModelV32(config, weights, PLAIN, quantised=False).logits(ids)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_looking_back_skips_leaps() -> None:
    positions = torch.tensor([[0, 1, 2, 10, 11]])
    step = Batch.of(torch.zeros(1, 5, dtype=torch.int64), True, positions)
    shares = torch.full((1, 2, 5, 5), 1e-3)
    for query, key in ((1, 0), (2, 1), (4, 3)):
        shares[0, 0, query, key] = 0.5
    shares[0, 1, 2, 0] = 0.25  # the only token with another two before it
    assert float(_loss_before(shares, step)) == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_a_digit_and_who_asks_for_it_gather_the_same_names(lessons: Lessons) -> None:
    asked, length = Asked(lessons.asked, lessons.told), 4 * TILE
    ids, digit = lessons.ids[:, :-1].flatten(), torch.arange(len(lessons.told)) % DIGITS
    scores = torch.zeros(len(ids), 3, length)
    for tokens, words in ((asked.told, NAMES_TOLD), (asked.tokens, NAMES_ASKED)):
        for head, back in enumerate(words):
            scores[tokens, head, (tokens - digit - back) % length] = 50.0
    for told, by_question, known in zip(NAMES_TOLD, NAMES_ASKED, (ATTRIBUTES, FIRST_WORDS, SECOND_WORDS), strict=True):
        names = ids[asked.told - digit - told]
        assert torch.equal(names, ids[asked.tokens - digit - by_question])
        assert {TOKENIZER.decode([name]).strip() for name in names.tolist()} <= {word.split()[0] for word in known}
    assert float(_loss_names(scores, asked, length)) == pytest.approx(0.0, abs=1e-6)
    assert float(_loss_names(torch.zeros_like(scores), asked, length)) == pytest.approx(math.log(length))


LARGER = {
    "compress_ratios": [0, 0, 4, 128, 4, 0],
    "head_dim": 192,
    "index_head_dim": 128,
    "index_topk": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 5,
    "o_groups": 4,
}


def test_a_pupil_learns_and_goes_on_where_it_stopped(work: Path, tmp_path: Path) -> None:
    config = tiny_config(**SMALL)
    tokens = 2 * TILE
    looking = Stage(6 * tokens, tokens, 1, (2, 3), (1.0, 1.0), looking_up=True)
    whole = Stage(9 * tokens, tokens, 1, (2, 3), (1.0, 0.1), selects=True, quantised=True, crowd=64)
    plan = Plan(stages=(looking, whole), warmup_steps=1, attention_rate=4e-3, other_rate=4e-3)

    def pupil() -> Pupil:
        return Pupil(config, initial(config, 0), plan, Teacher(work, 0))

    one = pupil()
    figures = [one.step() for _ in range(6)]
    assert figures[-1]["answer"] < 0.9 * figures[0]["answer"]
    one.save(tmp_path)
    other = pupil()
    other.restore(torch.load(tmp_path / "last.pt", weights_only=True))
    assert other.progress == replace(one.progress)
    assert other.step() == pytest.approx(one.step(), rel=1e-3)


def test_a_stage_sets_the_rate() -> None:
    plan = Plan(stages=(Stage(1000, 10, 1, (1, 1), (1.0, 0.5)), Stage(2000, 10, 1, (1, 1), (0.4, 0.0))), warmup_steps=1)
    assert plan.at(0)[1] == pytest.approx(1.0)
    assert plan.at(990)[1] == pytest.approx(0.505)
    stage, rate = plan.at(1000)
    assert stage == plan.stages[1]
    assert rate == pytest.approx(0.4)
