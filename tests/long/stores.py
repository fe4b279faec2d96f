"""The disk under a running server: full, and shared by two servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.long.clients import Answer, ask
from tests.long.engine import body, words
from tests.long.served import serving


def _answers(port: int, seeds: range) -> list[str]:
    async def run() -> list[Answer]:
        return [await ask(port, "/v1/completions", body(words(500, seed), 12)) for seed in seeds]

    answers = asyncio.run(run())
    assert all(answer.done for answer in answers), [answer for answer in answers if not answer.done]
    return [answer.text for answer in answers]


@contextlib.contextmanager
def _small_disk(folder: str, megabytes: int) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def full(prompts: int = 40) -> dict[str, Any]:
    """The store's disk fills up under requests: the answers are those of a server without a store."""
    with serving("real") as served:
        expected = _answers(served.port, range(prompts))
    if os.geteuid() != 0:
        return {"ok": None, "not_run": "a small disk can be mounted by root alone"}
    with (
        tempfile.TemporaryDirectory() as folder,
        _small_disk(folder, 6),
        serving("real", folder + "/store") as served,
    ):
        found = _answers(served.port, range(prompts))
        again = _answers(served.port, range(prompts))
        left = os.statvfs(folder)
        stored_bytes = served.gauge("tenfold:store_bytes")
    wrong = sum(a != b for a, b in zip(expected, found, strict=True)) + sum(
        a != b for a, b in zip(expected, again, strict=True)
    )
    assert not wrong, f"{wrong} answers changed"
    assert stored_bytes > 0, "the disk was full before anything was stored"
    return {
        "prompts": 2 * prompts,
        "wrong": wrong,
        "stored_bytes": int(stored_bytes),
        "disk_bytes_left": left.f_bavail * left.f_frsize,
    }


def shared(prompts: int = 30) -> dict[str, Any]:
    """Two servers over one store, in turns and at once; what one has read the other finds, and nobody is wrong."""
    with serving("real") as served:
        expected = _answers(served.port, range(prompts))
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        with serving("real", store) as one, serving("real", store) as two:

            async def at_once() -> list[tuple[Answer, Answer]]:
                async def both(seed: int) -> tuple[Answer, Answer]:
                    asked = (ask(served.port, "/v1/completions", body(words(500, seed), 12)) for served in (one, two))
                    first, second = await asyncio.gather(*asked)
                    return first, second

                return [await both(seed) for seed in range(prompts)]

            pairs = asyncio.run(at_once())
            later = asyncio.run(ask(two.port, "/v1/completions", body(words(500, 0), 12)))
    wrong = sum(answer.text != text for pair, text in zip(pairs, expected, strict=True) for answer in pair)
    assert not wrong, f"{wrong} answers differ"
    cached = later.events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0, "what was read is found"
    return {"prompts": 2 * prompts, "wrong": wrong, "cached_tokens_later": cached}
