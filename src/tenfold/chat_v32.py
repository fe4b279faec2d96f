"""V3.2's chat grammar: messages -> prompt, completion -> events. Knows V3.2 only; `chat` is the door to it.

The structure is the checkpoint's: roles, thinking, call blocks, result blocks. Two texts are in our own words
and not the checkpoint's: the instructions around the tool schemas and the sentence above a response schema.
So a prompt is as trained for, unless it has tools or a response format. Knows nothing of token ids.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tenfold.errors import InputError
from tenfold.tokenizer import Prompt

__all__ = ["BOS", "CONTROL_TOKENS", "Event", "Parser", "compose", "text_of"]

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"

CONTROL_TOKENS = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML)

_CONTROL = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
_CALLS = f"<{DSML}function_calls>"
_CALLS_END = f"</{DSML}function_calls>"
_INVOKE_END = f"</{DSML}invoke>"
_PARAMETER_END = f"</{DSML}parameter>"

_TOOLS = f"""## Tools

The tools described below can be called to help with the user's request. Calls are written as one block:

{_CALLS}
<{DSML}invoke name="$FUNCTION_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{_PARAMETER_END}
...
{_INVOKE_END}
...
{_CALLS_END}

A parameter that is a string is written as it is, marked `string="true"`. A parameter of any other type \
(number, boolean, array, object) is written as JSON, marked `string="false"`.

If thinking is on, which {THINK} shows, all reasoning comes first, inside {THINK}...{END_THINK}, and only \
then the calls or the answer.

The schemas of the tools:

<functions>
"""
_TOOLS_END = "\n</functions>\n"
_RESPONSE_FORMAT = "## Response Format:\n\nThe reply must be JSON that follows this schema exactly:\n"


@dataclass(frozen=True, slots=True)
class Event:
    """A piece of a completion.

    The first `tool_call` event of a call has its `id` and `name`; the texts of all events with its `index`
    add up to the call's arguments as JSON.
    """

    kind: Literal["reasoning", "content", "tool_call"]
    text: str
    index: int = 0
    id: str = ""
    name: str = ""


class _Script:
    """A prompt in the making: `grammar` may hold control tokens, `content` never does."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._ranges: list[tuple[int, int]] = []
        self._length = 0

    def grammar(self, text: str) -> None:
        self._ranges += [(self._length + m.start(), self._length + m.end()) for m in _CONTROL.finditer(text)]
        self.content(text)

    def content(self, text: str) -> None:
        self._texts.append(text)
        self._length += len(text)

    def prompt(self) -> Prompt:
        return Prompt("".join(self._texts), tuple(self._ranges))


def text_of(content: Any) -> str:
    """The text of a message's `content`: a string, null, or a list of text parts."""
    if isinstance(content, list):
        return "\n\n".join(part["text"] for part in content)
    return content or ""


def compose(
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool,
    tools: Sequence[Mapping[str, Any]] = (),
    response_format: Mapping[str, Any] | None = None,
) -> Prompt:
    """The prompt that asks for the next assistant message.

    Tools and response format belong to the system text, which comes first. When thinking, reasoning is kept
    after the last user message only, and developer messages before it are left out.
    """
    turns = _turns(messages)
    script = _Script()
    script.grammar(BOS)
    if turns and turns[0].role == "system":
        script.content(text_of(turns.pop(0).message["content"]))
    _write_tools(script, tools)
    _write_response_format(script, response_format)
    _write_turns(script, turns, thinking)
    return script.prompt()


@dataclass(frozen=True, slots=True)
class _Turn:
    """A message, and the tool results that answer its calls."""

    message: Mapping[str, Any]
    results: list[Mapping[str, Any]]

    @property
    def role(self) -> str:
        return str(self.message["role"])

    @property
    def calls(self) -> Sequence[Mapping[str, Any]]:
        return self.message.get("tool_calls") or ()


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[_Turn]:
    turns: list[_Turn] = []
    for message in messages:
        if message["role"] != "tool":
            turns.append(_Turn(message, []))
        elif turns and turns[-1].calls:
            turns[-1].results.append(message)
        else:
            raise InputError("a tool message follows no assistant message with tool_calls; put it behind its call")
    if not turns or (turns[-1].role in ("system", "assistant") and not turns[-1].results):
        raise InputError("there is nothing to answer; the last message must be from a user, developer or tool")
    return turns


