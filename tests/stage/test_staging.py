"""The stage step as a whole: parts, resume, processes, memory, and its Prefect task."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm_operators.errors import TerminalError, TransientError
from batchllm_operators.formats import open_source
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.sampling import SamplingSpec
from batchllm_operators.specs.source import ColumnPrompt, SourceSpec
from batchllm_operators.stage.progress import StageStep
from batchllm_operators.stage.staging import PART_ROWS, stage_rows
from batchllm_operators.store import Store
from batchllm_operators.work.layout import STAGED_SUMMARY
from batchllm_operators.work.staged import STAGED_SCHEMA

from .conftest import Stage

TOKENS = {"kind": "tokens", "column": "ids"}


def test_staged_rows_follow_each_other_over_parts(stage: Stage) -> None:
    rows = 2 * PART_ROWS + 5000
    seen: list[int] = []
    staged = stage([{"ids": [n % 7, 1]} for n in range(rows)], TOKENS, progress=lambda _, done: seen.append(done))
    assert [part.name for part in staged.summary.parts] == [f"staged/part-{n:05d}.parquet" for n in range(3)]
    assert sum(part.rows for part in staged.summary.parts) == staged.summary.rows == rows
    assert [row["row_index"] for row in staged.rows] == list(range(rows))
    assert seen == sorted(seen)
    assert seen[-1] == rows
    for part in staged.summary.parts:
        with staged.work.parquet(part.name) as file:
            assert file.schema_arrow == STAGED_SCHEMA
            assert file.read(["row_index"])["row_index"][0].as_py() == part.first_row


def test_what_is_staged_is_not_staged_again(stage: Stage, tmp_path: Path) -> None:
    first = stage([{"text": "x"}])
    before = {one.path: one.version for one in first.work.objects()}
    assert stage(tmp_path / "input.parquet").summary == first.summary
    assert {one.path: one.version for one in first.work.objects()} == before


@pytest.mark.parametrize("lost", [STAGED_SUMMARY, "staged/part-00000.parquet"])
def test_staging_that_did_not_come_to_its_end_is_done_again(stage: Stage, lost: str) -> None:
    first = stage([{"text": "x"}])
    rows = first.rows
    first.work.delete([lost])
    assert stage([{"text": "x"}]).rows == rows


def test_the_number_of_processes_does_not_change_a_byte(stage: Stage, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"row {n % 100}" if n % 9 else None} for n in range(5000)]
    one = stage(rows, work="one")
    three = stage(tmp_path / "input.parquet", work="three", processes=3)
    assert len(one.summary.parts) == len(three.summary.parts)
    for part in one.summary.parts:
        assert one.work.read_bytes(part.name) == three.work.read_bytes(part.name)
    assert one.summary.model_copy(update={"seconds": 0}) == three.summary.model_copy(update={"seconds": 0})


def test_a_tokenizer_process_that_dies_is_a_transient_error(stage: Stage) -> None:
    killed: list[int] = []

    def kill_one(step: StageStep, rows: int) -> None:
        if not killed:
            killed.append(rows)
            children = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text().split()
            workers = [pid for pid in map(int, children) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            os.kill(workers[0], signal.SIGKILL)

    with pytest.raises(TransientError, match="a tokenizer process died"):
        stage([{"text": f"row {n}"} for n in range(50_000)], processes=2, progress=kill_one)
    assert killed


def test_a_model_that_cannot_be_used_is_said_by_the_processes_before_any_row_is_read(
    stage: Stage, tmp_path: Path, tiny_llama: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(Path(tiny_llama) / "config.json", model)
    for processes in (1, 2):
        with pytest.raises(TerminalError, match=r"model\.id: cannot load the tokenizer of"):
            stage([{"text": "x"}], model={"id": str(model)}, processes=processes)
        assert not (tmp_path / "work").exists()


def test_memory_is_bounded_by_the_batches_not_by_the_dataset(tiny_llama: str, tmp_path: Path) -> None:
    """Staging four times the rows must not take noticeably more memory; 300 MB of text pass through."""
    peaks = []
    for groups in (8, 32):
        folder = tmp_path / str(groups)
        folder.mkdir()
        with pq.ParquetWriter(folder / "input.parquet", pa.schema([("text", pa.string())])) as writer:
            for _ in range(groups):
                writer.write_table(pa.table({"text": [os.urandom(2500).hex() for _ in range(2000)]}))
        script = (
            "import resource, sys\n"
            "from batchllm_operators.specs.execution import ModelSpec\n"
            "from batchllm_operators.formats import open_source\n"
            "from batchllm_operators.specs.source import SourceSpec, TemplatePrompt\n"
            "from batchllm_operators.specs.sampling import SamplingSpec\n"
            "from batchllm_operators.stage.staging import stage_rows\n"
            "from batchllm_operators.store import Store\n"
            "source = open_source(SourceSpec(uri=sys.argv[1] + '/input.parquet', format='parquet'))\n"
            "prompt = TemplatePrompt(kind='template', template='{{ text[:10] }}')\n"
            "stage_rows(source, prompt, SamplingSpec(), ModelSpec(id=sys.argv[2]), Store(sys.argv[1] + '/work'))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder), tiny_llama], check=True, capture_output=True, text=True
        )
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 60, f"peak MiB of 80 and of 320 MB of text: {peaks}"


def test_input_and_work_folder_may_be_on_s3(bucket: str, tiny_llama: str) -> None:
    source_store, work = Store(f"{bucket}/input"), Store(f"{bucket}/work")
    for name in ("a", "b"):
        source_store.write_table(f"{name}.parquet", pa.table({"text": [f"{name} {n}" for n in range(1500)]}))
    source = open_source(SourceSpec(uri=f"{bucket}/input/*.parquet", format="parquet"))
    prompt = ColumnPrompt(kind="column", column="text")
    summary = stage_rows(source, prompt, SamplingSpec(), ModelSpec(id=tiny_llama), work)
    assert (summary.rows, summary.requests) == (3000, 3000)
    assert work.names() == ["staged/part-00000.parquet", STAGED_SUMMARY]


def test_the_task_stages_within_a_flow_of_the_users(prefect_server: None, tiny_llama: str, tmp_path: Path) -> None:
    from prefect import flow

    from batchllm_operators.stage.task import stage as stage_task

    pq.write_table(pa.table({"text": ["x", "y"]}), tmp_path / "input.parquet")

    @flow
    def pipeline(path: str) -> Any:
        return stage_task(
            SourceSpec(uri=path, format="parquet"),
            ColumnPrompt(kind="column", column="text"),
            SamplingSpec(),
            ModelSpec(id=tiny_llama),
            str(tmp_path / "work"),
            StorageOptions(),
        )

    summary = pipeline(str(tmp_path / "input.parquet"))
    assert summary.requests == 2
    assert Store(str(tmp_path / "work")).exists(STAGED_SUMMARY)
    with pytest.raises(TerminalError, match="no object matches"):
        pipeline(str(tmp_path / "nothing.parquet"))


def test_only_transient_errors_are_tried_again(prefect_server: None) -> None:
    from prefect import flow, task

    from batchllm_operators.retry import retry_transient

    attempts: list[str] = []

    @task(retries=2, retry_delay_seconds=0, retry_condition_fn=retry_transient)
    def fail(error: type[Exception]) -> None:
        attempts.append(error.__name__)
        raise error("no luck")

    @flow
    def failing(kind: str) -> None:
        fail(TransientError if kind == "transient" else TerminalError)

    with pytest.raises(TransientError):
        failing("transient")
    with pytest.raises(TerminalError):
        failing("terminal")
    assert attempts == ["TransientError"] * 3 + ["TerminalError"]
