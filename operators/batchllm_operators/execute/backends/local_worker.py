"""The process of an engine on this machine: `EngineLoop` on an inherited socket.

    python -m batchllm_operators.execute.backends.local_worker --channel-fd 3 --parent-pid 4711 --folder /tmp/engines

It is the leader of a session of its own and ends the whole session when its parent is gone. Its standard output is a
log, because vLLM and torch print there.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from batchllm_operators.execute.messages import Event, Shutdown, decode_command, encode
from batchllm_operators.execute.vllm_engine import VllmMaker
from batchllm_operators.execute.worker import EngineLoop, EngineMaker, LoopFiles, files_of_process

PARENT_CHECK_SECONDS = 0.5


def main(maker: EngineMaker | None = None, arguments: Sequence[str] | None = None) -> None:
    """Serve the commands that come on the inherited socket, then end the process.

    Args:
        maker: makes the engine; default: vLLM's.
        arguments: of the command line; default: those of this process.
    """
    parser = argparse.ArgumentParser(description="engine process; started by LocalBackend")
    parser.add_argument("--channel-fd", type=int, required=True, help="inherited socket to the driver")
    parser.add_argument("--parent-pid", type=int, required=True, help="process that this one does not outlive")
    parser.add_argument("--cores", default="", help="comma-separated CPU cores to run on; default: all")
    parser.add_argument("--folder", type=Path, required=True, help="for files that the parent removes at the end")
    told = parser.parse_args(arguments)
    threading.Thread(target=_end_with_parent, args=(told.parent_pid,), name="parent", daemon=True).start()
    if told.cores:
        os.sched_setaffinity(0, {int(core) for core in told.cores.split(",")})
    channel = socket.socket(fileno=told.channel_fd)
    # The engine core must not keep the channel open when this process is gone.
    channel.set_inheritable(False)
    _serve(channel, maker or VllmMaker(), files_of_process(told.folder))
    sys.stdout.flush()
    sys.stderr.flush()
    # What is left is memory. To take the interpreter apart with torch in it takes seconds, for which a GPU would wait.
    os._exit(0)


def _serve(channel: socket.socket, maker: EngineMaker, files: LoopFiles) -> None:
    sending = threading.Lock()

    def send(event: Event) -> None:
        with sending:
            channel.sendall(encode(event))

    def receive() -> None:
        try:
            with channel.makefile("rb") as lines:
                for line in lines:
                    command = decode_command(line)
                    if isinstance(command, Shutdown):
                        break
                    loop.take(command)
        finally:
            loop.stop()

    def on_signal(_signal: int, _frame: FrameType | None) -> None:
        loop.stop()

    # Loading cannot be interrupted, and has written nothing that would be lost.
    loop = EngineLoop(send, maker, on_abandon=lambda: os.killpg(0, signal.SIGKILL), files=files)
    signal.signal(signal.SIGTERM, on_signal)
    threading.Thread(target=receive, name="commands", daemon=True).start()
    loop.serve()


def _end_with_parent(parent_pid: int) -> None:
    """Kill this process's group as soon as its parent is gone; runs for ever, in a thread.

    PR_SET_PDEATHSIG would do that too early: it fires when the thread that started this process ends.
    """
    while os.getppid() == parent_pid:
        time.sleep(PARENT_CHECK_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
