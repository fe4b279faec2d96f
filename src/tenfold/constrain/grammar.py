"""A demand -> a grammar in llguidance's text form. Knows JSON schemas and DSML; of tokens, nothing but one id.

A call's parameters are written one by one, each name once, in any order, required ones always. A parameter that may be
a string is written as it is, any other as JSON; both are held to the schema. Of strings written as they are `enum`,
`const`, `pattern` and lengths are enforced, a `format` is not. Parameters beyond the declared ones are generated only
where none are declared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import regex_to_lark

from tenfold.errors import InputError

__all__ = ["Tool", "json_grammar", "loosened", "parameter_grammars", "regex_grammar", "tool_grammar", "tools_of"]

_MOST_CHARS = 1 << 20
_MOST_TOOLS = 128
_MOST_IN_ANY_ORDER = 64  # the bits of a rule's argument; more parameters keep the order they are declared in
_MOST_SHAPES = 16
_MOST_HOPS = 16
_BLANKS = r"[ \t]{1,2}|\r?\n[ \t]{0,40}"  # one line end with its indentation: who may write blanks for ever does
_AS_IT_IS = r"/(?s:.*)<\//"  # no control token is text, so what follows the last "</" is the grammar's
_ANY_NAME = "/[A-Za-z_][A-Za-z0-9_.-]{0,63}/"

Schema = Any  # a mapping, true or false, as JSON schemas are


# ------------------------------------------------------------------------------------------ json, regex


def json_grammar(schema: str) -> str:
    """One JSON value that follows the schema; without a schema, any JSON object."""
    return f"%llguidance {{}}\nstart: {_json(_parsed(schema) if schema else {'type': 'object'})}\n"


def regex_grammar(pattern: str) -> str:
    """A whole output that the pattern matches."""
    if len(pattern) > _MOST_CHARS:
        raise InputError(_too_long(pattern))
    return "%llguidance {}\nstart: /" + regex_to_lark(pattern, "") + "/\n"


def _parsed(schema: str) -> Any:
    if len(schema) > _MOST_CHARS:
        raise InputError(_too_long(schema))
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as exc:
        raise InputError(f"the schema is not usable JSON ({type(exc).__name__}); correct it") from exc


def _too_long(text: str) -> str:
    return f"the schema has {len(text):,} characters, expected at most {_MOST_CHARS:,}; simplify it"


def _json(schema: Schema, *, lenient: bool = False) -> str:
    document = schema if isinstance(schema, dict) else {"allOf": [schema]}
    return "%json " + json.dumps({**document, "x-guidance": {"whitespace_pattern": _BLANKS, "lenient": lenient}})


# ------------------------------------------------------------------------------------------ tools


@dataclass(frozen=True, slots=True)
class _Shape:
    """One way an object may look: the schemas of its parameters, those it must have, and that of any other."""

    properties: Mapping[str, Schema]
    required: frozenset[str]
    others: Schema

    def also(self, other: _Shape) -> _Shape:
        """Both at once."""
        properties = dict(self.properties)
        for name, schema in other.properties.items():
            properties[name] = {"allOf": [properties[name], schema]} if name in properties else schema
        others = False if False in (self.others, other.others) else other.others
        return _Shape(properties, self.required | other.required, others)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called. `strict`: a schema that cannot be enforced is refused, not loosened."""

    name: str
    strict: bool
    root: Mapping[str, Any]
    shapes: tuple[_Shape, ...]


def tools_of(schema: str) -> list[Tool]:
    """The tools of a demand: a JSON array of Chat Completions function tools."""
    listed = _parsed(schema)
    if not isinstance(listed, list) or not 1 <= len(listed) <= _MOST_TOOLS:
        raise InputError(f"expected 1 to {_MOST_TOOLS} tools in a list; leave some out")
    return [_tool(one["function"]) for one in listed]


def _tool(function: Mapping[str, Any]) -> Tool:
    name = _written(function["name"], "a tool")
    root = function.get("parameters") or {}
    if not isinstance(root, dict) or root.get("type", "object") != "object":
        raise InputError(f"the parameters of tool {name} are no object; give them a schema of type object")
    shapes = tuple(_shapes(root, root, 0))
    if len(shapes) > _MOST_SHAPES:
        raise InputError(f"tool {name} has {len(shapes)} alternatives of parameters, expected at most {_MOST_SHAPES}")
    for parameter in {parameter for shape in shapes for parameter in shape.properties}:
        _written(parameter, f"a parameter of tool {name}")
    return Tool(name, bool(function.get("strict")), root, shapes)


