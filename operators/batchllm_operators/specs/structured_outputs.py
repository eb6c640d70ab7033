"""What a completion must look like: the engine generates nothing else."""

from __future__ import annotations

from typing import Any

import orjson
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from pydantic import Field, field_validator, model_validator

from batchllm_operators.spec_base import SpecModel, Texts

MOST_LETTERS = 1 << 20
"""Of a schema, expression or grammar: it stands in every request that has one of its own."""
KINDS = ("json_schema", "json_object", "regex", "choice", "grammar", "structural_tag")
_NAMES_OF_VLLM = {"json_schema": "json"}


class StructuredOutputs(SpecModel):
    """One kind of constraint; the names are vLLM's, but for `json_schema`, which is `json` there.

    vLLM (0.32) reads options such as `disable_any_whitespace` of the engine alone, so that they stand in
    `model.engine_args.structured_outputs_config`. A completion that ends at `max_tokens` may be cut in its midst:
    `finish_reason` is `length` then.
    """

    json_schema: dict[str, Any] | None = Field(default=None, description="a JSON schema, as an object or as JSON text")
    json_object: bool | None = Field(default=None, description="true: any JSON object")
    regex: str | None = Field(default=None, min_length=1, description="a regular expression for the whole completion")
    choice: Texts | None = Field(default=None, min_length=1, description="one of these texts")
    grammar: str | None = Field(default=None, min_length=1, description="a grammar in EBNF")
    structural_tag: str | None = Field(default=None, min_length=1, description="xgrammar's structural tag, JSON text")

    @field_validator("json_schema", mode="before")
    @classmethod
    def _schema_of_json_text(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"expected a JSON schema, as an object or as JSON text: {error}") from error

    @field_validator("json_schema")
    @classmethod
    def _is_a_schema(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        try:
            Draft202012Validator.check_schema(value)
        except SchemaError as error:
            place = "/".join(map(str, error.absolute_path))
            raise ValueError(f"no JSON schema: {place or 'it'}: {error.message}") from error
        return value

    @field_validator("choice")
    @classmethod
    def _choices_are_texts(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and "" in value:
            raise ValueError("expected non-empty texts, got ''")
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> StructuredOutputs:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of {', '.join(KINDS)}, got {' and '.join(given) or 'none'}")
        if self.json_object is False:
            raise ValueError("json_object: expected true, or another kind, got false")
        letters = len(orjson.dumps(self.model_dump(mode="json")))
        if letters > MOST_LETTERS:
            raise ValueError(f"{given[0]}: expected at most {MOST_LETTERS:,} bytes, got {letters:,}")
        return self

    def to_vllm(self) -> dict[str, Any]:
        """The fields as vLLM's `StructuredOutputsParams` takes them."""
        fields = self.model_dump(mode="json", exclude_defaults=True)
        return {_NAMES_OF_VLLM.get(name, name): value for name, value in fields.items()}
