"""The plan as objects: one Parquet file per bundle, and the summary last."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from batchllm_operators.plan.columnar_plan import Plan
from batchllm_operators.plan.disk_array import TokenSpool
from batchllm_operators.plan.requests import RequestColumns
from batchllm_operators.records import BUNDLE_SCHEMA, KEY_TYPE, PLAN_FOLDER, PLAN_SUMMARY, PlanSummary
from batchllm_operators.store import Store, parquet_writer

ROW_GROUP_TOKENS = 1_000_000
WRITERS = 8
"""Objects written at a time: a write mostly waits for the disk or the network."""


def delete_plan(work: Store) -> None:
    """Delete an earlier plan, its summary first: without it there is no plan."""
    names = work.names(PLAN_FOLDER)
    work.delete(sorted(names, key=lambda name: name != PLAN_SUMMARY))


def bundle_name(number: int) -> str:
    """Name of a bundle's object in the work folder."""
    return f"{PLAN_FOLDER}/bundle-{number:05d}.parquet"


def write_bundles(work: Store, plan: Plan, requests: RequestColumns, tokens: TokenSpool) -> list[str]:
    """Write every bundle; a few at a time, each in row groups, so that memory stays small. Returns their digests."""
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="plan-write") as writers:
        written = [
            writers.submit(_write_bundle, work, plan, requests, tokens, number) for number in range(len(plan.worker))
        ]
        return [bundle.result() for bundle in written]


def write_summary(work: Store, summary: PlanSummary) -> None:
    """Write the summary, which makes the plan complete."""
    work.write_bytes(PLAN_SUMMARY, summary.model_dump_json(indent=2).encode())


def _write_bundle(work: Store, plan: Plan, requests: RequestColumns, tokens: TokenSpool, number: int) -> str:
    low, high = int(plan.offsets[number]), int(plan.offsets[number + 1])
    lengths = requests.prompt_tokens[plan.request[low:high]].astype(np.int64)
    row_group = (np.cumsum(lengths) - lengths) // ROW_GROUP_TOKENS
    starts = low + np.flatnonzero(np.diff(row_group, prepend=-1))
    with work.writer(bundle_name(number)) as file:
        with parquet_writer(
            file,
            BUNDLE_SCHEMA,
            use_dictionary=["sampling"],
            # Token ids are small numbers: their high bytes are all alike.
            column_encoding={"prompt_token_ids.list.element": "BYTE_STREAM_SPLIT"},
        ) as parquet:
            for begin, end in zip(starts, [*starts[1:], high], strict=True):
                rows = slice(int(begin), int(end))
                parquet.write_table(_table(plan, requests, tokens, rows), row_group_size=rows.stop - rows.start)
        return file.digest()


def _table(plan: Plan, requests: RequestColumns, tokens: TokenSpool, rows: slice) -> pa.Table:
    request = plan.request[rows]
    prompts, offsets = tokens.gather(requests.token_starts[request], requests.prompt_tokens[request])
    keys = np.ascontiguousarray(requests.keys[request].astype(">u8"))
    sampling = pa.DictionaryArray.from_arrays(
        requests.sampling[request], pa.array(requests.sampling_texts, pa.string())
    )
    columns = {
        "request_key": pa.Array.from_buffers(KEY_TYPE, len(keys), [None, pa.py_buffer(keys)]),
        "prompt_token_ids": pa.ListArray.from_arrays(offsets, prompts),
        "max_tokens": requests.max_tokens[request],
        "sampling": sampling.cast(pa.string()),
        "group_id": plan.group[rows],
        "prefix_tokens": plan.prefix_tokens[rows],
        "expected_output_tokens": plan.output_tokens[rows],
    }
    return pa.table(columns, schema=BUNDLE_SCHEMA)
