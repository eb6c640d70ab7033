"""Staged work folders made of given prompts, and what a plan in one of them says."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from batchllm_operators.keys import RequestKeys
from batchllm_operators.records import PlanSummary, StagedPart, StageSummary
from batchllm_operators.store import Store
from batchllm_operators.work.staged import STAGED_SCHEMA
from tests.generation import RESULT_SCHEMA

KEYS = RequestKeys("test-model", None)


def key_of(prompt: Sequence[int], max_tokens: int = 16) -> bytes:
    return KEYS.key(np.array(prompt, dtype=np.int32), {"max_tokens": max_tokens}, row_index=None)


def stage_prompts(
    work: Store,
    prompts: Sequence[Sequence[int] | None],
    *,
    max_tokens: Sequence[int] | int = 16,
    sampling: Sequence[str | None] | None = None,
    estimates: Sequence[int | None] | None = None,
    rows_per_part: int = 1000,
) -> StageSummary:
    """Write `staged/` as the stage step does; a prompt of None is a row with an error."""
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    rows: list[dict[str, Any]] = []
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        failed = prompt is None
        rows.append(
            {
                "row_index": index,
                "row_id": str(index),
                "request_key": None if failed else key_of(prompt, limit),
                "prompt_token_ids": None if failed else list(prompt),
                "max_tokens": None if failed else limit,
                "sampling": None if failed or sampling is None else sampling[index],
                "error": {"code": "invalid_row", "message": "no text"} if failed else None,
                "expected_output_tokens": None if estimates is None else estimates[index],
            }
        )
    schema = STAGED_SCHEMA
    if estimates is not None and "expected_output_tokens" not in schema.names:
        schema = schema.append(pa.field("expected_output_tokens", pa.int32()))
    parts = []
    for first in range(0, len(rows), rows_per_part):
        name = f"staged/part-{len(parts):05d}.parquet"
        part = [{field: row[field] for field in schema.names} for row in rows[first : first + rows_per_part]]
        work.write_table(name, pa.Table.from_pylist(part, schema=schema))
        parts.append(StagedPart(name=name, first_row=first, rows=len(part)))
    made = [prompt for prompt in prompts if prompt is not None]
    return StageSummary(
        parts=tuple(parts),
        rows=len(rows),
        error_rows={"invalid_row": len(rows) - len(made)} if len(made) < len(rows) else {},
        prompt_tokens=sum(len(prompt) for prompt in made),
        requests=len(made),
        source_schema="",
        seconds=0.0,
    )


def write_results(
    work: Store,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 16,
    completion_tokens: Sequence[int] | int = 4,
    cached_tokens: int = 0,
    failed: bool = False,
    name: str = "results/part-0.parquet",
) -> None:
    """Write a result part that answers some prompts."""
    lengths = [completion_tokens] * len(prompts) if isinstance(completion_tokens, int) else list(completion_tokens)
    rows = [
        {
            "request_key": key_of(prompt, max_tokens),
            "output_token_ids": None if failed else [1] * length,
            "completion": None if failed else "x",
            "finish_reason": None if failed else "stop",
            "prompt_tokens": None if failed else len(prompt),
            "cached_tokens": None if failed else cached_tokens,
            "completion_tokens": None if failed else length,
            "error": {"code": "engine_error", "message": "lost"} if failed else None,
        }
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    work.write_table(name, pa.Table.from_pylist(rows, schema=RESULT_SCHEMA))


def planned_rows(work: Store, plan: PlanSummary) -> list[dict[str, Any]]:
    """The requests of all bundles, in the order of dispatch."""
    rows: list[dict[str, Any]] = []
    for bundle in plan.bundles:
        with work.parquet(bundle.name) as file:
            rows += file.read().to_pylist()
    return rows


def planned_prompts(work: Store, plan: PlanSummary) -> list[list[int]]:
    return [row["prompt_token_ids"] for row in planned_rows(work, plan)]


def ideal_computed_tokens(prompts: Sequence[Sequence[int]], block_size: int) -> int:
    """Prompt tokens that an ideal cache computes when it is fed in this order."""
    cached: set[tuple[int, ...]] = set()
    computed = 0
    for prompt in prompts:
        hit = 0
        while (hit + 1) * block_size < len(prompt) and tuple(prompt[: (hit + 1) * block_size]) in cached:
            hit += 1
        computed += len(prompt) - hit * block_size
        cached |= {tuple(prompt[: size * block_size]) for size in range(1, len(prompt) // block_size + 1)}
    return computed
