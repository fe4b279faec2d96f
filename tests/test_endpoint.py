"""An OpenAI-compatible server on loopback is asked, in both forms; what goes wrong is one sentence."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tenfold import config, needle
from tenfold.endpoint import Api, EndpointReader, checked_api
from tenfold.errors import RunError, UsageError
from tenfold.haystack import Haystack, Straw, build, embedded_document, evenly
from tenfold.terminal import ReadingClock
from tenfold.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(config.locate("tiny-v4-flash"))


class Server(ThreadingHTTPServer):
    """Finds the sentence that a question is about; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        self.status, self.garbage = 200, b""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._reply({"data": [{"id": "first"}, {"id": "second"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        self.server.keys.append(self.headers["Authorization"])
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        what = re.findall(r"Q: What is (.*)\?\nA:$", prompt)[0]
        value = re.findall(f"{what} is ([0-9]+)".replace("the ", "[Tt]he ", 1), prompt)[0]
        choice = {"text": f" {value}."} if "prompt" in body else {"message": {"content": f"It is {value}."}}
        self._reply({"choices": [choice], "usage": {"prompt_tokens": 777}})

    def _reply(self, found: object) -> None:
        content = self.server.garbage or json.dumps(found).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def haystack() -> Haystack:
    facts = needle.facts(1, 4)
    straw = Straw(embedded_document(), TOKENIZER.encode)
    return build(straw, 1500, list(zip(facts, evenly(4), strict=True)), seed=1)


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize("path", ["", "/v1", "/v1/"])
def test_every_question_goes_with_the_whole_text(server: Server, api: Api, path: str) -> None:
    reader = EndpointReader(server.url + path, None, TOKENIZER, api)
    assert reader.name == "first"
    clock, hidden = ReadingClock(1500), haystack()
    answers = reader.ask(hidden, clock)
    assert all(needle.is_right(one.fact, text) for one, text in zip(hidden.needles, answers.texts, strict=True))
    assert (answers.tokens, clock.done, server.keys[0]) == (777, 1500, None)
    paths = {path for path, _ in server.asked}
    assert paths == {"/v1/chat/completions" if api == "chat" else "/v1/completions"}
    texts = [body["prompt"] if api == "completions" else body["messages"][0]["content"] for _, body in server.asked]
    assert len({text[: text.index("Q: What")] for text in texts}) == 1  # a server can keep this prefix
    assert all(body["temperature"] == 0 and body["model"] == "first" for _, body in server.asked)


def test_a_key_and_a_model_are_passed_on(server: Server) -> None:
    reader = EndpointReader(server.url, "second", TOKENIZER, "completions", "a word")
    reader.ask(haystack(), ReadingClock(1500))
    assert server.keys[0] == "Bearer a word"
    assert server.asked[0][1]["model"] == "second"
    assert "a word" not in reader.identity


def test_what_a_server_refuses_is_quoted(server: Server) -> None:
    reader = EndpointReader(server.url, "m", TOKENIZER, "chat")
    server.status, server.garbage = 400, b'{"error": "context too long"}'
    with pytest.raises(RunError, match=r"answered 400: .*context too long"):
        reader.ask(haystack(), ReadingClock(1500))


@pytest.mark.parametrize(
    ("garbage", "said"),
    [(b"<html>", "no JSON object"), (b"[]", "no JSON object"), (b"{}", "without choices"),
     (b'{"choices": [{"text": "4"}]}', "other --api")],
)  # fmt: skip
def test_other_servers_are_told(server: Server, garbage: bytes, said: str) -> None:
    reader = EndpointReader(server.url, "m", TOKENIZER, "chat")
    server.garbage = garbage
    with pytest.raises(RunError, match=said):
        reader.ask(haystack(), ReadingClock(1500))


def test_a_server_that_is_not_there_and_addresses_that_are_none(server: Server) -> None:
    server.garbage = b'{"data": []}'
    with pytest.raises(RunError, match="lists no models"):
        EndpointReader(server.url, None, TOKENIZER, "chat")
    with pytest.raises(RunError, match="is the server running"):
        EndpointReader("http://127.0.0.1:9", None, TOKENIZER, "chat")
    for url in ("ftp://host", "http://", "http://host:none", ""):
        with pytest.raises(UsageError, match="expected a URL"):
            EndpointReader(url, None, TOKENIZER, "chat")
    with pytest.raises(UsageError, match="--api is 'grpc'"):
        checked_api("grpc")
