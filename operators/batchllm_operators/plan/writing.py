"""The bundles of a plan as objects of the work folder."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from batchllm_operators.plan.columnar_plan import Plan
from batchllm_operators.plan.disk_array import TokenSpool
from batchllm_operators.plan.requests import RequestColumns
from batchllm_operators.store import Store
from batchllm_operators.work.bundles import BUNDLE_SCHEMA, write_bundle
from batchllm_operators.work.columns import KEY_TYPE

ROW_GROUP_TOKENS = 1_000_000
WRITERS = 8
"""Objects written at a time: a write mostly waits for the disk or the network."""


def write_bundles(work: Store, plan: Plan, requests: RequestColumns, tokens: TokenSpool) -> list[str]:
    """Write every bundle; a few at a time, each in row groups, so that memory stays small. Returns their digests."""
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="plan-write") as writers:
        written = [
            writers.submit(write_bundle, work, number, _tables(plan, requests, tokens, number))
            for number in range(len(plan.engine))
        ]
        return [bundle.result() for bundle in written]


def _tables(plan: Plan, requests: RequestColumns, tokens: TokenSpool, number: int) -> Iterator[pa.Table]:
    """The rows of a bundle, in tables of about `ROW_GROUP_TOKENS`."""
    low, high = int(plan.offsets[number]), int(plan.offsets[number + 1])
    lengths = requests.prompt_tokens[plan.request[low:high]].astype(np.int64)
    row_group = (np.cumsum(lengths) - lengths) // ROW_GROUP_TOKENS
    starts = low + np.flatnonzero(np.diff(row_group, prepend=-1))
    for begin, end in zip(starts, [*starts[1:], high], strict=True):
        yield _table(plan, requests, tokens, slice(int(begin), int(end)))


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
