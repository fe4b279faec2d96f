"""Structured output through the engine process: what the embedded model writes under a demand meets it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from tenfold import config
from tenfold.server.engine_client import EngineProcess
from tenfold.server.wire import Constraint, Event, Failed, Finished, Job, Start, Tokens
from tenfold.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "lines": {"type": "integer", "minimum": 0, "maximum": 99},
        "flags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "lines", "flags"],
    "additionalProperties": False,
}
TOKENIZER = Tokenizer.load(config.locate("tiny-v4-flash"))


def job(name: str, schema: Any = None, **sampling: Any) -> Job:
    prompt = (0, *TOKENIZER.encode("The PRAGMA statement in JSON: "))
    constraint = None if schema is None else Constraint("json", json.dumps(schema))
    sampling = {"temperature": 1.0, "max_tokens": 120, "logprobs": 0, **sampling}
    return Job(name, "client", "", prompt, sampling, constraint)


def answers(*jobs: Job) -> list[list[Event]]:
    """What an engine process says of jobs that come at once."""

    async def talk() -> list[list[Event]]:
        process = EngineProcess(Start("tiny-v4-flash", memory="1G", threads=1))
        await process.open()
        await process.loaded()

        async def events(job: Job) -> list[Event]:
            return [event async for event in process.run(job)]

        try:
            return await asyncio.gather(*map(events, jobs))
        finally:
            await process.close()

    return asyncio.run(talk())


def written(events: list[Event]) -> str:
    tokens = [token for event in events if isinstance(event, Tokens) for token in event.tokens]
    assert all(token.logprob is not None and token.logprob <= 0 for token in tokens), "the model's own, not the masked"
    return TOKENIZER.decode(token.id for token in tokens)


def test_what_is_written_follows_its_schema_and_a_bad_schema_ends_its_own_request(tmp_path: Path) -> None:
    held = [job(f"held {i}", SCHEMA, seed=i) for i in range(4)]
    never = job("never", SCHEMA, ignore_eos=True)
    bad = job("bad", {"not": {"type": "string"}})
    plain = job("plain", max_tokens=5, ignore_eos=True)
    *valid, refused, free = answers(*held, never, bad, plain)
    for events in valid:
        assert events[-1] == Finished(events[-1].id, "stop")
        value = json.loads(written(events))
        assert set(value) == {"name", "lines", "flags"}
        assert len(value["name"]) <= 12
        assert 0 <= value["lines"] <= 99
        assert set(value["flags"]) <= {"a", "b"}
    assert isinstance(refused[-1], Failed)
    assert refused[-1].kind == "input"
    assert not refused[-1].again
    assert "cannot be enforced" in refused[-1].message
    assert free[-1] == Finished("plain", "length")
