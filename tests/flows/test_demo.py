"""The demo as `make demo` runs it, on scripted engines: its own S3 server, its input, its job, what it prints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from batchllm_flows.demo import run
from batchllm_operators.execute.backends.inline import Script
from tests.conftest import MODELS, InlineEngines

VARIABLES = (
    *("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "PREFECT_HOME"),
    *("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"),
)


@pytest.mark.usefixtures("prefect_server", "smollm2")
def test_the_demo_answers_its_rows_shows_some_and_finds_them_again(
    tmp_path: Path,
    inline_engines: InlineEngines,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that what the demo sets is gone after the test
    job = run.demo_job

    def on_scripted_engines(model: Path) -> dict[str, Any]:
        return job(model) | {"execution": {"backend": "inline"}}

    monkeypatch.setattr(run, "demo_job", on_scripted_engines)
    inline_engines.script = Script(answer=lambda _request: "It does something.")

    assert run.run_demo(tmp_path / "demo", MODELS) == 0

    first = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert (first["rows_in"], first["rows_out"], first["rows_error"]) == (59, 59, 1)
    assert first["computed_requests"] > 0
    printed = capsys.readouterr().out
    assert "59 of 59, in input order" in printed
    assert printed.count("It does something.") == run.SAMPLES
    assert run.run_demo(tmp_path / "demo", MODELS) == 0
    again = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert (again["already_complete"], again["computed_requests"]) == (True, 0)
    assert "nothing: the output was complete already" in capsys.readouterr().out
