"""One bundle where its engine is: its answers on their way to parts, and what the driver is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor

from batchllm_operators.errors import BatchLLMError, TransientError
from batchllm_operators.execute.feeding import BundleStep, count, known_results, read_rows
from batchllm_operators.execute.messages import AllRead, BundleDone, BundleEvent, Failed, PartWritten, Progress, Run
from batchllm_operators.execute.part_writer import PartWriter
from batchllm_operators.store import Store
from batchllm_operators.tasks import task_named
from batchllm_operators.work.bundles import check_bundle


class BundleRun:
    """The state of a bundle from its command to its last event.

    Args:
        command: what to compute.
        send: takes the events; called in any thread.
        writing: runs the writes of parts.
        clock: seconds, increasing.

    Raises:
        BatchLLMError: the bundle is damaged, or what earlier attempts have written cannot be read.
    """

    def __init__(
        self,
        command: Run,
        send: Callable[[BundleEvent], None],
        writing: Executor,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = command.bundle
        self.work = store = Store(command.work_uri, command.storage)
        check_bundle(store, command.bundle, command.digest)
        task = task_named(command.task)
        done, self._counts = known_results(store, task, command.known_parts)
        self.requests = read_rows(store, command.bundle, command.sampling, done, command.rows)
        self._known_parts = command.known_parts
        self._send = send
        self._writer = PartWriter(
            store,
            task,
            part_rows=command.part_rows,
            part_seconds=command.part_seconds,
            on_part=lambda name: send(PartWritten(bundle=self.name, name=name)),
            writing=writing,
            clock=clock,
        )
        self._clock = clock
        self._began = clock()
        self._all_read = False
        self._told = self._counts
        send(Progress(bundle=self.name, counts=self._counts, computed=False))

    @property
    def has_news(self) -> bool:
        """Whether there are answers of which `tell_progress` has not told."""
        return self._counts != self._told

    @property
    def written(self) -> bool:
        """Whether no answer waits for the store."""
        return self._writer.idle

    def take(self, step: BundleStep) -> None:
        """Count and write what a step finished.

        Raises:
            BatchLLMError: the store does not take it, or the bundle cannot be read any further.
        """
        self._counts += count(step.finished)
        if step.all_read and not self._all_read:
            self._all_read = True
            self._send(AllRead(bundle=self.name))
        self._writer.add(step.finished)
        if step.fault is not None:
            raise step.fault
        if step.done:
            self._writer.hand_over()

    def tell_progress(self) -> None:
        """Send the counts so far."""
        self._told = self._counts
        self._send(Progress(bundle=self.name, counts=self._counts))

    def end(self, done_before: float) -> float:
        """Wait until all is written and say that the bundle is done; returns when that was.

        Args:
            done_before: when the bundle before it was done.

        Raises:
            BatchLLMError: the store does not take it.
        """
        self._writer.flush()
        if self.has_news:
            self.tell_progress()
        now = self._clock()
        self._send(
            BundleDone(
                bundle=self.name,
                counts=self._counts,
                parts=self._known_parts + self._writer.parts,
                seconds=now - max(self._began, done_before),
            )
        )
        return now

    def keep(self) -> None:
        """Write what is finished, without a word."""
        self._writer.flush()

    def fail(self, error: BatchLLMError) -> None:
        """Keep what is finished where that is possible, and say why the rest is not computed; the engine lives on."""
        try:
            self._writer.flush()
        except BatchLLMError as another:
            # The first fault of the store is the one to tell.
            if another is not error:
                error.add_note(f"and what was finished is lost: {another}")
        transient = isinstance(error, TransientError)
        self._send(
            Failed(bundle=self.name, message=error.message, transient=transient, engine_lost=False, uri=error.uri)
        )