def _written(name: str, of: str) -> str:
    """A name that can stand between the quotation marks of a tag."""
    if not name or not name.isprintable() or '"' in name or "｜" in name or len(name) > 256:
        raise InputError(f"the name of {of} is {name[:80]!r}, which no call can spell; use letters, digits, _ and -")
    return name


def _shapes(schema: Schema, root: Mapping[str, Any], depth: int) -> list[_Shape]:
    """The alternatives of an object schema, at least one."""
    schema = _resolved(schema, root)
    if not isinstance(schema, dict) or depth > _MOST_HOPS:
        return [_Shape({}, frozenset(), schema is not False)]
    properties = {name: one for name, one in schema.get("properties", {}).items() if one is not False}
    required = frozenset(schema.get("required", ()))
    others = schema.get("additionalProperties", True)
    declared = {**properties, **{name: others or {} for name in sorted(required - set(properties))}}
    shapes = [_Shape(declared, required, others)]
    for parts in [[one] for one in schema.get("allOf", ())] + [schema.get(word, []) for word in ("anyOf", "oneOf")]:
        if parts:
            inner = [shape for part in parts for shape in _shapes(part, root, depth + 1)]
            shapes = [one.also(two) for one in shapes[:_MOST_SHAPES] for two in inner[: _MOST_SHAPES + 1]]
    return shapes


def _resolved(schema: Schema, root: Mapping[str, Any]) -> Schema:
    """Where a `$ref` within the document leads; {} where it leads nowhere, or in a circle."""
    for _ in range(_MOST_HOPS):
        if not isinstance(schema, dict) or "$ref" not in schema:
            return schema
        target: Any = root
        for step in str(schema["$ref"]).removeprefix("#").split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            target = target.get(step, {}) if isinstance(target, dict) else {}
        schema = target
    return {}


def loosened(tool: Tool, names: set[str]) -> Tool:
    """The tool with any value allowed for the parameters named."""

    def loose(shape: _Shape) -> _Shape:
        properties = {name: {} if name in names else one for name, one in shape.properties.items()}
        return _Shape(properties, shape.required, shape.others if isinstance(shape.others, bool) else {})

    return Tool(tool.name, tool.strict, tool.root, tuple(map(loose, tool.shapes)))


def parameter_grammars(tool: Tool) -> Iterator[tuple[str, str]]:
    """Each parameter with a grammar of its values alone, to find the one that cannot be enforced."""
    for shape in tool.shapes:
        for name, schema in shape.properties.items():
            yield name, "%llguidance {}\nstart: " + " | ".join(_values(schema, tool)) + "\ndsml: /x/\n"


def tool_grammar(
    tools: Sequence[Tool], dsml_id: int, *, required: bool = False, in_call: bool = False, block: str = "tool_calls"
) -> str:
    """Text, then perhaps one block of calls; only the block where `required`, only its rest where `in_call`.

    `dsml_id` is the control token without which no tag can be written; `block` is the tag of the block.
    """
    calls = f'call+ "</" dsml "{block}>"'
    opened = f'"<" dsml "{block}>\\n" {calls}'
    start = calls if in_call else f'"\\n\\n"? {opened}' if required else f'TEXT | BEFORE dsml "{block}>\\n" {calls}'
    lines = [
        "%llguidance {}",
        f"start: {start}",
        "TEXT: /(?s:.*)/",
        "BEFORE: /(?s:.*)</",
        f"dsml: <[{dsml_id}]>",
        'call: "<" dsml "invoke name=\\"" (' + " | ".join(f"tool_{i}" for i in range(len(tools))) + ")",
    ]
    for i, tool in enumerate(tools):
        shapes = [f"tool_{i}_{j}" + ("::0x0" if _any_order(one) else "") for j, one in enumerate(tool.shapes)]
        lines.append(f'tool_{i}: {json.dumps(tool.name)} "\\">\\n" ({" | ".join(shapes)})')
        for j, shape in enumerate(tool.shapes):
            lines += _parameters(f"tool_{i}_{j}", shape, tool)
    return "\n".join(lines) + "\n"


_INVOKE_END = '"</" dsml "invoke>\\n"'


def _any_order(shape: _Shape) -> bool:
    return 0 < len(shape.properties) <= _MOST_IN_ANY_ORDER


