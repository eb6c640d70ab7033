"""Whole runs that add their outputs to one sink, on the objects that are new since the last of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from batchllm_flows.cli import app
from batchllm_flows.flows import batch_inference, plan_batch_inference
from batchllm_flows.job import BatchJob
from batchllm_flows.job_checks import check_job
from batchllm_flows.job_status import job_statuses
from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.backends.inline import Script
from batchllm_operators.merge.sink import all_manifests
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.store import Store
from tests.conftest import InlineEngines
from tests.flows.jobs import job

pytestmark = pytest.mark.usefixtures("prefect_server")


class Tickets:
    """A folder of tickets, to which objects come, and the job that answers them."""

    def __init__(self, root: str, model: str, engines: InlineEngines) -> None:
        self.root = root
        self.store = Store(f"{root}/in")
        self.out = Store(f"{root}/out")
        self._model = model
        self.engines = engines
        engines.script = Script(answer=lambda request: str(request.prompt_token_ids[-9:]))

    def write(self, name: str, numbers: range) -> None:
        ids = [f"ticket-{number}" for number in numbers]
        questions = [f"What about {number}?" for number in numbers]
        table = pa.table({"id": ids, "document": ["the river runs north. " * 9] * len(ids), "question": questions})
        self.store.write_table(name, table)

    def job(self, **changes: Any) -> BatchJob:
        execution = {"backend": "inline", "calibrate": False}
        return job(f"{self.root}/in", f"{self.root}/out", self._model, execution=execution, **changes)

    def ids(self) -> list[str]:
        """The rows of all outputs, as whoever follows the manifests sees them."""
        rows: list[str] = []
        for manifest in all_manifests(self.out):
            for file in manifest.files:
                with self.out.parquet(file.name) as opened:
                    rows += opened.read()["id"].to_pylist()
        return sorted(rows, key=lambda name: int(name.removeprefix("ticket-")))


def tickets(end: int) -> list[str]:
    return [f"ticket-{number}" for number in range(end)]


@pytest.fixture
def folder(bucket: str, tiny_llama: str, inline_engines: InlineEngines) -> Tickets:
    return Tickets(bucket, tiny_llama, inline_engines)


NEW_ONLY = {"sink__mode": "append", "source__new_objects_only": True}


def test_each_run_answers_the_objects_that_came_since_the_last_one(folder: Tickets) -> None:
    folder.write("a.parquet", range(3))
    folder.write("b.parquet", range(3, 5))
    this_job = folder.job(**NEW_ONLY)
    first = batch_inference(this_job)
    assert (first.rows_out, first.computed_requests) == (5, 5)
    folder.write("c.parquet", range(5, 9))
    assert (second := batch_inference(this_job)).rows_out == 4
    assert folder.ids() == tickets(9)

    nothing = batch_inference(this_job)
    assert (nothing.already_complete, nothing.job_id, nothing.computed_requests) == (True, second.job_id, 0)
    assert folder.ids() == tickets(9)
    with pytest.raises(TerminalError, match="no object is new, there is nothing to plan"):
        plan_batch_inference(this_job)
    assert [check.found for check in check_job(this_job) if check.name == "source"] == [
        "no object is new: a run computes nothing"
    ]
    assert [status.complete for status in job_statuses(folder.out.uri, StorageOptions())] == [True, True]
    verified = CliRunner().invoke(app, ["verify", folder.out.uri])
    assert verified.exit_code == 0, verified.stdout
    assert "whole. " in verified.stdout
    assert "9 rows" in verified.stdout
    report = CliRunner().invoke(app, ["report", folder.out.uri])
    assert second.job_id in report.stdout

    folder.write("b.parquet", range(3, 6))
    changed = batch_inference(this_job)
    assert changed.rows_out == 3, "a new version of an object is a new object"


def test_a_run_that_fails_moves_nothing(folder: Tickets) -> None:
    folder.write("a.parquet", range(3))
    batch_inference(folder.job(**NEW_ONLY))
    folder.write("b.parquet", range(3, 6))

    def fails(_request: Any) -> str:
        raise TerminalError("out of luck")

    folder.engines.script = Script(answer=fails)
    with pytest.raises(TerminalError, match="out of luck"):
        batch_inference(folder.job(**NEW_ONLY))
    assert folder.ids() == tickets(3)
    folder.engines.script = Script(answer=lambda _request: "later")
    folder.write("c.parquet", range(6, 7))
    assert batch_inference(folder.job(**NEW_ONLY)).rows_out == 4
    assert folder.ids() == tickets(7)


def test_nights_of_a_dated_job_stand_beside_each_other_and_one_may_be_run_again(folder: Tickets) -> None:
    folder.write("dt=2026-11-01/a.parquet", range(3))
    folder.write("dt=2026-11-02/a.parquet", range(3, 5))
    nightly = folder.job(
        source__partitioning="hive",
        source__filter="dt = '{date}'",
        sink__mode="partition",
        sink__partition_by=["dt"],
        sink__carry=["id", "dt"],
    )
    assert batch_inference(nightly, date=date(2026, 11, 1)).rows_out == 3
    assert batch_inference(nightly, date=date(2026, 11, 2)).rows_out == 2
    assert folder.ids() == tickets(5)
    folder.write("dt=2026-11-02/late.parquet", range(5, 8))
    late = batch_inference(nightly, date=date(2026, 11, 2))
    assert (late.rows_out, late.computed_requests, late.reused_requests) == (5, 3, 2)
    assert folder.ids() == tickets(8)
    names = [name for name in folder.out.names() if not name.startswith("_")]
    assert {name.partition("/")[0] for name in names} == {"dt=2026-11-01", "dt=2026-11-02"}
    assert batch_inference(nightly, date=date(2026, 11, 1)).already_complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source__new_objects_only": True}, "source.new_objects_only: expected sink.mode append or partition"),
        ({"sink__mode": "partition"}, "partition_by: expected columns where mode is `partition`"),
        (
            {"sink__partition_by": ["id"]},
            "partition_by: expected columns where mode is `partition`, and none elsewhere",
        ),
        ({"sink__carry": "key_only", "source__id_column": None}, "sink.carry: key_only carries source.id_column"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(str(tmp_path / "in"), str(tmp_path / "out"), "model", **changes)


def test_objects_that_another_run_answers_meanwhile_are_not_added_twice(folder: Tickets) -> None:
    folder.write("a.parquet", range(3))
    this_job, context, others = folder.job(**NEW_ONLY), copy_context(), []

    def answer(_request: Any) -> str:
        if not others:
            others.append("b.parquet")
            folder.write("b.parquet", range(3, 5))
            with ThreadPoolExecutor(1) as another:
                others.append(another.submit(context.run, batch_inference, this_job).result())
        return "an answer"

    folder.engines.script = Script(answer=answer)
    with pytest.raises(TerminalError, match=r"another run has answered a\.parquet meanwhile; run the job again"):
        batch_inference(this_job)
    assert others[1].rows_out == 5
    assert folder.ids() == tickets(5)
    assert batch_inference(this_job).already_complete
