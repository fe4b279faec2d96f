"""From the fields of a request to the jobs of the engine. Knows nothing of HTTP."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from tenfold.server.auth import cache_name
from tenfold.server.fields import check_logit_bias
from tenfold.server.service import Call
from tenfold.server.wire import Constraint, Job, Ready

__all__ = ["job_of", "new_id", "sampling_of"]

_PLAIN_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
)


def new_id(prefix: str) -> str:
    """An id for an answer; nothing a client sends ever becomes one."""
    return f"{prefix}{uuid.uuid4().hex}"


def sampling_of(
    fields: Mapping[str, Any], ready: Ready, max_tokens: int, logprobs: int | None, top_p: float = 1.0
) -> dict[str, Any]:
    """The sampling parameters of a job. They are honoured while thinking too; `top_p` is the model's own default."""
    found: dict[str, Any] = {"top_p": round(top_p, 4)} if top_p < 1.0 else {}
    found |= {name: fields[name] for name in _PLAIN_FIELDS if name in fields}
    if fields.get("top_k", 0) > 0:
        found["top_k"] = fields["top_k"]
    if "seed" in fields:
        found["seed"] = fields["seed"] % 2**63
    found["logit_bias"] = check_logit_bias(fields.get("logit_bias", {}), ready.vocab_size)
    return {**found, "max_tokens": max_tokens, "logprobs": logprobs}


def job_of(
    call: Call,
    fields: Mapping[str, Any],
    prompt: tuple[int, ...],
    sampling: Mapping[str, Any],
    index: int = 0,
    constraint: Constraint | None = None,
) -> Job:
    """A job; the choices of one request differ in their seeds."""
    apart = {name: fields[name] for name in ("user_id", "cache_salt") if name in fields}
    cache = cache_name(call.key, apart, shared=call.service.settings.shared_cache)
    if index and "seed" in sampling:
        sampling = {**sampling, "seed": (sampling["seed"] + index) % 2**63}
    return Job(uuid.uuid4().hex, call.client, cache, prompt, sampling, constraint)
