"""The plan as a page that a person reads before any engine second is spent."""

from __future__ import annotations

from batchllm_operators.records import AttentionForecast, PlanSummary
from batchllm_operators.row_errors import most_frequent_first
from batchllm_operators.wording import counted, markdown_code, markdown_text

SHOWN_BUNDLES = 20

_ORDERS = {
    "decode_first": "Requests with a shared prefix stand together, deeper sharing within. Groups with more decode for "
    "their prefill come first, so that decode tokens fill the steps that compute later prompts; within a group the "
    "longest expected outputs come first.",
    "blend": "Requests with a shared prefix stand together, deeper sharing within. Groups are taken from both ends of "
    "the list by decode/prefill ratio, so that compute-heavy and memory-heavy work run together.",
    "input": "Requests stand as the input rows do, for comparison; what is shared is found only while it is still in "
    "the cache.",
}

_SOURCES = {
    "row": "the rows themselves",
    "same_request": "the same request in earlier results",
    "group": "earlier results of the group",
    "job": "earlier results of the job",
    "max_tokens": "`max_tokens`",
}


def plan_markdown(plan: PlanSummary) -> str:
    """The plan in Markdown: what is saved, what it will take, why this order, the largest groups, the bundles."""
    lines = ["## Pilot" if plan.pilot else "## Plan", "", _headline(plan), "", _saving(plan), ""]
    if plan.attention is not None:
        lines += [explain_attention(plan.attention), ""]
    lines += [*_counts(plan), *_row_errors(plan), *_forecast(plan), "", "### Order", "", explain_order(plan)]
    if plan.shape.largest_groups:
        lines += _section("Groups that save most", "requests", "prefix tokens", "tokens saved", "forecast")
        lines += [
            f"| {one.requests:,} | {one.prefix_tokens:,} | {one.saved_tokens:,} | {duration(one.expected_seconds)} |"
            for one in plan.shape.largest_groups
        ]
    if plan.shape.sharing_degrees:
        lines += _section("How many share a prefix", "group size", "groups", "requests", "tokens saved")
        lines += [
            f"| {size} | {one.groups:,} | {one.requests:,} | {one.saved_tokens:,} |"
            for size, one in zip(group_sizes(plan), plan.shape.sharing_degrees, strict=True)
        ]
    if plan.bundles:
        lines += _section(
            "Bundles", "bundle", "engine", "requests", "groups", "prompt tokens", "to compute", "forecast"
        )
        lines += [
            f"| {one.name.rpartition('/')[2].removesuffix('.parquet')} | {one.worker} | {one.requests:,} "
            f"| {one.groups:,} | {one.prompt_tokens:,} | {one.expected_computed_prompt_tokens:,} "
            f"| {duration(one.expected_seconds)} |"
            for one in plan.bundles[:SHOWN_BUNDLES]
        ]
        if len(plan.bundles) > SHOWN_BUNDLES:
            lines += ["", f"and {counted(len(plan.bundles) - SHOWN_BUNDLES, 'more bundle')}."]
    if plan.page_uri is not None:
        lines += ["", f"With plots: {markdown_code(plan.page_uri)}"]
    return "\n".join(lines) + "\n"


def group_sizes(plan: PlanSummary) -> list[str]:
    """The sizes of groups that each entry of the sharing degrees stands for: `1`, `2`, `3 to 4`, `5 to 8`..."""
    return [
        f"{one.up_to:,}" if one.up_to <= 2 else f"{one.up_to // 2 + 1:,} to {one.up_to:,}"
        for one in plan.shape.sharing_degrees
    ]


def explain_order(plan: PlanSummary) -> str:
    """Why the requests stand in this order, in a few sentences."""
    shape = plan.shape
    sentences = [_ORDERS[shape.order]]
    if shape.field_sharing is not None:
        fields = shape.field_sharing
        sentences.append(
            f"The order of the fields is chosen row by row: each row shares {fields.chosen:.1%} of its fields with the "
            f"row before it (fields as given: {fields.sorted_rows:.1%}; rows as given too: {fields.as_given:.1%})."
        )
    if shape.parted_trees:
        sentences.append(
            f"{counted(shape.parted_trees, 'short common beginning is', 'short common beginnings are')} computed more "
            "than once, because ordering what is below by ratio is worth more."
        )
    if shape.split_prefix_tokens:
        sentences.append(
            f"{counted(shape.split_prefix_tokens, 'shared token is', 'shared tokens are')} computed again, so that "
            f"{counted(shape.workers, 'engine')} finish together."
        )
    return " ".join(sentences)


def explain_attention(forecast: AttentionForecast) -> str:
    """What prefix-shared attention is expected to save, and which attention the engines get."""
    outcome = (
        "the engines get it, where they support it"
        if forecast.pays
        else f"below {forecast.needed_saving:.1%} it does not pay, and the engines get vLLM's own"
    )
    return (
        f"Prefix-shared attention (`model.attention: auto`) is expected to save {forecast.attention_saving:.1%} of the "
        f"time of decode attention and {forecast.engine_saving:.1%} of the engines' time: {outcome}. Rates of its "
        f"kernels: {markdown_text(forecast.rates)}."
    )


