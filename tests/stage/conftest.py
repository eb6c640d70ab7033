"""Rows to stage, and what staging makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from batchllm_operators.formats import open_source
from batchllm_operators.records import StageSummary
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.planning import FieldOrderChoice
from batchllm_operators.specs.sampling import SamplingSpec
from batchllm_operators.specs.source import PromptSpec, SourceSpec
from batchllm_operators.stage.progress import StageStep
from batchllm_operators.stage.staging import stage_rows
from batchllm_operators.store import Store

PROMPT: TypeAdapter[PromptSpec] = TypeAdapter(PromptSpec)


@dataclass(frozen=True)
class Staged:
    """What staging wrote."""

    summary: StageSummary
    work: Store

    @property
    def rows(self) -> list[dict[str, Any]]:
        tables = []
        for part in self.summary.parts:
            with self.work.parquet(part.name) as file:
                tables.append(file.read())
        return [row for table in tables for row in table.to_pylist()]

    @property
    def errors(self) -> list[tuple[str, str] | None]:
        return [row["error"] and (row["error"]["code"], row["error"]["message"]) for row in self.rows]


Stage = Callable[..., Staged]


@pytest.fixture
def stage(tmp_path: Path, tiny_llama: str) -> Stage:
    """Stages rows: a list of dicts becomes a Parquet file, bytes become a JSONL file, a path is taken as it is."""

    def run(
        rows: list[dict[str, Any]] | bytes | Path,
        prompt: dict[str, Any] | None = None,
        *,
        sampling: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        work: str = "work",
        field_order: FieldOrderChoice = "optimise",
        processes: int = 1,
        progress: Callable[[StageStep, int], None] = lambda _step, _rows: None,
        **source: Any,
    ) -> Staged:
        form = source.pop("format", "jsonl" if isinstance(rows, bytes) else "parquet")
        path = rows if isinstance(rows, Path) else tmp_path / f"input.{form}"
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        elif isinstance(rows, list):
            pq.write_table(pa.Table.from_pylist(rows), path)
        store = Store(str(tmp_path / work))
        summary = stage_rows(
            open_source(SourceSpec(uri=str(path), format=form, **source)),
            PROMPT.validate_python(prompt or {"kind": "column", "column": "text"}),
            SamplingSpec(**(sampling or {})),
            ModelSpec(**{"id": tiny_llama, **(model or {})}),
            store,
            field_order=field_order,
            tokenizer_processes=processes,
            progress=progress,
        )
        return Staged(summary, store)

    return run


def json_lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)
