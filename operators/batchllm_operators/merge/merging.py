"""The merge step: one output row for each input row, in input order, and a manifest when all of them are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa

from batchllm_operators.columns.arrays import Int64s
from batchllm_operators.disk_space import full_disk_told
from batchllm_operators.errors import TerminalError
from batchllm_operators.formats import Source
from batchllm_operators.formats.input_changes import refuse_changed_input
from batchllm_operators.merge.answers import AnswerSpill, spill_results, spill_staged_errors
from batchllm_operators.merge.claim import SinkClaim
from batchllm_operators.merge.joining import side_by_side
from batchllm_operators.merge.requests import (
    ChosenResults,
    RequestIndex,
    choose_results,
    index_requests,
)
from batchllm_operators.merge.samples import SampleCollector
from batchllm_operators.merge.seen_inputs import refuse_inputs_seen_meanwhile, write_inputs
from batchllm_operators.merge.sink import check_sink, refuse_overlap
from batchllm_operators.merge.writers import output_rows, write_in_folders, write_output
from batchllm_operators.records import InputObject, Manifest, RowErrorExample, StageSummary
from batchllm_operators.row_errors import ErrorExamples, refuse_too_many_errors
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.store import Store
from batchllm_operators.tasks import task_named
from batchllm_operators.temporary_folders import OwnedFolder
from batchllm_operators.wording import counted
from batchllm_operators.work.json_objects import write_record
from batchllm_operators.work.layout import FORMAT_VERSION, RESULTS_FOLDER, SAMPLES_FILE
from batchllm_operators.work.results import part_names, refuse_output_names
from batchllm_operators.work.staged import carried_schema, read_part, source_rows

_EXAMPLES = 5


def merge_results(
    source: Source,
    stage: StageSummary,
    work: Store,
    sink: Store,
    sink_spec: SinkSpec,
    *,
    job_id: str,
    job_name: str,
    fingerprint: Sequence[InputObject],
    max_error_fraction: float,
    rewrite: bool = False,
    slice_id: str | None = None,
    known_parts: Sequence[str] = (),
) -> Manifest:
    """Join the results to the input rows, write the output files, and the manifest last.

    An old output stays as it is, with its manifest, until the new one is complete. Nothing is written where this job's
    output is complete already, unless `rewrite` asks for it. Memory does not grow with the length of texts: rows are
    joined by spill files in the local temporary folder.

    Args:
        source: the input, opened anew: it is read again, and must be what was staged.
        stage: what staging found.
        work: the work folder, with `staged/` and `results/`.
        sink: the folder of the output.
        sink_spec: its part of the job.
        job_id: of this job.
        job_name: for the manifest.
        fingerprint: the input objects as they were when the job began.
        max_error_fraction: share of rows without an answer above which there is no output.
        rewrite: write this job's output again, from results that are newer than it.
        slice_id: tells the output from others of the sink, where it is added to them.
        known_parts: result parts that this run has seen written, which a store may not list yet.

    Raises:
        TerminalError: the sink is another job's, the input changed, requests have no result, too many rows have errors,
            or a disk is full; the sink is as it was then.
        LostClaimError: another run has claimed the sink meanwhile.
        TransientError: the store does not answer.
    """
    refuse_overlap(source, sink, work)
    complete = check_sink(sink, sink_spec.mode, job_id, sink_spec.layout, slice_id)
    if complete is not None and not rewrite:
        return complete
    refuse_changed_input(source, source.objects, fingerprint)
    task = task_named(stage.task)
    index = index_requests(stage, work)
    parts = part_names(work, known_parts)
    chosen = choose_results(index, parts, work, task)
    _refuse_missing_results(index, chosen, stage, work)
    error_rows = Counter(stage.error_rows) + chosen.error_rows
    examples = _error_examples(index, chosen, stage, work)
    refuse_too_many_errors(error_rows, stage.rows, max_error_fraction, examples)

    schema, seen = _columns_to_carry(source, stage, sink_spec), SampleCollector(task)
    refuse_output_names(task, schema.names, sink_spec.prefix)
    numbers = None if source.spec.filter is None else source_rows(work, stage)
    output = output_rows(source, schema, sink_spec, task, numbers)
    with SinkClaim(sink, job_id, sink_spec.mode, slice_id) as claim:
        # Again: another run may have completed it just before.
        complete = check_sink(sink, sink_spec.mode, job_id, sink_spec.layout, slice_id)
        if complete is not None and not rewrite:
            claim.release()
            return complete
        with (
            full_disk_told("merge"),
            OwnedFolder("merge") as folder,
            AnswerSpill(Path(folder), stage.rows, task) as spill,
        ):
            spill_staged_errors(stage, work, spill)
            spill_results(index, chosen, parts, work, spill, task)
            answers = seen.watched(spill.in_row_order())
            rows = side_by_side(output.carried, answers, output.schema, source.spec.uri)
            with closing(rows):
                if sink_spec.partition_by:
                    files = write_in_folders(rows, output, sink, sink_spec, claim, Path(folder))
                else:
                    files = write_output(rows, output.schema, sink, sink_spec, claim)
        written = sum(file.rows for file in files)
        if written != stage.rows:
            raise TerminalError(
                f"merge: {counted(stage.rows, 'row')} went in, {written:,} came out", job_id=job_id, uri=sink.uri
            )
        refuse_changed_input(source, source.look_again(), fingerprint)
        if source.spec.new_objects_only:
            refuse_inputs_seen_meanwhile(sink, job_name, slice_id, source.store, fingerprint)
        samples = seen.samples(_row_ids(np.array(seen.rows, np.int64), stage, work), examples)
        write_record(work, SAMPLES_FILE, samples)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            job_id=job_id,
            job_name=job_name,
            work_uri=work.uri,
            rows=written,
            error_rows=dict(sorted(error_rows.items())),
            files=tuple(files),
            layout=sink_spec.layout,
            slice_id=slice_id,
            inputs=_listed_inputs(source, fingerprint, sink, claim),
            prompt_tokens=stage.prompt_tokens,
            cached_tokens=chosen.cached_tokens,
            computed_prompt_tokens=chosen.prompt_tokens - chosen.cached_tokens,
            completion_tokens=chosen.completion_tokens,
        )
        claim.complete(manifest)
    return manifest


def _columns_to_carry(source: Source, stage: StageSummary, spec: SinkSpec) -> pa.Schema:
    """The schema of the input columns that go to the sink, by `sink.carry` of those that staging found.

    Raises:
        TerminalError: names a column that is not there.
    """
    schema = carried_schema(stage)
    if spec.carry == "all":
        return schema
    names = [source.spec.id_column or ""] if spec.carry == "key_only" else list(spec.carry)
    missing = [name for name in names if name not in schema.names]
    if missing:
        raise TerminalError(
            f"sink.carry: no such column: {', '.join(missing)}; there is {', '.join(schema.names) or 'none'}"
        )
    source.carry_only(names)
    return pa.schema([schema.field(name) for name in names])


def _listed_inputs(source: Source, fingerprint: Sequence[InputObject], sink: Store, claim: SinkClaim) -> str | None:
    """List the input beside the manifest, where later runs leave it out; the name of the list."""
    if not source.spec.new_objects_only:
        return None
    name = claim.inputs_name()
    write_inputs(sink, name, source.store, fingerprint)
    return name


def _refuse_missing_results(index: RequestIndex, chosen: ChosenResults, stage: StageSummary, work: Store) -> None:
    missing = chosen.missing
    if len(missing):
        _, rows = index.rows_of(missing)
        names = _row_ids(np.sort(rows)[:_EXAMPLES], stage, work)
        raise TerminalError(
            f"merge: {len(missing)} of {counted(len(index), 'request')} have no result ({counted(len(rows), 'row')},"
            f" the first: {', '.join(names)}); run the job again to compute them",
            uri=work.uri_of(RESULTS_FOLDER),
        )


def _error_examples(
    index: RequestIndex, chosen: ChosenResults, stage: StageSummary, work: Store
) -> dict[str, tuple[RowErrorExample, ...]]:
    """Examples of rows with errors: those that staging found, and some that engines met."""
    examples = ErrorExamples()
    for code, number, message in chosen.error_examples:
        first_row = index.rows[index.starts[number] : index.starts[number] + 1]
        examples.add(code, _row_ids(first_row, stage, work)[0], message)
    return {**stage.error_examples, **examples.by_kind()}


def _row_ids(rows: Int64s, stage: StageSummary, work: Store) -> list[str]:
    """Ids of some rows, in their order."""
    names: list[str] = []
    for part in stage.parts:
        inside = rows[(rows >= part.first_row) & (rows < part.first_row + part.rows)]
        if len(inside):
            names += read_part(work, part, ["row_id"])["row_id"].take(inside - part.first_row).to_pylist()
    return names
