"""What runs where an engine is: takes commands, loads the model, computes bundles, and sends events.

The loop knows neither sockets nor processes: a backend feeds it commands and carries its events to the driver. It
imports no Prefect. What loading needs is imported at once, while the other side looks for something to compute, and a
model is loaded only when a command says so.
"""

from __future__ import annotations

import os
import queue
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from batchllm_kernels.vllm_plugin.load_phases import LOAD_PHASE_VARIABLE
from batchllm_kernels.vllm_plugin.options import ATTENTION_TRACE_VARIABLE, STEP_TRACE_VARIABLE
from batchllm_operators.cost import Calibration
from batchllm_operators.errors import BatchLLMError, TerminalError, TransientError
from batchllm_operators.execute.calibration import calibrate
from batchllm_operators.execute.engine import Engine
from batchllm_operators.execute.load_watch import LoadWatch, download_folder
from batchllm_operators.execute.messages import EnginePhase, Event, Failed, Load, Loaded, Run, Shutdown, Started
from batchllm_operators.execute.running_bundles import RunningBundles
from batchllm_operators.execute.step_traces import StepTraces

MESSAGE_CHARACTERS = 2000


class EngineMaker(Protocol):
    """Makes the one engine of a loop."""

    def prepare(self) -> None:
        """Do what needs no model yet: import packages."""

    def load(self, command: Load) -> Engine:
        """Load the model of a command."""


@dataclass(frozen=True, slots=True)
class LoopFiles:
    """The local files that an engine writes beside its answers."""

    traces: StepTraces
    """The steps of the engine, on their way to the work folder."""
    phases: Path
    """The phases of vLLM's start, see `LoadWatch`."""


def files_of_process(parent: Path) -> LoopFiles:
    """The files of an engine that has this process for itself: vLLM and the plugin find them by the environment.

    Args:
        parent: a local folder, in which they get one of their own; who made it removes it.
    """
    folder = Path(tempfile.mkdtemp(prefix="engine-", dir=parent))
    steps, attention, phases = folder / "steps", folder / "attention", folder / "phases"
    os.environ[STEP_TRACE_VARIABLE] = str(steps)
    os.environ[ATTENTION_TRACE_VARIABLE] = str(attention)
    os.environ[LOAD_PHASE_VARIABLE] = str(phases)
    return LoopFiles(StepTraces(steps, attention), phases)


