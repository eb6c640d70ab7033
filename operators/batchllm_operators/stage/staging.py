"""The stage step: every input row becomes a request, or an error that says why not."""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from batchllm_operators.columns.json_schema import unified
from batchllm_operators.digests import digest_of_bytes
from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import RowBatch, Source
from batchllm_operators.formats.input_changes import refuse_changed_input
from batchllm_operators.keys import canonical_json
from batchllm_operators.models.model_files import model_versions
from batchllm_operators.records import FieldSharing, InputObject, StagedPart, StageSummary
from batchllm_operators.row_errors import ErrorExamples
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.planning import FieldOrderChoice
from batchllm_operators.specs.sampling import SamplingSpec
from batchllm_operators.specs.source import ChatPrompt, FieldsPrompt, PromptSpec, TemplatePrompt
from batchllm_operators.stage.field_scan import scan_fields, with_field_order
from batchllm_operators.stage.progress import StageStep
from batchllm_operators.stage.row_stager import StagerSettings
from batchllm_operators.stage.sampling import refuse_unknown_tokens
from batchllm_operators.stage.tokenizer_pool import staged_tables
from batchllm_operators.stage.tokenizing import model_limits
from batchllm_operators.store import Store
from batchllm_operators.task_names import GENERATE
from batchllm_operators.tasks.base import Task
from batchllm_operators.tasks.generate import GENERATION
from batchllm_operators.work.results import refuse_output_names
from batchllm_operators.work.staged import carried_schema, finished_staging, write_part, write_summary

LEFT_OUT_EXAMPLES = 10
PART_ROWS = 20_000
PART_TOKENS = 32 << 20  # 128 MiB of token ids


def stage_rows(
    source: Source,
    prompt: PromptSpec,
    sampling: SamplingSpec,
    model: ModelSpec,
    work: Store,
    *,
    fingerprint: Sequence[InputObject] | None = None,
    field_order: FieldOrderChoice = "optimise",
    tokenizer_processes: int = 1,
    output_prefix: str = "",
    task: Task = GENERATION,
    progress: Callable[[StageStep, int], None] = lambda _step, _rows: None,
) -> StageSummary:
    """Render, tokenise and validate all rows, and write them to `staged/` of the work folder.

    What is staged already, undamaged, from these very objects and by these settings, is not staged again.

    Args:
        source: the input.
        prompt: how a row becomes a prompt.
        sampling: of the job; single rows may differ.
        model: whose tokenizer and limits count.
        work: the work folder.
        fingerprint: the input objects as they were when the job began; default: as the source found them.
        field_order: of a prompt of kind `fields`; to optimise it, the input is read once more before.
        tokenizer_processes: processes that render and tokenise; the result is the same for any number.
        output_prefix: of the names of the output columns (`sink.prefix`), which no input column may have.
        task: what the model will do with each prompt.
        progress: called with the number of rows that a step has done so far.

    Raises:
        TerminalError: a column that does not exist, a bad template, a model that cannot be loaded, values that do not
            fit the types of their columns, an input column with the name of an output column. Or the input is not what
            it was when the job began, before it was read or after.
        TransientError: a tokenizer process died, or the store does not answer.
    """
    fingerprint = source.objects if fingerprint is None else fingerprint
    refuse_changed_input(source, source.objects, fingerprint)
    input_digest = digest_of_bytes(canonical_json([one.model_dump() for one in fingerprint]))
    settings_digest = digest_of_bytes(
        canonical_json(
            ({} if task.name == GENERATE else {"task": task.name})
            | {
                "source": source.spec.model_dump(mode="json", exclude={"uri", "storage"}),
                "prompt": prompt.model_dump(mode="json"),
                "sampling": sampling.values | {"override_column": sampling.override_column},
                "model": model.model_dump(mode="json"),
                "model_versions": model_versions(model),
                "field_order": field_order,
            }
        )
    )
    done = finished_staging(work, input_digest, settings_digest)
    if done is not None:
        refuse_output_names(task, carried_schema(done).names, output_prefix)
        return done
    started = time.monotonic()
    if source.spec.columns is None or isinstance(prompt, ChatPrompt | TemplatePrompt):
        # A name that a late row brings may be an output column's, or what an expression of a template could mean.
        source.find_all_columns(partial(progress, StageStep.FIND_COLUMNS))
    refuse_output_names(task, source.carried(), output_prefix)
    limits = model_limits(model)
    refuse_unknown_tokens(sampling, limits.vocab_size)
    settings = StagerSettings(
        prompt=prompt,
        sampling=sampling,
        model=model,
        limits=limits,
        id_column=source.spec.id_column,
        task=task.name,
        generates=task.generates,
        numbers_rows=source.spec.filter is not None,
        source_columns=tuple(source.columns) if source.has_columns else None,
        unites_keys=source.unites_keys,
    )
    needed = settings.columns()
    for field_name, columns in needed.items():
        source.require_columns(columns, field_name)
    schema = _SinkSchema(source.schema)
    writer = _PartWriter(work)
    batches: Iterator[RowBatch] = map(schema.seen, source.batches(frozenset[str]().union(*needed.values())))
    sharing = None
    if isinstance(prompt, FieldsPrompt) and field_order == "optimise":
        order = scan_fields(source, prompt.columns, partial(progress, StageStep.SCAN_FIELDS))
        sharing = FieldSharing(
            as_given=round(order.hit_rate_unsorted, 6),
            sorted_rows=round(order.hit_rate_as_given, 6),
            chosen=round(order.hit_rate, 6),
        )
        batches = with_field_order(batches, order.fields)
    for table in staged_tables(batches, settings, tokenizer_processes):
        writer.add(table)
        progress(StageStep.STAGE, writer.rows)
    writer.flush()
    refuse_changed_input(source, source.look_again(), fingerprint)
    summary = StageSummary(
        parts=tuple(writer.parts),
        rows=writer.rows,
        error_rows=dict(sorted(writer.error_rows.items())),
        error_examples=writer.error_examples.by_kind(),
        prompt_tokens=writer.prompt_tokens,
        requests=writer.rows - writer.error_rows.total(),
        source_schema=_encoded(source.sink_schema(schema.schema), source),
        input_digest=input_digest,
        settings_digest=settings_digest,
        left_out_objects=len(source.left_out),
        left_out_examples=source.left_out[:LEFT_OUT_EXAMPLES],
        field_sharing=sharing,
        task=task.name,
        seconds=round(time.monotonic() - started, 3),
    )
    write_summary(work, summary)
    return summary


