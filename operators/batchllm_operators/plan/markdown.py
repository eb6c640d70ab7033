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
    if plan.largest_groups:
        lines += _section("Groups that save most", "requests", "prefix tokens", "tokens saved", "forecast")
        lines += [
            f"| {one.requests:,} | {one.prefix_tokens:,} | {one.saved_tokens:,} | {duration(one.expected_seconds)} |"
            for one in plan.largest_groups
        ]
    if plan.sharing_degrees:
        lines += _section("How many share a prefix", "group size", "groups", "requests", "tokens saved")
        lines += [
            f"| {size} | {one.groups:,} | {one.requests:,} | {one.saved_tokens:,} |"
            for size, one in zip(group_sizes(plan), plan.sharing_degrees, strict=True)
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
        for one in plan.sharing_degrees
    ]


def explain_order(plan: PlanSummary) -> str:
    """Why the requests stand in this order, in a few sentences."""
    sentences = [_ORDERS[plan.order]]
    if plan.field_sharing is not None:
        fields = plan.field_sharing
        sentences.append(
            f"The order of the fields is chosen row by row: each row shares {fields.chosen:.1%} of its fields with the "
            f"row before it (fields as given: {fields.sorted_rows:.1%}; rows as given too: {fields.as_given:.1%})."
        )
    if plan.parted_trees:
        sentences.append(
            f"{counted(plan.parted_trees, 'short common beginning is', 'short common beginnings are')} computed more "
            "than once, because ordering what is below by ratio is worth more."
        )
    if plan.split_prefix_tokens:
        sentences.append(
            f"{counted(plan.split_prefix_tokens, 'shared token is', 'shared tokens are')} computed again, so that "
            f"{counted(plan.workers, 'engine')} finish together."
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
    engines = "" if plan.workers == 1 else f" on {counted(plan.workers, 'engine')}"
    price = "" if plan.expected_usd is None else f", about {usd(plan.expected_usd)}"
    return (
        f"**{counted(plan.requests, 'request')}** in {counted(plan.groups, 'prefix group')} and "
        f"{counted(len(plan.bundles), 'bundle')}: about **{duration(plan.expected_seconds)}**{engines}{price}."
    )


def _saving(plan: PlanSummary) -> str:
    stock = "" if plan.stock_saving is None else f"; a stock engine on the rows as given: {plan.stock_saving:.1%}"
    return (
        f"Of {counted(plan.prompt_tokens, 'prompt token')} **{plan.expected_saving:.1%}** need not be computed "
        f"(possible: {plan.optimum_saving:.1%}; with one prefix a request: {plan.single_level_saving:.1%}{stock})."
    )


def _counts(plan: PlanSummary) -> list[str]:
    sources = ", ".join(f"{_SOURCES[source]} ({count:,})" for source, count in plan.estimate_sources.items())
    return [
        "| | |",
        "|---|---:|",
        f"| rows | {plan.rows:,} |",
        f"| answered by another row's computation | {plan.duplicate_rows:,} |",
        f"| answered by earlier results | {plan.done_requests:,} |",
        f"| requests to compute | {plan.requests:,} |",
        f"| their prompt tokens | {plan.planned_prompt_tokens:,} |",
        f"| of these to compute | {plan.expected_computed_prompt_tokens:,} |",
        f"| expected output tokens | {plan.expected_output_tokens:,} |",
        f"| known from | {sources or 'nothing to estimate'} |",
        f"| rates of the forecast | {markdown_text(plan.rates)} |",
        *([f"| tokens of a KV-cache block | {plan.block_size} |"] if plan.block_size else []),
    ]


def _row_errors(plan: PlanSummary) -> list[str]:
    if not plan.error_rows:
        return []
    errors = sum(plan.error_rows.values())
    lines = ["", "### Rows with errors", "", f"{counted(errors, 'row')} of {plan.rows:,} will get no answer:", ""]
    for code, count in most_frequent_first(plan.error_rows):
        lines.append(f"- {markdown_code(code)}: {counted(count, 'row')}, for example")
        lines += [
            f"    - {markdown_code(one.row_id)}: {markdown_text(one.message)}"
            for one in plan.error_examples.get(code, ())
        ]
    return lines


def _forecast(plan: PlanSummary) -> list[str]:
    engines = (
        "on one engine" if plan.workers == 1 else f"until the last of {counted(plan.workers, 'engine')} has finished"
    )
    price = "" if plan.expected_usd is None else f", {usd(plan.expected_usd)}"
    return [
        "",
        "### Forecast",
        "",
        "| step | time | |",
        "|---|---:|---|",
        f"| stage | {duration(plan.stage_seconds)} | done: {counted(plan.rows, 'row')} |",
        f"| plan | {duration(plan.seconds)} | done |",
        f"| execute | {duration(plan.expected_seconds)} | {engines}, without loading the model{price} |",
        f"| its prefill | {duration(plan.expected_prefill_seconds)} "
        f"| {counted(plan.expected_computed_prompt_tokens, 'token')}, all engines |",
        f"| its decode | {duration(plan.expected_decode_seconds)} "
        f"| {counted(plan.expected_output_tokens, 'token')}, all engines |",
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
