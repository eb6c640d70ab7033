"""Job files that would take all memory, or never end: one line, at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from batchllm_flows import BatchJob
from batchllm_flows.cli import app
from batchllm_flows.job import InvalidJobError

JOB = """
source: {uri: in, format: jsonl}
prompt: {kind: column, column: text}
model: {id: m, engine_args: ARGUMENTS}
sink: {uri: out}
"""
BOMB = "{a0: &a0 [x, x, x, x, x, x, x, x, x]" + "".join(
    f", a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)
) + "}"  # fmt: skip
DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (BOMB, "expected at most 10,000 values, those that aliases repeat included"),
        ("&a {a: *a}", "expected values within values at most 32 deep, got more at line 4"),
        ("&a [*a]", "expected values within values at most 32 deep"),
        (DEEP, "expected values within values at most 32 deep"),
        ('{"a": ' * 5000 + "1" + "}" * 5000, "expected values within values at most 32 deep"),
        ("[" * 20 + "]" * 20, "model.engine_args: expected settings within settings at most 16 deep"),
    ],
)
def test_a_file_that_has_no_end_is_an_error_of_usage(tmp_path: Path, arguments: str, message: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(JOB.replace("ARGUMENTS", arguments))
    with pytest.raises(InvalidJobError) as told:
        BatchJob.from_file(file)
    assert message in str(told.value)
    assert len(str(told.value)) < 1000
    done = CliRunner().invoke(app, ["validate", str(file)])
    assert done.exit_code == 2
    assert len((done.stderr + done.stdout).strip().splitlines()) == 1


def test_aliases_within_reason_are_taken(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(JOB.replace("ARGUMENTS", "{a: &a {enforce_eager: true}, b: *a}"))
    assert BatchJob.from_file(file).model.engine_args == {"a": {"enforce_eager": True}, "b": {"enforce_eager": True}}


@pytest.mark.parametrize("setting", [f"model.engine_args={BOMB}", "model.engine_args={a: 1, a: 2}"])
def test_a_setting_of_the_command_line_is_looked_at_alike(tmp_path: Path, setting: str) -> None:
    (tmp_path / "job.yaml").write_text(JOB.replace("ARGUMENTS", "{}"))
    done = CliRunner().invoke(app, ["validate", str(tmp_path / "job.yaml"), "--set", setting])
    assert done.exit_code == 2
    assert "--set model.engine_args: expected" in (done.stderr + done.stdout).replace("\n", " ")


def test_settings_without_end_from_python_are_refused() -> None:
    endless: dict[str, Any] = {}
    endless["a"] = endless
    values = {
        "source": {"uri": "in", "format": "jsonl"},
        "prompt": {"kind": "column", "column": "text"},
        "model": {"id": "m", "engine_args": endless},
        "sink": {"uri": "out"},
    }
    with pytest.raises(ValueError, match="expected settings within settings at most 16 deep"):
        BatchJob.model_validate(values)


def test_what_was_got_is_shown_in_short(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB.replace("ARGUMENTS", "x" * 5000))
    with pytest.raises(InvalidJobError, match=r"model\.engine_args: .*xxx\.\.\.\)") as told:
        BatchJob.from_file(tmp_path / "job.yaml")
    assert len(str(told.value)) < 600
