"""Rows on their way through stage and merge without an engine: staged by the real step, answered by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from batchllm_operators.formats import open_source
from batchllm_operators.merge.merging import merge_results
from batchllm_operators.records import StageSummary
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.sampling import SamplingSpec
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.specs.source import PromptSpec, SourceSpec
from batchllm_operators.stage.staging import stage_rows
from batchllm_operators.store import Store
from batchllm_operators.work.staged import carried_schema
from tests.generation import RESULT_SCHEMA

PROMPT: TypeAdapter[PromptSpec] = TypeAdapter(PromptSpec)
WITHOUT_COLUMNS = {"kind": "template", "template": "Say yes."}
ANSWER = {
    "completion": "yes", "finish_reason": "stop", "error": None, "prompt_tokens": 1, "cached_tokens": 0,
    "completion_tokens": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Carried:
    """A source that was staged, and merged into a sink of each format."""

    staged: StageSummary
    work: Store
    sinks: dict[str, Store]

    @property
    def errors(self) -> list[str | None]:
        """What is wrong with each row."""
        return [row["error"] and row["error"]["message"] for row in self._staged(["error"])]

    @property
    def tokens(self) -> list[list[int] | None]:
        """The prompt of each row."""
        return [row["prompt_token_ids"] for row in self._staged(["prompt_token_ids"])]

    @property
    def schema(self) -> pa.Schema:
        """Of the carried columns."""
        return carried_schema(self.staged)

    @property
    def table(self) -> pa.Table:
        """The rows of the Parquet sink."""
        sink = self.sinks["parquet"]
        names = [name for name in sink.names() if name.endswith(".parquet")]
        return pa.concat_tables(pq.read_table(pa.BufferReader(sink.read_bytes(name))) for name in names)

    @property
    def lines(self) -> list[bytes]:
        """The lines of the JSON Lines sink."""
        sink = self.sinks["jsonl"]
        names = [name for name in sink.names() if name.endswith(".jsonl")]
        return [line for name in names for line in sink.read_bytes(name).split(b"\n") if line]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the JSON Lines sink."""
        return [orjson.loads(line) for line in self.lines]

    def column(self, name: str) -> list[Any]:
        """A column of the Parquet sink, and of the JSON Lines sink."""
        return [self.table[name].to_pylist(), [row.get(name) for row in self.rows]]

    def _staged(self, columns: list[str]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for part in self.staged.parts:
            with self.work.parquet(part.name) as file:
                rows += file.read(columns).to_pylist()
        return rows


def carried(
    model: str,
    folder: Path,
    source: Path,
    *,
    form: str = "parquet",
    prompt: dict[str, Any] | None = None,
    sinks: tuple[str, ...] = ("parquet", "jsonl"),
    sink: dict[str, Any] | None = None,
    **options: Any,
) -> Carried:
    """Stage a source, answer every request with "yes", and merge into a sink of each format.

    Args:
        model: folder of the model.
        folder: of what is written.
        source: an object or a folder.
        form: its format.
        prompt: the prompt part of the job; default: one without columns.
        sinks: formats of the sinks.
        sink: their other fields.
        options: further fields of the source.
    """
    spec = SourceSpec.model_validate({"uri": str(source), "format": form, **options})
    work, opened = Store(str(folder / "work")), open_source(spec)
    outputs = {
        name: SinkSpec.model_validate({"uri": str(folder / name), "format": name, **(sink or {})}) for name in sinks
    }
    staged = stage_rows(
        opened,
        PROMPT.validate_python(prompt or WITHOUT_COLUMNS),
        SamplingSpec(),
        ModelSpec(id=model),
        work,
        output_prefix=(sink or {}).get("prefix", ""),
    )
    answer(staged, work)
    for output in outputs.values():
        merge_results(
            open_source(spec),
            staged,
            work,
            Store(output.uri),
            output,
            job_id="0123456789abcdef",
            job_name="inputs",
            fingerprint=opened.objects,
            max_error_fraction=1.0,
        )
    return Carried(staged, work, {name: Store(output.uri) for name, output in outputs.items()})


def answer(staged: StageSummary, work: Store) -> None:
    """Write a result for each request."""
    keys: set[bytes] = set()
    for part in staged.parts:
        with work.parquet(part.name) as file:
            keys.update(key for key in file.read(["request_key"])["request_key"].to_pylist() if key is not None)
    if keys:
        rows = [{"request_key": key, "output_token_ids": [1], **ANSWER} for key in sorted(keys)]
        work.write_table("results/part-0.parquet", pa.Table.from_pylist(rows, RESULT_SCHEMA))
