"""Workloads as staged jobs, for benchmarks that plan without rows and a tokenizer."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pyarrow as pa

from batchllm_operators.records import StageSummary
from batchllm_operators.store import Store
from batchllm_operators.work.columns import ERROR_TYPE, KEY_TYPE
from batchllm_operators.work.staged import STAGED_SCHEMA, write_part, write_summary
from benchmarks.workloads import Workload

PART_ROWS = 50_000


def stage(work: Store, workload: Workload, *, key_by_row: bool = False) -> StageSummary:
    """Write a workload as `staged/`.

    `key_by_row`: a row's number is its request key, so that equal prompts stay apart; else they are one request.
    """
    parts = []
    rows = len(workload)
    for low in range(0, rows, PART_ROWS):
        high = min(low + PART_ROWS, rows)
        tokens, offsets = workload.prompts(low, high)
        if key_by_row:
            keys = [row.to_bytes(16, "big") for row in range(low, high)]
        else:
            keys = [
                hashlib.blake2b(tokens[begin:end].data, digest_size=16).digest() for begin, end in pairwise(offsets)
            ]
        table = pa.table(
            {
                "row_index": np.arange(low, high),
                "row_id": [str(row) for row in range(low, high)],
                "request_key": pa.array(keys, KEY_TYPE),
                "prompt_token_ids": pa.ListArray.from_arrays(offsets.astype(np.int32), tokens),
                "max_tokens": workload.max_tokens[low:high],
                "sampling": pa.nulls(high - low, pa.string()),
                "error": pa.nulls(high - low, ERROR_TYPE),
            },
            schema=STAGED_SCHEMA,
        )
        parts.append(write_part(work, len(parts), table, low))
    summary = StageSummary(
        parts=tuple(parts),
        rows=rows,
        error_rows={},
        prompt_tokens=int(workload.prompt_tokens.sum(dtype=np.int64)),
        requests=rows,
        source_schema="",
        seconds=0.0,
    )
    write_summary(work, summary)
    return summary
