"""Jobs that run night after night: only what is new is computed, and nothing that another model or prompt answered."""

from __future__ import annotations

import time
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchllm_flows.cleaning import find_old_folders
from batchllm_flows.flows import batch_inference, plan_batch_inference
from batchllm_flows.job import BatchJob
from batchllm_flows.job_status import job_statuses, status_text
from batchllm_flows.outcome import plan_line, report_line
from batchllm_flows.report import JobReport
from batchllm_flows.verify import verify_output
from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.backends.inline import Script
from batchllm_operators.plan.markdown import plan_markdown
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.store import Store
from batchllm_operators.work.layout import ANSWERS_FOLDER
from tests.conftest import InlineEngines
from tests.flows.jobs import job, questions, read_output, write_input

pytestmark = pytest.mark.usefixtures("prefect_server")


class Nights:
    """Runs a job on a folder of tickets that changes from night to night; answers are the prompts' own tokens."""

    def __init__(self, folder: Path, model: str, engines: InlineEngines) -> None:
        self.folder = folder
        self._model = model
        self.engines = engines
        engines.script = Script(answer=lambda request: str(request.prompt_token_ids[-9:]))

    def job(self, rows: pa.Table, **changes: Any) -> BatchJob:
        write_input(str(self.folder / "in"), rows)
        execution = {"backend": "inline", "calibrate": False, "part_rows": 7, "usd_per_gpu_hour": 2.0}
        for name in [name for name in changes if name.startswith("execution__")]:
            execution[name.removeprefix("execution__")] = changes.pop(name)
        places = str(self.folder / "in"), str(self.folder / changes.pop("sink", "out"))
        return job(*places, self._model, sink__mode="overwrite", execution=execution, **changes)

    def run(self, rows: pa.Table, **changes: Any) -> JobReport:
        report = batch_inference(self.job(rows, **changes))
        output = read_output(report.output_uri)
        assert output["id"].to_pylist() == rows["id"].to_pylist()
        assert output["completion"].null_count == 0
        return report


@pytest.fixture
def nights(tmp_path: Path, tiny_llama: str, inline_engines: InlineEngines) -> Nights:
    return Nights(tmp_path, tiny_llama, inline_engines)


def tickets(first: int, end: int, changed: int = 0) -> pa.Table:
    """Tickets of these numbers, one question each; the first few ask something else than the night before."""
    numbers = range(first, end)
    asked = ["changed" if at < changed else "point" for at in range(len(numbers))]
    return pa.table(
        {
            "id": [f"ticket-{number}" for number in numbers],
            "document": [f"Document {number % 3}: " + "the river runs north. " * 20 for number in numbers],
            "question": [f"What about {what} {number}?" for what, number in zip(asked, numbers, strict=True)],
        }
    )


def computed(report: JobReport) -> tuple[int, int]:
    return report.computed_requests, report.reused_requests


def test_three_nights_compute_only_what_is_new(nights: Nights) -> None:
    first = nights.run(tickets(0, 100))
    assert computed(first) == (100, 0)
    assert "earlier runs" not in report_line(first)

    # 1 % gone, 5 % changed, 20 % new
    second_night = tickets(1, 120, changed=5)
    planned = plan_batch_inference(nights.job(second_night))
    assert (planned.counts.requests, planned.counts.answered_before.requests) == (25, 94)
    assert planned.forecast.avoided_seconds > 0
    assert planned.forecast.avoided_usd is not None
    assert plan_line(planned).startswith("25 requests in 1 bundle, 94 answered by earlier runs, ")
    this_job = nights.job(second_night)
    second = batch_inference(this_job)
    assert computed(second) == (25, 94)
    assert report_line(second).endswith(", 94 requests answered by earlier runs")

    before = read_output(second.output_uri)
    again = batch_inference(this_job)
    assert again.already_complete
    assert read_output(again.output_uri) == before

    back = nights.run(tickets(0, 120))
    assert computed(back) == (0, 120), "the deleted ticket and the old questions are still known"
    prompt = {"kind": "chat", "system": "{{ document }}", "user": "In a word: {{ question }}"}
    assert computed(nights.run(tickets(0, 120), prompt=prompt)) == (120, 0)


def test_reused_answers_are_those_of_an_undisturbed_run(nights: Nights) -> None:
    nights.run(tickets(0, 40))
    reused = read_output(nights.run(tickets(10, 60)).output_uri)
    anew = read_output(nights.run(tickets(10, 60), sink="anew", execution__reuse="none").output_uri)
    assert reused == anew
    assert Store(str(nights.folder / "anew" / ANSWERS_FOLDER)).names() == []


def test_what_a_night_that_failed_had_computed_is_not_paid_again(nights: Nights) -> None:
    rows = tickets(0, 60)
    bad = rows.append_column("prompt", pa.array([""] * 60))
    nights.engines.script = Script(answer=fails_after(40))
    with pytest.raises(TerminalError, match="out of luck"):
        batch_inference(nights.job(bad))
    nights.engines.script = Script(answer=lambda _request: "later")
    report = nights.run(tickets(0, 70))
    assert report.computed_requests + report.reused_requests == 70
    assert report.reused_requests >= 28, "all but the last part that was written, and what was under way"

    # Answers that somebody has deleted are kept anew from the work folders that are still there.
    Store(str(nights.folder / "out" / ANSWERS_FOLDER)).remove()
    assert nights.run(tickets(0, 71)).reused_requests == 70


def test_a_damaged_folder_of_another_job_ends_no_run(nights: Nights) -> None:
    nights.engines.script = Script(answer=fails_after(30))
    with pytest.raises(TerminalError, match="out of luck"):
        batch_inference(nights.job(tickets(0, 40)))
    (staged,) = nights.folder.glob("out/_batchllm/*/staged/part-*")
    staged.write_bytes(b"not Parquet")
    nights.engines.script = Script(answer=lambda _request: "later")
    assert computed(nights.run(tickets(0, 41))) == (41, 0)


