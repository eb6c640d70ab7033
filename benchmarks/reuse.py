"""What it takes to find the answers of earlier runs: seconds of a lookup, and what it reads of the store.

    python benchmarks/reuse.py [--answers 1000000] [--segments 10] [--rows 10000] [--json]

Answers of 60 tokens (text of 240 characters) are kept on a local S3 server, that of the tests, in as many segments as
nights; then as many keys are looked up, of which none, a tenth, or nine tenths have an answer. Those that have stand
together, as the rows of an input file do, or (`scattered`) anywhere. Seconds are medians of three lookups, each by a
new store.

The floor: a filter of 10 bits a key is read whole, 1.25 MB for a million answers, and the keys of segments that may
have any, 24 bytes each before compression; the rest is the answers themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batchllm_flows.demo.s3_server import serve_s3
from batchllm_operators.answers import AnswerStore
from batchllm_operators.columns.arrays import UInt64s
from batchllm_operators.store import Store
from batchllm_operators.tasks.generate import GENERATION
from batchllm_operators.work.results import result_schema

TOKENS = 60
SCHEMA = result_schema(GENERATION)
ROUNDS = 3


def answers(keys: UInt64s, chance: np.random.Generator) -> pa.Table:
    """Answers to these requests."""
    rows = len(keys)
    content = np.ascontiguousarray(keys.astype(">u8")).tobytes()
    key_type = SCHEMA.field("request_key").type
    tokens = pa.array(chance.integers(0, 50_000, rows * TOKENS, dtype=np.int32))
    offsets = pa.array(np.arange(0, (rows + 1) * TOKENS, TOKENS, dtype=np.int32))
    letters = chance.integers(97, 123, rows * 4 * TOKENS, dtype=np.uint8).tobytes().decode()
    texts = [letters[at : at + 4 * TOKENS] for at in range(0, len(letters), 4 * TOKENS)]
    ends = pa.array(["stop"] * rows)
    counts = [pa.array(np.full(rows, count, dtype=np.int32)) for count in (400, 300, TOKENS)]
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(key_type, rows, [None, pa.py_buffer(content)]),
        pa.ListArray.from_arrays(offsets, tokens),
        pa.array(texts),
        ends,
        *counts,
        pa.nulls(rows, SCHEMA.field("error").type),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def lookup(uri: str, keys: UInt64s) -> dict[str, Any]:
    """One lookup by a store that has read nothing before."""
    store = AnswerStore(Store(uri), GENERATION)
    started = time.perf_counter()
    found = sum(len(table) for table in store.find(keys))
    return {"seconds": time.perf_counter() - started, "found": found}


def main() -> None:
    """Builds the store, looks up, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1_000_000, help="kept by earlier runs")
    parser.add_argument("--segments", type=int, default=10, help="runs that kept them")
    parser.add_argument("--rows", type=int, default=10_000, help="requests that are looked up")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    chance = np.random.default_rng(0)
    keys = chance.integers(0, 2**63, (options.answers, 2), dtype=np.uint64)
    new = chance.integers(0, 2**63, (options.rows, 2), dtype=np.uint64)
    with tempfile.TemporaryDirectory() as folder, serve_s3(Path(folder) / "s3") as server:
        (Path(folder) / "s3" / "bucket").mkdir()
        os.environ.update(server.environment())
        uri = "s3://bucket/answers"
        store = AnswerStore(Store(uri), GENERATION)
        started = time.perf_counter()
        for part in np.array_split(keys, options.segments):
            store.add(answers(piece, chance) for piece in np.array_split(part, max(len(part) // 50_000, 1)))
        report: dict[str, Any] = {
            "answers": options.answers,
            "segments": options.segments,
            "bytes": sum(one.size for one in Store(uri).stored_objects()),
            "keep_seconds": time.perf_counter() - started,
            "rows": options.rows,
        }
        for share in (0.0, 0.1, 0.9):
            known = int(options.rows * share)
            asked = np.concatenate((keys[len(keys) // 3 :][:known], new[known:]))
            runs = [lookup(uri, asked) for _ in range(ROUNDS)]
            assert all(run["found"] == known for run in runs)
            report[f"lookup_seconds_{share:.0%}_known"] = statistics.median(run["seconds"] for run in runs)
        scattered = chance.choice(keys, options.rows, replace=False)
        runs = [lookup(uri, scattered) for _ in range(ROUNDS)]
        assert all(run["found"] == options.rows for run in runs)
        report["lookup_seconds_all_known_scattered"] = statistics.median(run["seconds"] for run in runs)
    if options.json:
        sys.stdout.write(json.dumps(report) + "\n")
        return
    for name, value in report.items():
        sys.stdout.write(f"{name}: {value:,.2f}\n" if isinstance(value, float) else f"{name}: {value:,}\n")


if __name__ == "__main__":
    main()
