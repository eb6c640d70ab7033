"""The engines of one flow run: leased to task threads, started when first needed, replaced when dead."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType

from batchllm_operators.cost import Calibration
from batchllm_operators.errors import BatchLLMError, RowError, RowErrorCode, TerminalError
from batchllm_operators.execute.calibration import MOST_SECONDS
from batchllm_operators.execute.engine import Completion
from batchllm_operators.execute.engine_ahead import take_engine_ahead
from batchllm_operators.execute.engine_logs import EngineLogs
from batchllm_operators.execute.feeding import known_results
from batchllm_operators.execute.handle import BundleCallbacks, EngineHandle, ProgressCallback, StatusCallback, no_status
from batchllm_operators.execute.isolation import EngineDiedError, find_guilty
from batchllm_operators.execute.local_engines import local_handle
from batchllm_operators.execute.messages import BundleCounts, BundleDone, Load, Loaded, Run
from batchllm_operators.execute.part_writer import part_table
from batchllm_operators.execute.slots import Lease, Slot
from batchllm_operators.records import AttentionForecast, BundleInfo, BundleResult, EngineSetting
from batchllm_operators.specs.execution import ExecutionSpec, ModelSpec
from batchllm_operators.specs.planning import CostModel
from batchllm_operators.specs.sampling import SamplingParameters
from batchllm_operators.store import Store
from batchllm_operators.work.bundles import bundle_keys, check_bundle
from batchllm_operators.work.results import encoded_part

THREADS_PER_ENGINE = 2
"""One that feeds the engine and one whose last requests it finishes."""

DEATHS_OF_A_BUNDLE = 2
"""Engines that may die on a bundle before one of its requests is taken to be the reason."""

_LOGGER = logging.getLogger(__name__)


@dataclass(slots=True)
class _Attempt:
    """One task run's try at a bundle."""

    bundle: BundleInfo
    on_progress: ProgressCallback
    load_seconds: float = 0.0
    seconds: float = 0.0
    """Of the engines' work that was not lost."""


