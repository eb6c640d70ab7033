"""The engine's own process: takes commands on a socket, reads bundles from the store, writes parts to the store.

    python -m batchllm_operators.execute.engine_process --channel-fd 3 --parent-pid 4711

It is the leader of a session of its own and ends the whole session when its parent is gone. Its standard output is a
log, because vLLM and torch print there. It imports no Prefect. It imports vLLM at once, so that this goes on while its
parent looks for something to compute, and loads a model only when it is told to.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from batchllm_kernels.vllm_plugin.load_phases import LOAD_PHASE_VARIABLE
from batchllm_kernels.vllm_plugin.options import ATTENTION_TRACE_VARIABLE, STEP_TRACE_VARIABLE
from batchllm_operators.cost import Calibration
from batchllm_operators.errors import BatchLLMError, TransientError
from batchllm_operators.execute.bundle_run import BundleRun
from batchllm_operators.execute.calibration import calibrate
from batchllm_operators.execute.engine import Engine, VllmEngine, import_vllm
from batchllm_operators.execute.feeding import BundleFeed
from batchllm_operators.execute.load_watch import LoadWatch, download_folder
from batchllm_operators.execute.messages import (
    EnginePhase,
    Event,
    Failed,
    Load,
    Loaded,
    Run,
    Shutdown,
    Started,
    decode_command,
    encode,
)
from batchllm_operators.execute.step_traces import StepTraces

PARENT_CHECK_SECONDS = 0.5
PROGRESS_SECONDS = 0.25
MESSAGE_CHARACTERS = 2000


class EngineProcess:
    """Carries out the commands of one handle; several bundles at a time overlap in one engine.

    Args:
        channel: connected socket; commands come in, events go out.
        load_engine: makes the engine of a `Load` command.
        traces: takes the engine's steps to the work folder; None: they are not traced.
        prepare: what can be done before there is a model to load: importing packages.
        phases: file of vLLM's own phases of its start, see `LoadWatch`.
    """

    def __init__(
        self,
        channel: socket.socket,
        load_engine: Callable[[Load], Engine],
        traces: StepTraces | None = None,
        prepare: Callable[[], None] | None = None,
        phases: Path | None = None,
    ) -> None:
        self._channel = channel
        self._traces = traces
        self._load_engine = load_engine
        self._engine: Engine | None = None
        # SimpleQueue, because its put may be called in a signal handler.
        self._commands: queue.SimpleQueue[Load | Run | Shutdown] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._prepare_engine = prepare
        self._prepare_failure: Exception | None = None
        self._prepare_seconds = 0.0
        self._phases = phases
        self._loading = False
        self._sending = threading.Lock()
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="parts")
        self._feed: BundleFeed | None = None
        self._runs: dict[str, BundleRun] = {}
        self._ending: list[BundleRun] = []
        self._last_done = 0.0
        self._told = 0.0
        self._computed_tokens = 0

    def serve(self) -> None:
        """Take commands until told to shut down, or the other end is closed, or the engine breaks."""
        threading.Thread(target=self._receive, name="commands", daemon=True).start()
        self._send(Started())
        self._prepare()
        try:
            while not self._stopping.is_set():
                try:
                    self._take_commands()
                    self._advance()
                except Exception as error:
                    traceback.print_exc()
                    self._leave(f"the engine broke: {_one_line(error)}", stopped=False)
                    return
            self._leave("the engine was told to stop", stopped=True)
        finally:
            if self._engine is not None:
                self._engine.close()

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """End after writing the rows that are finished; at once when a model is being loaded. A signal handler."""
        if self._loading:
            os.killpg(0, signal.SIGKILL)
        self._stopping.set()
        self._commands.put(Shutdown())

    def _receive(self) -> None:
        try:
            with self._channel.makefile("rb") as lines:
                for line in lines:
                    command = decode_command(line)
                    if isinstance(command, Shutdown):
                        break
                    self._commands.put(command)
        finally:
            self.stop()

    def _send(self, event: Event) -> None:
        try:
            with self._sending:
                self._channel.sendall(encode(event))
        except OSError:
            # Nobody listens any more; the reading thread sees the same and stops the process.
            self._stopping.set()

    def _take_commands(self) -> None:
        """Carry out what has come; wait for something to come when there is nothing to compute."""
        while not self._stopping.is_set():
            try:
                command = self._commands.get(block=not self._runs)
            except queue.Empty:
                return
            if isinstance(command, Load):
                self._load(command)
            elif isinstance(command, Run):
                self._begin(command)

    def _prepare(self) -> None:
        """Import what loading needs; a fault there is told when there is a model to load, and else to nobody."""
        if self._prepare_engine is None:
            return
        started = time.monotonic()
        self._loading = True
        try:
            with LoadWatch(self._send, None) as watch:
                watch.enter(EnginePhase.ENVIRONMENT)
                self._prepare_engine()
        except Exception as error:
            traceback.print_exc()
            self._prepare_failure = error
        finally:
            self._loading = False
            self._prepare_seconds = time.monotonic() - started

    def _load(self, command: Load) -> None:
        if self._prepare_failure is not None:
            self._refuse_to_load(self._prepare_failure)
            return
        started = time.monotonic()
        self._loading = True
        try:
            with LoadWatch(self._send, self._phases, download_folder(command.model)) as watch:
                watch.enter(EnginePhase.WEIGHTS)
                engine = self._engine = self._load_engine(command)
                seconds = self._prepare_seconds + time.monotonic() - started
                calibration = None
                if command.calibrate:
                    watch.enter(EnginePhase.CALIBRATION)
                    calibration = _calibrate(engine, command)
            if self._traces is not None:
                self._traces.skip()
            self._feed = BundleFeed(engine)
        except Exception as error:
            traceback.print_exc()
            self._refuse_to_load(error)
        else:
            self._send(Loaded(seconds=seconds, calibration=calibration, settings=engine.settings))
        finally:
            self._loading = False

    def _refuse_to_load(self, error: Exception) -> None:
        # A model that does not load will not load the next time either, unless the network was the reason.
        transient = isinstance(error, (TransientError, ConnectionError, TimeoutError))
        explained = isinstance(error, BatchLLMError)
        self._send(Failed(message=_one_line(error), transient=transient, engine_lost=True, explained=explained))
        self._stopping.set()

    def _begin(self, command: Run) -> None:
        try:
            run = BundleRun(command, self._send, self._writing)
        except BatchLLMError as error:
            traceback.print_exc()
            transient = isinstance(error, TransientError)
            self._send(
                Failed(
                    bundle=command.bundle, message=error.message, transient=transient, engine_lost=False, uri=error.uri
                )
            )
            return
        self._runs[run.name] = run
        self._bundles().add(run.name, run.requests)

    def _advance(self) -> None:
        """One step of the engine, and an end to the bundles that are done and written."""
        if not self._runs:
            return
        feed = self._bundles()
        for step in feed.step():
            run = self._runs[step.bundle]
            try:
                run.take(step)
            except BatchLLMError as error:
                # A fault of the store: the engine is as good as before.
                traceback.print_exc()
                feed.drop(run.name)
                del self._runs[run.name]
                run.fail(error)
                continue
            if step.done:
                self._ending.append(run)
        self._end_written(wait=not feed.busy)
        self._tell_progress()

    def _end_written(self, *, wait: bool) -> None:
        """Say of bundles that they are done; with `wait` of all whose last request is finished."""
        for run in [run for run in self._ending if wait or run.written]:
            self._ending.remove(run)
            del self._runs[run.name]
            try:
                if self._traces is not None:
                    self._traces.write(run.work, run.name)
                self._last_done = run.end(self._last_done)
            except BatchLLMError as error:
                traceback.print_exc()
                run.fail(error)

    def _tell_progress(self) -> None:
        """Tell of answers and, where there are none, that tokens are computed: a step alone is no sign of life."""
        now = time.monotonic()
        if now - self._told < PROGRESS_SECONDS or self._engine is None or not self._runs:
            return
        computed = self._engine.computed_tokens
        news = [run for run in self._runs.values() if run.has_news]
        if computed != self._computed_tokens and not news:
            news = [next(iter(self._runs.values()))]
        for run in news:
            run.tell_progress()
        self._computed_tokens = computed
        self._told = now

    def _leave(self, message: str, *, stopped: bool) -> None:
        """Write what is finished, so that it is not computed again, and say of every bundle that it is not done."""
        self._stopping.set()
        if stopped and self._feed is not None:
            self._feed.abort()
        faults = {}
        for run in self._runs.values():
            try:
                run.keep()
            except BatchLLMError as error:
                traceback.print_exc()
                faults[run.name] = f"{message}; what was finished could not be written: {error.message}"
        for name in self._runs:
            self._send(
                Failed(
                    bundle=name,
                    message=faults.get(name, message),
                    transient=True,
                    engine_lost=True,
                    stopped=stopped,
                    explained=stopped,
                )
            )

    def _bundles(self) -> BundleFeed:
        if self._feed is None:
            raise RuntimeError("asked to compute before a model was loaded")
        return self._feed


def end_with_parent(parent_pid: int) -> None:
    """Kill this process's group as soon as its parent is gone; runs for ever, in a thread.

    PR_SET_PDEATHSIG would do that too early: it fires when the thread that started this process ends.
    """
    while os.getppid() == parent_pid:
        time.sleep(PARENT_CHECK_SECONDS)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Serve the commands that come on the inherited socket."""
    parser = argparse.ArgumentParser(description="engine process; started by LocalEngineHandle")
    parser.add_argument("--channel-fd", type=int, required=True, help="inherited socket to the handle")
    parser.add_argument("--parent-pid", type=int, required=True, help="process that this one does not outlive")
    parser.add_argument("--cores", default="", help="comma-separated CPU cores to run on; default: all")
    arguments = parser.parse_args()
    threading.Thread(target=end_with_parent, args=(arguments.parent_pid,), name="parent", daemon=True).start()
    if arguments.cores:
        os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    channel = socket.socket(fileno=arguments.channel_fd)
    # The engine core must not keep the channel open when this process is gone.
    channel.set_inheritable(False)
    steps, attention, phases = (
        os.environ.get(name) for name in (STEP_TRACE_VARIABLE, ATTENTION_TRACE_VARIABLE, LOAD_PHASE_VARIABLE)
    )
    process = EngineProcess(
        channel,
        lambda load: VllmEngine(
            load.model, block_size=load.block_size, gpus=load.gpus, attention_reason=load.attention_reason
        ),
        StepTraces(Path(steps), Path(attention)) if steps and attention else None,
        prepare=import_vllm,
        phases=Path(phases) if phases else None,
    )
    signal.signal(signal.SIGTERM, process.stop)
    process.serve()
    sys.stdout.flush()
    sys.stderr.flush()
    # What is left is memory. To take the interpreter apart with torch in it takes seconds, for which a GPU would wait.
    os._exit(0)


def _calibrate(engine: Engine, command: Load) -> Calibration | None:
    model = command.model.id + (f"@{command.model.revision}" if command.model.revision else "")
    return calibrate(engine, model=model, seconds=command.calibration_seconds, default=command.default_rates)


def _one_line(error: Exception) -> str:
    text = error.message if isinstance(error, BatchLLMError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:MESSAGE_CHARACTERS]


if __name__ == "__main__":
    main()
