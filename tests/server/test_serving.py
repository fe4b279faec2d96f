"""`tenfold serve`: its options, what it refuses to start, and a whole run with the embedded model."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from tenfold.cli import app
from tenfold.errors import UsageError
from tenfold.server.serving import KEY_VARIABLE, Options, options_of

KEY = "a-long-enough-key"
MODEL = "tiny-v4-flash"
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "A database is"}],
    "temperature": 0,
    "max_tokens": 12,
}


@contextlib.contextmanager
def running(tmp_path: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "tenfold", "serve", MODEL, "--port", "0", "--store", str(tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([*command, "--threads", "1", *more], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        address = ""
        while not address:
            line = process.stderr.readline()
            assert line, "the server ended"
            found = re.search(r"http://\S+", line)
            address = found[0] if found else ""
        with httpx.Client(base_url=address) as client:
            until = time.monotonic() + 300  # loading takes a second, on a machine that does nothing else
            # a server with keys refuses to say
            while client.get("/ready").status_code == 503:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.2)
        yield process, address
    finally:
        process.kill()
        process.communicate()


def run(*words: str, **environment: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["serve", *words], env=environment)
    return found.exit_code, found.output


def test_options_come_from_a_file_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('model = "m"\nname = ["a", "b"]\nport = 1\ndrain = 5\nshared-cache = true\nstore_limit = "1G"\n')
    found = options_of({"port": 2, "host": None, "name": []}, file)
    assert found == Options("m", port=2, name=("a", "b"), drain=5.0, shared_cache=True, store_limit="1G")


@pytest.mark.parametrize(
    "text",
    [
        'nonsense = 1\nmodel = "m"',
        'model = "m"\nport = "x"',
        'model = "m"\nport = 70000',
        'model = "m"\nname = [1]',
        'model = "m"\ninsecure = 1',
        'model = "m"\nnumerics = "rough"',
        'model = "m"\nqueue = 0',
        "port = 1",
        "not toml",
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(UsageError):
        options_of({}, file)
    code, output = run("--config", str(file))
    assert code == 2
    assert output.startswith("error: ")


def test_what_does_not_start(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("# nobody\n\n")
    for words in (
        [MODEL, "--host", "0.0.0.0"],
        [MODEL, "--host", "::"],
        [MODEL, "--keys", str(keys)],
        [MODEL, "--keys", str(tmp_path / "missing")],
        [str(tmp_path / "no-model")],
        [MODEL, "--profile", "latin"],
        ["--config", str(tmp_path / "missing.toml")],
        [],
    ):
        code, output = run(*words)
        assert (code, output.startswith("error: ")) == (2, True), words
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, output = run(MODEL, "--port", str(taken.getsockname()[1]))
    assert code == 1
    assert "choose another --port" in output
    assert run(MODEL, **{KEY_VARIABLE: "short"})[0] == 2


def test_the_embedded_model_is_served(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(KEY)
    with running(tmp_path, "--keys", str(keys), "--name", MODEL) as (process, address):
        assert httpx.get(f"{address}/ready").status_code == 401
        with httpx.Client(base_url=address, headers={"authorization": f"Bearer {KEY}"}, timeout=300) as client:
            while client.get("/ready").status_code == 503:
                time.sleep(0.2)
            first = client.post("/v1/chat/completions", json=CHAT).json()
            text = first["choices"][0]["message"]["content"]
            assert text
            assert first["choices"][0]["finish_reason"] == "length"
            assert first["usage"]["completion_tokens"] == 12
            again = client.post("/v1/chat/completions", json={**CHAT, "stream": True}).text
            assert again.endswith("data: [DONE]\n\n")
            asked: dict[str, Any] = {**CHAT, "prompt": "A database is", "logprobs": 2}
            del asked["messages"]
            plain = client.post("/v1/completions", json=asked).json()
            assert plain["choices"][0]["text"] == text
            assert len(plain["choices"][0]["logprobs"]["tokens"]) == 12
            claude = {**CHAT, "stream": True}
            assert "message_stop" in client.post("/v1/messages", json=claude).text
            body = {"model": MODEL, "input": "A database is", "max_output_tokens": 12, "temperature": 0}
            response = client.post("/v1/responses", json=body).json()
            assert response["output"][0]["content"][0]["text"] == text
            status = client.get("/status").json()
            assert status["v32_kv_bytes_per_token"] > 5 * status["kv_bytes_per_token"]
            assert min(client.get("/health").elapsed.total_seconds() for _ in range(20)) < 0.02, "Nagle's 40 ms"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_signal_lets_an_answer_end_and_a_second_does_not(tmp_path: Path) -> None:
    body = {**CHAT, "max_tokens": 100_000, "stream": True, "ignore_eos": True}
    with (
        running(tmp_path, "--drain", "30") as (process, address),
        httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as answer,
    ):
        pieces = answer.iter_raw()  # kept: where it ends, so does the connection
        assert b"chat.completion.chunk" in next(pieces)
        process.send_signal(signal.SIGTERM)
        for _ in range(50):
            if httpx.get(f"{address}/ready").status_code == 503:
                break
        assert httpx.post(f"{address}/v1/chat/completions", json=CHAT).status_code == 503
        assert httpx.get(f"{address}/health").status_code == 200
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
