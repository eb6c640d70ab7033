"""Checks of a job that cost nothing: what would fail in its first minute is told before, one line a check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from batchllm_flows.job import BatchJob
from batchllm_flows.new_objects import input_of
from batchllm_operators.errors import BatchLLMError, TerminalError
from batchllm_operators.execute.engine_options import check_engine_arguments
from batchllm_operators.formats import Source, open_source
from batchllm_operators.merge.sink import check_sink, refuse_overlap
from batchllm_operators.stage.rendering import prompt_renderer
from batchllm_operators.stage.row_stager import StagerSettings
from batchllm_operators.stage.sampling import refuse_unknown_tokens
from batchllm_operators.stage.tokenizing import PromptTokenizer, model_limits
from batchllm_operators.tasks import task_named
from batchllm_operators.wording import counted, size_text
from batchllm_operators.work.results import output_fields


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, whether it is as it must be, and what was found."""

    name: str
    ok: bool
    found: str


def check_job(job: BatchJob) -> Iterator[Check]:
    """Check what a job refers to: source, model, prompt, columns, tokenizer and sink; stages and writes nothing.

    What depends on a check that failed is left out.
    """
    try:
        job = job.with_model_defaults()
    except BatchLLMError as error:
        yield Check("sampling", False, str(error))
    source: list[Source] = []
    settings: list[StagerSettings] = []
    needed: list[dict[str, frozenset[str]]] = []
    yield _checked("source", lambda: _source(job, source))
    yield _checked("engine_args", lambda: _engine_arguments(job))
    yield _checked("model", lambda: _model(job, settings))
    if settings:
        yield _checked("prompt", lambda: _prompt(settings, source, needed))
    if source and needed:
        yield _checked("columns", lambda: _columns(job, source[0], needed[0]))
    if needed:
        yield _checked("tokenizer", lambda: _tokenizer(settings[0]))
    if source:
        yield _checked("sink", lambda: _sink(job, source[0]))


def _checked(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except BatchLLMError as error:
        return Check(name, False, str(error))


def _source(job: BatchJob, opened: list[Source]) -> str:
    found = input_of(job)
    if not found.objects:
        return "no object is new: a run computes nothing"
    source = open_source(job.source, found)
    opened.append(source)
    rows = "rows not counted" if source.rows is None else counted(source.rows, "row")
    size = size_text(sum(one.size for one in source.objects))
    return f"{counted(len(source.objects), 'object')}, {size}, {rows}, {counted(len(source.columns), 'column')}"


def _engine_arguments(job: BatchJob) -> str:
    check_engine_arguments(job.model)
    return ", ".join(job.model.engine_args) or "none"


def _model(job: BatchJob, found: list[StagerSettings]) -> str:
    limits = model_limits(job.model)
    refuse_unknown_tokens(job.sampling, limits.vocab_size)
    settings = StagerSettings(
        prompt=job.prompt, sampling=job.sampling, model=job.model, limits=limits, id_column=job.source.id_column
    )
    found.append(settings)
    return f"{job.model.id}: {limits.max_model_len:,} tokens of prompt and completion, vocabulary {limits.vocab_size:,}"


def _prompt(found: list[StagerSettings], source: list[Source], needed: list[dict[str, frozenset[str]]]) -> str:
    if source and source[0].has_columns:  # what a name means is known only where the columns are
        found[0] = found[0].model_copy(update={"source_columns": tuple(source[0].columns)})
    needed.append(found[0].columns())
    return f"kind {found[0].prompt.kind}"


def _columns(job: BatchJob, source: Source, needed: dict[str, frozenset[str]]) -> str:
    for field, columns in needed.items():
        source.require_columns(columns, field)
    if isinstance(job.sink.carry, list):
        source.require_columns(job.sink.carry, "sink.carry")
    if source.has_columns:
        _partition_columns(job, source)
    carried = "all" if source.spec.columns is None else len(source.carried())
    used = ", ".join(f"{field} {', '.join(sorted(columns))}" for field, columns in needed.items() if columns)
    return f"{used or 'the prompt uses none'}; carried to the sink: {carried}"


def _partition_columns(job: BatchJob, source: Source) -> None:
    """Refuse `sink.partition_by` that names no column of the output."""
    answers = [field.name for field in output_fields(task_named(job.task), job.sink.prefix)]
    missing = [name for name in job.sink.partition_by if name not in answers and source.missing([name])]
    if missing:
        raise TerminalError(f"sink.partition_by: no such output column: {', '.join(missing)}", uri=job.sink.uri)


def _tokenizer(settings: StagerSettings) -> str:
    tokenizer = PromptTokenizer(settings.model)
    if not prompt_renderer(settings.prompt, settings.limits.vocab_size, columns=settings.source_columns).is_chat:
        return f"loads; prompts of kind {settings.prompt.kind} need no chat template"
    tokenizer.require_chat_template()
    return "loads, with a chat template"


def _sink(job: BatchJob, source: Source) -> str:
    sink = job.sink_store()
    identity = job.job_id(source.objects)
    refuse_overlap(source, sink, job.work_store(identity), job.answers_store())
    complete = check_sink(sink, job.sink.mode, identity, job.sink.layout, job.slice_id(identity))
    if complete is not None:
        return f"{sink.uri} holds this job's complete output: a run computes nothing"
    return f"{sink.uri}: this job may write there (job {identity})"
