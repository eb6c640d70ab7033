"""Rates that an engine measures for the forecast: once, and for every later job."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchllm_flows.flows import batch_inference, plan_batch_inference
from batchllm_operators.execute import calibration
from batchllm_operators.records import PlanSummary
from batchllm_operators.store import Store
from batchllm_operators.work.layout import MANIFEST_FILE, PLAN_SUMMARY
from tests.conftest import InlineEngines
from tests.flows.jobs import job, questions, write_input

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def any_job_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrate although the tiny model answers everything in seconds."""
    monkeypatch.setattr(calibration, "SHORTEST_JOB_SECONDS", 0.0)
    monkeypatch.setattr(calibration, "MOST_SHARE", 1e9)


@pytest.mark.engine
def test_the_first_engine_measures_its_rates_and_later_jobs_find_them(
    tmp_path: Path, tiny_llama: str, any_job_is_worth_it: None
) -> None:
    source, sink = str(tmp_path / "in"), str(tmp_path / "out")
    write_input(source, questions(60))
    this_job = job(source, sink, tiny_llama, execution__calibrate=True)
    kept = Store(f"{sink}/_batchllm/calibrations")
    assert plan_batch_inference(this_job).forecast.rates == "hardware default"
    assert kept.names() == []

    report = batch_inference(this_job)

    plan = PlanSummary.model_validate_json(Store(report.work_uri).read_bytes(PLAN_SUMMARY))
    assert plan.forecast.rates.startswith("calibrated on 1 x ")
    assert report.engine_load_seconds > 0
    assert report.bundles >= 1
    (name,) = kept.names()
    content = kept.read_bytes(name)
    changes = {"sampling": {"max_tokens": 3}, "sink__mode": "overwrite", "execution__calibrate": True}
    other = job(source, sink, tiny_llama, **changes)
    assert plan_batch_inference(other).forecast.rates == plan.forecast.rates

    batch_inference(other)
    assert kept.read_bytes(name) == content

    # With all results there and only the merge to do again, no engine is needed to plan nothing.
    kept.delete([name])
    Store(sink).delete([MANIFEST_FILE])
    again = batch_inference(other)
    assert (again.computed_requests, again.engine_load_seconds) == (0, 0)
    assert kept.names() == []


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"execution__calibrate": False}, "hardware default"),
        ({"execution__calibrate": True}, "hardware default"),
        (
            {
                "execution__calibrate": True,
                "planning": {
                    "cost": {
                        "step_seconds": 0.01,
                        "prefill_tokens_per_second": 5000,
                        "decode_tokens_per_second": 3000,
                        "kv_tokens_per_second": 1e6,
                        "kv_capacity_tokens": 10_000,
                        "max_running_requests": 16,
                    }
                },
            },
            "job",
        ),
    ],
    ids=["switched off", "too short to be worth it", "the job says its own"],
)
def test_no_engine_measures_what_is_not_wanted(
    tmp_path: Path, tiny_llama: str, inline_engines: InlineEngines, changes: dict[str, object], rates: str
) -> None:
    write_input(str(tmp_path / "in"), questions(4))
    changes = {**changes, "execution__backend": "inline"}
    report = batch_inference(job(str(tmp_path / "in"), str(tmp_path / "out"), tiny_llama, **changes))
    plan = PlanSummary.model_validate_json(Store(report.work_uri).read_bytes(PLAN_SUMMARY))
    assert plan.forecast.rates == rates
    assert Store(f"{tmp_path}/out/_batchllm/calibrations").names() == []