def fails_after(answers: int) -> Any:
    given = 0

    def answer(_request: Any) -> str:
        nonlocal given
        given += 1
        if given > answers:
            raise TerminalError("out of luck")
        return "in time"

    return answer


def test_answers_are_shared_as_far_as_the_job_says(nights: Nights) -> None:
    rows = questions(20)
    shared = str(nights.folder / "shared")
    assert computed(nights.run(rows, name="one", execution__reuse="same_job_name")) == (19, 0)
    assert computed(nights.run(rows, name="two", execution__reuse="same_job_name")) == (19, 0)
    assert computed(nights.run(rows, name="three", execution__reuse=shared, sink="third")) == (19, 0)
    assert computed(nights.run(rows, name="four", execution__reuse=shared, sink="fourth")) == (0, 19)
    assert computed(nights.run(rows, name="five", execution__reuse="none")) == (19, 0)
    other = nights.job(rows).model.model_copy(update={"dtype": "float32"})
    assert computed(nights.run(rows, name="six", execution__reuse=shared, model=other.model_dump())) == (19, 0)
    with pytest.raises(
        ValueError, match=r"execution\.reuse\s.*expected sink, same_job_name, none or a URI, got 'sinks'"
    ):
        nights.job(rows, execution__reuse="sinks")


@pytest.mark.parametrize(
    ("sampling", "unseeded", "reused"),
    [
        ({"temperature": 0.7}, False, 0),
        ({"temperature": 0.7, "seed": 3}, False, 20),
        ({"temperature": 0.7}, True, 20),
    ],
)
def test_what_is_sampled_without_a_seed_is_sampled_anew(
    nights: Nights, sampling: dict[str, Any], unseeded: bool, reused: int
) -> None:
    changes = {"sampling": sampling | {"max_tokens": 4}, "execution__reuse_unseeded": unseeded}
    nights.run(tickets(0, 20), **changes)
    assert nights.run(tickets(0, 21), **changes).reused_requests == reused


def test_answers_that_are_too_old_are_let_go(nights: Nights) -> None:
    nights.run(tickets(0, 10))
    nights.run(tickets(0, 11), execution__keep_days=1e-9)
    assert nights.run(tickets(0, 12)).reused_requests <= 1, "of the first night nothing is left"


def test_a_night_reads_and_writes_the_folders_of_its_day(nights: Nights) -> None:
    for day, rows in (("2026-03-01", tickets(0, 20)), ("2026-03-02", tickets(0, 25))):
        write_input(str(nights.folder / "in" / f"dt={day}"), rows)
    nightly = nights.job(tickets(0, 1), sink="out/dt={date}", execution__reuse=str(nights.folder / "answers"))
    nightly = nightly.model_copy(
        update={"source": nightly.source.model_copy(update={"uri": str(nights.folder / "in/dt={date}")})}
    )
    first = batch_inference(nightly, date=date(2026, 3, 1))
    second = batch_inference(nightly, date=date(2026, 3, 2))
    assert [computed(first), computed(second)] == [(20, 0), (5, 20)]
    assert first.output_uri.endswith("out/dt=2026-03-01")
    assert len(read_output(second.output_uri)) == 25
    with pytest.raises(TerminalError, match=f"dt={datetime.now(UTC):%Y-%m-%d}"):
        batch_inference(nightly)


def test_the_saving_of_a_plan_is_of_what_it_computes(nights: Nights) -> None:
    nights.run(tickets(0, 100))
    planned = plan_batch_inference(nights.job(tickets(0, 110)))
    counts, forecast = planned.counts, planned.forecast
    assert planned.saving_to_come == 1 - forecast.computed_prompt_tokens / counts.planned_prompt_tokens
    assert 0 < planned.saving_to_come != planned.saving.planned
    text = plan_markdown(planned)
    assert f"Of {counts.planned_prompt_tokens:,} prompt tokens of the requests to compute" in text
    assert (
        f"**{planned.saving_to_come:.1%}** need not be computed. Of all {counts.prompt_tokens:,} prompt tokens" in text
    )
    assert plan_line(planned).endswith(f", {100 * planned.saving_to_come:.0f} % to be saved")


def test_a_night_whose_output_was_replaced_was_completed_all_the_same(nights: Nights) -> None:
    nights.run(tickets(0, 10))
    nights.run(tickets(0, 11))
    newest, oldest = job_statuses(str(nights.folder / "out"), StorageOptions())
    assert (newest.complete, newest.replaced, oldest.complete, oldest.replaced) == (True, False, False, True)
    assert "completed, its output was replaced or removed since" in status_text(oldest)
    in_a_month = time.time() + 30 * 86400
    going = find_old_folders(str(nights.folder / "out"), StorageOptions(), 86400, now=in_a_month)
    assert ["its output was replaced or removed since" in one.line() for one in going] == [False, True]


def test_verify_reads_the_kept_answers_too(nights: Nights) -> None:
    sink = SinkSpec(uri=nights.run(tickets(0, 10)).output_uri)
    whole = verify_output(sink)
    assert whole.faults == ()
    (kept,) = nights.folder.glob("out/_batchllm/answers/*/*.answers.parquet")
    kept.write_bytes(kept.read_bytes()[:-40])
    (bits,) = nights.folder.glob("out/_batchllm/answers/*/*.filter")
    bits.write_bytes(b"")
    (parts,) = nights.folder.glob("out/_batchllm/answers/*/*.parts.json")
    parts.write_bytes(b"{}")
    assert {fault.uri for fault in verify_output(sink).faults} == {str(kept), str(bits), str(parts)}
