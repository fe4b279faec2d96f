"""The OpenAPI page, made from the tables that requests are checked with. Knows nothing of engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tenfold
from tenfold.server import fields

__all__ = ["document"]

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type"],
        }
    },
    "required": ["error"],
}
_STATUSES = {
    400: "The request is wrong; the error names the field.",
    401: "No API key, or an unknown one.",
    404: "No such model or path.",
    405: "The path does not take this method.",
    408: "The body came too slowly.",
    413: "The body is larger than 64 MiB.",
    415: "The body is not plain JSON.",
    429: "The queue is full; Retry-After says when to come again.",
    500: "The engine failed.",
    503: "Loading, shutting down, or no memory at the moment.",
}
_GET_STATUSES = (400, 401, 404, 405, 503)


def document(names: Sequence[str]) -> dict[str, Any]:
    """The whole page, for a model of these names."""
    paths: dict[str, Any] = {
        "/v1/chat/completions": _post("OpenAI's Chat Completions, with DeepSeek's additions", fields.CHAT, stream=True),
        "/v1/completions": _post("Plain text goes on; with suffix, a hole is filled", fields.COMPLETIONS, stream=True),
        "/v1/responses": _post("OpenAI's Responses, nothing kept", fields.RESPONSES, stream=True),
        "/v1/messages": _post("Anthropic's Messages", fields.MESSAGES, stream=True, overload=529),
        "/v1/messages/count_tokens": _post("Tokens of a Messages request", fields.COUNT_TOKENS, overload=529),
        "/tokenize": _post("Ids of a text or of messages", fields.TOKENIZE),
        "/detokenize": _post("The text of ids", fields.DETOKENIZE),
        "/v1/models": _get("What is served"),
        "/v1/models/{name}": _get("One of the models", "name"),
        "/v1/responses/{name}": _get("Always 404: nothing is kept", "name"),
        "/health": _get("Whether the process answers"),
        "/ready": _get("Whether a request would be worked on"),
        "/status": _get("Figures of the engine"),
        "/metrics": _get("Prometheus", content="text/plain"),
        "/version": _get("The version"),
        "/openapi.json": _get("This page"),
    }
    for path in paths.values():
        _name_model(path, names)
    return {
        "openapi": "3.1.0",
        "info": {"title": "tenfold", "version": tenfold.__version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _name_model(path: dict[str, Any], names: Sequence[str]) -> None:
    content = path.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
    if content is not None and "model" in content["schema"]["properties"]:
        content["schema"]["properties"]["model"] = {"enum": list(names)}


def _post(
    summary: str, table: Mapping[str, fields.Field], *, stream: bool = False, overload: int = 503
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if stream:
        content["text/event-stream"] = {"schema": {}}
    body = {"required": True, "content": {"application/json": {"schema": fields.schema_of(table)}}}
    statuses = {overload if status == 503 else status: says for status, says in _STATUSES.items()}
    answers = {"200": {"description": "The answer", "content": content}, **_errors(statuses)}
    return {"post": {"summary": summary, "requestBody": body, "responses": answers}}


def _get(summary: str, parameter: str | None = None, content: str = "application/json") -> dict[str, Any]:
    answers = {"200": {"description": "The answer", "content": {content: {"schema": {}}}}}
    answers |= _errors({status: _STATUSES[status] for status in _GET_STATUSES})
    found: dict[str, Any] = {"summary": summary, "responses": answers}
    if parameter is not None:
        found["parameters"] = [{"name": parameter, "in": "path", "required": True, "schema": {"type": "string"}}]
    return {"get": found}


def _errors(statuses: Mapping[int, str]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": says, "content": content} for status, says in statuses.items()}
