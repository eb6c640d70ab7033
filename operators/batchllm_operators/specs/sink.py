"""The sink part of a job."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from batchllm_operators.format_names import SinkFormat
from batchllm_operators.records import OutputLayout
from batchllm_operators.spec_base import SpecModel, StorageOptions


class SinkSpec(SpecModel):
    """Where the answers go."""

    uri: str = Field(min_length=1, description="folder of the output, e.g. s3://bucket/out/; or a local path")
    format: SinkFormat = "parquet"
    rows_per_file: int = Field(default=100_000, ge=1, description="rows of one output file")
    mode: Literal["error", "overwrite"] = Field(
        default="error", description="what to do when the folder holds another job's output"
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
        return OutputLayout(format=self.format, rows_per_file=self.rows_per_file, prefix=self.prefix)
