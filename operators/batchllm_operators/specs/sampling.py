"""The sampling part of a job, and how single rows differ from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import orjson
from pydantic import Field, field_validator, model_validator

from batchllm_operators.spec_base import SpecModel, Texts
from batchllm_operators.specs.structured_outputs import StructuredOutputs

_OLDEST_FIELDS = {"temperature", "top_p", "seed", "max_tokens", "stop"}
"""Fields that count in keys and ids also at their defaults; all others are younger, and must not change those of jobs
that do not use them."""


class RepetitionDetection(SpecModel):
    """When a completion that goes round in circles is ended; the field names are vLLM's."""

    max_pattern_size: int = Field(ge=1, description="longest repeated pattern that is looked for, in tokens")
    min_pattern_size: int = Field(default=1, ge=1, description="shortest one")
    min_count: int = Field(ge=2, description="times that a pattern stands one behind the other before the end")

    @model_validator(mode="after")
    def _sizes_are_a_range(self) -> RepetitionDetection:
        if self.min_pattern_size > self.max_pattern_size:
            raise ValueError(
                f"min_pattern_size: expected at most max_pattern_size {self.max_pattern_size}, got"
                f" {self.min_pattern_size}"
            )
        return self


class SamplingParameters(SpecModel):
    """How one completion is sampled; the field names, ranges and meanings are those of vLLM's `SamplingParams`.

    `tests/vllm_contract/test_sampling_params.py` holds them against the installed vLLM, and says which are left out.
    """

    temperature: float = Field(default=0.0, ge=0.0, le=2.0, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="nucleus sampling")
    top_k: int = Field(default=0, ge=-1, description="only so many of the likeliest tokens; 0 or -1: all")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0, description="least probability, as a share of the likeliest's")
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="makes sampling with temperature repeatable")
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0, description="on tokens the completion has")
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0, description="by how often the completion has them")
    repetition_penalty: float = Field(default=1.0, gt=0.0, description="on tokens of prompt and completion; 1: none")
    max_tokens: int = Field(default=256, ge=1, description="most tokens of one completion")
    min_tokens: int = Field(default=0, ge=0, description="no end before so many tokens")
    stop: Texts = Field(default=(), description="texts that end a completion")
    stop_token_ids: tuple[int, ...] = Field(default=(), description="token ids that end a completion")
    include_stop_str_in_output: bool = Field(default=False, description="the text that ended it stays")
    ignore_eos: bool = Field(default=False, description="go on to max_tokens")
    skip_special_tokens: bool = Field(default=True, description="special tokens are not in the text")
    spaces_between_special_tokens: bool = Field(default=True, description="in the text, where they are kept")
    bad_words: Texts = Field(default=(), description="words that are not generated")
    allowed_token_ids: tuple[int, ...] | None = Field(default=None, description="only these tokens are generated")
    logit_bias: dict[int, float] | None = Field(default=None, description="added to logits, by token id")
    structured_outputs: StructuredOutputs | None = Field(default=None, description="what a completion must look like")
    thinking_token_budget: int | None = Field(default=None, ge=0, description="most tokens of reasoning")
    repetition_detection: RepetitionDetection | None = Field(
        default=None, description="ends completions that go round in circles"
    )

    @field_validator("top_k")
    @classmethod
    def _all_tokens_have_one_name(cls, value: int) -> int:
        return max(value, 0)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _pairs_of_a_map_column(cls, value: object) -> object:
        return dict(value) if isinstance(value, list) and all(isinstance(one, tuple) for one in value) else value

    @model_validator(mode="after")
    def _values_go_together(self) -> SamplingParameters:
        for name in ("stop", "bad_words"):
            if "" in getattr(self, name):
                raise ValueError(f"{name}: expected non-empty texts, got ''")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens: expected at most max_tokens {self.max_tokens}, got {self.min_tokens}")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids: expected at least one token, got none")
        return self

    @property
    def deterministic(self) -> bool:
        """Whether equal prompts get equal completions, so that one computation serves them all."""
        return self.temperature == 0.0 or self.seed is not None

    @property
    def parameters(self) -> SamplingParameters:
        """The sampling fields alone, without what a subclass adds."""
        return SamplingParameters(**self._sampling_fields())

    @property
    def values(self) -> dict[str, Any]:
        """What decides an answer, as JSON values: fields that were added later stand there only where they are set."""
        oldest = self.model_dump(mode="json", include=_OLDEST_FIELDS)
        ours = set(SamplingParameters.model_fields)
        return oldest | self.model_dump(mode="json", include=ours, exclude_defaults=True)

    def with_override(self, fields: Mapping[str, Any]) -> RowOverride:
        """These parameters as a row overrides them.

        Args:
            fields: sampling fields, and perhaps `expected_output_tokens`.

        Raises:
            pydantic.ValidationError: an unknown field, or a value of a wrong type or out of its range.
        """
        return RowOverride.model_validate({**self._sampling_fields(), **fields})

    def within(self, tokens: int) -> SamplingParameters:
        """These parameters where a completion has room for so many tokens only."""
        if self.max_tokens <= tokens:
            return self
        return self.model_copy(update={"max_tokens": tokens, "min_tokens": min(self.min_tokens, tokens)})

    def unknown_tokens(self, vocabulary: int) -> str | None:
        """What is wrong with the token ids in these parameters where a model has so many; None: nothing."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            unknown = [token for token in getattr(self, name) or () if not 0 <= token < vocabulary]
            if unknown:
                return f"{name}: expected token ids from 0 to {vocabulary - 1:,}, got {unknown[0]}"
        return None

    def to_json(self) -> str:
        """The sampling fields as JSON text, as the column `sampling` of staged rows and bundles holds them."""
        return orjson.dumps(self.values).decode()

    def of_request(self, text: str | None, max_tokens: int) -> SamplingParameters:
        """The parameters of a request, where these are the job's.

        Args:
            text: what `to_json` gave for the request; None: the request is sampled as the job says.
            max_tokens: most tokens of the completion, whatever the text says.
        """
        if text is None:
            fields = self.values
        else:
            # Younger fields that the text does not have are at their defaults, whatever the job says.
            fields = self.model_dump(mode="json", include=_OLDEST_FIELDS) | orjson.loads(text)
        least = min(fields.get("min_tokens", 0), max_tokens)
        return SamplingParameters.model_validate({**fields, "min_tokens": least, "max_tokens": max_tokens})

    def _sampling_fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SamplingParameters.model_fields}


class RowOverride(SamplingParameters):
    """What the override column of one row may say: sampling fields, and how long the completion will be."""

    expected_output_tokens: int | None = Field(
        default=None, ge=1, description="for the plan only; above max_tokens it counts as max_tokens"
    )


class SamplingSpec(SamplingParameters):
    """Sampling of the whole job, with a column of exceptions."""

    defaults: Literal["batchllm", "model"] = Field(
        default="batchllm",
        description="of what is not set: as said here (greedy), or first as the model's `generation_config.json` says",
    )
    override_column: str | None = Field(
        default=None,
        description="column with sampling fields of single rows, and `expected_output_tokens` for the plan (struct or "
        "JSON object text; null: none)",
    )
