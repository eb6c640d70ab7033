"""Requests from rows: renders, tokenises and validates one batch of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa

from batchllm_operators.columns.arrays import Int32s
from batchllm_operators.errors import RowError, RowErrorCode
from batchllm_operators.formats import RowBatch
from batchllm_operators.keys import RequestKeys
from batchllm_operators.records import Record
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.sampling import SamplingParameters, SamplingSpec
from batchllm_operators.specs.source import PromptSpec, TokensPrompt
from batchllm_operators.stage.faults import RowFaultError, invalid_row
from batchllm_operators.stage.rendering import Prompt, PromptRenderer, characters_of, prompt_renderer
from batchllm_operators.stage.sampling import RowSampling, SampledRow
from batchllm_operators.stage.special_tokens import SpecialTokens
from batchllm_operators.stage.tokenizing import ModelLimits, PromptTokenizer
from batchllm_operators.stage.value_text import NotDataError, value_text
from batchllm_operators.task_names import GENERATE
from batchllm_operators.wording import counted
from batchllm_operators.work.staged import ESTIMATE_FIELD, SOURCE_ROW_FIELD, STAGED_SCHEMA

_CHARACTERS_AT_A_TIME = 16 << 20
"""Characters of prompts above which they are tokenised before more are rendered, as tokens take far more memory."""


class StagerSettings(Record):
    """What decides how rows become requests; crosses to the processes that tokenise."""

    prompt: PromptSpec
    sampling: SamplingSpec
    model: ModelSpec
    limits: ModelLimits
    id_column: str | None
    task: str = GENERATE
    generates: bool = True
    """Whether the task generates tokens; else a prompt needs no room for them, and sampling changes no answer."""
    source_columns: tuple[str, ...] | None = None
    """Columns of the input; None where they are not known (JSONL without a readable row)."""
    numbers_rows: bool = False
    """Whether the source has a filter, so that rows have other numbers there than here."""
    unites_keys: bool = False
    """Whether structs of the input have the keys of all rows, null where a row has none (Parquet)."""

    def columns(self) -> dict[str, frozenset[str]]:
        """Field of the job -> input columns that it needs."""
        needed = dict(self.renderer().columns)
        if self.id_column is not None:
            needed["source.id_column"] = frozenset([self.id_column])
        if self.sampling.override_column is not None:
            needed["sampling.override_column"] = frozenset([self.sampling.override_column])
        return needed

    def renderer(self, special_tokens: SpecialTokens | None = None) -> PromptRenderer:
        """The renderer of the job's prompts.

        Raises:
            TerminalError: a template does not parse, or could mean a column and does not.
        """
        return prompt_renderer(
            self.prompt,
            self.limits.vocab_size,
            columns=self.source_columns,
            unites_keys=self.unites_keys,
            special_tokens=special_tokens,
        )


class RowStager:
    """Makes the staged rows of one job.

    Raises:
        TerminalError: the model cannot be loaded, has no chat template, or a template does not parse.
    """

    def __init__(self, settings: StagerSettings) -> None:
        self._settings = settings
        self._tokenizer = PromptTokenizer(
            settings.model, _special_tokens_of(settings.prompt), settings.limits.max_model_len
        )
        self._renderer = settings.renderer(self._tokenizer.special_tokens)
        self._sampling = RowSampling(settings.sampling, settings.limits.vocab_size)
        self._base_values = self._sampling.base.values
        self._keys = RequestKeys(settings.model.id, settings.model.revision, settings.task)
        self._schema = STAGED_SCHEMA
        if settings.sampling.override_column is not None:
            self._schema = self._schema.append(ESTIMATE_FIELD)
        if settings.numbers_rows:
            self._schema = self._schema.append(SOURCE_ROW_FIELD)
        if self._renderer.is_chat:
            self._tokenizer.require_chat_template()

    def stage(self, batch: RowBatch) -> pa.Table:
        """The staged rows of a batch, one for each of its rows, in order.

        Their schema is `STAGED_SCHEMA`, with `ESTIMATE_FIELD` where the job has an override column, and with
        `SOURCE_ROW_FIELD` where the source has a filter.
        """
        records, errors = batch.readable()
        rows = [self._row_id(batch, offset, record) for offset, record in enumerate(records)]
        for prompts in self._rendered(batch, records, errors):
            tokenized = self._tokenizer.tokenize([prompt for prompt, _ in prompts.values()])
            for (offset, (_, sampling)), tokens in zip(prompts.items(), tokenized, strict=True):
                error = tokens.error if isinstance(tokens, RowFaultError) else self._too_long(len(tokens))
                if error is not None:
                    errors[offset] = error
                elif not isinstance(tokens, RowFaultError):
                    rows[offset] |= self._request(tokens, sampling, batch.first_row + offset)
        for offset, error in errors.items():
            rows[offset]["error"] = {"code": error.code.value, "message": _writable(error.message)}
        return pa.table(
            [pa.array([row.get(field.name) for row in rows], field.type) for field in self._schema],
            schema=self._schema,
        )

    def _rendered(
        self, batch: RowBatch, records: list[dict[str, Any]], errors: dict[int, RowError]
    ) -> Iterator[dict[int, tuple[Prompt, SampledRow]]]:
        """The prompts of rows by offset, in pieces: few at a time where they are long; adds to the errors."""
        prompts: dict[int, tuple[Prompt, SampledRow]] = {}
        characters = 0
        for offset, record in enumerate(records):
            if offset in errors:
                continue
            try:
                sampling = self._sampling.of(record)
                prompt = self._renderer.render(record, batch.field_order_of(offset))
            except RowFaultError as fault:
                errors[offset] = fault.error
                continue
            except RecursionError:
                errors[offset] = invalid_row("a value is nested too deeply").error
                continue
            prompts[offset] = prompt, sampling
            characters += characters_of(prompt)
            if characters > _CHARACTERS_AT_A_TIME:
                yield prompts
                prompts, characters = {}, 0
        yield prompts

    def _row_id(self, batch: RowBatch, offset: int, record: dict[str, Any]) -> dict[str, Any]:
        row_index = batch.first_row + offset
        source_row = row_index if batch.source_rows is None else int(batch.source_rows[offset])
        name = record.get(self._settings.id_column) if self._settings.id_column is not None else None
        return {
            "row_index": row_index,
            "row_id": str(source_row) if name is None else _row_name(name),
            SOURCE_ROW_FIELD.name: source_row,
        }

    def _too_long(self, prompt_tokens: int) -> RowError | None:
        limit = self._settings.limits.max_model_len
        if prompt_tokens < limit or (prompt_tokens == limit and not self._settings.generates):
            return None
        room = ": no room for a completion" if self._settings.generates else ""
        message = f"the prompt has {counted(prompt_tokens, 'token')} and max_model_len is {limit}{room}"
        return RowError(RowErrorCode.PROMPT_TOO_LONG, message)

    def _request(self, tokens: Int32s, sampled: SampledRow, row_index: int) -> dict[str, Any]:
        wanted, estimate = sampled.parameters, sampled.expected_output_tokens
        generates = self._settings.generates
        # As vLLM does: where the prompt fits and the longest completion would not, that is made shorter.
        room = self._settings.limits.max_model_len - len(tokens) if generates else 1
        effective = wanted.within(room)
        sampling = self._values_of(effective) if generates else {}
        own_answer = generates and not wanted.deterministic
        return {
            "request_key": self._keys.key(tokens, sampling, row_index=row_index if own_answer else None),
            "prompt_token_ids": tokens,
            "max_tokens": effective.max_tokens,
            "sampling": None if wanted == self._sampling.base else effective.to_json(),
            ESTIMATE_FIELD.name: None if estimate is None else min(estimate, effective.max_tokens),
        }

    def _values_of(self, sampling: SamplingParameters) -> dict[str, Any]:
        """What counts in a request's key; most rows are sampled as the job says, whose values are made once."""
        return self._base_values if sampling is self._sampling.base else sampling.values


def _special_tokens_of(prompt: PromptSpec) -> Literal["as_text", "allow"]:
    return "as_text" if isinstance(prompt, TokensPrompt) else prompt.special_tokens


def _row_name(value: object) -> str:
    """A value as the name of its row; it need not be readable to tell one row from another."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    try:
        return _writable(value_text(value))
    except (NotDataError, RowFaultError, RecursionError, ValueError):
        return f"a {type(value).__name__}"


def _writable(text: str) -> str:
    """The text with escapes for halves of surrogate pairs, which no file can hold."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()
