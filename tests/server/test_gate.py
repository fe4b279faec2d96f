"""What stands before every route: ids, hosts, keys, methods; and the routes around the answers."""

from __future__ import annotations

import base64
import hashlib
import socket
from collections.abc import Iterator

import httpx
import pytest
from starlette.routing import Route
from tests.server.fakes import CONTEXT, MODEL, FakeJobs, Served, plain_language, saying, serving

from tenfold.errors import UsageError
from tenfold.server.app import routes
from tenfold.server.auth import Keys, cache_name, client_name

KEY = "a-long-enough-key"
OTHER = "another-long-key"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
PATHS = {
    "/v1/chat/completions": "POST",
    "/chat/completions": "POST",
    "/beta/chat/completions": "POST",
    "/v1/completions": "POST",
    "/completions": "POST",
    "/beta/completions": "POST",
    "/v1/responses": "POST",
    "/responses": "POST",
    "/v1/responses/{name}": "GET",
    "/v1/messages": "POST",
    "/anthropic/v1/messages": "POST",
    "/v1/messages/count_tokens": "POST",
    "/anthropic/v1/messages/count_tokens": "POST",
    "/v1/models": "GET",
    "/models": "GET",
    "/v1/models/{name:path}": "GET",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/health": "GET",
    "/ready": "GET",
    "/status": "GET",
    "/metrics": "GET",
    "/version": "GET",
    "/openapi.json": "GET",
}
WRONG: list[tuple[str, dict[str, str]]] = [
    ("none", {}),
    ("wrong", {"authorization": f"Bearer {OTHER}"}),
    ("scheme", {"authorization": f"Token {KEY}"}),
    ("bare", {"authorization": KEY}),
    ("short", {"authorization": "Bearer x"}),
    ("x-api-key", {"x-api-key": OTHER}),
    ("basic", {"authorization": "Basic !!"}),
    ("bearer wins", {"authorization": f"Bearer {OTHER}", "x-api-key": KEY}),
]


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    language = plain_language()
    hashed = "sha256:" + hashlib.sha256(OTHER.encode()).hexdigest()[::-1]
    with serving(saying("ok", language), language=language, keys=[KEY, hashed]) as served:
        yield served


