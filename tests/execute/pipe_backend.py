"""An engine backend as a package from outside adds it: engines in processes of `multiprocessing`, over a pipe."""

import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing.connection import wait
from threading import Lock, Thread

from batchllm_operators.execute.backends import Death, Place
from batchllm_operators.execute.worker import EngineLoop

SPAWN = multiprocessing.get_context("spawn")


def serve(pipe, make_maker) -> None:
    sending = Lock()

    def send(event) -> None:
        with sending:
            pipe.send(event)

    def receive() -> None:
        with suppress(EOFError):
            while True:
                loop.take(pipe.recv())
        loop.stop()

    loop = EngineLoop(send, make_maker(), on_abandon=lambda: os.kill(os.getpid(), signal.SIGKILL))
    Thread(target=receive, daemon=True).start()
    loop.serve()


class PipeLink:
    log = ""

    def __init__(self, place, make_maker) -> None:
        self.place, self._lock = place, Lock()
        self._pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=serve, args=(theirs, make_maker), daemon=True)
        self._process.start()
        theirs.close()
        self.close, self.silence = self._pipe.close, str

    def send(self, command) -> None:
        with self._lock:
            self._pipe.send(command)

    def receive(self, timeout_s):
        return self._pipe.recv() if self._pipe.poll(timeout_s) else None

    def death(self, wait_s=0.0):
        if not wait([self._process.sentinel], wait_s):
            return None
        with self._lock:  # two threads that wait for one process can both miss its exit code
            self._process.join()
        return Death.by_exit_code(self._process.exitcode)

    def kill(self) -> None:
        self._process.kill()
        self.death(None)


class PipeBackend:
    def __init__(self, engines, make_maker) -> None:
        self._engines, self._make_maker = engines, make_maker
        self.keep_logs = self.close = lambda *_: []

    def places(self) -> list[Place]:
        return [Place(index=index) for index in range(self._engines)]

    def start(self, place: Place) -> PipeLink:
        return PipeLink(place, self._make_maker)