def _write_turns(script: _Script, turns: Sequence[_Turn], thinking: bool) -> None:
    last_user = max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)
    for index, turn in enumerate(turns):
        thinks = thinking and index >= last_user
        if turn.role == "assistant":
            _write_assistant(script, turn, thinks)
            _write_results(script, turn, thinks)
        elif turn.role == "system":
            script.content(text_of(turn.message["content"]))
        elif turn.role == "user" or index == last_user or not thinking:
            script.grammar(USER)
            script.content("\n\n# The user's message is: " if turn.role == "developer" else "")
            script.content(text_of(turn.message["content"]))
            script.grammar(ASSISTANT + (THINK if thinks else END_THINK))


def _write_assistant(script: _Script, turn: _Turn, thinks: bool) -> None:
    if thinks:
        reasoning = turn.message.get("reasoning_content") or ""
        if not reasoning and not turn.calls:
            raise InputError(
                "an assistant message after the last user message has neither reasoning_content nor calls, "
                "expected one of them when thinking; add its reasoning_content or turn thinking off"
            )
        script.content(reasoning)
        script.grammar(END_THINK)
    script.content(text_of(turn.message.get("content")))
    if turn.calls:
        script.grammar(f"\n\n{_CALLS}\n")
        for number, call in enumerate(turn.calls):
            _write_call(script, call["function"], "\n" if number else "")
        script.grammar(f"\n{_CALLS_END}")
    script.grammar(EOS)


def _write_call(script: _Script, function: Mapping[str, Any], separator: str) -> None:
    script.grammar(f'{separator}<{DSML}invoke name="')
    script.content(function["name"])
    script.grammar('">\n')
    for number, (name, value) in enumerate(_parameters(function["arguments"]).items()):
        script.grammar(("\n" if number else "") + f'<{DSML}parameter name="')
        script.content(name)
        script.grammar(f'" string="{"true" if isinstance(value, str) else "false"}">')
        script.content(value if isinstance(value, str) else _json(value, "the arguments of a tool call"))
        script.grammar(_PARAMETER_END)
    script.grammar(f"\n{_INVOKE_END}")


def _parameters(arguments: str) -> dict[str, Any]:
    """The arguments of a call; what is not a JSON object goes whole into one parameter, as in V4."""
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, dict) else {"arguments": arguments}


def _write_results(script: _Script, turn: _Turn, thinks: bool) -> None:
    """The results in the order of their calls, since nothing else in the text says which is whose."""
    if not turn.results:
        return
    script.grammar("\n\n<function_results>")
    for result in _in_order_of_calls(turn):
        script.grammar("\n<result>")
        script.content(text_of(result["content"]))
        script.grammar("</result>")
    script.grammar("\n</function_results>\n\n" + (THINK if thinks else END_THINK))


def _in_order_of_calls(turn: _Turn) -> list[Mapping[str, Any]]:
    asked = [call.get("id") for call in turn.calls]
    answered = [result.get("tool_call_id") for result in turn.results]
    if sorted(map(str, asked)) != sorted(map(str, answered)):
        raise InputError(f"tool results for {answered} do not answer the calls {asked}; give one result for each")
    return sorted(turn.results, key=lambda result: asked.index(result.get("tool_call_id")))


def _write_tools(script: _Script, tools: Sequence[Mapping[str, Any]]) -> None:
    if not tools:
        return
    script.grammar(f"\n\n{_TOOLS}")
    script.content("\n".join(_json(tool["function"], "a tool's schema") for tool in tools))
    script.grammar(_TOOLS_END)


def _write_response_format(script: _Script, response_format: Mapping[str, Any] | None) -> None:
    if response_format is not None:
        script.grammar(f"\n\n{_RESPONSE_FORMAT}")
        script.content(_json(response_format, "response_format"))


def _json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise InputError(f"{what} cannot be written as JSON ({exc}); use plain JSON values, not too deep") from exc


