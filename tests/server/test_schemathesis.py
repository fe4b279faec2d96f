"""What schemathesis makes of our OpenAPI page, valid and not: no server error, nothing undocumented."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.server.fakes import plain_language, saying, serving

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "unsupported_method,allow_header_conformance"
)
RUN = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"


def examine(folder: Path, examples: int, seconds: int) -> int:
    """The number of cases; fails with schemathesis' own words."""
    language = plain_language()
    report = folder / "report.ndjson"
    with serving(saying("ok", language), language=language) as served:
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
        return count_cases(done.stdout)


def count_cases(said: str) -> int:
    """From `N generated, ...` in its last lines."""
    words = said.split()
    return max(
        (int(words[i]) for i in range(len(words) - 1) if words[i].isdigit() and words[i + 1].startswith("generated")),
        default=0,
    )


def test_some_cases(tmp_path: Path) -> None:
    assert examine(tmp_path, examples=8, seconds=500) >= 500


@pytest.mark.slow
def test_many_cases(tmp_path: Path) -> None:
    assert examine(tmp_path, examples=1000, seconds=7200) >= 10_000
