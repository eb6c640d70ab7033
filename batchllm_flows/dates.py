"""Dates in the places of a job: `s3://bucket/tickets/dt={date}/` is another folder every night.

`{date}` is a day, `{scheduled}` the moment that a run was scheduled for; `-N` or `+N` behind the name counts days, and
a format of Python's `strftime` may follow a colon: `{date-1}`, `{scheduled:%Y/%m/%d/%H}`. All are of UTC.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time, timedelta

from batchllm_flows.job import BatchJob, InvalidJobError

FORMATS = {"date": "%Y-%m-%d", "scheduled": "%Y-%m-%dT%H%M%S"}
"""The names that may stand in braces, each with how it is written without a format of its own."""

_PLACE = re.compile(r"\{(date|scheduled)([+-]\d{1,5})?(?::([^{}]+))?\}")
_MEANT = re.compile(r"\{\s*(?:date|scheduled)\b[^{}]*\}")


def dated_job(job: BatchJob, moment: datetime) -> BatchJob:
    """The job with its dates filled in, in `source.uri`, `source.filter` and `sink.uri`; the same where it has none.

    Args:
        job: as it was written.
        moment: when the run was scheduled for, with a time zone.

    Raises:
        InvalidJobError: what is meant for a date is none; names the field.
    """
    source, sink = _filled(job.source.uri, "source.uri", moment), _filled(job.sink.uri, "sink.uri", moment)
    condition = None if job.source.filter is None else _filled(job.source.filter, "source.filter", moment)
    if (source, condition, sink) == (job.source.uri, job.source.filter, job.sink.uri):
        return job
    places = {
        "source": job.source.model_copy(update={"uri": source, "filter": condition}),
        "sink": job.sink.model_copy(update={"uri": sink}),
    }
    return job.model_copy(update=places)


def moment_of(day: date) -> datetime:
    """The moment that stands for a day which a user names: its begin, in UTC."""
    return datetime.combine(day, time.min, UTC)


def _filled(text: str, field: str, moment: datetime) -> str:
    def written(match: re.Match[str]) -> str:
        name, days, form = match.groups()
        return f"{moment.astimezone(UTC) + timedelta(days=int(days or 0)):{form or FORMATS[name]}}"

    filled = _PLACE.sub(written, text)
    if left := _MEANT.search(filled):
        raise InvalidJobError(
            f"{field}: expected a date as {{date}}, {{date-1}} or {{scheduled:%Y/%m/%d}}, got {left[0]!r}", uri=text
        )
    return filled
