"""The routes around the answers: what is served, how it does, tokens and text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import tenfold
from tenfold.server import fields, openapi
from tenfold.server.chat_completions import recipe_body
from tenfold.server.errors import Refusal, mapped
from tenfold.server.language import Language
from tenfold.server.service import Call

__all__ = ["detokenize", "document", "health", "metrics", "model", "models", "ready", "status", "tokenize", "version"]


async def health(call: Call) -> None:
    """Whether this process answers; the engine has `ready`."""
    await call.answer({"status": "ok"})


async def ready(call: Call) -> None:
    """Whether a request would be worked on: loaded, making progress, not shutting down."""
    service = call.service
    service.ready()
    if not service.jobs.alive():
        raise Refusal(503, "the engine makes no progress", code="stalled", again=True, retry_after_s=10)
    await call.answer({"status": "ready"})


async def status(call: Call) -> None:
    """The figures of the web page's panel; null while unknown."""
    found, pulse = call.service.jobs.ready, call.service.jobs.pulse
    said: dict[str, Any] = {"model": call.service.name}
    limits = {} if found is None else asdict(found)
    for name in ("context", "kv_fixed_bytes", "kv_bytes_per_token", "v32_kv_bytes_per_token"):
        said[name] = limits.get(name)
    for name in ("running", "waiting", "kv_bytes"):
        said[name] = None if pulse is None else getattr(pulse, name)
    await call.answer(said)


async def models(call: Call) -> None:
    await call.answer({"object": "list", "data": [_card(call, name) for name in call.service.settings.names]})


async def model(call: Call) -> None:
    name = str(call.scope["path_params"]["name"])
    call.service.check_model(name)
    await call.answer(_card(call, name))


def _card(call: Call, name: str) -> dict[str, Any]:
    limits = call.service.jobs.ready
    return {
        "id": name,
        "object": "model",
        "created": call.service.created,
        "owned_by": "tenfold",
        "max_model_len": None if limits is None else limits.context,
        "root": call.service.name,
        # what Anthropic's clients read of the same list
        "type": "model",
        "display_name": name,
    }


async def tokenize(call: Call) -> None:
    body = fields.check(await call.json(), fields.TOKENIZE)
    service = call.service
    service.check_model(body.get("model"))
    context = service.ready().context
    if ("prompt" in body) == ("messages" in body):
        raise Refusal(400, "expected prompt or messages, one of them", param="prompt")
    ids = await call.apart(_ids, service.language, body, context)
    await call.answer({"count": len(ids), "max_model_len": context, "tokens": ids})


def _ids(language: Language, body: Mapping[str, Any], context: int) -> list[int]:
    if "messages" in body:
        return list(language.ask("chat", recipe_body(language, body), context).prompt)
    with mapped("prompt"):
        return language.encode(body["prompt"], context, bos=body.get("add_special_tokens", True))


async def detokenize(call: Call) -> None:
    body = fields.check(await call.json(), fields.DETOKENIZE)
    service = call.service
    service.check_model(body.get("model"))
    limits = service.ready()
    tokens = body["tokens"]
    if len(tokens) > limits.context:
        raise Refusal(400, f"{len(tokens):,} tokens, the context holds {limits.context:,}", param="tokens")
    if not all(type(token) is int and 0 <= token < limits.vocab_size for token in tokens):
        raise Refusal(400, f"expected token ids from 0 to {limits.vocab_size - 1}", param="tokens")
    with mapped("tokens"):
        text = await call.apart(service.language.tokenizer.decode, tokens)
    await call.answer({"prompt": text})


async def metrics(call: Call) -> None:
    page = call.service.metrics.page(call.service.jobs)
    await call.start(
        200,
        [
            (b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),
            (b"content-length", str(len(page)).encode()),
        ],
    )
    await call.write(page, more=False)


async def version(call: Call) -> None:
    await call.answer({"version": tenfold.__version__})


async def document(call: Call) -> None:
    await call.answer(openapi.document(call.service.settings.names))
