"""Runs of a job that are killed by SIGKILL, again and again, and what comes out in the end."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq

from batchllm_operators.merge.claim import IN_PROGRESS_FILE
from batchllm_operators.store import Store
from batchllm_operators.work.layout import LEASE_FILE
from benchmarks.fault_jobs import COMMAND, differences, job, output
from benchmarks.fault_jobs import rows as rows_of_documents
from benchmarks.faults_run import run_once

STEP_SECONDS = 0.01
FIGURES = ("rows_lost", "rows_twice", "rows_wrong", "orphans", "leftover_files")
ORPHAN_SECONDS = 30.0
"""How long a process that belonged to a killed run may take to notice that, before it counts as an orphan."""
_IMPORTED_LATER = ("transformers.models.auto.tokenization_auto", "numba", "matplotlib.figure")
"""What a run imports when it needs it."""
MARK = "BATCHLLM_FAULTS_RUN"
"""Variable of the environment by which processes of a run are found."""


class Run(Protocol):
    """A run under way."""

    def wait(self, seconds: float | None) -> int | None:
        """Its exit code; None where it has not ended after so many seconds."""

    def kill(self) -> None:
        """End it by SIGKILL."""


@dataclass
class Kills:
    """What is killed: a way to start a run, and the folder where all of it happens."""

    start: Callable[[Path], Run]
    """Starts a run of the job in a file."""
    values: Callable[[str, str], dict[str, Any]]
    """The job, as JSON values, of an input and a sink."""
    rows: int
    folder: Path
    warms: bool = False
    """Whether the first run takes longer than all others, so that a second one tells how long a run takes."""

    def measure(self, count: int, chance: random.Random) -> dict[str, Any]:
        """Kill so many runs, each at a moment drawn from the time of an undisturbed one.

        Whenever a run completes, its output is held against that of the undisturbed one, and the next job begins.
        """
        self.folder.mkdir()
        pq.write_table(rows_of_documents(self.rows), self.folder / "in.parquet")
        log = self.folder / "answered"
        log.touch()
        if self.warms:
            self._complete("warm")
            log.write_text("")
        began = time.monotonic()
        self._complete("undisturbed")
        seconds, expected = time.monotonic() - began, output(Store(str(self.folder / "undisturbed")))
        requests = len(log.read_text().splitlines())
        totals, share, done, number = Counter[str](), 0.0, 0, 0
        while done < count:
            name, number = f"job-{number}", number + 1
            log.write_text("")
            while True:
                before = Counter(log.read_text().splitlines())
                run = self._start(name)
                code = run.wait(None if done >= count else chance.uniform(0, seconds))
                if code is None:
                    run.kill()
                    done += 1
                answered = Counter(log.read_text().splitlines()) - before
                again = sum(times for key, times in answered.items() if key in before)
                share = max(share, again / max(requests, 1))
                if code == 0:
                    break
                if code is not None:
                    raise SystemExit(f"a run that was not killed failed with {code}, see {self.folder / 'log'}")
            totals += differences(expected, output(Store(str(self.folder / name))))
            left = self._left_in(self.folder / name)
            if left:
                print(f"{name}: left are {', '.join(map(str, left))}", file=sys.stderr)
            totals["leftover_files"] += len(left)
        totals["orphans"] = orphans()
        measured = {"recomputed_share_max": round(share, 4)} if requests else {}
        return {"kills": done, "jobs": number, **measured, **{name: totals[name] for name in FIGURES}}

    def _start(self, name: str) -> Run:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(self.values(str(self.folder / "in.parquet"), str(self.folder / name))))
        return self.start(path)

    def _complete(self, name: str) -> None:
        if self._start(name).wait(None) != 0:
            raise SystemExit(f"the undisturbed run failed, see {self.folder / 'log'}")

    @staticmethod
    def _left_in(sink: Path) -> list[Path]:
        """Files that only a run under way has a use for."""
        names = (IN_PROGRESS_FILE, LEASE_FILE)
        return [path for path in sink.rglob("*") if path.name.startswith(".partial-") or path.name in names]


def scripted_kills(folder: Path, model: str, rows: int = 240) -> Kills:
    """Runs on a scripted engine, each in a process that was prepared by one which has all modules loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.faults_run", *_IMPORTED_LATER])

    def start(path: Path) -> Run:
        arguments = (path, folder / "answered", STEP_SECONDS, folder / "log")
        process = context.Process(target=run_once, args=arguments)
        process.start()
        return _PreparedRun(process)

    return Kills(start, lambda source, sink: job(source, sink, model), rows, folder, warms=True)


def real_kills(folder: Path, model: str, rows: int = 120) -> Kills:
    """Runs of the command line on the real engine, with the tiny model."""

    def values(source: str, sink: str) -> dict[str, Any]:
        wanted = job(source, sink, model)
        engine = {"enforce_eager": True, "num_gpu_blocks_override": 512, "max_num_seqs": 16}
        wanted["model"] |= {"engine_args": engine, "dtype": "float32"}
        wanted["execution"] |= {"backend": "local"}
        return wanted

    def start(path: Path) -> Run:
        command = [*COMMAND, "run", str(path), "--quiet"]
        environment = {**os.environ, MARK: "1"}
        with (folder / "log").open("ab") as log:
            return _CommandRun(subprocess.Popen(command, stdout=log, stderr=log, env=environment))

    return Kills(start, values, rows, folder)


class _PreparedRun:
    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process

    def wait(self, seconds: float | None) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


class _CommandRun:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def wait(self, seconds: float | None) -> int | None:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Only the command itself: its engines have to notice that they are alone."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def orphans() -> int:
    """Processes of killed runs that go on after `ORPHAN_SECONDS`."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (found := _marked()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def _marked() -> int:
    count = 0
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            count += f"\0{MARK}=".encode() in b"\0" + file.read_bytes()
        except OSError:
            continue  # it has ended meanwhile, or is another user's
    return count
