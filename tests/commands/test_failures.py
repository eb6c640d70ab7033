"""Every failure of a command is one line with cause and next step, and ends with the documented exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchllm_flows.commands import failures
from batchllm_operators.errors import TerminalError, TransientError
from tests.commands.conftest import Batchllm
from tests.commands.job_folders import write_job

MODEL = "no-such-owner/no-such-model"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["plan"], 2, "Missing argument 'job_file'"),
        (["run", "JOB", "--limit", "0"], 2, "--limit"),
        (["plan", "JOB", "--set", "nothing"], 2, "expected KEY.PATH=VALUE, got 'nothing'"),
        (["plan", "JOB", "--set", "sampling.max_tokens=[1"], 2, "a text needs quotes"),
        (["plan", "JOB", "--set", "sampling.max_tokns=3"], 2, "did you mean 'max_tokens'"),
        (["plan", "none.yaml"], 2, "cannot read job file: No such file"),
        (["plan", "FOLDER"], 2, "cannot read job file: Is a directory"),
        (["plan", "JOB", "--set", "source.uri=gs://bucket/in"], 1, "pip install gcsfs"),
        (["plan", "JOB", "--set", "sink.uri=gs://bucket/out"], 1, "pip install gcsfs"),
        (["plan", "JOB", "--set", "execution.work_uri=abfs://bucket/work"], 1, "pip install adlfs"),
        (["plan", "JOB", "--set", "source.uri=nothing://bucket/in"], 1, "unknown scheme nothing://"),
        (["plan", "JOB", "--set", "source.uri=ftp://host/in"], 1, "ftp:// cannot be opened by its address alone"),
        (["plan", "JOB", "--set", "source.uri=hf://datasets"], 1, "the store of hf://"),
        (["plan", "JOB", "--set", "source.uri=none/*.parquet"], 1, "no object matches"),
        (["plan", "JOB", "--quiet", "--set", "prompt.user={{ titel }}"], 1, "cannot load the configuration"),
        (["status", "FOLDER"], 1, "no job here"),
        (["report", "FOLDER"], 1, "no complete output here"),
        (["clean", "FOLDER", "--older-than", "soon"], 2, "expected a number with one of the units"),
    ],
)
def test_a_failure_is_one_line(tmp_path: Path, batchllm: Batchllm, arguments: list[str], code: int, told: str) -> None:
    places = {"JOB": str(write_job(tmp_path, MODEL)), "FOLDER": str(tmp_path)}
    shown = batchllm(*(places.get(one, one) for one in arguments))
    assert shown.exit_code == code, shown.output
    assert told in shown.stderr
    assert shown.stderr.startswith("batchllm: ")
    assert shown.stderr.count("\n") == 1
    assert shown.stdout == ""


def test_a_store_that_refuses_connections_is_named(
    tmp_path: Path, batchllm: Batchllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    path = write_job(tmp_path, MODEL)
    endpoint = "source.storage.endpoint_url=http://127.0.0.1:9"
    shown = batchllm("plan", path, "--set", "source.uri=s3://bucket/in", "--set", endpoint)
    assert shown.exit_code == 1
    assert "no answer from endpoint http://127.0.0.1:9, bucket 'bucket'" in shown.stderr
    assert shown.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--debug", "plan", "none.yaml"), ("plan", "none.yaml", "--debug")])
def test_the_traceback_is_shown_where_it_is_asked_for(batchllm: Batchllm, arguments: tuple[str, ...]) -> None:
    shown = batchllm(*arguments)
    assert shown.exit_code == 2
    assert "Traceback (most recent call last)" in shown.stderr
    assert shown.stderr.splitlines()[-1].startswith("batchllm: cannot read job file")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted; what is done is kept: give the same command again"),
        (TerminalError("no such bucket\nat all"), 1, "no such bucket at all"),
        (TransientError("throttled"), 1, "throttled; run again"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero; run with --debug"),
    ],
)
def test_exceptions_end_with_their_code(error: BaseException, code: int, told: str) -> None:
    message, exit_code = failures.explained(error)
    assert exit_code == code
    assert told in message
    assert "\n" not in message


def test_an_unknown_exception_of_a_command_is_one_line_too(
    tmp_path: Path, batchllm: Batchllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("batchllm_flows.job_status.job_statuses", broken)
    shown = batchllm("status", tmp_path)
    assert (shown.exit_code, shown.stderr.count("\n")) == (1, 1)
    assert "run with --debug" in shown.stderr
