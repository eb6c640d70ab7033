"""Checks of a job that cost nothing: what would fail in its first minute is told before, one line a check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from batchllm_flows.job import BatchJob
from batchllm_operators.errors import BatchLLMError
from batchllm_operators.merge.sink import check_sink, refuse_input_in_sink
from batchllm_operators.stage.readers import Source, open_source
from batchllm_operators.stage.rendering import prompt_renderer
from batchllm_operators.stage.row_stager import StagerSettings
from batchllm_operators.stage.tokenizing import ModelLimits, PromptTokenizer, model_limits


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, whether it is as it must be, and what was found."""

    name: str
    ok: bool
    found: str


def check_job(job: BatchJob) -> Iterator[Check]:
    """Check what a job refers to: source, model, columns, tokenizer and sink; stages and writes nothing.

    What depends on a check that failed is left out.
    """
    source: list[Source] = []
    limits: list[ModelLimits] = []
    yield _checked("source", lambda: _source(job, source))
    yield _checked("model", lambda: _model(job, limits))
    if source and limits:
        yield _checked("columns", lambda: _columns(job, source[0], limits[0]))
    if limits:
        yield _checked("tokenizer", lambda: _tokenizer(job, limits[0]))
    if source:
        yield _checked("sink", lambda: _sink(job, source[0]))


def _checked(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except BatchLLMError as error:
        return Check(name, False, str(error))


def _source(job: BatchJob, opened: list[Source]) -> str:
    source = open_source(job.source)
    opened.append(source)
    rows = "rows not counted" if source.rows is None else f"{source.rows:,} rows"
    size = sum(one.size for one in source.objects)
    return f"{len(source.objects):,} objects, {size:,} bytes, {rows}, {len(source.columns):,} columns"


def _model(job: BatchJob, found: list[ModelLimits]) -> str:
    limits = model_limits(job.model)
    found.append(limits)
    return f"{job.model.id}: {limits.max_model_len:,} tokens of prompt and completion, vocabulary {limits.vocab_size:,}"


def _columns(job: BatchJob, source: Source, limits: ModelLimits) -> str:
    settings = StagerSettings(
        prompt=job.prompt,
        sampling=job.sampling,
        model=job.model,
        limits=limits,
        id_column=job.source.id_column,
    )
    needed = settings.columns()
    for field, columns in needed.items():
        source.require_columns(columns, field)
    carried = len(source.schema.names) or "all"
    used = ", ".join(f"{field} {', '.join(sorted(columns))}" for field, columns in needed.items() if columns)
    return f"{used or 'the prompt uses none'}; carried to the sink: {carried}"


def _tokenizer(job: BatchJob, limits: ModelLimits) -> str:
    tokenizer = PromptTokenizer(job.model)
    if not prompt_renderer(job.prompt, limits.vocab_size).is_chat:
        return f"loads; prompts of kind {job.prompt.kind} need no chat template"
    tokenizer.require_chat_template()
    return "loads, with a chat template"


def _sink(job: BatchJob, source: Source) -> str:
    sink = job.sink_store()
    refuse_input_in_sink(source, sink)
    identity = job.job_id(source.objects)
    complete = check_sink(sink, job.sink.mode, identity)
    if complete is not None:
        return f"{sink.uri} holds this job's complete output: a run computes nothing"
    return f"{sink.uri}: this job may write there (job {identity})"