def _headline(plan: PlanSummary) -> str:
    shape, forecast = plan.shape, plan.forecast
    engines = "" if shape.workers == 1 else f" on {counted(shape.workers, 'engine')}"
    price = "" if forecast.usd is None else f", about {usd(forecast.usd)}"
    return (
        f"**{counted(plan.counts.requests, 'request')}** in {counted(shape.groups, 'prefix group')} and "
        f"{counted(len(plan.bundles), 'bundle')}: about **{duration(forecast.seconds)}**{engines}{price}."
        f"{_avoided(plan)}"
    )


def _avoided(plan: PlanSummary) -> str:
    """What is not computed again, and what that would have cost."""
    before, forecast = plan.counts.answered_before.requests, plan.forecast
    if not before:
        return ""
    price = "" if forecast.avoided_usd is None else f", about {usd(forecast.avoided_usd)}"
    return (
        f" Earlier runs have answered {before:,} of {counted(before + plan.counts.requests, 'request')}, which saves "
        f"about {duration(forecast.avoided_seconds)} of one engine{price}."
    )


def _saving(plan: PlanSummary) -> str:
    saving, counts = plan.saving, plan.counts
    stock = "" if saving.stock is None else f"; a stock engine on the rows as given: {saving.stock:.1%}"
    whole = f"(possible: {saving.optimum:.1%}; with one prefix a request: {saving.single_level:.1%}{stock})."
    all_tokens = counted(counts.prompt_tokens, "prompt token")
    if not counts.done_requests:
        return f"Of {all_tokens} **{saving.planned:.1%}** need not be computed {whole}"
    return (
        f"Of {counted(counts.planned_prompt_tokens, 'prompt token')} of the requests to compute "
        f"**{plan.saving_to_come:.1%}** need not be computed. Of all {all_tokens} of the job, those of earlier results "
        f"included, it is {saving.planned:.1%} {whole}"
    )


def _counts(plan: PlanSummary) -> list[str]:
    counts, forecast = plan.counts, plan.forecast
    sources = ", ".join(f"{_SOURCES[source]} ({count:,})" for source, count in forecast.estimate_sources.items())
    return [
        "| | |",
        "|---|---:|",
        f"| rows | {counts.rows:,} |",
        f"| answered by another row's computation | {counts.duplicate_rows:,} |",
        f"| answered by earlier results | {counts.done_requests:,} |",
        f"| of these by earlier runs | {counts.answered_before.requests:,} |",
        f"| requests to compute | {counts.requests:,} |",
        f"| their prompt tokens | {counts.planned_prompt_tokens:,} |",
        f"| of these to compute | {forecast.computed_prompt_tokens:,} |",
        f"| expected output tokens | {forecast.output_tokens:,} |",
        f"| known from | {sources or 'nothing to estimate'} |",
        f"| rates of the forecast | {markdown_text(forecast.rates)} |",
        f"| tokens of a KV-cache block | {plan.shape.block_size} |",
    ]


def _row_errors(plan: PlanSummary) -> list[str]:
    counts = plan.counts
    if not counts.error_rows:
        return []
    errors = sum(counts.error_rows.values())
    lines = ["", "### Rows with errors", "", f"{counted(errors, 'row')} of {counts.rows:,} will get no answer:", ""]
    for code, count in most_frequent_first(counts.error_rows):
        lines.append(f"- {markdown_code(code)}: {counted(count, 'row')}, for example")
        lines += [
            f"    - {markdown_code(one.row_id)}: {markdown_text(one.message)}"
            for one in counts.error_examples.get(code, ())
        ]
    return lines


def _forecast(plan: PlanSummary) -> list[str]:
    forecast, count = plan.forecast, plan.shape.workers
    engines = "on one engine" if count == 1 else f"until the last of {counted(count, 'engine')} has finished"
    price = "" if forecast.usd is None else f", {usd(forecast.usd)}"
    return [
        "",
        "### Forecast",
        "",
        "| step | time | |",
        "|---|---:|---|",
        f"| stage | {duration(plan.stage_seconds)} | done: {counted(plan.counts.rows, 'row')} |",
        f"| plan | {duration(plan.seconds)} | done |",
        f"| execute | {duration(forecast.seconds)} | {engines}, without loading the model{price} |",
        f"| its prefill | {duration(forecast.prefill_seconds)} "
        f"| {counted(forecast.computed_prompt_tokens, 'token')}, all engines |",
        f"| its decode | {duration(forecast.decode_seconds)} "
        f"| {counted(forecast.output_tokens, 'token')}, all engines |",
    ]


def _section(title: str, *columns: str) -> list[str]:
    return ["", f"### {title}", "", f"| {' | '.join(columns)} |", f"|{'---:|' * len(columns)}"]


def usd(price: float) -> str:
    """A price in dollars; one below a dollar to a hundredth of a cent."""
    return f"${price:,.2f}" if price >= 1 or price == 0 else f"${price:.4f}"


def duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
