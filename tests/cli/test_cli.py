"""Every verb as a user types it: what it prints, where, and its exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tenfold.cli import app

runner = CliRunner()


def call(*words: object, stdin: str | bytes | None = None) -> Result:
    return runner.invoke(app, [str(word) for word in words], input=stdin)


def found(*words: object, stdin: str | bytes | None = None) -> dict[str, Any]:
    result = call(*words, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    parsed = json.loads(result.stdout)
    assert isinstance(parsed, dict)
    return parsed


def refused(*words: object, code: int = 2, stdin: str | bytes | None = None) -> str:
    """What a refusal says; a traceback, another exit code or talk around it is a failure."""
    result = call(*words, stdin=stdin)
    assert result.exit_code == code, (result.exit_code, result.output)
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: "), result.output
    assert result.stdout == ""
    return result.stderr


# ------------------------------------------------------------------------------------------------ run, chat


def test_run_answers_on_stdout_and_talks_on_stderr(model: Path) -> None:
    result = call("run", model, "hello", "--max-tokens", 5, "--temperature", 0)
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.stderr
    assert "tokens/s" not in result.stdout
    assert result.stdout.strip()


def test_run_json_tells_everything(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "doc.txt"
    text.write_text("A journal mode is chosen. " * 60, encoding="utf-8")
    report = found("run", model, "Which?", "--file", text, "--max-tokens", 4, "--temperature", 0, "--logprobs", 2)
    assert report["completion_tokens"] == 4
    assert report["finish_reason"] == "length"
    assert len(report["logprobs"]) == 4
    assert len(report["logprobs"][0]["top"]) == 2
    assert report["kv_bytes"]["window"] > 0
    assert report["prompt_tokens"] > 300
    assert report["backend"] == "cpu"
    assert found("run", model, "Which?", "--max-tokens", 1, "--backend", "reference")["backend"] == "reference"


def test_run_reads_stdin_like_a_file(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "doc.txt"
    text.write_text("Some words to read.", encoding="utf-8")
    options = ("--max-tokens", 3, "--temperature", 0)
    by_file = found("run", model, "--file", text, *options)
    for words in (("run", model, *options), ("run", model, "--file", "-", *options)):
        piped = found(*words, stdin="Some words to read.")
        assert piped["message"] == by_file["message"]
        assert piped["prompt_tokens"] == by_file["prompt_tokens"]


def test_stdin_is_the_text_and_the_argument_the_question(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "doc.txt"
    text.write_text("Some words to read.", encoding="utf-8")
    options = ("--max-tokens", 3, "--temperature", 0)
    by_file = found("run", model, "Which words?", "--file", text, *options)
    piped = found("run", model, "Which words?", *options, stdin="Some words to read.")
    assert piped["message"] == by_file["message"]
    assert (
        piped["prompt_tokens"]
        == by_file["prompt_tokens"]
        > found("run", model, "Which words?", *options)["prompt_tokens"]
    )


def test_the_same_seed_gives_the_same_text(model: Path) -> None:
    first, again = (found("run", model, "hello", "--seed", 3, "--max-tokens", 8)["message"] for _ in range(2))
    assert first == again


def test_a_stop_string_ends_the_answer_and_does_not_show(model: Path) -> None:
    options = ("--max-tokens", 24, "--temperature", 0)
    full = found("run", model, "hello", *options)["message"]["content"]
    stop = full[len(full) // 2 :][:3]
    cut = found("run", model, "hello", *options, "--stop", stop)
    assert cut["message"]["content"] == full[: full.index(stop)]
    assert cut["finish_reason"] == "stop"
    assert cut["stop"] == stop


def test_logit_bias_forbids_and_forces(model: Path) -> None:
    forced = found("run", model, "hello", "--max-tokens", 3, "--logit-bias", "100=100", "--logprobs", 0)
    assert [one["id"] for one in forced["logprobs"]] == [100, 100, 100]


def test_exact_numerics_need_more_memory(model: Path) -> None:
    options = ("run", model, "hello " * 50, "--max-tokens", 1)
    deployed, exact = found(*options)["kv_bytes"], found(*options, "--numerics", "exact")["kv_bytes"]
    assert exact["window"] > 2 * deployed["window"]


def test_chat_goes_on_and_reads_each_turn_once(model: Path) -> None:
    result = call("chat", model, "--max-tokens", 3, "--temperature", 0, "--json", stdin="one\ntwo\n\n")
    assert result.exit_code == 0, result.output
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first["reused_tokens"] == 0
    assert second["reused_tokens"] >= first["prompt_tokens"]
    assert second["prompt_tokens"] > first["prompt_tokens"]


# ------------------------------------------------------------------------------------------------ inspect, doctor


@pytest.mark.parametrize("name", ["v4-flash", "v4-pro", "v3.2"])
def test_inspect_presets_without_weights(name: str) -> None:
    shown = found("inspect", name, "--context", 1_000_000)
    expected = {"v4-flash": 3_529_664_576, "v4-pro": 5_054_698_848, "v3.2": 48_068_000_000}
    assert sum(shown["kv_bytes"]["1000000"].values()) == expected[name]
    assert "formats" not in shown
    assert call("inspect", name).exit_code == 0


def test_inspect_a_folder_counts_its_tensors(model: Path) -> None:
    shown = found("inspect", model, "--tensors")
    assert sum(row["tensors"] for row in shown["formats"]) == len(shown["tensors"])
    assert sum(row["bytes"] for row in shown["formats"]) == sum(t["bytes"] for t in shown["tensors"])
    result = call("inspect", model)
    assert "bf16" in result.stdout


def test_doctor_finds_the_kernels_and_names_what_is_missing() -> None:
    shown = found("doctor")
    states = {check["name"]: check["state"] for check in shown["checks"]}
    assert states["native kernels"] == "ok"
    assert states["backend cpu"] == states["backend reference"] == "ok"
    assert all(check["mend"] for check in shown["checks"] if check["state"] == "broken")
    assert call("doctor").exit_code == 0
    assert "threads is 0" in refused("doctor", "--threads", 0)


# ------------------------------------------------------------------------------------------------ synth


def test_synth_writes_what_inspect_reads(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    sizes = ("--layers", 3, "--hidden", 128, "--experts", 4, "--vocab", 512, "--set", "index_topk=16")
    written = found("synth", "v4-flash", folder, *sizes)
    shown = found("inspect", folder)
    assert shown["layers"] == 3
    assert shown["hidden_size"] == 128
    assert written["bytes"] == sum(row["bytes"] for row in shown["formats"])
    assert "empty" in refused("synth", "v4-flash", folder, *sizes)


# ------------------------------------------------------------------------------------------------ refusals


def test_wrong_words_are_refused(model: Path, tmp_path: Path) -> None:
    empty, binary, nul = tmp_path / "empty.txt", tmp_path / "binary", tmp_path / "nul.txt"
    empty.write_bytes(b"")
    binary.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    nul.write_bytes(b"text\0text")
    long = tmp_path / "long.txt"
    long.write_text("words " * 4000, encoding="utf-8")
    assert "no config.json" in refused("run", tmp_path / "nowhere", "hello")
    assert "no config.json" in refused("inspect", tmp_path)
    assert "without weights" in refused("run", "v4-flash", "hello")
    assert "cannot be read" in refused("run", model, "--file", tmp_path / "absent.txt")
    assert "cannot be read" in refused("run", model, "--file", tmp_path)
    assert "is empty" in refused("run", model, "--file", empty)
    assert "is empty" in refused("run", model, stdin="")
    assert "not UTF-8" in refused("run", model, "--file", binary)
    assert "NUL" in refused("run", model, "--file", nul)
    assert "do not fit the context" in refused("run", model, "--file", long)
    assert "context is" in refused("run", model, "hello", "--context", 10**9)
    assert "temperature" in refused("run", model, "hello", "--temperature", "nan")
    assert "max_tokens" in refused("run", model, "hello", "--max-tokens", 0)
    assert "backend" in refused("run", model, "hello", "--backend", "metal")
    assert "numerics" in refused("run", model, "hello", "--numerics", "half")
    assert "memory" in refused("run", model, "hello", "--memory", "lots")
    assert "profile" in refused("run", model, "hello", "--profile", "v5")
    assert "--logit-bias" in refused("run", model, "hello", "--logit-bias", "a=b")
    assert "--set" in refused("synth", "v4-flash", tmp_path / "x", "--set", "layers")
    assert "preset" in refused("synth", "v9", tmp_path / "x")
    assert "format" in refused("synth", "v4-flash", tmp_path / "x", "--layers", 1, "--format", "int3")
    assert "--context" in refused("inspect", "v4-flash", "--context", 0)


def test_a_missing_backend_is_never_replaced(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "triton" in refused("run", model, "hello", "--backend", "triton", code=1)


@pytest.mark.parametrize("words", [(), ("fly",), ("run",), ("run", "m", "q", "--no-such"), ("run", "m", "--seed", "x")])
def test_wrong_usage_is_exit_code_2(words: tuple[str, ...]) -> None:
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output


def test_half_a_checkpoint_is_one_clear_sentence(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(model, folder)
    shard = next(folder.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert shard.name in refused("run", folder, "hello")
    shard.unlink()
    refused("run", folder, "hello")
    (folder / "config.json").write_text('{"model_type": "deepseek_v4"}', encoding="utf-8")
    assert "no field" in refused("run", folder, "hello")
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert "not JSON" in refused("run", folder, "hello")


def test_no_tokenizer_is_said(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(model, folder)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused("run", folder, "hello")


# ------------------------------------------------------------------------------------------------ as a process


def test_ctrl_c_ends_cleanly_with_130(model: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("words and words " * 200, encoding="utf-8")
    command = [sys.executable, "-m", "tenfold", "run", str(model), "--file", str(long), "--max-tokens", "20000"]
    # The slower backend and no end token: the answer must still be going on when the signal comes.
    command += ["--backend", "reference", "--logit-bias", "1=-100"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # What a shell starts in the background ignores this signal, tests too, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    deadline = time.monotonic() + 60
    while not process.stdout.read() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)  # until the answer begins
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr.decode()
    assert b"Traceback" not in stderr
    assert b"interrupted" in stderr


def test_the_help_needs_no_torch() -> None:
    code = "import sys; from tenfold.cli import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
