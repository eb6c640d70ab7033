"""What came out of a flow run, in the line that Prefect shows beside it."""

from __future__ import annotations

from batchllm_flows.report import JobReport
from batchllm_operators.records import PlanSummary
from batchllm_operators.wording import counted


def report_line(report: JobReport) -> str:
    """For example `3,201 rows, 4 errors, 16 truncated, 47 % saved`."""
    pieces = [
        counted(report.rows_out, "row"),
        counted(report.rows_error, "error"),
        f"{report.truncated_rows:,} truncated",
        f"{100 * report.saving:.0f} % saved",
    ]
    if report.reused_requests:
        pieces.append(f"{counted(report.reused_requests, 'request')} answered by earlier runs")
    if report.already_complete:
        pieces.append("complete already")
    return ", ".join(pieces)


def plan_line(plan: PlanSummary) -> str:
    """For example `3,197 requests in 12 bundles, 4 errors, 47 % to be saved`."""
    requests = f"{counted(plan.counts.requests, 'request')} in {counted(len(plan.bundles), 'bundle')}"
    errors = counted(sum(plan.counts.error_rows.values()), "error")
    before = plan.counts.answered_before.requests
    earlier = f", {before:,} answered by earlier runs" if before else ""
    return f"{requests}{earlier}, {errors}, {100 * plan.saving_to_come:.0f} % to be saved"
