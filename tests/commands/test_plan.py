"""`plan` and `--set`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchllm_flows.commands.options import load_job
from tests.commands.conftest import Batchllm
from tests.commands.job_folders import write_job
from tests.flows.jobs import questions

_PROGRAM = """
import sys
from batchllm_flows.cli import app
app(sys.argv[1:], standalone_mode=False)
heavy = [name for name in ("prefect", "torch", "vllm") if sys.modules.get(name) is not None]
print(heavy, file=sys.stderr)
"""


def without_text(rows: pa.Table, *missing: int) -> pa.Table:
    texts = [None if index in missing else text for index, text in enumerate(rows["question"].to_pylist())]
    return rows.set_column(2, "question", pa.array(texts, pa.string()))


def test_a_plan_needs_no_prefect_and_no_torch_and_is_quiet(tmp_path: Path, tiny_llama: str) -> None:
    path = write_job(tmp_path, tiny_llama)
    # A server that nobody could reach: a plan does not ask for one.
    environment = os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api", "HF_HUB_OFFLINE": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "plan", str(path), "--quiet", "--json"],
        env=environment, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert json.loads(printed.stdout)["counts"]["requests"] == 7
    assert printed.stderr == "[]\n"


def test_rows_with_errors_are_shown_by_kind_with_examples_and_end_with_3(
    tmp_path: Path, batchllm: Batchllm, tiny_llama: str
) -> None:
    rows = without_text(questions(100), 5, 17, 30, 31)
    shown = batchllm("plan", write_job(tmp_path, tiny_llama, rows))
    assert shown.exit_code == 3, shown.output
    assert "### Rows with errors" in shown.stdout
    assert "`invalid_row`: 4 rows" in shown.stdout
    for row in (5, 17, 30):
        assert f"`row-{row}`: " in shown.stdout
    assert "`row-31`: " not in shown.stdout
    assert "staged 100 rows: 96 requests, 4 errors" in shown.stderr


def test_too_many_rows_with_errors_end_with_1_after_staging(
    tmp_path: Path, batchllm: Batchllm, tiny_llama: str
) -> None:
    path = write_job(tmp_path, tiny_llama, without_text(questions(8), *range(8)))
    shown = batchllm("plan", path, "--quiet")
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert "8 of 8 rows have errors" in shown.stderr
    assert "invalid_row 8; row row-0: " in shown.stderr
    assert shown.stderr.count("row row-") == 3
    # What was staged is kept: another fraction needs no other staging.
    allowed = batchllm("plan", path, "--quiet", "--json", "--set", "execution.max_error_fraction=1")
    assert allowed.exit_code == 3
    assert json.loads(allowed.stdout)["counts"]["error_rows"] == {"invalid_row": 8}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("prompt.user={{ question }}", "{{ question }}"),
        ("prompt.user=Title: {{ question }}", "Title: {{ question }}"),
        ("prompt.user={% if id %}{{ id }}{% endif %}", "{% if id %}{{ id }}{% endif %}"),
        ("prompt.user='{{ id }}: {{ question }}'", "{{ id }}: {{ question }}"),
        ('prompt.user="{{ id }}\\n"', "{{ id }}\n"),
        ("prompt.user=plain", "plain"),
        ("sampling.max_tokens=7", 7),
        ("sampling.stop=['}}', '{{']", ("}}", "{{")),
        ("source.storage={anonymous: true}", True),
    ],
)
def test_settings_are_yaml_and_templates_are_text(tmp_path: Path, setting: str, value: Any) -> None:
    path = write_job(tmp_path, "model")
    job = load_job(path, [setting])
    assert value in (
        getattr(job.prompt, "user", None), job.sampling.max_tokens, job.sampling.stop, job.source.storage.anonymous
    )  # fmt: skip
