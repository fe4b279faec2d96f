"""Programs that we did not write, as their users run them. Found on the PATH, or not run.

    npm install @openai/codex @anthropic-ai/claude-code @continuedev/cli
    pip install genai-bench; pip install guidellm (environments of their own; guidellm with a CPU build of torch)
    PATH=... python -m tests.long codex claude continue guidellm genai-bench

They have the settings of docs/guides/serve.md. They must see no error, and count the tokens that the server counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.long.served import KEYS, MODEL, SLOW_S, SLOW_SAYS, command, serving

from tenfold import config

TOKENIZER = str(config.locate("tiny-v4-flash"))
LONGEST_S = 1200
_NOT_RUN = {"ok": None, "not_run": "the program is not on the PATH"}
_LINE = re.compile(r" prompt=(\d+) cached=\d+ completion=(\d+) .*finish=(\w+)")


def counted(folder: str) -> dict[str, int]:
    """By the log of the server: how many answers ended how, and the tokens of those that nobody cut short."""
    lines = _LINE.findall(Path(folder, "log").read_text())
    whole = [(int(prompt), int(completion)) for prompt, completion, how in lines if how in ("stop", "length")]
    tokens = {"input_tokens": sum(pair[0] for pair in whole), "output_tokens": sum(pair[1] for pair in whole)}
    return {"answers": len(whole), **tokens, **Counter(how for *_, how in lines if how not in ("stop", "length"))}


def run(words: list[str], folder: str, **environment: str) -> str:
    """What the program says on stdout."""
    more = {"HF_HUB_OFFLINE": "1", "TENFOLD_API_KEY": KEYS[0], "NO_COLOR": "1", **environment}
    done = subprocess.run(
        words, env={**os.environ, **more}, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=LONGEST_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout[-1500:], done.stderr[-1500:])
    return done.stdout


def _ask_codex(url: str, question: str, folder: str) -> dict[str, Any]:
    """One turn of codex, which waits 20 seconds for an event, and has no second try."""
    home = Path(folder, "codex")
    home.mkdir()
    (home / "config.toml").write_text(
        f'model = "{MODEL}"\nmodel_provider = "tenfold"\nmodel_context_window = 1000000\n'
        '[model_providers.tenfold]\nname = "tenfold"\n'
        f'base_url = "{url}/v1"\nwire_api = "responses"\nenv_key = "TENFOLD_API_KEY"\n'
        "stream_idle_timeout_ms = 20000\nstream_max_retries = 0\nrequest_max_retries = 0\n"
    )
    words = ["codex", "exec", "--json", "--skip-git-repo-check", "-s", "read-only", question]
    events = [json.loads(line) for line in run(words, str(home), CODEX_HOME=str(home)).splitlines()]
    said = [event["item"]["text"] for event in events if event.get("item", {}).get("type") == "agent_message"]
    usage = next(event["usage"] for event in events if event["type"] == "turn.completed")
    return {"said": "".join(said), **{name: usage[name] for name in ("input_tokens", "output_tokens")}}


def codex() -> dict[str, Any]:
    """An engine that reads for 65 seconds, then the embedded model and as long a prompt as a command line holds."""
    if shutil.which("codex") is None:
        return _NOT_RUN
    with _slow() as (url, folder):
        slow = _ask_codex(url, "Say hello.", folder)
    assert slow["said"] == SLOW_SAYS, slow
    text = " ".join(f"Row {number} is locked." for number in range(5000))
    with tempfile.TemporaryDirectory() as folder, command(folder, "--no-store", keys=True) as served:
        real = _ask_codex(served.url, text, folder)
        ours = counted(folder)
    assert {name: real[name] for name in ("input_tokens", "output_tokens")} == {
        name: ours[name] for name in ("input_tokens", "output_tokens")
    }, (real, ours)
    return {"silent_s": SLOW_S, "of_the_embedded_model": ours}


def claude() -> dict[str, Any]:
    """Claude Code, and an engine that reads for 65 seconds."""
    if shutil.which("claude") is None:
        return _NOT_RUN
    with _slow() as (url, folder):
        chosen = {
            f"ANTHROPIC_{name}MODEL": MODEL for name in ("", "DEFAULT_OPUS_", "DEFAULT_SONNET_", "DEFAULT_HAIKU_")
        }
        told = run(
            ["claude", "-p", "Say hello.", "--output-format", "json"],
            folder,
            HOME=folder,
            ANTHROPIC_BASE_URL=url,
            ANTHROPIC_AUTH_TOKEN=KEYS[0],
            CLAUDE_CODE_MAX_CONTEXT_TOKENS="1000000",
            API_TIMEOUT_MS="3600000",
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
            **chosen,
        )
    found = json.loads(told)
    assert (found["result"], found["is_error"]) == (SLOW_SAYS, False), found
    assert found["modelUsage"][MODEL]["contextWindow"] == 1_000_000, found
    return {"silent_s": SLOW_S, "input_tokens": found["usage"]["input_tokens"]}


def continue_() -> dict[str, Any]:
    """Continue's own program, with the file that its editors read, and an engine that reads for 65 seconds."""
    if shutil.which("cn") is None:
        return _NOT_RUN
    with _slow() as (url, folder):
        settings = Path(folder, "config.yaml")
        settings.write_text(
            "name: tenfold\nversion: 1.0.0\nschema: v1\nmodels:\n  - name: deepseek\n    provider: openai\n"
            f"    model: {MODEL}\n    apiBase: {url}/v1\n    apiKey: {KEYS[0]}\n"
            "    defaultCompletionOptions: { contextLength: 1000000, maxTokens: 32000 }\n"
            "    requestOptions: { timeout: 3600 }\n"
        )
        words = ["cn", "-p", "Say hello.", "--config", str(settings)]
        said = run(words, folder, HOME=folder, CONTINUE_GLOBAL_DIR=folder, CONTINUE_TELEMETRY_ENABLED="0").strip()
    assert said == SLOW_SAYS, said
    return {"silent_s": SLOW_S}


