"""Names of file formats in a job: `source.format` and `sink.format`.

The formats themselves are in `batchllm_operators.formats`, above the parts of a job, which only name them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from batchllm_operators.registry import NamesInSchema, Registry

FORMATS = Registry(
    kind="format",
    group="batchllm_flows.formats",
    contract="batchllm_operators.formats.base:FileFormat",
    built_in={
        "parquet": "batchllm_operators.formats.parquet:PARQUET",
        "jsonl": "batchllm_operators.formats.jsonl:JSONL",
        "csv": "batchllm_operators.formats.delimited:CSV",
        "tsv": "batchllm_operators.formats.delimited:TSV",
        "arrow": "batchllm_operators.formats.arrow:ARROW",
    },
)


def _usable(name: str, side: Literal["reader", "writer"]) -> str:
    if getattr(FORMATS.get(name), side) is None:
        can = {"reader": "read", "writer": "written"}[side]
        raise ValueError(f"format {name!r} cannot be {can}: it has no {side}")
    return name


def _readable(name: str) -> str:
    return _usable(name, "reader")


def _writable(name: str) -> str:
    return _usable(name, "writer")


SourceFormat = Annotated[str, AfterValidator(_readable), NamesInSchema(FORMATS)]
"""Name of a format that can be read."""

SinkFormat = Annotated[str, AfterValidator(_writable), NamesInSchema(FORMATS)]
"""Name of a format that can be written."""
