"""The engines of one flow run: leased to task threads, started when first needed, replaced when dead."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from batchllm_operators.errors import BatchLLMError, TerminalError
from batchllm_operators.execute.devices import DeviceShare, device_shares, gpus_of_machine
from batchllm_operators.execute.handle import EngineHandle, LocalEngineHandle, ProgressCallback
from batchllm_operators.execute.messages import BundleDone, Load, Run
from batchllm_operators.execute.spec import ExecutionSpec, ModelSpec
from batchllm_operators.records import BundleInfo, BundleResult
from batchllm_operators.stage.spec import SamplingParameters
from batchllm_operators.store import Store


@dataclass(frozen=True, slots=True)
class Lease:
    """An engine with its model loaded, for one thread."""

    handle: EngineHandle
    load_seconds: float
    """Seconds the lease waited for the model to load; 0 on a warm engine."""


class EnginePool:
    """As many engines as the execution part asks for; a context manager that ends them all.

    `close` may be called from any thread, and makes waiting threads raise `TerminalError` at once: tasks blocked in a
    thread cannot be interrupted in another way.

    Args:
        model: what the engines load.
        execution: how many, on what, and their deadlines.
        block_size: tokens of a KV-cache block.
        sampling: the job's sampling parameters.
        work: the work folder.
        make_handle: makes the handle of the engine with this index; default: a process on this machine.
    """

    def __init__(
        self,
        *,
        model: ModelSpec,
        execution: ExecutionSpec,
        block_size: int,
        sampling: SamplingParameters,
        work: Store,
        make_handle: Callable[[int], EngineHandle] | None = None,
    ) -> None:
        self._load = Load(model=model, block_size=block_size, gpus=execution.gpus_per_engine)
        self._execution = execution
        self._sampling = SamplingParameters(**sampling.model_dump(include=set(SamplingParameters.model_fields)))
        self._work = work
        self._logs = tempfile.TemporaryDirectory(prefix="batchllm-engines-")
        self._make_handle = make_handle or self._local_handles()
        self._handles: list[EngineHandle | None] = [None] * execution.engines
        self._free = list(range(execution.engines))
        self._changed = threading.Condition()
        self._closed = False
        self._load_failure: TerminalError | None = None
        self._written: defaultdict[str, list[str]] = defaultdict(list)

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run_bundle(self, bundle: BundleInfo, on_progress: ProgressCallback) -> BundleResult:
        """Compute a bundle on the next free engine.

        A bundle that failed before goes on behind the parts its engine had written; the result covers all of it.

        Args:
            bundle: its object is read by the engine process.
            on_progress: called in this thread with the bundle's name and its counts so far.

        Raises:
            TransientError: the engine died or stalled, or the store failed for now.
            TerminalError: the model does not load, the bundle cannot be read, or the pool is closed.
        """
        written = self._written[bundle.name]
        command = Run(
            bundle=bundle.name,
            work_uri=self._work.uri,
            storage=self._work.options,
            sampling=self._sampling,
            part_rows=self._execution.part_rows,
            part_seconds=self._execution.part_seconds,
            known_parts=tuple(written),
        )
        with self.lease() as lease:
            done: BundleDone = lease.handle.run_bundle(command, on_progress, written.append)
        # A later plan of the same run may use the name again.
        self._written.pop(bundle.name, None)
        return BundleResult(
            bundle=bundle.name,
            requests=done.counts.requests,
            errors=done.counts.errors,
            prompt_tokens=done.counts.prompt_tokens,
            cached_tokens=done.counts.cached_tokens,
            completion_tokens=done.counts.completion_tokens,
            parts=done.parts,
            load_seconds=lease.load_seconds,
            seconds=done.seconds,
        )

    @contextmanager
    def lease(self) -> Iterator[Lease]:
        """Wait for an engine, load its model if need be, and keep it until the block ends.

        Raises:
            TerminalError: the model does not load, which is not tried twice; or the pool is closed.
            TransientError: the engine died while loading.
        """
        index = self._take()
        try:
            yield self._warm(index)
        finally:
            with self._changed:
                self._free.append(index)
                self._changed.notify()

    def close(self) -> None:
        """End all engines; finished rows are written first. Safe to call more than once."""
        with self._changed:
            self._closed = True
            handles = [handle for handle in self._handles if handle is not None]
            self._changed.notify_all()
        with ThreadPoolExecutor(max_workers=max(1, len(handles))) as closers:
            list(closers.map(lambda handle: handle.close(), handles))
        self._logs.cleanup()

    def _take(self) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._free)
            self._refuse_when_useless()
            # A warm engine before one that would have to be loaded.
            index = max(self._free, key=self._is_warm)
            self._free.remove(index)
            return index

    def _is_warm(self, index: int) -> bool:
        handle = self._handles[index]
        return handle is not None and handle.usable

    def _refuse_when_useless(self) -> None:
        if self._closed:
            raise TerminalError("the engines of this run are closed")
        if self._load_failure is not None:
            raise self._load_failure

    def _warm(self, index: int) -> Lease:
        handle = self._handles[index]
        if handle is not None and handle.usable:
            return Lease(handle, 0.0)
        if handle is not None:
            handle.close()
        with self._changed:
            self._refuse_when_useless()
            handle = self._handles[index] = self._make_handle(index)
        started = time.monotonic()
        try:
            handle.load(self._load)
        except BatchLLMError as error:
            if isinstance(error, TerminalError) and not self._closed:
                self._load_failure = error
            raise
        return Lease(handle, time.monotonic() - started)

    def _local_handles(self) -> Callable[[int], EngineHandle]:
        execution = self._execution
        shares: list[DeviceShare] = device_shares(
            execution.engines, execution.gpus_per_engine, gpus_of_machine(), sorted(os.sched_getaffinity(0))
        )

        def make(index: int) -> EngineHandle:
            return LocalEngineHandle(
                f"engine {index}",
                devices=shares[index],
                log_file=Path(self._logs.name) / f"engine-{index}.log",
                python=execution.engine_python,
                load_timeout_s=execution.load_timeout_s,
                stall_timeout_s=execution.stall_timeout_s,
            )

        return make