def raw(served: Served, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


def test_the_list_of_routes_is_this_one() -> None:
    found = {route.path: route.methods for route in routes() if isinstance(route, Route)}
    assert {path: (methods or set()) - {"HEAD"} for path, methods in found.items()} == {
        path: {method} for path, method in PATHS.items()
    }


@pytest.mark.parametrize("path", [path for path in PATHS if path != "/health"])
@pytest.mark.parametrize(("_name", "headers"), WRONG)
def test_every_route_but_health_wants_a_key(locked: Served, path: str, _name: str, headers: dict[str, str]) -> None:
    url = path.replace("{name}", "x").replace("{name:path}", MODEL)
    for target in (url, f"{url}?api_key={KEY}", f"{url}?key={KEY}"):
        answer = locked.http.request(PATHS[path], target, headers=headers, json=CHAT if PATHS[path] == "POST" else None)
        assert answer.status_code == 401
        error = answer.json()["error"]
        assert error["type"] == "authentication_error"
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert KEY not in answer.text


def test_two_authorizations_are_one_too_many(locked: Served) -> None:
    headers = [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")]
    assert locked.http.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {KEY}", "x-api-key": "nonsense"},
        {"x-api-key": KEY},
        {"authorization": "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()},
    ],
    ids=str,
)
def test_the_key_opens(locked: Served, headers: dict[str, str]) -> None:
    assert locked.http.get("/v1/models", headers=headers).status_code == 200
    assert locked.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "target",
    [b"//v1/models", b"/v1/../health", b"/health/../v1/models", b"/v1/models%2f..", b"/%2e%2e/health", b"/health%00",
     b"/static/../v1/models", b"http://x/health", b"http://127.0.0.1/v1/models", b"/health?/v1/models", b"*"],
)  # fmt: skip
@pytest.mark.parametrize(
    "host", [b"127.0.0.1", b"x/?", b"x/#", b"evil.example", b"", b"127.0.0.1@evil", b"localhost:x"]
)
def test_tricks_with_hosts_and_paths_open_nothing(locked: Served, target: bytes, host: bytes) -> None:
    answer = raw(locked, b"GET " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
    status = int(answer.split(b" ")[1])
    fine = target == b"/health?/v1/models" and host == b"127.0.0.1"
    assert status == 200 if fine else status in (400, 401, 404)
    assert b"x-request-id" in answer


def test_hosts_of_this_machine(locked: Served) -> None:
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:1"):
        assert locked.http.get("/health", headers={"host": host}).status_code == 200
    assert locked.http.get("/health", headers={"host": "[::1]:5"}).status_code == 400  # not in this server's list


def test_no_site_is_let_in(hello: Served) -> None:
    headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    answer = hello.http.options("/v1/chat/completions", headers=headers)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("given", "echoed"),
    [("abc-DEF_9", True), ("x", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ("é", False), ("", False)],
)
def test_request_ids(hello: Served, given: str, echoed: bool) -> None:
    answer = hello.http.post("/v1/chat/completions", json=CHAT, headers={b"x-request-id": given.encode()})
    assert answer.status_code == 200
    assert (answer.headers["x-request-id"] == given) is echoed
    assert len(answer.headers["x-request-id"]) in (len(given), 32)
    assert hello.jobs.jobs[-1].id != given


def test_unknown_paths_and_methods(hello: Served) -> None:
    missing = hello.http.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    wrong = hello.http.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "error" in wrong.json()
    anthropic = hello.http.get("/v1/messages")
    assert (anthropic.status_code, anthropic.json()["type"]) == (405, "error")


def test_models(hello: Served) -> None:
    found = hello.http.get("/v1/models").json()
    assert [card["id"] for card in found["data"]] == [MODEL]
    assert found["data"][0]["max_model_len"] == CONTEXT
    assert hello.http.get(f"/v1/models/{MODEL}").json()["id"] == MODEL
    assert hello.http.get("/v1/models/a/b").status_code == 404


def test_tokens_and_text(hello: Served) -> None:
    found = hello.http.post("/tokenize", json={"prompt": "Hello<｜User｜>"}).json()
    assert found["count"] == len(found["tokens"]) > 3
    assert found["max_model_len"] == CONTEXT
    back = hello.http.post("/detokenize", json={"tokens": found["tokens"][1:]}).json()
    assert back == {"prompt": "Hello<｜User｜>"}
    chat = hello.http.post("/tokenize", json={"messages": CHAT["messages"]}).json()
    hello.http.post("/v1/chat/completions", json=CHAT)
    assert tuple(chat["tokens"]) == hello.jobs.jobs[-1].prompt
    for tokens in ([-1], [129_280], ["x"], [0] * (CONTEXT + 1), [True]):
        assert hello.http.post("/detokenize", json={"tokens": tokens}).status_code == 400
    assert hello.http.post("/tokenize", json={}).status_code == 400


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    language = plain_language()
    with serving(saying("ok", language), language=language) as served:  # whose engine says that it has more of them
        assert served.http.post("/detokenize", json={"tokens": [2048]}).status_code == 400


def test_readiness_follows_the_engine() -> None:
    language = plain_language()
    jobs = FakeJobs(saying("ok", language))
    with serving(jobs.script, language=language, jobs=jobs) as served:
        assert served.http.get("/ready").json() == {"status": "ready"}
        jobs.stalled = True
        assert served.http.get("/ready").status_code == 503
        jobs.stalled, limits, jobs.ready = False, jobs.ready, None
        loading = served.http.get("/ready")
        assert (loading.status_code, loading.json()["error"]["code"]) == (503, "loading")
        refused = served.http.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert "x-should-retry" not in refused.headers
        message = {**CHAT, "max_tokens": 5}
        assert served.http.post("/v1/messages", json=message).status_code == 529
        assert served.http.get("/health").status_code == 200
        assert served.http.get("/v1/models").status_code == 200
        jobs.ready = limits
        served.service.draining = True
        assert served.http.post("/v1/chat/completions", json=CHAT).json()["error"]["code"] == "shutting_down"
        assert served.http.get("/ready").status_code == 503
        assert served.http.get("/health").status_code == 200


def test_metrics_name_no_text(hello: Served) -> None:
    secret = "a very secret sentence"
    hello.http.post("/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": secret}]})
    hello.http.get(f"/{secret}")
    page = hello.http.get("/metrics").text
    assert secret not in page
    assert "secret" not in page
    for name in (
        "vllm:num_requests_running",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:prefix_cache_hits_total",
    ):
        assert f"{name}{{" in page, name
    assert 'vllm:request_success_total{finished_reason="stop"' in page


