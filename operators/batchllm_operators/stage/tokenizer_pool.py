"""Staging of batches in this process, or in several, with the same result."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache

import pyarrow as pa

from batchllm_operators.errors import TransientError
from batchllm_operators.stage.readers import RowBatch
from batchllm_operators.stage.row_stager import RowStager, StagerSettings

_BATCHES_IN_FLIGHT = 2  # per process: one at work, one waiting


def staged_tables(batches: Iterator[RowBatch], settings: StagerSettings, processes: int) -> Iterator[pa.Table]:
    """The staged rows of each batch, in the order of the batches.

    Args:
        batches: read lazily; a few a process are in memory at a time.
        settings: of the job.
        processes: 1 works in this process, with a tokenizer thread a core; more are spawned, each with a tokenizer of
            its own and its share of the cores.

    Raises:
        TerminalError: the model cannot be loaded.
        TransientError: a process died.
    """
    if processes == 1:
        yield from map(RowStager(settings).stage, batches)
        return
    pool = ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),
        initializer=_limit_threads,
        initargs=(max(available_cores() // processes, 1),),
    )
    pending: deque[Future[pa.Table]] = deque()
    content = settings.model_dump_json()
    try:
        for loaded in [pool.submit(_load, content) for _ in range(processes)]:
            loaded.result()  # what is wrong with the model is said before any row is read
        for batch in batches:
            pending.append(pool.submit(_stage, content, batch))
            if len(pending) >= processes * _BATCHES_IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise TransientError("a tokenizer process died (killed, or out of memory)") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _limit_threads(threads: int) -> None:
    """The tokenizer's own threads, one a core, would be too many beside other processes like this one."""
    os.environ["TOKENIZERS_PARALLELISM"] = str(threads > 1).lower()
    os.environ["RAYON_NUM_THREADS"] = str(threads)


def _load(settings: str) -> None:
    _stager(settings)


def _stage(settings: str, batch: RowBatch) -> pa.Table:
    return _stager(settings).stage(batch)


@lru_cache(maxsize=1)
def _stager(settings: str) -> RowStager:
    """Loaded once in a process."""
    return RowStager(StagerSettings.model_validate_json(settings))
