"""What schemathesis makes of our OpenAPI page, valid and not: no server error, nothing undocumented."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.server.fakes import CONTEXT, FakeJobs, plain_language, saying, serving

from tenfold.server.wire import Ready

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "unsupported_method,allow_header_conformance"
)
RUN = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"


def examine(folder: Path, examples: int, seconds: int) -> int:
    """The number of cases; fails with schemathesis' own words."""
    language = plain_language()
    report = folder / "report.ndjson"
    jobs = FakeJobs(saying("ok", language), Ready("fake", CONTEXT, 2048, 1 << 30, 282_624, 118.8, 788.0, (1,)))
    with serving(jobs.script, jobs=jobs, language=language) as served:
        words = [
            *("run", f"{served.url}/openapi.json", "--mode", "all", "--phases", "examples,coverage,fuzzing"),
            *("--max-examples", str(examples), "--checks", CHECKS, "--continue-on-failure", "--seed", "1"),
            *("--suppress-health-check", "all", "--warnings", "off", "--no-color", "--request-timeout", "30"),
            *("--generation-allow-x00", "true", "--generation-database", ":memory:"),
            *("--report", "ndjson", "--report-ndjson-path", str(report)),
        ]
        done = subprocess.run(
            [sys.executable, "-c", RUN, *words],
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=folder,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert served.http.get("/health").status_code == 200
        assert not served.jobs.running
        return count_cases(report)


def count_cases(report: Path) -> int:
    """Requests that were sent and answered."""
    scenarios = (json.loads(line).get("ScenarioFinished") for line in report.read_text("utf-8").splitlines())
    recorders = [scenario["recorder"] for scenario in scenarios if scenario]
    return sum(bool(one["response"]) for recorder in recorders for one in recorder.get("interactions", {}).values())


def test_some_cases(tmp_path: Path) -> None:
    assert examine(tmp_path, examples=2, seconds=900) >= 500


@pytest.mark.slow
def test_many_cases(tmp_path: Path) -> None:
    assert examine(tmp_path, examples=1000, seconds=7200) >= 10_000
