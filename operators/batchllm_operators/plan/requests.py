"""The requests of a job as columns: distinct ones of `staged/`, and those that results answer already."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from batchllm_operators.batch_sizes import ROWS_AT_A_TIME
from batchllm_operators.columns.arrays import Int32s, Int64s, UInt64s
from batchllm_operators.columns.request_keys import distinct_keys, key_words
from batchllm_operators.plan.block_hashes import BlockHashes, hash_blocks
from batchllm_operators.plan.disk_array import DiskArray, TokenSpool
from batchllm_operators.records import StageSummary
from batchllm_operators.store import Store
from batchllm_operators.tasks.base import Task
from batchllm_operators.work.results import COUNT_COLUMNS, read_result_parts
from batchllm_operators.work.staged import ESTIMATE_FIELD, scan_part

QUEUED_BATCHES = 2

_COLUMNS = ("row_index", "request_key", "prompt_token_ids", "max_tokens", "sampling")


@dataclass(frozen=True, slots=True)
class RequestColumns:
    """The distinct requests of a job, N of them, in the order of their first rows.

    Attributes:
        request_of_row: int32 [rows], the request that each row makes, duplicates included, in row order.
        row_tokens: prompt tokens of those rows.
        keys: uint64 [N, 2], request keys as big-endian words.
        first_row: int64 [N], index of the first row that makes each request.
        prompt_tokens: int32 [N].
        max_tokens: int32 [N].
        estimate: int32 [N], the row's own estimate of its output tokens; -1 where it gives none.
        sampling: int32 [N] into `sampling_texts`.
        sampling_texts: distinct sampling overrides.
        token_starts: int64 [N], where each prompt stands in the token spool.
        hashes: block hashes of the prompts.
    """

    request_of_row: Int32s
    row_tokens: int
    keys: UInt64s
    first_row: Int64s
    prompt_tokens: Int32s
    max_tokens: Int32s
    estimate: Int32s
    sampling: Int32s
    sampling_texts: Sequence[str | None]
    token_starts: Int64s
    hashes: BlockHashes


@dataclass(frozen=True, slots=True)
class ResultColumns:
    """The requests that readable results answer, each once; results with an error do not count.

    Attributes:
        keys: uint64 [M, 2].
        computed_tokens: int64 [M], prompt tokens that the engine computed for it.
        completion_tokens: int32 [M].
    """

    keys: UInt64s
    computed_tokens: Int64s
    completion_tokens: Int32s


class HashSpool:
    """Block hashes of all rows: in memory, or on the local disk from a given size on.

    Args:
        disk: takes the hashes that do not fit.
        memory_bytes: most bytes in memory.
    """

    def __init__(self, disk: DiskArray, memory_bytes: int) -> None:
        self._disk = disk
        self._memory_bytes = memory_bytes
        self._lanes = [np.zeros((0, 2), dtype=np.uint64)]
        self._bytes = 0
        self.on_disk = False

    def append(self, lanes: UInt64s) -> None:
        """Add hashes, uint64 [n, 2]."""
        self._lanes.append(lanes)
        self._bytes += lanes.nbytes
        if self.on_disk or self._bytes > self._memory_bytes:
            self.on_disk = True
            for piece in self._lanes:
                self._disk.append(piece.reshape(-1))
            self._lanes.clear()

    def hashes(self, prompt_tokens: Int32s, block_size: int) -> BlockHashes:
        """The hashes of all rows; nothing may be added after.

        Args:
            prompt_tokens: int32 [rows].
            block_size: tokens of a block.
        """
        blocks, rest = np.divmod(prompt_tokens, np.int32(block_size))
        if self.on_disk:
            return BlockHashes(starts_of(blocks), blocks, rest == 0, self._disk.values().reshape(-1, 2), self._disk)
        lanes = np.concatenate(self._lanes)
        self._lanes.clear()
        return BlockHashes(starts_of(blocks), blocks, rest == 0, lanes)


def read_requests(
    work: Store, stage: StageSummary, *, block_size: int, tokens: TokenSpool, hashes: HashSpool
) -> RequestColumns:
    """Read the staged parts one batch at a time; tokens and block hashes go to spools, counts stay.

    Raises:
        TerminalError: a part is missing or damaged (its name).
    """
    reading = _Reading(block_size, tokens, hashes)
    with ThreadPoolExecutor(1, thread_name_prefix="plan-hash") as hashing:
        queued: list[Future[None]] = []
        for part in stage.parts:
            for batch in scan_part(work, part, [*_COLUMNS, ESTIMATE_FIELD.name], ROWS_AT_A_TIME):
                queued.append(hashing.submit(reading.absorb, batch))
                if len(queued) > QUEUED_BATCHES:
                    queued.pop(0).result()
        for future in queued:
            future.result()
    return reading.columns()


def read_results(works: Sequence[Store], task: Task, *, only_looks: bool = False) -> ResultColumns:
    """Read what is answered in some work folders of jobs of one task, see `read_result_parts`."""
    keys = [np.zeros((0, 2), dtype=np.uint64)]
    computed = [np.zeros(0, dtype=np.int64)]
    completion = [np.zeros(0, dtype=np.int32)]
    tables = (table for work in works for table in read_result_parts(work, task, COUNT_COLUMNS, only_looks=only_looks))
    for table in tables:
        answered = table.filter(table["error"].is_null())
        for batch in answered.to_batches():
            keys.append(key_words(batch.column("request_key")))
            prompt, cached = _integers(batch.column("prompt_tokens")), _integers(batch.column("cached_tokens"))
            computed.append((prompt - cached).astype(np.int64))
            completion.append(_integers(batch.column("completion_tokens")))
    all_keys = np.concatenate(keys)
    first, _ = distinct_keys(all_keys)
    return ResultColumns(all_keys[first], np.concatenate(computed)[first], np.concatenate(completion)[first])


class _Reading:
    """Collects batches of staged rows."""

    def __init__(self, block_size: int, tokens: TokenSpool, hashes: HashSpool) -> None:
        self._block_size = block_size
        self._tokens = tokens
        self._hashes = hashes
        self._keys = [np.zeros((0, 2), dtype=np.uint64)]
        self._first_row = [np.zeros(0, dtype=np.int64)]
        self._columns: dict[str, list[Int32s]] = {
            name: [np.zeros(0, dtype=np.int32)] for name in ("prompt_tokens", "max_tokens", "estimate", "sampling")
        }
        self._sampling_codes: dict[str | None, int] = {None: 0}

    def absorb(self, batch: pa.RecordBatch) -> None:
        if batch.column("request_key").null_count:
            batch = batch.filter(batch.column("request_key").is_valid())
        prompts = batch.column("prompt_token_ids")
        tokens = prompts.flatten().to_numpy(zero_copy_only=False)
        offsets = prompts.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
        offsets -= offsets[0]
        self._tokens.append(tokens)
        self._hashes.append(hash_blocks(tokens, offsets, self._block_size).lanes)
        self._keys.append(key_words(batch.column("request_key")))
        self._first_row.append(batch.column("row_index").to_numpy(zero_copy_only=False))
        self._columns["prompt_tokens"].append(np.diff(offsets).astype(np.int32))
        self._columns["max_tokens"].append(_integers(batch.column("max_tokens")))
        self._columns["sampling"].append(self._codes(batch.column("sampling")))
        if ESTIMATE_FIELD.name in batch.schema.names:
            estimate = _integers(batch.column(ESTIMATE_FIELD.name), missing=-1)
        else:
            estimate = np.full(len(batch), -1, dtype=np.int32)
        self._columns["estimate"].append(estimate)

    def columns(self) -> RequestColumns:
        keys = np.concatenate(self._keys)
        first, request_of_row = distinct_keys(keys)
        column = {name: np.concatenate(pieces) for name, pieces in self._columns.items()}
        prompt_tokens = column["prompt_tokens"]
        return RequestColumns(
            request_of_row=request_of_row,
            row_tokens=int(prompt_tokens.sum(dtype=np.int64)),
            keys=keys[first],
            first_row=np.concatenate(self._first_row)[first],
            prompt_tokens=prompt_tokens[first],
            max_tokens=column["max_tokens"][first],
            estimate=column["estimate"][first],
            sampling=column["sampling"][first],
            sampling_texts=list(self._sampling_codes),
            token_starts=starts_of(prompt_tokens)[first],
            hashes=self._hashes.hashes(prompt_tokens, self._block_size).of(first),
        )

    def _codes(self, texts: pa.Array) -> Int32s:
        """Sampling overrides as numbers of distinct texts."""
        if texts.null_count == len(texts):
            return np.zeros(len(texts), dtype=np.int32)
        encoded = texts.dictionary_encode()
        codes = [
            self._sampling_codes.setdefault(text, len(self._sampling_codes)) for text in encoded.dictionary.to_pylist()
        ]
        table = np.array([*codes, 0], dtype=np.int32)
        return table[_integers(encoded.indices, missing=len(codes))]


def starts_of(lengths: Int32s) -> Int64s:
    """Where each of some pieces begins that stand one after the other; int64 [N]."""
    return np.cumsum(lengths, dtype=np.int64) - lengths


def _integers(values: pa.Array, missing: int = 0) -> Int32s:
    integers: Int32s = values.fill_null(missing).to_numpy(zero_copy_only=False).astype(np.int32)
    return integers