def _encoded(schema: pa.Schema, source: Source) -> str:
    content = schema.serialize().to_pybytes()
    try:
        pa.ipc.read_schema(pa.py_buffer(content))
    except (pa.ArrowException, OSError) as error:
        # Arrow writes types of any depth, and reads them to about 120.
        raise TerminalError(
            f"source: a column's type cannot be carried (too many types within types?): {error}; leave it out of"
            " source.columns",
            uri=source.spec.uri,
        ) from error
    return base64.b64encode(content).decode()


class _SinkSchema:
    """The schema of the input columns, as the batches seen so far show it."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema

    def seen(self, batch: RowBatch) -> RowBatch:
        """Takes note of a batch on its way."""
        if not batch.schema.equals(self.schema):
            self.schema = unified([self.schema, batch.schema])
        return batch


class _PartWriter:
    """Writes staged rows as parts of bounded size and counts them."""

    def __init__(self, work: Store) -> None:
        self._work = work
        self._tables: list[pa.Table] = []
        self._waiting_rows = 0
        self._waiting_tokens = 0
        self.parts: list[StagedPart] = []
        self.rows = 0
        self.prompt_tokens = 0
        self.error_rows: Counter[str] = Counter()
        self.error_examples = ErrorExamples()

    def add(self, table: pa.Table) -> None:
        tokens = pc.sum(pc.list_value_length(table["prompt_token_ids"])).as_py() or 0
        faulty = table.select(["row_id", "error"]).filter(pc.is_valid(table["error"])).to_pylist()
        for row in faulty:
            self.error_rows[row["error"]["code"]] += 1
            self.error_examples.add(row["error"]["code"], row["row_id"], row["error"]["message"])
        self.rows += len(table)
        self.prompt_tokens += tokens
        self._tables.append(table)
        self._waiting_rows += len(table)
        self._waiting_tokens += tokens
        if self._waiting_rows >= PART_ROWS or self._waiting_tokens >= PART_TOKENS:
            self.flush()

    def flush(self) -> None:
        if not self._tables:
            return
        table = pa.concat_tables(self._tables).combine_chunks()
        self.parts.append(write_part(self._work, len(self.parts), table, self.rows - self._waiting_rows))
        self._tables, self._waiting_rows, self._waiting_tokens = [], 0, 0
