"""Input rows: finds the objects of a source and streams their rows in input order with bounded memory.

Staging reads the rows as Python records to render prompts; merge reads them again, as Arrow tables of one schema for a
Parquet sink, and as JSON texts for a JSON Lines sink.
"""

from __future__ import annotations

from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.stage.jsonl_source import JsonlSource
from batchllm_operators.stage.parquet_source import ParquetSource
from batchllm_operators.stage.source import BATCH_ROWS, ROW_JSON, RowBatch, Source
from batchllm_operators.stage.source_objects import source_objects

__all__ = ["BATCH_ROWS", "ROW_JSON", "RowBatch", "Source", "open_source"]


def open_source(spec: SourceSpec) -> Source:
    """Find the objects of a source and look at their columns.

    Raises:
        TerminalError: no object matches, no access, an unreadable Parquet object, objects whose schemas disagree, or
            that are of another format.
    """
    kind = ParquetSource if spec.format == "parquet" else JsonlSource
    return kind(spec, source_objects(spec))
