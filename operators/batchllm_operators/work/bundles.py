"""`plan/`: what engines compute, one object per bundle in the order of the engine; bundles first, their summary last.

A plan is never taken up by a later run, which plans anew. So a bundle that is damaged ends the run that reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

import pyarrow as pa

from batchllm_operators.batch_sizes import NUMBERS_AT_A_TIME
from batchllm_operators.errors import DamagedObjectError
from batchllm_operators.parquet_objects import parquet_writer
from batchllm_operators.records import PlanSummary
from batchllm_operators.store import Store
from batchllm_operators.work.columns import KEY_TYPE, TOKENS_TYPE
from batchllm_operators.work.json_objects import write_record
from batchllm_operators.work.layout import PLAN_FOLDER, PLAN_SUMMARY

_BUNDLE = re.compile(rf"{PLAN_FOLDER}/bundle-\d+\.parquet")

# One row per request to compute, in the order the engine takes them.
BUNDLE_SCHEMA = pa.schema(
    [
        pa.field("request_key", KEY_TYPE, nullable=False),
        pa.field("prompt_token_ids", TOKENS_TYPE, nullable=False),
        pa.field("max_tokens", pa.int32(), nullable=False),
        pa.field("sampling", pa.string()),
        pa.field("group_id", pa.int32(), nullable=False),
        pa.field("prefix_tokens", pa.int32(), nullable=False),
        pa.field("expected_output_tokens", pa.int32(), nullable=False),
    ]
)


def bundle_name(number: int) -> str:
    """Name of a bundle's object in the work folder."""
    return f"{PLAN_FOLDER}/bundle-{number:05d}.parquet"


def is_bundle(name: str) -> bool:
    """Whether an object of a work folder has the name of a bundle."""
    return _BUNDLE.fullmatch(name) is not None


def short_name(bundle: str) -> str:
    """The name of a bundle's object without its folder and its suffix."""
    return PurePosixPath(bundle).stem


def delete_plan(work: Store) -> None:
    """Delete an earlier plan, its summary first: without it there is no plan."""
    names = work.names(PLAN_FOLDER)
    work.delete(sorted(names, key=lambda name: name != PLAN_SUMMARY))


def write_bundle(work: Store, number: int, tables: Iterable[pa.Table]) -> str:
    """Write a bundle, each table as one row group; returns the digest of the object.

    Args:
        work: the work folder.
        number: of the bundle.
        tables: of `BUNDLE_SCHEMA`; only one is held at a time.
    """
    with work.writer(bundle_name(number)) as file:
        with parquet_writer(
            file,
            BUNDLE_SCHEMA,
            use_dictionary=["sampling"],
            # Token ids are small numbers: their high bytes are all alike.
            column_encoding={"prompt_token_ids.list.element": "BYTE_STREAM_SPLIT"},
        ) as parquet:
            for table in tables:
                parquet.write_table(table, row_group_size=len(table))
        return file.digest()


def write_summary(work: Store, summary: PlanSummary) -> None:
    """Write the summary, which makes the plan complete."""
    write_record(work, PLAN_SUMMARY, summary)


def check_bundle(work: Store, bundle: str, digest: str) -> None:
    """Look whether a bundle is what the planner wrote: checksums of pages leave out what stands between the pages.

    Raises:
        DamagedObjectError: it has another digest.
    """
    # A connection that breaks off can look like damage: only what looks so twice is.
    if digest and work.digest(bundle) != digest and (found := work.digest(bundle)) != digest:
        raise DamagedObjectError(
            f"damaged bundle: expected digest {digest}, found {found}; run again: the plan is made anew",
            uri=work.uri_of(bundle),
        )


def scan_bundle(work: Store, bundle: str, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """The rows of a bundle in their order, all columns, in batches of at most `batch_rows`.

    Raises:
        TerminalError: no such bundle, or not readable as Parquet.
    """
    return work.scan_parquet(bundle, BUNDLE_SCHEMA.names, batch_rows)


def bundle_keys(work: Store, bundle: str) -> list[bytes]:
    """The request keys of a bundle, in their order; errors as `scan_bundle`."""
    batches = work.scan_parquet(bundle, ["request_key"], NUMBERS_AT_A_TIME)
    return [key for batch in batches for key in batch.column(0).to_pylist()]
