"""The sampling part of a job, and how single rows differ from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import Field, field_validator, model_validator

from batchllm_operators.spec_base import SpecModel


class SamplingParameters(SpecModel):
    """How one completion is sampled; the field names are vLLM's."""

    temperature: float = Field(default=0.0, ge=0.0, le=100.0, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="makes sampling with temperature repeatable")
    max_tokens: int = Field(default=256, ge=1, description="most tokens of one completion")
    stop: tuple[str, ...] = Field(default=(), description="texts that end a completion")

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_text_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _no_empty_stop_text(self) -> SamplingParameters:
        if "" in self.stop:
            raise ValueError("stop: expected non-empty texts, got ''")
        return self

    @property
    def deterministic(self) -> bool:
        """Whether equal prompts get equal completions, so that one computation serves them all."""
        return self.temperature == 0.0 or self.seed is not None

    @property
    def parameters(self) -> SamplingParameters:
        """The sampling fields alone, without what a subclass adds."""
        return SamplingParameters(**self._sampling_fields())

    def with_override(self, fields: Mapping[str, Any]) -> RowOverride:
        """These parameters as a row overrides them.

        Args:
            fields: sampling fields, and perhaps `expected_output_tokens`.

        Raises:
            pydantic.ValidationError: an unknown field, or a value of a wrong type or out of its range.
        """
        return RowOverride.model_validate({**self._sampling_fields(), **fields})

    def to_json(self) -> str:
        """The sampling fields as JSON text, as the column `sampling` of staged rows and bundles holds them."""
        return orjson.dumps(self.parameters.model_dump(mode="json")).decode()

    def of_request(self, text: str | None, max_tokens: int) -> SamplingParameters:
        """The parameters of a request, where these are the job's.

        Args:
            text: what `to_json` gave for the request; None: the request is sampled as the job says.
            max_tokens: most tokens of the completion, whatever the text says.
        """
        fields = orjson.loads(text) if text is not None else {}
        return self.with_override({**fields, "max_tokens": max_tokens}).parameters

    def _sampling_fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SamplingParameters.model_fields}


class RowOverride(SamplingParameters):
    """What the override column of one row may say: sampling fields, and how long the completion will be."""

    expected_output_tokens: int | None = Field(
        default=None, ge=1, description="for the plan only; above max_tokens it counts as max_tokens"
    )


class SamplingSpec(SamplingParameters):
    """Sampling of the whole job, with a column of exceptions."""

    override_column: str | None = Field(
        default=None,
        description="column with sampling fields of single rows, and `expected_output_tokens` for the plan (struct or "
        "JSON object text; null: none)",
    )