class EngineLoop:
    """Carries out the commands of one driver; several bundles at a time overlap in one engine.

    `take` and `stop` may be called from any thread, and `stop` from a signal handler too. `serve` runs in one thread.

    Args:
        send: takes the events, from several threads at once; `OSError` where nobody listens any more, which ends the
            loop.
        maker: makes the engine.
        on_abandon: called by `stop` while a model is being loaded or prepared for, which nothing can interrupt: it ends
            the process or the thread.
        files: what the engine writes beside its answers, see `files_of_process`; None: nothing, and then reports show
            neither its steps nor the phases of its load.
    """

    def __init__(
        self,
        send: Callable[[Event], None],
        maker: EngineMaker,
        *,
        on_abandon: Callable[[], None],
        files: LoopFiles | None = None,
    ) -> None:
        self._send = send
        self._maker = maker
        self._on_abandon = on_abandon
        self._files = files
        # SimpleQueue, because its put may be called in a signal handler.
        self._commands: queue.SimpleQueue[Load | Run | Shutdown] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._loading = False
        self._prepare_failure: Exception | None = None
        self._prepare_seconds = 0.0
        self._engine: Engine | None = None
        self._bundles: RunningBundles | None = None

    def take(self, command: Load | Run | Shutdown) -> None:
        """Carry a command out, after those before it; `Shutdown` is `stop`."""
        if isinstance(command, Shutdown):
            self.stop()
        else:
            self._commands.put(command)

    def stop(self) -> None:
        """End after the rows that are finished are written; at once where a model is being loaded."""
        if self._loading:
            self._on_abandon()
        self._stopping.set()
        self._commands.put(Shutdown())

    def serve(self) -> None:
        """Take commands until told to stop, or nobody listens any more, or the engine breaks."""
        self._tell(Started())
        self._prepare()
        try:
            while not self._stopping.is_set():
                try:
                    self._take_commands()
                    if self._bundles is not None:
                        self._bundles.advance()
                except TerminalError as error:
                    traceback.print_exc()
                    self._leave(_one_line(error), stopped=False, transient=False)
                    return
                except Exception as error:
                    traceback.print_exc()
                    self._leave(f"the engine broke: {_one_line(error)}", stopped=False)
                    return
            self._leave("the engine was told to stop", stopped=True)
        finally:
            if self._bundles is not None:
                self._bundles.close()
            if self._engine is not None:
                self._engine.close()

    def _tell(self, event: Event) -> None:
        try:
            self._send(event)
        except OSError:
            # Nobody listens any more, and whoever brings the commands sees the same.
            self._stopping.set()

    def _take_commands(self) -> None:
        """Carry out the commands that have come; wait for one where there is nothing to compute."""
        while not self._stopping.is_set():
            try:
                command = self._commands.get(block=self._bundles is None or not self._bundles.busy)
            except queue.Empty:
                return
            if isinstance(command, Load):
                self._load(command)
            elif isinstance(command, Run):
                self._begin(command)

    def _prepare(self) -> None:
        """Prepare for loading. A failure is told when a model is to be loaded: before, nobody needs the engine."""
        started = time.monotonic()
        try:
            with self._abandonable(), LoadWatch(self._tell, None) as watch:
                watch.enter(EnginePhase.ENVIRONMENT)
                self._maker.prepare()
        except Exception as error:
            traceback.print_exc()
            self._prepare_failure = error
        self._prepare_seconds = time.monotonic() - started

    def _load(self, command: Load) -> None:
        if self._prepare_failure is not None:
            self._refuse_to_load(self._prepare_failure)
            return
        try:
            with self._abandonable():
                loaded = self._loaded(command)
        except Exception as error:
            traceback.print_exc()
            self._refuse_to_load(error)
        else:
            self._tell(loaded)

    def _loaded(self, command: Load) -> Loaded:
        started = time.monotonic()
        phases, traces = (None, None) if self._files is None else (self._files.phases, self._files.traces)
        with LoadWatch(self._tell, phases, download_folder(command.model)) as watch:
            watch.enter(EnginePhase.WEIGHTS)
            engine = self._engine = self._maker.load(command)
            seconds = self._prepare_seconds + time.monotonic() - started
            calibration = None
            if command.calibrate:
                watch.enter(EnginePhase.CALIBRATION)
                calibration = _calibrate(engine, command)
        if traces is not None:
            traces.skip()
        self._bundles = RunningBundles(engine, self._tell, traces)
        return Loaded(seconds=seconds, calibration=calibration, settings=engine.settings)

    @contextmanager
    def _abandonable(self) -> Iterator[None]:
        """What runs in the block cannot be interrupted, and has written nothing that would be lost."""
        self._loading = True
        try:
            if self._stopping.is_set():
                # It was told to end just before, when there was nothing to abandon yet.
                self._on_abandon()
            yield
        finally:
            self._loading = False

    def _refuse_to_load(self, error: Exception) -> None:
        # A model that does not load will not load the next time either, unless the network was the reason.
        transient = isinstance(error, (TransientError, ConnectionError, TimeoutError))
        explained = isinstance(error, BatchLLMError)
        self._tell(Failed(message=_one_line(error), transient=transient, engine_lost=True, explained=explained))
        self._stopping.set()

    def _begin(self, command: Run) -> None:
        if self._bundles is None:
            raise RuntimeError("asked to compute before a model was loaded")
        self._bundles.begin(command)

    def _leave(self, message: str, *, stopped: bool, transient: bool = True) -> None:
        self._stopping.set()
        if self._bundles is not None:
            self._bundles.leave(message, stopped=stopped, transient=transient)


def _calibrate(engine: Engine, command: Load) -> Calibration | None:
    model = command.model.id + (f"@{command.model.revision}" if command.model.revision else "")
    return calibrate(engine, model=model, seconds=command.calibration_seconds, default=command.default_rates)


def _one_line(error: Exception) -> str:
    text = error.message if isinstance(error, BatchLLMError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:MESSAGE_CHARACTERS]
