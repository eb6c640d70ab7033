"""The stage step as a call: opens the source, shows how far it is, and says what came out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from batchllm_operators.formats import open_source
from batchllm_operators.records import InputObject, StageSummary
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.planning import FieldOrderChoice
from batchllm_operators.specs.sampling import SamplingSpec
from batchllm_operators.specs.source import PromptSpec, SourceSpec
from batchllm_operators.stage.progress import StageProgress
from batchllm_operators.stage.staging import stage_rows
from batchllm_operators.store import Store
from batchllm_operators.task_names import GENERATE
from batchllm_operators.tasks import task_named
from batchllm_operators.terminal import terminal
from batchllm_operators.wording import counted

_LOGGER = logging.getLogger(__name__)


def stage_source(
    source: SourceSpec,
    prompt: PromptSpec,
    sampling: SamplingSpec,
    model: ModelSpec,
    work_uri: str,
    storage: StorageOptions,
    field_order: FieldOrderChoice = "optimise",
    tokenizer_processes: int = 1,
    fingerprint: Sequence[InputObject] | None = None,
    output_prefix: str = "",
    task_name: str = GENERATE,
    *,
    log: Callable[[str], None] = _LOGGER.info,
) -> StageSummary:
    """Turn every input row into a request, or an error that says why not; written to `staged/` of the work folder.

    Args:
        source: where the rows are.
        prompt: how a row becomes a prompt.
        sampling: how completions are sampled.
        model: the model that will answer.
        work_uri: the work folder.
        storage: how to reach the work folder.
        field_order: of a prompt of kind `fields`.
        tokenizer_processes: processes that render and tokenise.
        fingerprint: the input objects as they were when the job began; default: as they are now.
        output_prefix: of the names of the output columns.
        task_name: what the model will do with each prompt.
        log: takes a line at the start and at the end, and where there is no terminal some on how far it is.

    Raises:
        TerminalError: see `stage_rows`.
        TransientError: the store does not answer.
    """
    rows = open_source(source, only=fingerprint if source.new_objects_only else None)
    # From the hub, or of a large vocabulary, that takes long.
    log(f"loading the tokenizer of {model.id}")
    with StageProgress(rows.rows, terminal(), log) as progress:
        summary = stage_rows(
            rows,
            prompt,
            sampling,
            model,
            Store(work_uri, storage),
            fingerprint=fingerprint,
            output_prefix=output_prefix,
            task=task_named(task_name),
            field_order=field_order,
            tokenizer_processes=tokenizer_processes,
            progress=progress.update,
        )
    log(
        f"staged {counted(summary.rows, 'row')}: {counted(summary.requests, 'request')}, "
        f"{counted(summary.errors, 'error')}, {counted(summary.prompt_tokens, 'prompt token')}"
    )
    if left_out := summary.left_out_text():
        log(f"source: not read: {left_out}")
    return summary
