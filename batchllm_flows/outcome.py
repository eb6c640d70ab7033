"""What came out of a flow run, in the line that Prefect shows beside it."""

from __future__ import annotations

from batchllm_flows.report import JobReport
from batchllm_operators.records import PlanSummary


def report_line(report: JobReport) -> str:
    """For example `3,201 rows, 4 errors, 47 % saved`."""
    pieces = [
        _counted(report.rows_out, "row"),
        _counted(report.rows_error, "error"),
        f"{100 * report.saving:.0f} % saved",
    ]
    if report.already_complete:
        pieces.append("complete already")
    return ", ".join(pieces)


def plan_line(plan: PlanSummary) -> str:
    """For example `3,197 requests in 12 bundles, 4 errors, 47 % to be saved`."""
    requests = f"{_counted(plan.requests, 'request')} in {_counted(len(plan.bundles), 'bundle')}"
    errors = _counted(sum(plan.error_rows.values()), "error")
    return f"{requests}, {errors}, {100 * plan.expected_saving:.0f} % to be saved"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
