"""`batchllm verify`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from batchllm_flows.cli import app
from batchllm_operators.work.layout import JOB_FILE, STAGED_SUMMARY
from tests.merge.conftest import JOB_ID, Job, answer


@pytest.fixture
def output(tmp_path: Path) -> Path:
    job = Job(tmp_path / "job", ["a", "b"])
    job.add_results(answer("a"), answer("b"))
    job.merge()
    job.work.write_bytes(JOB_FILE, orjson.dumps({"job_id": JOB_ID}))
    job.work.write_bytes(STAGED_SUMMARY, job.stage.model_dump_json().encode())
    return tmp_path / "job" / "sink"


def test_a_whole_output_ends_with_0_and_a_line_that_says_so(output: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(output)])
    assert done.exit_code == 0, done.output
    assert "whole" in done.output
    assert "2 rows" in done.output


def test_a_damaged_output_ends_with_1_and_names_the_object(output: Path) -> None:
    file = next(output.glob("part-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    done = CliRunner().invoke(app, ["verify", str(output)])
    assert done.exit_code == 1
    assert file.name in done.output
    assert "expected digest" in done.output
    as_json = CliRunner().invoke(app, ["verify", str(output), "--json"])
    assert as_json.exit_code == 1
    (fault,) = json.loads(as_json.output)["faults"]
    assert fault["uri"] == str(file)


def test_a_folder_without_output_ends_with_1_and_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert done.exit_code == 1
    assert "no complete output here" in done.output
    assert "Traceback" not in done.output