@contextlib.contextmanager
def _slow() -> Iterator[tuple[str, str]]:
    """An engine that reads for a while, and a folder; one answer is given, not a second one after an error."""
    began = time.monotonic()
    with serving("slow") as served, tempfile.TemporaryDirectory() as folder:
        yield served.url, folder
        assert time.monotonic() - began > SLOW_S
        assert served.gauge("vllm:request_success_total") == 1


@dataclass(frozen=True, slots=True)
class Generator:
    """A program that sends 40 requests of 256 tokens in, 32 out, four at a time; how it is called, the JSON file it
    writes, and where in that stand its counts. `leaves`: it may go away from some that it has begun."""

    words: tuple[str, ...]
    report: str
    answers: str
    errors: str
    input_tokens: str
    output_tokens: str
    leaves: bool = False


GENERATORS = {
    "guidellm": Generator(
        (
            *("run", "--backend", f"kind=openai_http,target={{url}},model={MODEL},api_key={KEYS[0]}"),
            *("--data", "kind=synthetic_text,prompt_tokens=256,output_tokens=32"),
            *("--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}"),
            *("--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=40"),
            *("--output", "kind=json,path={folder}/found.json", "--disable-console"),
        ),
        "found.json",
        "benchmarks.0.metrics.request_totals.successful",
        "benchmarks.0.metrics.request_totals.errored",
        "benchmarks.0.metrics.prompt_token_count.total.total_sum",
        "benchmarks.0.metrics.output_token_count.total.total_sum",
    ),
    "genai-bench": Generator(
        (
            *("benchmark", "--api-backend", "openai", "--api-base", "{url}", "--api-key", KEYS[0]),
            *("--task", "text-to-text", "--api-model-name", MODEL, "--model", MODEL, "--model-tokenizer", TOKENIZER),
            *("--num-concurrency", "4", "--traffic-scenario", "D(256,32)", "--max-time-per-run", "10"),
            *("--max-requests-per-run", "40", "--experiment-base-dir", "{folder}/found", "--log-dir", "{folder}"),
        ),
        "found/**/*text-to-text_num*.json",
        "aggregated_metrics.num_completed_requests",
        "aggregated_metrics.num_error_requests",
        "aggregated_metrics.stats.num_input_tokens.sum",
        "aggregated_metrics.stats.num_output_tokens.sum",
        leaves=True,
    ),
}


def loaded_by(name: str) -> dict[str, Any]:
    """R29: a load generator sees no error, and counts what the server counts."""
    if shutil.which(name) is None:
        return _NOT_RUN
    generator = GENERATORS[name]
    with tempfile.TemporaryDirectory() as folder, command(folder, "--no-store", keys=True) as served:
        run([name, *(word.format(url=served.url, folder=folder) for word in generator.words)], folder)
        report = json.loads(next(Path(folder).glob(generator.report)).read_text())
        ours = counted(folder)
    errors = _at(report, generator.errors)
    theirs = {name: _at(report, getattr(generator, name)) for name in ("answers", "input_tokens", "output_tokens")}
    assert errors == 0, report
    assert {name: ours[name] for name in theirs} == theirs, (ours, theirs)
    assert generator.leaves or ours == theirs, (ours, theirs)
    return {"errors": errors, **ours}


def _at(found: Any, path: str) -> int:
    for name in path.split("."):
        found = found[int(name) if isinstance(found, list) else name]
    return int(found)
