"""Sampling parameters of single rows: the job's, with the exceptions that an override column names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import ValidationError

from batchllm_operators.errors import TerminalError
from batchllm_operators.specs.sampling import SamplingParameters, SamplingSpec
from batchllm_operators.stage.faults import invalid_row
from batchllm_operators.wording import fault_text


@dataclass(frozen=True, slots=True)
class SampledRow:
    """How one row is sampled.

    Attributes:
        parameters: decide the answer.
        expected_output_tokens: what the row says of the length of its completion; decides the plan only.
    """

    parameters: SamplingParameters
    expected_output_tokens: int | None = None


class RowSampling:
    """Gives each row its sampling parameters.

    Args:
        spec: the sampling part of the job.
        vocabulary: tokens that the model has.

    Attributes:
        base: the job's parameters, for rows without an override.
    """

    def __init__(self, spec: SamplingSpec, vocabulary: int) -> None:
        self._column = spec.override_column
        self._vocabulary = vocabulary
        self.base = spec.parameters

    def of(self, record: dict[str, Any]) -> SampledRow:
        """Parameters of one row.

        Raises:
            RowFaultError: the override is no valid set of sampling fields; names field, expected and got.
        """
        override = self._override(record)
        if not override:
            return SampledRow(self.base)
        try:
            row = self.base.with_override(override)
        except ValidationError as error:
            raise invalid_row(f"column {self._column!r}: {_explained(error)}") from error
        unknown = row.unknown_tokens(self._vocabulary)
        if unknown is not None:
            raise invalid_row(f"column {self._column!r}: {unknown}")
        return SampledRow(row.parameters, row.expected_output_tokens)

    def _override(self, record: dict[str, Any]) -> dict[str, Any]:
        value = record.get(self._column) if self._column is not None else None
        if value is None or value == "":
            return {}
        if isinstance(value, str):
            try:
                value = orjson.loads(value)
            except orjson.JSONDecodeError as error:
                raise invalid_row(f"column {self._column!r}: expected a JSON object: {error}") from error
        if not isinstance(value, dict):
            raise invalid_row(f"column {self._column!r}: expected sampling fields, got {type(value).__name__}")
        # A column of structs has every field in every row, null where a row overrides nothing.
        return {key: item for key, item in value.items() if item is not None}


def refuse_unknown_tokens(sampling: SamplingSpec, vocabulary: int) -> None:
    """Refuse token ids in a job that its model does not have.

    Raises:
        TerminalError: names the field and the first one.
    """
    unknown = sampling.unknown_tokens(vocabulary)
    if unknown is not None:
        raise TerminalError(f"sampling.{unknown}")


def _explained(error: ValidationError) -> str:
    faults = []
    for fault in error.errors(include_url=False):
        name = ".".join(str(piece) for piece in fault["loc"])
        message = fault_text(fault["msg"])
        faults.append(f"{name}: {message}, got {fault['input']!r}" if name else message)
    return "; ".join(faults)
