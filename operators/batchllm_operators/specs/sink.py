"""The sink part of a job."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from batchllm_operators.format_names import SinkFormat
from batchllm_operators.records import OutputLayout
from batchllm_operators.spec_base import SpecModel, StorageOptions

SinkMode = Literal["error", "overwrite", "append", "partition"]


class SinkSpec(SpecModel):
    """Where the answers go."""

    uri: str = Field(min_length=1, description="folder of the output, e.g. s3://bucket/out/; or a local path")
    format: SinkFormat = "parquet"
    rows_per_file: int = Field(default=100_000, ge=1, description="rows of one output file")
    mode: SinkMode = Field(
        default="error",
        description="what to do when the folder holds another job's output: `error`; `overwrite`, it is replaced when "
        "the new one is complete; `append`, the output stands beside those of other runs and replaces only that of an "
        "earlier run of the same night (job name, source.uri and source.filter with their dates); `partition`, the "
        "same in folders by `partition_by`",
    )
    partition_by: list[str] = Field(
        default=[], description="output columns whose values name folders such as `dt=2026-11-01/`, for `partition`"
    )
    carry: Literal["all", "key_only"] | list[str] = Field(
        default="all",
        description="input columns in the output: `all` that source.columns has, `key_only`, source.id_column, or a "
        "list of names",
    )
    prefix: str = Field(
        default="",
        max_length=64,
        description="before the names of the output columns, where input columns have such names, e.g. `llm_`",
    )
    storage: StorageOptions = StorageOptions()

    @property
    def layout(self) -> OutputLayout:
        """How the output is written."""
        return OutputLayout(
            format=self.format,
            rows_per_file=self.rows_per_file,
            prefix=self.prefix,
            carry=self.carry if isinstance(self.carry, str) else tuple(self.carry),
            partition_by=tuple(self.partition_by),
        )

    @property
    def adds(self) -> bool:
        """Whether the output stands beside those of other runs."""
        return self.mode in ("append", "partition")

    @model_validator(mode="after")
    def _partitions_have_columns(self) -> Self:
        if (self.mode == "partition") != bool(self.partition_by):
            raise ValueError(
                f"partition_by: expected columns where mode is `partition`, and none elsewhere, got mode {self.mode!r}"
                f" and {self.partition_by}"
            )
        return self