def _parameters(rule: str, shape: _Shape, tool: Tool) -> Iterator[str]:
    """The rules of the parameters up to the end of the call; a bit for each that has been written."""
    if not shape.properties:
        others = "" if shape.others is False else f"({_parameter(_ANY_NAME, shape.others, tool)})* "
        yield f"{rule}: {others}{_INVOKE_END}"
        return
    for k, (name, schema) in enumerate(shape.properties.items()):
        yield f"{rule}_{k}: {_parameter(json.dumps(name), schema, tool)}"
    if not _any_order(shape):
        parts = [f"{rule}_{k}{'' if name in shape.required else '?'}" for k, name in enumerate(shape.properties)]
        yield f"{rule}: {' '.join(parts)} {_INVOKE_END}"
        return
    missing = "true"
    for k, name in enumerate(shape.properties):
        if name in shape.required:
            missing = f"and(bit_set({k}), {missing})"
    yield f"{rule}::_: {_INVOKE_END} %if {missing}"
    for k in range(len(shape.properties)):
        yield f"  | {rule}_{k} {rule}::set_bit({k}) %if bit_clear({k})"


def _parameter(name: str, schema: Schema, tool: Tool) -> str:
    return f'"<" dsml "parameter name=\\"" {name} "\\" string=\\"" ({" | ".join(_values(schema, tool))})'


def _values(schema: Schema, tool: Tool) -> list[str]:
    """How a value may be written, from behind `string="` to the end of its line."""
    values = []
    if strings := list(_strings(schema, tool, 0)):
        values.append(f'"true\\">" ({" | ".join(strings)}) dsml "parameter>\\n"')
    if not strings or _other_than_string(schema, tool, 0):
        document = {**schema, **_definitions(tool.root)} if isinstance(schema, dict) else schema
        values.append(f'"false\\">" {_json(document, lenient=not tool.strict)} "</" dsml "parameter>\\n"')
    return values


def _definitions(root: Mapping[str, Any]) -> dict[str, Any]:
    return {word: root[word] for word in ("$defs", "definitions") if word in root}


def _strings(schema: Schema, tool: Tool, depth: int) -> Iterator[str]:
    """Terminals for the strings among a schema's values, each with the "</" behind it; none if there are none."""
    schema = _resolved(schema, tool.root)
    if not isinstance(schema, dict) or depth > _MOST_HOPS:
        if schema is not False:
            yield _AS_IT_IS
        return
    members = [schema["const"]] if "const" in schema else schema.get("enum")
    alternatives = schema.get("anyOf") or schema.get("oneOf") or (schema.get("allOf", ()) if _alone(schema) else ())
    if members is not None:
        yield from dict.fromkeys(json.dumps(f"{one}</") for one in members if isinstance(one, str) and "｜" not in one)
    elif "type" in schema and "string" not in _types(schema):
        return
    elif alternatives:
        for one in alternatives:
            yield from _strings(one, tool, depth + 1)
    else:
        yield _string(schema)


def _alone(schema: Mapping[str, Any]) -> bool:
    return len(schema.get("allOf", ())) == 1


def _types(schema: Mapping[str, Any]) -> list[Any]:
    types = schema["type"]
    return types if isinstance(types, list) else [types]


def _string(schema: Mapping[str, Any]) -> str:
    """A terminal for strings of a pattern and length."""
    parts = []
    if (pattern := _whole(schema.get("pattern", ""))) is not None:
        parts.append(f"/{pattern}/")
    if "minLength" in schema or "maxLength" in schema:
        parts.append(f"/(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})/")
    return f'({" & ".join(parts)}) "</"' if parts else _AS_IT_IS


def _whole(pattern: str) -> str | None:
    """The pattern of a schema, which may match anywhere, as one of the whole string; None if there is none to hold to.

    Anchors beside alternatives, and those not at the ends, have no such form: such a pattern is left aside.
    """
    starts, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[starts : len(pattern) - ends]
    if not pattern or ((starts or ends) and "|" in inner):
        return None
    return ("" if starts else "(?s:.*)") + f"(?:{regex_to_lark(inner, 'dw')})" + ("" if ends else "(?s:.*)")


def _other_than_string(schema: Schema, tool: Tool, depth: int) -> bool:
    schema = _resolved(schema, tool.root)
    if not isinstance(schema, dict) or depth > _MOST_HOPS:
        return schema is not False
    members = [schema["const"]] if "const" in schema else schema.get("enum")
    if members is not None:
        return not all(isinstance(one, str) for one in members)
    if "type" in schema:
        return _types(schema) != ["string"]
    alternatives = schema.get("anyOf") or schema.get("oneOf") or (schema.get("allOf", ()) if _alone(schema) else ())
    return not alternatives or any(_other_than_string(one, tool, depth + 1) for one in alternatives)