_END_OF_REASONING = re.compile(f"{END_THINK}|\n{{0,2}}<{DSML}")
_END_OF_CONTENT = re.compile(f"\n{{0,2}}<{DSML}")
_END_OF_THINKING = re.compile(END_THINK)
_NEVER = re.compile(r"(?!)")
_MARKERS = (END_THINK, f"\n\n<{DSML}", f"\n<{DSML}", f"<{DSML}")
_INVOKE = re.compile(f'<{DSML}invoke name="([^"]*)">')
_PARAMETER = re.compile(f'<{DSML}parameter name="([^"]*)"(?: string="(true|false)")?>')


class Parser:
    """A completion in pieces -> events. Never raises; what opens a call is never shown, however it is cut.

    A call is reported when it is complete; one cut short by the end of the completion is reported with
    arguments that lack the closing brace, so that nobody runs it. With `tools` off, calls are plain content.
    """

    def __init__(self, *, thinking: bool, tools: bool = True) -> None:
        self._stage: Literal["reasoning", "content", "calls"] = "reasoning" if thinking else "content"
        self._tools = tools
        self._held = ""  # the end of what came, which may be the start of a marker
        self._call_texts: list[str] = []
        self._num_calls = 0

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        while text:
            text = self._push_calls(text, events) if self._stage == "calls" else self._push_talk(text, events)
        return events

    def finish(self) -> list[Event]:
        """What was held back, and a call that never ended."""
        if self._stage == "calls":
            return self._call("".join(self._call_texts), complete=False)
        return [Event(self._stage, self._held)] if self._held else []

    def _push_talk(self, text: str, events: list[Event]) -> str:
        """Reports text up to the marker that ends its stage; returns what belongs to the next one."""
        assert self._stage != "calls"
        text = self._held + text
        end = self._end_of_stage().search(text)
        said = text[: end.start() if end else len(text) - _num_held_back(text)]
        self._held = "" if end else text[len(said) :]
        if said:
            events.append(Event(self._stage, said))
        if end is None:
            return ""
        self._stage = "content" if end[0] == END_THINK else "calls"
        return text[end.end() if end[0] == END_THINK else end.end() - len(DSML) - 1 :]

    def _end_of_stage(self) -> re.Pattern[str]:
        if self._tools:
            return _END_OF_REASONING if self._stage == "reasoning" else _END_OF_CONTENT
        return _END_OF_THINKING if self._stage == "reasoning" else _NEVER

    def _push_calls(self, text: str, events: list[Event]) -> str:
        """Collects calls, joining the pieces only when one has ended: the cost stays linear."""
        self._call_texts.append(text)
        self._held += text
        if _INVOKE_END in self._held:
            *blocks, rest = "".join(self._call_texts).split(_INVOKE_END)
            events += [event for block in blocks for event in self._call(block, complete=True)]
            self._call_texts = [rest]
            self._held = rest
        self._held = self._held[1 - len(_INVOKE_END) :]
        return ""

    def _call(self, block: str, *, complete: bool) -> list[Event]:
        invoke = _INVOKE.search(block)
        if invoke is None:
            return []
        arguments = _arguments(block[invoke.end() :], complete=complete)
        call_id = f"call_{self._num_calls:02d}_{uuid.uuid4().hex[:20]}"
        event = Event("tool_call", arguments, index=self._num_calls, id=call_id, name=invoke[1])
        self._num_calls += 1
        return [event]


def _num_held_back(text: str) -> int:
    """Length of the longest end of `text` that a marker may begin with."""
    sizes = (n for marker in _MARKERS for n in range(1, len(marker)) if text.endswith(marker[:n]))
    return max(sizes, default=0)


def _arguments(block: str, *, complete: bool) -> str:
    """The parameters of a call as a JSON object; values that are not strings stay as they were written."""
    items = []
    at = 0
    while tag := _PARAMETER.search(block, at):
        end = block.find(_PARAMETER_END, tag.end())
        if end < 0:
            break
        value = block[tag.end() : end]
        items.append(f"{_quoted(tag[1])}: {value if tag[2] == 'false' else _quoted(value)}")
        at = end
    return "{" + ", ".join(items) + ("}" if complete else "")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
