"""Staging of batches in this process, or in several, with the same result."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TypeVar

import pyarrow as pa

from batchllm_operators.errors import TransientError
from batchllm_operators.formats import RowBatch
from batchllm_operators.stage.row_stager import RowStager, StagerSettings
from batchllm_operators.stage.without_torch import leave_out_torch

Result = TypeVar("Result")

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
    pool = _TokenizerPool(settings, processes)
    pending: deque[Future[pa.Table]] = deque()
    try:
        pool.wait_until_loaded()  # what is wrong with the model is said before any row is read
        for batch in batches:
            pending.append(pool.submit(batch))
            if len(pending) >= processes * _BATCHES_IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.close()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class _TokenizerPool:
    """Processes that stage batches, and a thread for each that waits for it.

    `ProcessPoolExecutor` would wait for ever where a process dies halfway through an answer: all its processes write to
    one pipe, whose other end cannot tell. Here each has a pipe of its own, which ends with it.
    """

    def __init__(self, settings: StagerSettings, processes: int) -> None:
        threads = max(available_cores() // processes, 1)
        self._processes = [_TokenizerProcess(settings, threads) for _ in range(processes)]
        self._idle: SimpleQueue[_TokenizerProcess] = SimpleQueue()
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="tokenizer")

    def wait_until_loaded(self) -> None:
        """Wait for the tokenizers of all processes."""
        for process in self._processes:
            process.receive()
            self._idle.put(process)

    def submit(self, batch: RowBatch) -> Future[pa.Table]:
        """Stage a batch in the next process that is idle."""
        return self._threads.submit(self._stage, batch)

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _stage(self, batch: RowBatch) -> pa.Table:
        process = self._idle.get()  # there are as many processes as threads
        try:
            process.send(batch)
            return process.receive()
        finally:
            self._idle.put(process)


class _TokenizerProcess:
    """A process that sends None or an error once it has loaded its tokenizer, and then a table or an error a batch."""

    def __init__(self, settings: StagerSettings, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other_end, settings.model_dump_json(), threads), daemon=True
        )
        self._process.start()
        other_end.close()

    def send(self, batch: RowBatch) -> None:
        try:
            self._connection.send(batch)
        except OSError as error:
            raise self._died() from error

    def receive(self) -> pa.Table | None:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _died(self) -> TransientError:
        return TransientError("a tokenizer process died (killed, or out of memory)")


def _serve(connection: Connection, settings: str, threads: int) -> None:
    """Stage batches until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    # The tokenizer's own threads, one a core, would be too many beside other processes like this one.
    os.environ["TOKENIZERS_PARALLELISM"] = str(threads > 1).lower()
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    of_job = StagerSettings.model_validate_json(settings)
    leave_out_torch(of_job.model)
    stager = _result_or_error(lambda: RowStager(of_job))
    with suppress(EOFError, ConnectionError):
        if isinstance(stager, Exception):
            connection.send(stager)
            return
        connection.send(None)
        while True:
            connection.send(_result_or_error(partial(stager.stage, connection.recv())))


def _result_or_error(work: Callable[[], Result]) -> Result | Exception:
    try:
        return work()
    except Exception as error:
        error.add_note(traceback.format_exc())
        return error
