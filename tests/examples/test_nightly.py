"""The nightly example: three nights as they come, one cut off, one run twice, one with another prompt."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from batchllm_flows import BatchJob, nightly_inference
from batchllm_flows.job import InvalidJobError
from batchllm_flows.report import JobReport
from batchllm_operators.errors import NoInputError, TerminalError
from batchllm_operators.execute.backends.inline import Script
from batchllm_operators.merge.sink import all_manifests
from batchllm_operators.store import Store
from tests.conftest import InlineEngines

EXAMPLE = Path(__file__).parents[2] / "examples" / "nightly" / "prefect.yaml"
NIGHTS = [date(2026, 11, day) for day in (2, 3, 4)]

pytestmark = pytest.mark.usefixtures("prefect_server")


class Nightly:
    """The example's job on a bucket, with scripted engines; rows of a night are (ticket, text)."""

    def __init__(self, bucket: str, model: str, engines: InlineEngines) -> None:
        text = EXAMPLE.read_text().replace("{{ $BATCHLLM_BUCKET }}", bucket).replace("{{ $BATCHLLM_MODEL }}", model)
        (deployment,) = yaml.safe_load(text)["deployments"]
        self._job = deployment["parameters"]["job"]
        self._job["execution"] |= {"backend": "inline", "calibrate": False, "part_rows": 10}
        self.catch_up_days = deployment["parameters"]["catch_up_days"]
        self.input = Store(f"{bucket}/tickets")
        self.output = Store(f"{bucket}/summaries")
        self.engines = engines
        engines.script = Script(answer=lambda request: str(request.prompt_token_ids[-9:]))

    def write(self, day: str, tickets: dict[int, str]) -> None:
        columns = {"ticket_id": list(tickets), "product": ["lamp"] * len(tickets), "body": list(tickets.values())}
        self.input.write_table(f"dt={day}/tickets.parquet", pa.table(columns))

    def run(self, night: date, *, catch_up_days: int = 0, **prompt: str) -> dict[date, JobReport]:
        job = BatchJob.model_validate(self._job | {"prompt": self._job["prompt"] | prompt})
        return nightly_inference(job, catch_up_days=catch_up_days, date=night)

    def rows(self) -> dict[str, list[int]]:
        """Tickets by day, as whoever follows the manifests finds them."""
        found: dict[str, list[int]] = {}
        for manifest in all_manifests(self.output):
            for file in manifest.files:
                with self.output.parquet(file.name) as opened:
                    table = opened.read()
                assert table["completion"].null_count == 0
                found.setdefault(file.name.partition("/")[0], []).extend(table["ticket_id"].to_pylist())
        return found


@pytest.fixture
def nightly(bucket: str, tiny_llama: str, inline_engines: InlineEngines) -> Nightly:
    return Nightly(bucket, tiny_llama, inline_engines)


def tickets(numbers: range, changed: int = 0) -> dict[int, str]:
    return {number: f"{'changed' if number < numbers.start + changed else 'ticket'} {number}" for number in numbers}


def computed(report: JobReport) -> tuple[int, int]:
    return report.computed_requests, report.reused_requests


def test_three_nights(nightly: Nightly) -> None:
    nightly.write("2026-11-01", tickets(range(100)))
    assert computed(nightly.run(NIGHTS[0])[NIGHTS[0]]) == (100, 0)

    # 1 % gone, 5 % changed, 20 % new; the night is cut off, and run twice
    nightly.write("2026-11-02", tickets(range(1, 121), changed=5))
    nightly.engines.script = Script(answer=fails_after(15))
    with pytest.raises(TerminalError, match="out of luck"):
        nightly.run(NIGHTS[1])
    assert nightly.rows() == {"dt=2026-11-01": list(range(100))}
    nightly.engines.script = Script(answer=lambda _request: "in time")
    second = nightly.run(NIGHTS[1])[NIGHTS[1]]
    assert second.reused_requests == 94
    assert 11 <= second.computed_requests <= 16, "26 are new, and the parts of the night that was cut off are not lost"
    before = nightly.output.objects()
    assert nightly.run(NIGHTS[1])[NIGHTS[1]].already_complete
    assert [one for one in nightly.output.objects() if "_batchllm" not in one.path] == [
        one for one in before if "_batchllm" not in one.path
    ]

    nightly.write("2026-11-03", tickets(range(1, 121), changed=5))
    third = nightly.run(NIGHTS[2], system="In a word: {{ product }}.")[NIGHTS[2]]
    assert computed(third) == (120, 0), "another prompt is another question"
    assert nightly.rows() == {
        "dt=2026-11-01": list(range(100)),
        "dt=2026-11-02": list(range(1, 121)),
        "dt=2026-11-03": list(range(1, 121)),
    }


def test_missed_nights_and_late_rows_are_caught_up_on(nightly: Nightly) -> None:
    nightly.write("2026-11-01", tickets(range(10)))
    nightly.run(NIGHTS[0])
    nightly.write("2026-11-01", tickets(range(12)))
    nightly.write("2026-11-02", tickets(range(20, 30)))
    nightly.write("2026-11-03", tickets(range(30, 40)))
    reports = nightly.run(NIGHTS[2], catch_up_days=nightly.catch_up_days)
    assert {night: computed(report) for night, report in reports.items()} == {
        NIGHTS[2]: (10, 0), NIGHTS[1]: (10, 0), NIGHTS[0]: (2, 10),
    }  # fmt: skip
    assert {day: len(rows) for day, rows in nightly.rows().items()} == {
        "dt=2026-11-01": 12, "dt=2026-11-02": 10, "dt=2026-11-03": 10,
    }  # fmt: skip
    again = nightly.run(NIGHTS[2], catch_up_days=2)
    assert all(report.already_complete for report in again.values())


def test_a_night_that_fails_stops_no_other(nightly: Nightly) -> None:
    nightly.write("2026-11-01", tickets(range(10)))
    nightly.input.write_bytes("dt=2026-11-02/tickets.parquet", b"damaged")
    nightly.write("2026-11-03", tickets(range(30, 40)))
    with pytest.raises(TerminalError, match="dt=2026-11-02"):
        nightly.run(NIGHTS[2], catch_up_days=3)
    assert sorted(nightly.rows()) == ["dt=2026-11-01", "dt=2026-11-03"]
    with pytest.raises(NoInputError, match="holds for no partition of 3 objects"):
        nightly.run(date(2026, 12, 24))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {"uri": "in/"}}, "expected a date such as {date} in source.uri or source.filter"),
        ({"source": {"uri": "in/{date}"}, "sink": {"uri": "out/"}}, "expected a place of its own for each night"),
    ],
)
def test_nights_that_would_be_equal_are_refused(changes: dict[str, Any], message: str) -> None:
    values = {"prompt": {"kind": "column", "column": "text"}, "model": {"id": "m"}, "sink": {"uri": "out/{date}"}}
    job = BatchJob.model_validate(values | changes | {"source": {"format": "jsonl"} | changes["source"]})
    with pytest.raises(InvalidJobError) as told:
        nightly_inference(job, catch_up_days=1)
    assert message in str(told.value)


def fails_after(answers: int) -> Any:
    given = 0

    def answer(_request: Any) -> str:
        nonlocal given
        given += 1
        if given > answers:
            raise TerminalError("out of luck")
        return "in time"

    return answer
