"""`init` and `validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from batchllm_flows.commands.options import load_job
from batchllm_flows.job import BatchJob
from batchllm_operators.store import Store
from tests.commands.conftest import Batchllm
from tests.commands.job_folders import write_job
from tests.flows.jobs import questions, write_input

CONVERSATION = [{"role": "user", "content": "Where is Rome?"}]


@pytest.mark.parametrize(
    ("columns", "prompt", "id_column"),
    [
        ({"id": "a", "question": "why?"}, {"kind": "chat", "user": "{{ question }}"}, "id"),
        ({"ticket_id": 1, "n": 2, "Body": "hot"}, {"kind": "chat"}, "ticket_id"),
        ({"messages": CONVERSATION, "text": "x"}, {"kind": "messages", "column": "messages"}, None),
        ({"Review Text": "good"}, {"kind": "column", "column": "Review Text"}, None),
        ({"Review Text": "good", "plain": "x"}, {"kind": "chat"}, None),
        ({"range": "text"}, {"kind": "column", "column": "range"}, None),
        ({"n": 1}, {"kind": "chat"}, None),
    ],
)
def test_init_writes_a_valid_job_over_the_columns_it_finds(
    tmp_path: Path, batchllm: Batchllm, columns: dict[str, Any], prompt: dict[str, str], id_column: str | None
) -> None:
    for form in ("parquet", "jsonl"):
        source, path = tmp_path / form, tmp_path / f"{form}.yaml"
        if form == "parquet":
            write_input(str(source), pa.Table.from_pylist([columns] * 2))
        else:
            Store(str(source)).write_bytes("rows.jsonl", orjson.dumps(columns) + b"\n")
        assert batchllm("init", "--input", source, "--output", path).exit_code == 0
        job = BatchJob.from_file(path)
        assert job.source.format == form
        assert job.source.id_column == id_column
        assert prompt.items() <= job.prompt.model_dump().items()
        for name in columns:
            assert f"#   {name}: " in path.read_text()
        assert not job.sink.uri.startswith(f"{source}/")


def test_init_takes_a_single_object_a_glob_and_names_of_output_columns(tmp_path: Path, batchllm: Batchllm) -> None:
    write_input(str(tmp_path / "in"), pa.table({"text": ["a", "b"], "error": ["c", "d"]}))
    for number, uri in enumerate((tmp_path / "in" / "rows-0.parquet", tmp_path / "in" / "*.parquet")):
        path = tmp_path / f"{number}.yaml"
        assert batchllm("init", "--input", uri, "--output", path).exit_code == 0
        job = BatchJob.from_file(path)
        assert (job.source.format, job.source.columns) == ("parquet", ["text"])


def test_what_init_writes_passes_validate(tmp_path: Path, batchllm: Batchllm, tiny_llama: str) -> None:
    write_input(str(tmp_path / "in"), questions(8))
    path = tmp_path / "job.yaml"
    assert batchllm("init", "--input", tmp_path / "in", "--output", path, "--model", tiny_llama).exit_code == 0
    shown = batchllm("validate", path)
    assert shown.exit_code == 0, shown.output
    assert all(line.startswith("ok ") for line in shown.stdout.splitlines())
    assert "8 rows" in shown.stdout


def test_init_replaces_a_file_only_when_forced(tmp_path: Path, batchllm: Batchllm) -> None:
    write_input(str(tmp_path / "in"), questions(2))
    path = tmp_path / "job.yaml"
    path.write_text("mine")
    refused = batchllm("init", "--input", tmp_path / "in", "--output", path)
    assert refused.exit_code == 1
    assert "--force replaces it" in refused.stderr
    assert path.read_text() == "mine"
    assert batchllm("init", "--input", tmp_path / "in", "--output", path, "--force").exit_code == 0
    assert yaml.safe_load(path.read_text())["source"]["uri"] == str(tmp_path / "in")


def test_init_says_what_is_wrong_with_an_input(tmp_path: Path, batchllm: Batchllm) -> None:
    shown = batchllm("init", "--input", tmp_path / "nothing", "--output", tmp_path / "job.yaml")
    assert shown.exit_code == 1
    assert "no object matches" in shown.stderr
    Store(str(tmp_path / "in")).write_bytes("rows.jsonl", b"")
    shown = batchllm("init", "--input", tmp_path / "in", "--output", tmp_path / "job.yaml")
    assert "no row with a column" in shown.stderr


@pytest.mark.parametrize(
    ("changes", "failed", "told"),
    [
        ({"prompt": {"kind": "chat", "user": "{{ titel }}"}}, "columns", "no such column: titel"),
        ({"source__id_column": "key"}, "columns", "no such column: key"),
        ({"source__uri": "/nowhere/in"}, "source", "no object matches"),
        ({"model__id": "/nowhere/model"}, "model", "no such folder"),
        ({"model__engine_args": {"enforce_eagr": True}}, "engine_args", "did you mean 'enforce_eager'"),
        ({"prompt": {"kind": "chat", "user": "{{ question"}}, "prompt", "prompt.user"),
    ],
)
def test_validate_tells_every_fault_in_a_line_of_its_own(
    tmp_path: Path, batchllm: Batchllm, tiny_llama: str, changes: dict[str, Any], failed: str, told: str
) -> None:
    shown = batchllm("validate", write_job(tmp_path, tiny_llama, **changes))
    assert shown.exit_code == 1
    lines = [line for line in shown.stdout.splitlines() if line.startswith("FAILED")]
    assert [line.split()[1].rstrip(":") for line in lines] == [failed]
    assert told in lines[0]
    assert not (tmp_path / "out").exists(), "validate staged something"


def test_validate_knows_the_columns_that_a_name_could_mean(tmp_path: Path, batchllm: Batchllm, tiny_llama: str) -> None:
    rows = pa.table({"product-id": ["a-1"], "product": [3], "id": ["x"]})
    prompt = {"kind": "chat", "user": "{{ product-id }}"}
    shown = batchllm("validate", write_job(tmp_path, tiny_llama, rows, prompt=prompt))
    assert shown.exit_code == 1
    assert 'row["product-id"]' in shown.stdout, shown.stdout


def test_validate_reads_no_rows(
    tmp_path: Path, batchllm: Batchllm, tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_file = write_job(tmp_path, tiny_llama)
    stamps = pa.table({"question": ["why?"], "t": pa.array([1], pa.timestamp("ns"))})
    pq.write_table(stamps, tmp_path / "in" / "z.parquet", use_deprecated_int96_timestamps=True)
    scanned: list[str] = []
    monkeypatch.setattr(Store, "scan_parquet", lambda _store, name, *_arguments, **_options: scanned.append(name))
    shown = batchllm("validate", str(job_file))
    assert shown.exit_code == 0, shown.stdout
    assert not scanned


def test_validate_knows_a_column_that_is_named_like_a_function_of_jinja(
    tmp_path: Path, batchllm: Batchllm, tiny_llama: str
) -> None:
    rows = pa.table({"range": ["from 3 to 5"], "id": ["x"]})
    prompt = {"kind": "template", "template": "{{ range }}"}
    shown = batchllm("validate", write_job(tmp_path, tiny_llama, rows, prompt=prompt))
    assert shown.exit_code == 0, shown.stdout
    assert "prompts of kind template need no chat template" in shown.stdout


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"kind": "template", "template": "{{ text }}"}', {"kind": "template", "template": "{{ text }}"}),
        ("{{ text }}", "{{ text }}"),
        ("Text: {{ text }}", "Text: {{ text }}"),
    ],
)
def test_a_setting_may_be_a_mapping_or_a_template(tmp_path: Path, tiny_llama: str, text: str, value: object) -> None:
    path = write_job(tmp_path, tiny_llama)
    field = "prompt" if isinstance(value, dict) else "prompt.user"
    job = load_job(path, [f"{field}={text}"])
    assert job.prompt.model_dump(exclude_defaults=True) == value if field == "prompt" else job.prompt.user == value
