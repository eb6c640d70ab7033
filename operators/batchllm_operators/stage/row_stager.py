"""Requests from rows: renders, tokenises and validates one batch of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from batchllm_operators.errors import RowError, RowErrorCode
from batchllm_operators.execute.spec import ModelSpec
from batchllm_operators.keys import RequestKeys
from batchllm_operators.records import ESTIMATE_FIELD, STAGED_SCHEMA, Record
from batchllm_operators.stage.faults import RowFaultError
from batchllm_operators.stage.readers import RowBatch
from batchllm_operators.stage.rendering import Prompt, prompt_renderer
from batchllm_operators.stage.sampling import RowSampling, SampledRow
from batchllm_operators.stage.spec import PromptSpec, SamplingSpec
from batchllm_operators.stage.tokenizing import ModelLimits, PromptTokenizer


class StagerSettings(Record):
    """What decides how rows become requests; crosses to the processes that tokenise."""

    prompt: PromptSpec
    sampling: SamplingSpec
    model: ModelSpec
    limits: ModelLimits
    id_column: str | None

    def columns(self) -> dict[str, frozenset[str]]:
        """Field of the job -> input columns that it needs."""
        needed = dict(prompt_renderer(self.prompt, self.limits.vocab_size).columns)
        if self.id_column is not None:
            needed["source.id_column"] = frozenset([self.id_column])
        if self.sampling.override_column is not None:
            needed["sampling.override_column"] = frozenset([self.sampling.override_column])
        return needed


class RowStager:
    """Makes the staged rows of one job.

    Raises:
        TerminalError: the model cannot be loaded, has no chat template, or a template does not parse.
    """

    def __init__(self, settings: StagerSettings) -> None:
        self._settings = settings
        self._renderer = prompt_renderer(settings.prompt, settings.limits.vocab_size)
        self._sampling = RowSampling(settings.sampling)
        self._tokenizer = PromptTokenizer(settings.model)
        self._keys = RequestKeys(settings.model.id, settings.model.revision)
        self._schema = STAGED_SCHEMA
        if settings.sampling.override_column is not None:
            self._schema = STAGED_SCHEMA.append(ESTIMATE_FIELD)
        if self._renderer.is_chat:
            self._tokenizer.require_chat_template()

    def stage(self, batch: RowBatch) -> pa.Table:
        """The staged rows of a batch, one for each of its rows, in order.

        Their schema is `STAGED_SCHEMA`, with `ESTIMATE_FIELD` where the job has an override column.
        """
        records = batch.records()
        errors: dict[int, RowError] = dict(batch.faults)
        sampling: dict[int, SampledRow] = {}
        prompts: dict[int, Prompt] = {}
        for offset, record in enumerate(records):
            if offset in errors:
                continue
            try:
                sampling[offset] = self._sampling.of(record)
                prompts[offset] = self._renderer.render(record, batch.field_order_of(offset))
            except RowFaultError as fault:
                errors[offset] = fault.error
        rows = [self._row_id(batch, offset, record) for offset, record in enumerate(records)]
        for (offset, _), tokens in zip(prompts.items(), self._tokenizer.tokenize(list(prompts.values())), strict=True):
            error = tokens.error if isinstance(tokens, RowFaultError) else self._too_long(len(tokens))
            if error is not None:
                errors[offset] = error
            elif not isinstance(tokens, RowFaultError):
                rows[offset] |= self._request(tokens, sampling[offset], batch.first_row + offset)
        for offset, error in errors.items():
            rows[offset]["error"] = {"code": error.code.value, "message": error.message}
        return pa.table(
            [pa.array([row.get(field.name) for row in rows], field.type) for field in self._schema],
            schema=self._schema,
        )

    def _row_id(self, batch: RowBatch, offset: int, record: dict[str, Any]) -> dict[str, Any]:
        row_index = batch.first_row + offset
        name = record.get(self._settings.id_column) if self._settings.id_column is not None else None
        return {"row_index": row_index, "row_id": str(row_index) if name is None else str(name)}

    def _too_long(self, prompt_tokens: int) -> RowError | None:
        limit = self._settings.limits.max_model_len
        if prompt_tokens < limit:
            return None
        message = f"the prompt has {prompt_tokens} tokens and max_model_len is {limit}: no room for a completion"
        return RowError(RowErrorCode.PROMPT_TOO_LONG, message)

    def _request(self, tokens: npt.NDArray[np.int32], sampled: SampledRow, row_index: int) -> dict[str, Any]:
        wanted, estimate = sampled.parameters, sampled.expected_output_tokens
        # As vLLM does: where the prompt fits and the longest completion would not, that is made shorter.
        room = self._settings.limits.max_model_len - len(tokens)
        effective = wanted if wanted.max_tokens <= room else wanted.model_copy(update={"max_tokens": room})
        values = effective.model_dump(mode="json")
        return {
            "request_key": self._keys.key(tokens, values, row_index=None if wanted.deterministic else row_index),
            "prompt_token_ids": tokens,
            "max_tokens": effective.max_tokens,
            "sampling": None if wanted == self._sampling.base else orjson.dumps(values).decode(),
            ESTIMATE_FIELD.name: None if estimate is None else min(estimate, effective.max_tokens),
        }