class EnginePool:
    """As many engines as the execution part asks for; a context manager that ends them all.

    An engine takes its next bundle as soon as it has been given all requests of the one before, so that it has no gap
    between them. For that there must be more threads than engines: `THREADS_PER_ENGINE` each.

    `close` may be called from any thread, and makes waiting threads raise `TerminalError` at once: tasks blocked in a
    thread cannot be interrupted in another way.

    Args:
        model: what the engines load.
        execution: how many, on what, and their deadlines.
        block_size: tokens of a KV-cache block.
        sampling: the job's sampling parameters.
        work: the work folder.
        make_handle: makes the handle of the engine with this index; default: a process on this machine.
        on_status: told what the engines on this machine do until their first tokens.
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
        on_status: StatusCallback = no_status,
    ) -> None:
        self._load = Load(model=model, block_size=block_size, gpus=execution.gpus_per_engine)
        self._execution = execution
        self._sampling = sampling.parameters
        self._work = work
        self._logs = EngineLogs()
        self._on_status = on_status
        self._make_handle = make_handle or self._local_handle
        self._slots = [Slot(index) for index in range(execution.engines)]
        self._changed = threading.Condition()
        self._waiting_alone = 0
        self._closed = False
        self._background: list[threading.Thread] = []
        self.load_seconds = 0.0
        """Of importing vLLM and of loading the model, all engines together, whether anybody waited or not."""
        self._load_failure: TerminalError | None = None
        self.kept_logs: list[str] = []
        """Where the engines' logs are kept, once the pool is closed because the run failed."""
        self._written: defaultdict[str, list[str]] = defaultdict(list)
        self._deaths: defaultdict[str, int] = defaultdict(int)
        self._engines_work = False
        self._has_loaded = False
        self.settings: tuple[EngineSetting, ...] = ()
        """Of the engine loaded last, and so of all: what decides their throughput, and who chose it."""

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def run_bundle(self, bundle: BundleInfo, on_progress: ProgressCallback) -> BundleResult:
        """Compute a bundle on the next free engine.

        A bundle that failed before goes on behind the parts its engine had written; the result covers all of it. Where
        an engine dies on a bundle for the second time, one of its requests is taken to be the reason, and this call
        finds it: it computes the unfinished requests in halves, on new engines, until the guilty one stands alone. Its
        answer is an `engine_error`.

        Args:
            bundle: its object is read by the engine process.
            on_progress: called in this thread with the bundle's name and its counts so far.

        Raises:
            TransientError: the engine died or stalled for the first time, or the store failed for now.
            TerminalError: the model does not load, the bundle cannot be read, engines die on too many requests, or the
                pool is closed.
        """
        attempt = _Attempt(bundle, on_progress)
        if self._deaths[bundle.name] < DEATHS_OF_A_BUNDLE:
            try:
                done = self._compute(attempt)
                return self._result(attempt, done.counts)
            except EngineDiedError:
                self._deaths[bundle.name] += 1
                if self._deaths[bundle.name] < DEATHS_OF_A_BUNDLE:
                    raise
        self._isolate(attempt)
        _, counts = known_results(self._work, self._written[bundle.name])
        return self._result(attempt, counts)

    def _compute(self, attempt: _Attempt, rows: tuple[int, int] | None = None) -> BundleDone:
        """Compute a bundle, or some rows of it; these alone in the engine, so that its death is their fault."""
        written = self._written[attempt.bundle.name]
        command = Run(
            bundle=attempt.bundle.name,
            digest=attempt.bundle.digest,
            work_uri=self._work.uri,
            storage=self._work.options,
            sampling=self._sampling,
            part_rows=self._execution.part_rows,
            part_seconds=self._execution.part_seconds,
            rows=rows,
            known_parts=tuple(written),
        )
        with self.lease(alone=rows is not None) as lease:
            attempt.load_seconds += lease.load_seconds
            done = lease.handle.run_bundle(
                command, BundleCallbacks(attempt.on_progress, written.append, lease.admit_next)
            )
        attempt.seconds += done.seconds
        self._engines_work = self._engines_work or done.counts.requests > done.counts.errors
        return done

    def _isolate(self, attempt: _Attempt) -> None:
        """Answer all requests of a bundle that can be answered, and say of the others that engines die on them."""
        bundle, written = attempt.bundle, self._written[attempt.bundle.name]
        done, _ = known_results(self._work, written)
        check_bundle(self._work, bundle.name, bundle.digest)
        keys = bundle_keys(self._work, bundle.name)
        unfinished = [row for row, key in enumerate(keys) if key not in done]

        def compute(first: int, stop: int) -> None:
            self._compute(attempt, (first, stop))

        guilty = find_guilty(unfinished, compute)
        if not guilty:
            return
        _, counts = known_results(self._work, written)
        if not self._engines_work and counts.requests == counts.errors:
            raise TerminalError(
                f"no engine of this run has answered anything: {guilty[0].error.message}", bundle=bundle.name
            )
        name, content = encoded_part(part_table([_verdict(keys[one.row], one.error) for one in guilty]))
        self._work.write_bytes(name, content)
        written.append(name)

    def _result(self, attempt: _Attempt, counts: BundleCounts) -> BundleResult:
        # A later plan of the same run may use the name again.
        parts = tuple(self._written.pop(attempt.bundle.name, ()))
        self._deaths.pop(attempt.bundle.name, None)
        return BundleResult(
            bundle=attempt.bundle.name,
            requests=counts.requests,
            errors=counts.errors,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            completion_tokens=counts.completion_tokens,
            parts=parts,
            load_seconds=attempt.load_seconds,
            seconds=attempt.seconds,
        )

    def calibrate(self, seconds: float = MOST_SECONDS, default: CostModel | None = None) -> Calibration | None:
        """Load an engine that measures its rates before it takes its first bundle; it stays warm.

        None when its model gives nothing to measure, and when the engine was warm already.

        Args:
            seconds: that the measurement may take.
            default: rates for what there is no time to measure; None: the hardware's.

        Raises:
            TerminalError: the model does not load, or the pool is closed.
            TransientError: the engine died while loading.
        """
        with self._taken(alone=True) as slot:
            how = {"calibrate": True, "calibration_seconds": seconds, "default_rates": default}
            _, loaded = self._warm(slot, self._load.model_copy(update=how))
            return None if loaded is None else loaded.calibration

    def choose_attention(self, forecast: AttentionForecast | None) -> None:
        """Give the engines vLLM's own attention, where the job leaves the choice to its plan and sharing does not pay.

        For engines that are loaded from now on.

        Args:
            forecast: of the plan; None: there is none, and the engines are loaded as the job says.
        """
        model = self._load.model
        if forecast is None or forecast.pays or model.attention != "auto":
            return
        reason = (
            f"model.attention: auto; prefix-shared attention is expected to save {forecast.engine_saving:.1%} of the "
            f"engines' time, {forecast.needed_saving:.1%} needed (rates of its kernels: {forecast.rates})"
        )
        stock = model.model_copy(update={"attention": "stock"})
        self._load = self._load.model_copy(update={"model": stock, "attention_reason": reason})

    def start(self) -> None:
        """Start the process of the first engine, which imports its packages; no model is loaded.

        A process that cannot be started is told by the first load, which tries again: there may be nothing to load.
        """
        slot = self._slots[0]
        with self._changed:
            self._refuse_when_useless()
            if slot.handle is None:
                slot.handle = self._make_handle(slot.index)
        with suppress(TerminalError):
            slot.handle.start()

    def preload(self) -> None:
        """Begin to load the model on the first engine, while the caller goes on; bundles that need it wait for it.

        A model that cannot be loaded is told to the first bundle; an engine that died is replaced for it.
        """
        slot = self._slots[0]

        def load() -> None:
            try:
                self._ready(slot, self._load)
            except BatchLLMError as error:
                if not self._closed:
                    _LOGGER.warning("engine %d could not be loaded ahead of its first bundle: %s", slot.index, error)

        self._run_in_background(load, "preload")

    @contextmanager
    def lease(self, *, alone: bool = False) -> Iterator[Lease]:
        """Wait for an engine, load its model if need be, and keep it until the block ends or it admits the next.

        Args:
            alone: wait for an engine without bundles, and admit none beside.

        Raises:
            TerminalError: the model does not load, which is not tried twice; or the pool is closed.
            TransientError: the engine died while loading.
        """
        with self._taken(alone=alone) as slot:
            handle, _ = self._warm(slot)
            load_seconds, slot.load_seconds = slot.load_seconds, 0.0
            yield Lease(handle, load_seconds, _nothing if alone else partial(self._open, slot))

    def release(self) -> None:
        """Begin to end all engines, while the caller goes on; `close` waits until they have ended."""
        self._run_in_background(self._end_engines, "release")

    def close(self, *, failed: bool = False) -> None:
        """End all engines; finished rows are written first. Safe to call more than once.

        Args:
            failed: keep the end of the engines' logs in the work folder, where any was asked to load its model.
        """
        self._end_engines()
        for thread in self._background:
            if thread is not threading.current_thread():
                thread.join()
        if failed and self._has_loaded:
            self.kept_logs = self.kept_logs or self._logs.keep(self._work)
        self._logs.remove()

    def _end_engines(self) -> None:
        with self._changed:
            self._closed = True
            handles = [slot.handle for slot in self._slots if slot.handle is not None]
            self._changed.notify_all()
        with ThreadPoolExecutor(max_workers=max(1, len(handles))) as closers:
            list(closers.map(lambda handle: handle.close(), handles))

    def _run_in_background(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=f"engines {name}", daemon=True)
        self._background.append(thread)
        thread.start()

    @contextmanager
    def _taken(self, *, alone: bool) -> Iterator[Slot]:
        slot = self._take(alone=alone)
        try:
            yield slot
        finally:
            with self._changed:
                slot.bundles -= 1
                self._open(slot)

    def _take(self, *, alone: bool) -> Slot:
        with self._changed:
            self._waiting_alone += alone
            try:
                self._changed.wait_for(lambda: self._closed or self._open_slots(alone=alone))
            finally:
                self._waiting_alone -= alone
            self._refuse_when_useless()
            # The engine with the least to do; of these a warm one before one that would have to be loaded.
            slot = min(self._open_slots(alone=alone), key=lambda slot: (slot.bundles, not slot.warm))
            slot.taken_by = threading.get_ident()
            slot.bundles += 1
            self._changed.notify_all()
            return slot

    def _open_slots(self, *, alone: bool) -> list[Slot]:
        # Who must be alone would wait for ever if the others went on sharing.
        if self._waiting_alone and not alone:
            return []
        return [slot for slot in self._slots if slot.taken_by is None and not (alone and slot.bundles)]

    def _open(self, slot: Slot) -> None:
        """Let another thread have a slot, unless one has it already."""
        with self._changed:
            if slot.taken_by == threading.get_ident():
                slot.taken_by = None
            self._changed.notify_all()

    def _refuse_when_useless(self) -> None:
        if self._closed:
            raise TerminalError("the engines of this run are closed")
        if self._load_failure is not None:
            raise self._load_failure

    def _warm(self, slot: Slot, load: Load | None = None) -> tuple[EngineHandle, Loaded | None]:
        """The slot's engine, with its model loaded; and what its load gave, None when it was warm."""
        if slot.warm and slot.handle is not None:
            return slot.handle, None
        started = time.monotonic()
        ready = self._ready(slot, load or self._load)
        slot.load_seconds += time.monotonic() - started
        return ready

    def _ready(self, slot: Slot, load: Load) -> tuple[EngineHandle, Loaded | None]:
        """Load the model on a slot's engine, on a new one where it is dead, unless another thread has just done so."""
        with slot.loading:
            with self._changed:
                self._refuse_when_useless()
                handle, loaded = slot.handle, slot.loaded
            if handle is not None and handle.usable and loaded:
                return handle, None
            if handle is not None and not handle.usable:
                handle.close()
                handle = None
            with self._changed:
                self._refuse_when_useless()
                slot.loaded, self._has_loaded = False, True
                handle = slot.handle = handle or self._make_handle(slot.index)
            try:
                told = handle.load(load)
            except BatchLLMError as error:
                if isinstance(error, TerminalError) and not self._closed:
                    self._load_failure = error
                raise
            slot.loaded = True
            self.load_seconds += told.seconds
            if told.settings != self.settings:
                for setting in told.settings:
                    if setting.warning:
                        _LOGGER.warning(setting.warning)
            self.settings = told.settings
            return handle, told

    def _local_handle(self, index: int) -> EngineHandle:
        handle = take_engine_ahead(self._execution) if index == 0 else None
        if handle is None:
            handle = local_handle(self._execution, index, self._logs.file(index))
        else:
            self._logs.adopt(index, handle.log_file)
        handle.on_status = self._on_status
        return handle


def _nothing() -> None:
    """Where no other bundle is admitted."""


def _verdict(key: bytes, error: EngineDiedError) -> Completion:
    how = error.message.splitlines()[0].partition(";")[0]
    return Completion(key, error=RowError(RowErrorCode.ENGINE_ERROR, f"the engine died on this request: {how}"))
