"""Dates in the places of a job."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from batchllm_flows.dates import dated_job, moment_of
from batchllm_flows.job import InvalidJobError
from tests.flows.jobs import job

NIGHT = datetime(2026, 3, 1, 2, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://b/tickets/dt={date}/", "s3://b/tickets/dt=2026-03-01/"),
        ("s3://b/{date-1}/{date+1}", "s3://b/2026-02-28/2026-03-02"),
        ("s3://b/{scheduled:%Y/%m/%d/%H}/x", "s3://b/2026/03/01/02/x"),
        ("s3://b/{date-1:%Y%m%d}-{scheduled}", "s3://b/20260228-2026-03-01T023000"),
        ("s3://b/{other}/{}/plain", "s3://b/{other}/{}/plain"),
    ],
)
def test_dates_are_filled_in_at_both_ends(uri: str, expected: str) -> None:
    filled = dated_job(job(uri, f"{uri}-out", "model"), NIGHT)
    assert (filled.source.uri, filled.sink.uri) == (expected, f"{expected}-out")
    assert filled.model_copy(update={"source": None, "sink": None}) == job(uri, uri, "model").model_copy(
        update={"source": None, "sink": None}
    )


def test_a_day_is_of_utc_whatever_zone_a_schedule_has() -> None:
    late = datetime(2026, 3, 1, 23, 30, tzinfo=timezone(timedelta(hours=-5)))
    assert dated_job(job("{date}", "out", "model"), late).source.uri == "2026-03-02"
    assert dated_job(job("{scheduled}", "out", "model"), moment_of(date(2026, 1, 2))).source.uri == "2026-01-02T000000"


@pytest.mark.parametrize("uri", ["s3://b/{date -1}/", "s3://b/{date-x}", "s3://b/{ date }/", "s3://b/{scheduled:}/"])
def test_what_is_meant_for_a_date_and_is_none_is_refused(uri: str) -> None:
    with pytest.raises(InvalidJobError, match=r"source\.uri: expected a date as \{date\}, .*got '\{"):
        dated_job(job(uri, "out", "model"), NIGHT)
