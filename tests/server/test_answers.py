"""When things are said: signs of life, progress, ends that are none, cancelled work, statuses before the first byte."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import anthropic
import httpx
import openai
import pytest
from tests.server.fakes import MODEL, FakeJobs, plain_language, serving

from tenfold.server.wire import Admitted, Event, Failed, Finished, Job, Progress, Queued, Token, Tokens

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": MODEL, "prompt": "Hi"},
    "/v1/messages": {**CHAT, "max_tokens": 10},
    "/v1/responses": {"model": MODEL, "input": "Hi"},
}
SIGNS = {
    "/v1/chat/completions": ": alive",
    "/v1/completions": ": alive",
    "/v1/messages": 'data: {"type":"ping"}',
    "/v1/responses": '"type": "response.in_progress"',
}
PATHS = pytest.mark.parametrize("path", BODIES)
KEEPALIVE_S = 0.15


def tokens(job: Job, text: str) -> list[Event]:
    return [Tokens(job.id, (Token(one, -0.5),)) for one in plain_language().tokenizer.encode(text)]


def slow(
    *, queue_s: float = 0.5, prefill_s: float = 0.5, decode_s: float = 0.5
) -> Callable[[Job], Sequence[Event | float]]:
    def script(job: Job) -> Sequence[Event | float]:
        first, *rest = tokens(job, "Hello")
        total = len(job.prompt)
        return [
            Queued(job.id, 2),
            queue_s,
            Admitted(job.id, 1),
            prefill_s,
            Progress(job.id, total, total, 100.0, 0.0),
            first,
            decode_s,
            *rest,
            Finished(job.id, "stop"),
        ]

    return script


def ending(*events: Callable[[Job], Event | float]) -> Callable[[Job], Sequence[Event | float]]:
    return lambda job: [event(job) if callable(event) else event for event in events]


def served(script: Callable[[Job], Sequence[Event | float]], **changed: Any) -> Any:
    return serving(script, language=plain_language(), **{"keepalive_s": KEEPALIVE_S, **changed})


def gaps(answer: httpx.Response) -> tuple[float, bytes]:
    """The longest silence of a streamed answer, and its bytes."""
    longest, last, got = 0.0, time.monotonic(), b""
    for piece in answer.iter_raw():
        now = time.monotonic()
        longest, last, got = max(longest, now - last), now, got + piece
    return longest, got


@PATHS
def test_a_stream_is_never_silent_for_long(path: str) -> None:
    with served(slow()) as server:
        with server.http.stream("POST", path, json={**BODIES[path], "stream": True}) as answer:
            assert answer.status_code == 200
            longest, got = gaps(answer)
        said = got.decode()
        assert longest < 0.4
        assert said.count(SIGNS[path]) >= 5
        assert "Hello" in "".join(said.split('"')) or '"H' in said
    if path == "/v1/responses":
        numbers = [json.loads(line[6:])["sequence_number"] for line in said.split("\n") if line.startswith("data: ")]
        assert numbers == list(range(len(numbers)))


@PATHS
def test_an_answer_at_once_is_never_silent_for_long(path: str) -> None:
    with served(slow()) as server, server.http.stream("POST", path, json=BODIES[path]) as answer:
        longest, got = gaps(answer)
        assert answer.headers["content-type"] == "application/json"
        assert longest < 0.4
        assert got.startswith(b"\n\n")
        assert "Hello" in json.dumps(json.loads(got))


def test_progress_is_told_to_those_who_ask() -> None:
    headers = {"x-tenfold-progress": "1"}
    with served(slow(queue_s=0, prefill_s=0, decode_s=0)) as server:
        said = {
            path: server.http.post(path, json={**body, "stream": True}, headers=headers).text
            for path, body in BODIES.items()
        }
        silent = server.http.post("/v1/chat/completions", json={**CHAT, "stream": True}).text
    total = len(server.jobs.jobs[0].prompt)
    frames = [block.split("\n") for block in said["/v1/chat/completions"].split("\n\n")]
    named = [frame for frame in frames if frame[0].startswith("event: ")]
    assert named[0] == ["event: queued", 'data: {"ahead": 2}']
    assert [frame[0] for frame in named[1:]] == ["event: progress", "event: progress"]
    progress = [json.loads(frame[1][6:]) for frame in named[1:]]
    assert progress[0] == {"done": 1, "total": total, "tokens_per_s": 0.0, "eta_s": None}
    assert progress[1] == {"done": total, "total": total, "tokens_per_s": 100.0, "eta_s": 0.0}
    assert 'data: {"type": "ping", "progress": {"done": 1,' in said["/v1/messages"]
    assert '"progress": {"done": 1,' in said["/v1/responses"]
    assert "event:" not in silent


FAILURES = [
    ("input", False, 400, "invalid_request_error", "invalid_request_error", False),
    ("full", True, 429, "rate_limit_error", "rate_limit_error", True),
    ("memory", True, 503, "overloaded_error", "overloaded_error", True),
    ("memory", False, 400, "invalid_request_error", "invalid_request_error", False),
    ("engine", True, 503, "overloaded_error", "overloaded_error", True),
    ("engine", False, 500, "server_error", "api_error", False),
]


@pytest.mark.parametrize("stream", [False, True])
@PATHS
@pytest.mark.parametrize(("kind", "again", "status", "openai_type", "anthropic_type", "retry"), FAILURES)
def test_a_failure_before_the_first_byte_has_its_status(
    path: str, stream: bool, kind: Any, again: bool, status: int, openai_type: str, anthropic_type: str, retry: bool
) -> None:
    with served(lambda job: [Failed(job.id, kind, "no such luck", again)], keepalive_s=10) as server:
        answer = server.http.post(path, json={**BODIES[path], "stream": stream})
        of_anthropic = path == "/v1/messages"
        assert answer.status_code == (529 if of_anthropic and status == 503 else status)
        error = answer.json()["error"]
        assert error["type"] == (anthropic_type if of_anthropic else openai_type)
        assert error["message"] == "no such luck"
        assert (answer.headers.get("x-should-retry") == "false") is not retry
        assert ("retry-after" in answer.headers) is retry
        if retry:
            assert 1 <= int(answer.headers["retry-after"]) <= 120


@PATHS
def test_a_stream_that_breaks_off_says_so_and_ends_abruptly(path: str) -> None:
    def script(job: Job) -> Sequence[Event | float]:
        return [Queued(job.id, 0), Admitted(job.id, 0), *tokens(job, "Hel"), 0.05, Failed(job.id, "engine", "it died")]

    with served(script, keepalive_s=10) as server:
        with server.http.stream("POST", path, json={**BODIES[path], "stream": True}) as answer:
            got, error = until_broken(answer)
        assert "incomplete chunked read" in error
        last = got.decode().strip().split("\n\n")[-1]
        data = json.loads(last.partition("data: ")[2])
        error = data["response"]["error"] if path == "/v1/responses" else data["error"]
        assert error["message"] == "it died"
        assert b"[DONE]" not in got
        assert b"message_stop" not in got


@PATHS
def test_an_answer_that_breaks_off_after_white_space_ends_abruptly(path: str) -> None:
    with served(lambda job: [Queued(job.id, 0), 0.5, Failed(job.id, "engine", "it died")]) as server:
        answer = server.http.send(server.http.build_request("POST", path, json=BODIES[path]), stream=True)
        assert answer.status_code == 200
        assert until_broken(answer)[1]


def test_sdks_raise_when_a_stream_breaks_off() -> None:
    def script(job: Job) -> Sequence[Event | float]:
        return [Admitted(job.id, 0), *tokens(job, "Hel"), 0.05, Failed(job.id, "engine", "it died")]

    with served(script, keepalive_s=10) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
        stream = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], stream=True)
        with pytest.raises(openai.APIError, match="it died"):
            list(stream)
        claude = anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0)
        with pytest.raises(anthropic.APIStatusError, match="it died"):
            list(
                claude.messages.create(
                    model=MODEL, max_tokens=5, messages=[{"role": "user", "content": "x"}], stream=True
                )
            )


def test_what_will_fail_again_is_not_sent_again() -> None:
    jobs = FakeJobs(lambda job: [Failed(job.id, "engine", "no", False)])
    with served(jobs.script, jobs=jobs) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=2)
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(**CHAT)
        assert len(jobs.jobs) == 1


@PATHS
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["queue", "prefill", "decode"])
def test_a_client_that_goes_away_cancels_its_job(path: str, stream: bool, stage: str) -> None:
    seconds = {f"{name}_s": 30.0 if name == stage else 0.0 for name in ("queue", "prefill", "decode")}
    with served(slow(**seconds), keepalive_s=10) as server:
        with (
            pytest.raises(httpx.ReadTimeout),
            server.http.stream("POST", path, json={**BODIES[path], "stream": stream}, timeout=0.3) as answer,
        ):
            answer.read()
        wait_until(lambda: not server.jobs.running and len(server.jobs.cancelled) == 1, 2.0)
        assert not server.service.live


def test_all_choices_are_cancelled() -> None:
    with served(slow(decode_s=30.0), keepalive_s=10) as server:
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/v1/chat/completions", json={**CHAT, "n": 3}, timeout=0.5)
        wait_until(lambda: len(server.jobs.cancelled) == 3 and not server.jobs.running, 2.0)


def test_a_client_that_does_not_read_is_given_up() -> None:
    def script(job: Job) -> Sequence[Event | float]:
        flood = [Tokens(job.id, tuple(Token(token, -0.5) for token in range(100, 1100)))] * 4000
        return [Admitted(job.id, 0), *flood, 30.0, Finished(job.id, "stop")]

    with served(script, write_timeout_s=0.5) as server:
        request = server.http.build_request("POST", "/v1/chat/completions", json={**CHAT, "stream": True})
        answer = server.http.send(request, stream=True)
        wait_until(lambda: len(server.jobs.cancelled) == 1, 20.0)
        answer.close()


def test_an_exception_in_the_engine_client_is_an_error() -> None:
    def script(job: Job) -> Sequence[Event | float]:
        raise RuntimeError("secret prompt text")

    with served(script) as server:
        answer = server.http.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 503
        assert "secret" not in answer.text


def test_shutting_down_ends_streams_with_an_error() -> None:
    with served(slow(decode_s=30.0), keepalive_s=10) as server:
        request = server.http.build_request("POST", "/v1/chat/completions", json={**CHAT, "stream": True})
        answer = server.http.send(request, stream=True)
        wait_until(lambda: bool(server.service.live), 2.0)
        server.loop.call_soon_threadsafe(server.service.abort)
        got, error = until_broken(answer)
        assert error
        assert b"shutting down" in got


def until_broken(answer: httpx.Response) -> tuple[bytes, str]:
    """What came of an answer, and how it broke; "" if it came to its end."""
    got = b""
    try:
        for piece in answer.iter_raw():
            got += piece
    except httpx.RemoteProtocolError as exc:
        return got, str(exc)
    return got, ""


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)
