"""The source and prompt parts of a job."""

from __future__ import annotations

from typing import Annotated, Literal

import pyarrow as pa
from pydantic import ConfigDict, Field, field_validator

from batchllm_operators.columns.sql_filter import SqlFilter
from batchllm_operators.columns.type_names import type_named
from batchllm_operators.format_names import SourceFormat
from batchllm_operators.spec_base import SpecModel, StorageOptions

MOST_FIELDS = 63
"""Sets of fields are bits of an int64."""


def _distinct(columns: list[str]) -> list[str]:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise ValueError(f"expected distinct columns, got {', '.join(map(repr, twice))} more than once")
    return columns


class SourceSpec(SpecModel):
    """Where the input rows are."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    uri: str = Field(min_length=1, description="object, prefix or glob, e.g. s3://bucket/in/*.parquet; or a local path")
    format: SourceFormat = Field(description="parquet, or one JSON object a line")
    id_column: str | None = Field(default=None, description="column that names a row in errors; default: row index")
    columns: list[str] | None = Field(
        default=None, description="input columns carried to the sink; default: all; an empty list: none"
    )
    column_types: dict[str, str] = Field(
        default={},
        alias="schema",
        description="column: type, e.g. `{id: int64}`, where objects disagree or JSON values are to have one type",
    )
    filter: str | None = Field(
        default=None,
        description="SQL condition over columns, e.g. `status = 'open' AND created >= '2026-11-01'`: other rows are no"
        " rows of the job; rows that cannot be read stay, as errors",
    )
    partitioning: Literal["none", "hive"] = Field(
        default="none",
        description="`hive`: folders such as `dt=2026-11-01/` in the paths of objects are columns, as text, or as int64"
        " where all are integers; `schema` names another type",
    )
    new_objects_only: bool = Field(
        default=False,
        description="only objects that no complete run of a job of this name has answered yet, in this version; needs "
        "sink.mode `append` or `partition`, whose manifests say what was answered",
    )
    limit: int | None = Field(default=None, ge=1, description="only the first rows, so many; default: all")
    storage: StorageOptions = StorageOptions()

    @field_validator("columns")
    @classmethod
    def _no_column_twice(cls, columns: list[str] | None) -> list[str] | None:
        return columns if columns is None else _distinct(columns)

    @field_validator("column_types")
    @classmethod
    def _only_known_types(cls, types: dict[str, str]) -> dict[str, str]:
        for name, kind in types.items():
            try:
                type_named(kind)
            except ValueError as error:
                raise ValueError(f"column {name!r}: {error}") from error
        return types

    @field_validator("filter")
    @classmethod
    def _filter_is_sql(cls, condition: str | None) -> str | None:
        if condition is not None:
            SqlFilter(condition)
        return condition

    def types(self) -> dict[str, pa.DataType]:
        """The types that the job names for columns."""
        return {name: type_named(kind) for name, kind in self.column_types.items()}


SpecialTokensChoice = Annotated[
    Literal["as_text", "allow"],
    Field(
        description="what looks like a special token (`<|im_end|>`) in the text of a row: `as_text` keeps it text;"
        " `allow` makes it the control token. The job's own templates and texts always keep theirs"
    ),
]


class ChatPrompt(SpecModel):
    """A system and a user message, rendered through the model's chat template."""

    kind: Literal["chat"]
    system: str | None = Field(default=None, description="Jinja template over the row's columns")
    user: str = Field(min_length=1, description="Jinja template over the row's columns")
    special_tokens: SpecialTokensChoice = "as_text"


class TemplatePrompt(SpecModel):
    """A plain text prompt, without a chat template."""

    kind: Literal["template"]
    template: str = Field(min_length=1, description="Jinja template over the row's columns")
    special_tokens: SpecialTokensChoice = "as_text"


class ColumnPrompt(SpecModel):
    """A column that holds the finished prompt text."""

    kind: Literal["column"]
    column: str = Field(min_length=1, description="column of the prompt's text")
    special_tokens: SpecialTokensChoice = "as_text"


class MessagesPrompt(SpecModel):
    """A column of chat messages (list of {role, content}, or the same as JSON text), for multi-turn chats."""

    kind: Literal["messages"]
    column: str = Field(min_length=1, description="column of the messages")
    continue_final_message: bool = Field(
        default=False,
        description="the last message is the assistant's, and the completion goes on where it ends; without this, a"
        " last message of the assistant makes the row an error",
    )
    special_tokens: SpecialTokensChoice = "as_text"


class TokensPrompt(SpecModel):
    """A column of token ids (list of integers), taken as they are."""

    kind: Literal["tokens"]
    column: str = Field(min_length=1, description="column of the token ids")


class FieldsPrompt(SpecModel):
    """A question about columns whose order does not matter to it, asked through the model's chat template.

    The order of the columns may differ from row to row, see `planning.field_order`.
    """

    kind: Literal["fields"]
    system: str | None = Field(default=None, description="system message; a plain text, no template")
    question: str = Field(
        pattern=r"\S", description="what is asked of every row; a plain text that stands before the fields"
    )
    columns: list[str] = Field(
        min_length=2, max_length=MOST_FIELDS, description="columns that stand in the prompt, by name"
    )
    format: Literal["json", "lines"] = Field(
        default="json", description="fields as one JSON object (null: `null`), or as `name: value` lines (null: empty)"
    )
    special_tokens: SpecialTokensChoice = "as_text"

    @field_validator("columns")
    @classmethod
    def _no_column_twice(cls, columns: list[str]) -> list[str]:
        return _distinct(columns)


PromptSpec = Annotated[
    ChatPrompt | TemplatePrompt | ColumnPrompt | MessagesPrompt | TokensPrompt | FieldsPrompt,
    Field(discriminator="kind"),
]
