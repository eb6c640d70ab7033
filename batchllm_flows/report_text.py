"""The report as a person reads it: Markdown for the terminal and the artifact, sentences and rows for the page too."""

from __future__ import annotations

from batchllm_flows.report import ExpectedActual, ForecastAgainstFact, JobOutline, JobReport
from batchllm_operators.plan.markdown import duration, usd
from batchllm_operators.records import OutputSamples
from batchllm_operators.wording import counted, markdown_code, markdown_text
from batchllm_operators.work.layout import REPORT_PAGE


def report_markdown(report: JobReport) -> str:
    """The report as a page of Markdown: outcome first, then saving, forecast against fact, speed and places."""
    errors = ", ".join(f"{count:,} {code}" for code, count in sorted(report.error_rows.items())) or "none"
    seconds = report.seconds
    loading = f"engine load {report.engine_load_seconds:.1f}, of which waited {report.engine_wait_seconds:.1f}"
    rows = f"{counted(report.rows_out, 'row')}, {report.rows_error:,} without an answer"
    lines = [
        f"# {markdown_text(report.job_name)}: {rows}",
        "",
        f"Job `{report.job_id}`. {whose_figures(report)}",
        "",
    ]
    if report.truncated_rows:
        lines += [truncation_advice(report), ""]
    lines += ["| | |", "|---|---|"]
    if report.outline is not None:
        lines += [f"| {name} | {markdown_text(value)} |" for name, value in outline_rows(report.outline)]
    lines += [
        f"| rows in / out | {report.rows_in:,} / {report.rows_out:,} |",
        f"| row errors | {errors} |",
        f"| answers that ended at max_tokens | {report.truncated_rows:,} |",
        f"| duplicate rows | {report.duplicate_rows:,} |",
        f"| prompt tokens | {report.prompt_tokens:,}, of which computed {report.computed_prompt_tokens:,} |",
        f"| saving | {report.saving:.1%} (optimum {report.optimum_saving:.1%}) |",
        f"| completion tokens | {report.completion_tokens:,} |",
        f"| speed | {report.tokens_per_second:,.0f} tokens/s on {counted(report.engines, 'engine')} |",
        f"| output | {markdown_code(report.output_uri)} |",
        f"| work folder | {markdown_code(report.work_uri)} |",
        f"| page with plots | {markdown_code(f'{report.work_uri}/{REPORT_PAGE}')} |",
        "",
        "| forecast against fact | forecast | fact | ratio |",
        "|---|---:|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in forecast_rows(report.forecast)),
        "",
        "| step | seconds |",
        "|---|---:|",
        f"| stage | {seconds.stage:.1f} |",
        f"| plan | {seconds.plan:.1f} |",
        f"| execute, {counted(report.bundles, 'bundle')} ({loading}) | {seconds.execute:.1f} |",
        f"| merge | {seconds.merge:.1f} |",
        f"| total | {seconds.total:.1f} |",
    ]
    if report.samples is not None:
        lines += _samples_markdown(report.samples)
    if report.storage_retries:
        lines += ["", f"{counted(report.storage_retries, 'request')} to object stores were sent again."]
    if report.set_aside:
        lines += ["", "Damaged objects of the work folder, set aside and made again:", ""]
        lines += [f"- {markdown_code(name)}" for name in report.set_aside]
    if report.engine_settings:
        lines += ["", "| engine setting | value | why |", "|---|---|---|"]
        lines += [
            f"| {markdown_code(one.name)} | {markdown_text(one.value)} | {markdown_text(one.reason)} |"
            for one in report.engine_settings
        ]
    return "\n".join(lines) + "\n"


def outline_rows(outline: JobOutline) -> list[tuple[str, str]]:
    """What was asked, as names and values to be read."""
    return [
        ("model", outline.model),
        ("input", f"{outline.input_uri}, {counted(outline.input_objects, 'object')}"),
        *([("not read", outline.not_read)] if outline.not_read else []),
        ("prompt", outline.prompt_kind),
        ("sampling", outline.sampling_text()),
    ]


def truncation_advice(report: JobReport) -> str:
    """How many answers ended at `max_tokens`, and what to do about it."""
    limit = "" if report.outline is None else f" ({report.outline.sampling.max_tokens:,})"
    what = counted(report.truncated_rows, "answer")
    return (
        f"{what} ended at sampling.max_tokens{limit}, perhaps in the midst of a sentence: raise it where that matters."
    )


def _samples_markdown(samples: OutputSamples) -> list[str]:
    lines = []
    if samples.answers:
        lines += ["", "| sample row | answer |", "|---|---|"]
        lines += [f"| {markdown_text(one.row_id)} | {markdown_text(one.text)} |" for one in samples.answers]
    if samples.errors:
        lines += ["", "| error | row | message |", "|---|---|---|"]
        lines += [
            f"| {code} | {markdown_text(one.row_id)} | {markdown_text(one.message)} |"
            for code, kept in samples.errors.items()
            for one in kept
        ]
    return lines


def whose_figures(report: JobReport) -> str:
    """Which run computed what, in a sentence or two."""
    if report.already_complete:
        return "Its output was complete already: nothing was computed. The figures are of the run that completed it."
    requests = counted(report.requests, "distinct request")
    computed = f"{report.computed_requests:,} of {requests} computed in this run."
    if report.computed_requests >= report.requests:
        return computed
    return (
        f"{computed} The others were answered by earlier runs: rows, tokens and saving are of the whole job, "
        "times and the forecast of this run."
    )


def forecast_rows(forecast: ForecastAgainstFact) -> list[tuple[str, str, str, str]]:
    """Name, forecast, fact and their ratio of each figure, to be read."""
    saving, price = forecast.saving, forecast.usd
    rows = [("saving, whole job", f"{saving.expected:.1%}", f"{saving.actual:.1%}", _ratio(saving))]
    for name, figure in (
        ("computed prompt tokens", forecast.computed_prompt_tokens),
        ("output tokens", forecast.output_tokens),
    ):
        rows.append((name, f"{figure.expected:,}", f"{figure.actual:,}", _ratio(figure)))
    time = forecast.execute_seconds
    rows.append(("execute, engines loaded", duration(time.expected), duration(time.actual), _ratio(time)))
    if price is not None:
        rows.append(("price (fact: with loading)", usd(price.expected), usd(price.actual), _ratio(price)))
    return rows


def _ratio(figure: ExpectedActual) -> str:
    return "" if figure.ratio is None else f"{figure.ratio:.2f}"
