"""What a finished job reports: figures for people and for programs."""

from __future__ import annotations

from batchllm_operators.errors import TerminalError
from batchllm_operators.merge.spec import SinkSpec
from batchllm_operators.records import MANIFEST_FILE, REPORT_FILE, BundleResult, Manifest, PlanSummary, Record
from batchllm_operators.store import Store


class StepSeconds(Record):
    """Wall-clock seconds of each step of one run."""

    stage: float
    plan: float
    execute: float
    merge: float
    total: float


class JobReport(Record):
    """One run of a job, `report.json` of the work folder.

    Savings are shares of `prompt_tokens`; `optimum_saving` is that of an ideal block-exact cache that never evicts.
    """

    job_id: str
    job_name: str
    already_complete: bool
    """This run found the complete output and computed nothing."""
    rows_in: int
    rows_out: int
    rows_error: int
    error_rows: dict[str, int]
    """Rows without an answer, by error code."""
    requests: int
    """Distinct requests, duplicates counted once."""
    computed_requests: int
    """Requests this run computed; the others were answered by earlier runs."""
    duplicate_rows: int
    prompt_tokens: int
    computed_prompt_tokens: int
    completion_tokens: int
    saving: float
    expected_saving: float
    optimum_saving: float
    bundles: int
    engines: int
    engine_load_seconds: float
    """Summed over the engines of this run."""
    expected_seconds: float
    """Of the last plan; a pilot before it is not in there."""
    expected_usd: float | None
    seconds: StepSeconds
    output_uri: str
    work_uri: str

    @property
    def tokens_per_second(self) -> float:
        """Prompt and completion tokens answered in a second of the execute step, engine loading left out."""
        busy = self.seconds.execute - self.engine_load_seconds / max(self.engines, 1)
        return (self.prompt_tokens + self.completion_tokens) / busy if busy > 0 else 0.0


def build_report(
    manifest: Manifest,
    plan: PlanSummary,
    results: list[BundleResult],
    seconds: StepSeconds,
    *,
    engines: int,
    output_uri: str,
    work_uri: str,
) -> JobReport:
    """Put together what the steps returned."""
    prompt_tokens = manifest.prompt_tokens
    return JobReport(
        job_id=manifest.job_id,
        job_name=manifest.job_name,
        already_complete=False,
        rows_in=plan.rows,
        rows_out=manifest.rows,
        rows_error=sum(manifest.error_rows.values()),
        error_rows=manifest.error_rows,
        requests=plan.requests + plan.done_requests,
        computed_requests=sum(result.requests for result in results),
        duplicate_rows=plan.duplicate_rows,
        prompt_tokens=prompt_tokens,
        computed_prompt_tokens=manifest.computed_prompt_tokens,
        completion_tokens=manifest.completion_tokens,
        saving=1 - manifest.computed_prompt_tokens / prompt_tokens if prompt_tokens else 0.0,
        expected_saving=plan.expected_saving,
        optimum_saving=plan.optimum_saving,
        bundles=len(results),
        engines=engines,
        engine_load_seconds=sum(result.load_seconds for result in results),
        expected_seconds=plan.expected_seconds,
        expected_usd=plan.expected_usd,
        seconds=seconds,
        output_uri=output_uri,
        work_uri=work_uri,
    )


def read_report(sink: SinkSpec) -> JobReport:
    """The report of the job whose complete output a sink holds.

    Raises:
        TerminalError: the folder holds no complete output.
    """
    store = Store(sink.uri, sink.storage)
    if not store.exists(MANIFEST_FILE):
        raise TerminalError(f"no complete output here: expected {MANIFEST_FILE}", uri=store.uri)
    manifest = Manifest.model_validate_json(store.read_bytes(MANIFEST_FILE))
    return JobReport.model_validate_json(Store(manifest.work_uri, sink.storage).read_bytes(REPORT_FILE))


def report_markdown(report: JobReport) -> str:
    """The report as a page of Markdown: outcome first, then saving, speed and places."""
    errors = ", ".join(f"{count:,} {code}" for code, count in sorted(report.error_rows.items())) or "none"
    seconds = report.seconds
    lines = [
        f"# {report.job_name}: {report.rows_out:,} rows, {report.rows_error:,} without an answer",
        "",
        f"Job `{report.job_id}`. "
        + (
            "Its output was complete already: nothing was computed."
            if report.already_complete
            else f"{report.computed_requests:,} of {report.requests:,} distinct requests computed in this run."
        ),
        "",
        "| | |",
        "|---|---|",
        f"| rows in / out | {report.rows_in:,} / {report.rows_out:,} |",
        f"| row errors | {errors} |",
        f"| duplicate rows | {report.duplicate_rows:,} |",
        f"| prompt tokens | {report.prompt_tokens:,}, of which computed {report.computed_prompt_tokens:,} |",
        f"| saving | {report.saving:.1%} (forecast {report.expected_saving:.1%}, "
        f"optimum {report.optimum_saving:.1%}) |",
        f"| completion tokens | {report.completion_tokens:,} |",
        f"| speed | {report.tokens_per_second:,.0f} tokens/s on {report.engines} engine(s) |",
        f"| output | `{report.output_uri}` |",
        f"| work folder | `{report.work_uri}` |",
        "",
        "| step | seconds |",
        "|---|---|",
        f"| stage | {seconds.stage:.1f} |",
        f"| plan | {seconds.plan:.1f} |",
        f"| execute, {report.bundles} bundles (engine load {report.engine_load_seconds:.1f}) | {seconds.execute:.1f} |",
        f"| merge | {seconds.merge:.1f} |",
        f"| total | {seconds.total:.1f} |",
    ]
    return "\n".join(lines) + "\n"