def test_the_log_has_numbers_and_no_text(hello: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "tenfold.serve"):
        secret = "a very secret sentence"
        body = {**CHAT, "messages": [{"role": "user", "content": secret}], "thinking": {"type": "disabled"}}
        hello.http.post(f"/v1/chat/completions?{secret}", json=body, headers={"x-request-id": "mine"})
        hello.http.post("/v1/chat/completions", json={**body, "reasoning_effort": secret})
        hello.http.get(f"/{secret}")
        for polled in ("/health", "/ready", "/status", "/metrics"):
            assert hello.http.get(polled).status_code == 200
    lines = [line for line in caplog.messages if " s=" in line]
    assert "secret" not in caplog.text
    assert "POST /v1/chat/completions 200 id=mine client=" in lines[0]
    for said in (" prompt=", " cached=3", " completion=3", " ttft_s=", " finish=stop"):
        assert said in lines[0], said
    assert [line.split()[1] for line in lines] == ["/v1/chat/completions", "/v1/chat/completions", "(other)"]


def test_status_for_the_page(hello: Served) -> None:
    found = hello.http.get("/status").json()
    assert found["model"] == MODEL
    assert found["context"] == CONTEXT
    assert (found["running"], found["waiting"], found["kv_bytes"]) == (0, 0, 0)
    assert (found["kv_fixed_bytes"], found["v32_kv_bytes_per_token"]) == (282_624, 788.0)


@pytest.mark.parametrize("entry", ["", "short", "has a space in it", "ümlautschlüssel", "tab\tinside-it"])
def test_keys_that_are_none(entry: str) -> None:
    with pytest.raises(UsageError, match="API key"):
        Keys.of([entry])


def test_names_are_hashes_that_keep_clients_apart() -> None:
    a, b = hashlib.sha256(b"a").digest(), hashlib.sha256(b"b").digest()
    names = {
        cache_name(a, {}, shared=False),
        cache_name(b, {}, shared=False),
        cache_name(a, {"user_id": "1"}, shared=False),
        cache_name(a, {"cache_salt": "1"}, shared=False),
        cache_name(a, {"cache_salt": "1", "user_id": "../\0"}, shared=False),
        cache_name(b"", {}, shared=False),
    }
    assert len(names) == 6
    assert all(len(name) in (0, 32) and name.isalnum() == bool(name) for name in names)
    assert cache_name(a, {}, shared=True) == cache_name(b"", {}, shared=False) == ""
    assert client_name(a, "x") == client_name(a, "y") != client_name(b"", "x")


def test_jobs_carry_the_name_of_their_key() -> None:
    language = plain_language()
    with serving(saying("ok", language), language=language, keys=[KEY, OTHER]) as served:
        for key in (KEY, OTHER, KEY):
            answer = served.http.post("/v1/chat/completions", json=CHAT, headers={"x-api-key": key})
            assert answer.status_code == 200
        one, two, three = (job.cache for job in served.jobs.jobs)
        assert one == three != two
        assert KEY not in one


def test_a_get_with_a_body_or_head_is_harmless(hello: Served) -> None:
    assert hello.http.head("/health").status_code == 200
    assert httpx.request("GET", hello.url + "/health", content=b"x" * 1000).status_code == 200
