"""R22: whether a request is answered beside others as it is alone, whatever the others ask for."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from tests.long.clients import Answer, ask
from tests.long.engine import MODEL, body, words
from tests.long.served import KEYS, serving

_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "rows": {"type": "integer"}},
    "required": ["name", "rows"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "look", "parameters": _SCHEMA}}


def asked(dice: random.Random) -> tuple[str, dict[str, Any]]:
    """Path and body of a request whose answer is settled, of one of many kinds."""
    text, tokens = words(dice.choice((3, 20, 100, 400)), dice.randrange(10**6)), dice.choice((1, 8, 24, 48))
    chat = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
    quiet: dict[str, Any] = {**chat, "stream": True, "thinking": {"type": "disabled"}}
    schema = {"type": "json_schema", "json_schema": {"name": "row", "schema": _SCHEMA}}
    bias = {str(dice.randrange(2, 2000)): dice.choice((-100, -5, 5, 100)) for _ in range(dice.randrange(1, 20))}
    return dice.choice(
        [
            ("/v1/completions", body(text, tokens)),
            ("/v1/completions", body(text, tokens, ignore_eos=False, stop=[dice.choice(" etaoin"), "row"])),
            ("/v1/completions", body(text, tokens, logit_bias=bias)),
            ("/v1/completions", body(text, tokens, repetition_penalty=1.3, presence_penalty=0.5)),
            ("/v1/completions", body(text, tokens, temperature=1.0, top_p=0.9, seed=dice.randrange(10**6))),
            ("/v1/completions", body(text, tokens, logprobs=3)),
            ("/v1/chat/completions", {**quiet, "thinking": {"type": "enabled"}}),
            ("/v1/chat/completions", {**quiet, "max_tokens": 48, "response_format": schema}),
            ("/v1/chat/completions", {**quiet, "max_tokens": 64, "tools": [_TOOL], "tool_choice": "required"}),
        ]
    )


def said(answer: Answer) -> list[Any]:
    """All that the model has part in."""
    assert answer.done, answer
    return [
        {name: value for name, value in choice.items() if value is not None}
        for event in answer.events
        for choice in event.get("choices", ())
    ]


def _joined(pieces: list[Any]) -> dict[str, Any]:
    """Of chunks, however the text was cut: texts put together, reasons and figures in their order."""
    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key != "id":
                    add(f"{name}.{key}", inner)
        elif isinstance(value, list):
            for inner in value:
                add(f"{name}[]", inner)
        elif isinstance(value, str):
            found[name] = found.get(name, "") + value
        elif value is not None:
            found.setdefault(f"{name}#", []).append(value)

    for piece in pieces:
        for name, value in piece.items():
            if name != "index":
                add(name, value)
    return {name: value for name, value in found.items() if not name.endswith(("index#", ".type", ".role"))}


def contamination(pairs: int = 512, at_once: int = 16) -> dict[str, Any]:
    """Each request alone, then `at_once` of all kinds at a time: every answer is the same."""
    dice = random.Random(22)
    wrong: list[Any] = []

    async def run(port: int) -> None:
        for start in range(0, pairs, at_once):
            requests = [asked(dice) for _ in range(at_once)]
            alone = [await ask(port, path, sent) for path, sent in requests]
            keys = [dice.choice(KEYS) for _ in requests]
            beside = await asyncio.gather(
                *(ask(port, path, sent, key=key) for (path, sent), key in zip(requests, keys, strict=True))
            )
            for (path, sent), one, other in zip(requests, alone, beside, strict=True):
                if _joined(said(one)) != _joined(said(other)):
                    wrong.append((start, path, sent, _joined(said(one)), _joined(said(other))))

    with serving("real") as served:
        asyncio.run(run(served.port))
    assert not wrong, f"{len(wrong)} of {pairs} differ, the first: {wrong[0]}"
    return {"pairs": pairs, "neighbours": at_once - 1, "different": 0}
