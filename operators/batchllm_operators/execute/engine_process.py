"""The engine's own process: takes commands on a socket, reads bundles from the store, writes parts to the store.

    python -m batchllm_operators.execute.engine_process --channel-fd 3 --parent-pid 4711

It is the leader of a session of its own and ends the whole session when its parent is gone. Its standard output is a
log, because vLLM and torch print there. It imports no Prefect, and no vLLM before it is told to load a model.
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
from types import FrameType

from batchllm_operators.errors import BatchLLMError, TransientError
from batchllm_operators.execute.engine import Engine, VllmEngine
from batchllm_operators.execute.feeding import completions, count, known_results, read_requests
from batchllm_operators.execute.messages import (
    BundleDone,
    Failed,
    Load,
    Loaded,
    PartWritten,
    Progress,
    Run,
    Shutdown,
    Started,
    decode_command,
    encode,
)
from batchllm_operators.execute.part_writer import PartWriter
from batchllm_operators.records import Record
from batchllm_operators.store import Store

PARENT_CHECK_SECONDS = 0.5
PROGRESS_SECONDS = 0.25
MESSAGE_CHARACTERS = 2000


class EngineProcess:
    """Carries out the commands of one handle, one after the other.

    Args:
        channel: connected socket; commands come in, events go out.
        load_engine: makes the engine of a `Load` command.
    """

    def __init__(self, channel: socket.socket, load_engine: Callable[[Load], Engine]) -> None:
        self._channel = channel
        self._load_engine = load_engine
        self._engine: Engine | None = None
        # SimpleQueue, because its put may be called in a signal handler.
        self._commands: queue.SimpleQueue[Load | Run | Shutdown] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._loading = False

    def serve(self) -> None:
        """Take commands until told to shut down, or the other end is closed, or the engine breaks."""
        threading.Thread(target=self._receive, name="commands", daemon=True).start()
        self._send(Started())
        try:
            while not self._stopping.is_set():
                command = self._commands.get()
                if isinstance(command, Load):
                    self._load(command)
                elif isinstance(command, Run):
                    self._run(command)
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

    def _send(self, event: Record) -> None:
        try:
            self._channel.sendall(encode(event))
        except OSError:
            # Nobody listens any more; the reading thread sees the same and stops the process.
            self._stopping.set()

    def _load(self, command: Load) -> None:
        started = time.monotonic()
        self._loading = True
        try:
            self._engine = self._load_engine(command)
        except Exception as error:
            traceback.print_exc()
            # A model that does not load will not load the next time either, unless the network was the reason.
            transient = isinstance(error, (TransientError, ConnectionError, TimeoutError))
            self._send(Failed(message=_one_line(error), transient=transient, engine_lost=True))
            self._stopping.set()
        else:
            self._send(Loaded(seconds=time.monotonic() - started))
        finally:
            self._loading = False

    def _run(self, command: Run) -> None:
        try:
            done = self._compute(command)
        except BatchLLMError as error:
            # A fault of the store: the engine is as good as before.
            traceback.print_exc()
            transient = isinstance(error, TransientError)
            self._send(Failed(message=error.message, transient=transient, engine_lost=False, uri=error.uri))
        except Exception as error:
            traceback.print_exc()
            self._send(Failed(message=f"the engine broke: {_one_line(error)}", transient=True, engine_lost=True))
            self._stopping.set()
        else:
            self._send(done)

    def _compute(self, command: Run) -> BundleDone | Failed:
        if self._engine is None:
            raise RuntimeError(f"asked to run {command.bundle} before a model was loaded")
        started = time.monotonic()
        store = Store(command.work_uri, command.storage)
        done, counts = known_results(store, command.known_parts)
        writer = PartWriter(
            store,
            part_rows=command.part_rows,
            part_seconds=command.part_seconds,
            on_part=lambda name: self._send(PartWritten(name=name)),
        )
        requests = read_requests(store, command.bundle, command.sampling, done)
        self._send(Progress(bundle=command.bundle, counts=counts))
        told = started
        try:
            for finished in completions(self._engine, requests, self._stopping.is_set):
                counts += count(finished)
                writer.add(finished)
                if (now := time.monotonic()) - told >= PROGRESS_SECONDS:
                    self._send(Progress(bundle=command.bundle, counts=counts))
                    told = now
        finally:
            # Also when the engine broke or is told to stop: what is finished is not computed again.
            writer.flush()
        if self._stopping.is_set():
            return Failed(message="the engine was told to stop", transient=True, engine_lost=True)
        return BundleDone(counts=counts, parts=command.known_parts + writer.parts, seconds=time.monotonic() - started)


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
    process = EngineProcess(channel, lambda load: VllmEngine(load.model, block_size=load.block_size, gpus=load.gpus))
    signal.signal(signal.SIGTERM, process.stop)
    process.serve()
    sys.stdout.flush()


def _one_line(error: Exception) -> str:
    text = error.message if isinstance(error, BatchLLMError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:MESSAGE_CHARACTERS]


if __name__ == "__main__":
    main()
