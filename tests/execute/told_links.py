"""Links to engines that are none: they answer commands as the test says, to try what stands above a link."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

from batchllm_operators.cost import CPU_DEFAULT, Calibration
from batchllm_operators.execute.backends.base import Death, Place
from batchllm_operators.execute.messages import (
    AllRead,
    BundleCounts,
    BundleDone,
    Event,
    Failed,
    Load,
    Loaded,
    PartWritten,
    Progress,
    Run,
    Shutdown,
    Started,
)
from batchllm_operators.records import EngineSetting
from batchllm_operators.store import Store

CALIBRATION = Calibration(rates=CPU_DEFAULT, device="d", measured_at="2026-01-31 12:00:00", seconds=1.0)
KILLED = Death("killed by signal 9", -9)


class ToldLink:
    """Answers a bundle with what the test has put in `faults`, else with success; remembers its commands."""

    log = ""

    def __init__(self) -> None:
        self.place = Place(index=0)
        self.started = False
        self.asked_to_load = threading.Event()
        self.may_load = threading.Event()
        self.may_load.set()
        self.loads: list[Load] = []
        self.runs: list[Run] = []
        self.load_fault: Failed | None = None
        self.faults: list[Death | Failed] = []
        self.entered = threading.Event()
        self.both_entered = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.reads_all = False
        self.writes = True
        self.settings: tuple[EngineSetting, ...] = ()
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.ended: Death | None = None
        self.closed = False
        self.events.put(Started())

    def send(self, command: Load | Run | Shutdown) -> None:
        if isinstance(command, Load):
            self.loads.append(command)
            self.asked_to_load.set()
            threading.Thread(target=self.load, args=(command,), daemon=True).start()
        elif isinstance(command, Run):
            self.runs.append(command)
            threading.Thread(target=self.run, args=(command, len(self.runs)), daemon=True).start()
        else:
            self.ended = self.ended or Death("exit code 0", 0)

    def load(self, command: Load) -> None:
        assert self.may_load.wait(30)
        calibration = CALIBRATION if command.calibrate else None
        self.events.put(self.load_fault or Loaded(seconds=2.5, calibration=calibration, settings=self.settings))

    def run(self, command: Run, number: int) -> None:
        name, part = command.bundle, f"results/part-{number}.parquet"
        self.events.put(Progress(bundle=name, counts=BundleCounts(), computed=False))
        if self.writes:
            self.events.put(PartWritten(bundle=name, name=part))
        if self.reads_all:
            self.events.put(AllRead(bundle=name))
        if self.faults:
            fault = self.faults.pop(0)
            if isinstance(fault, Failed):
                self.events.put(fault.model_copy(update={"bundle": name}))
            else:
                self.ended = fault
            return
        if self.entered.is_set():
            self.both_entered.set()
        self.entered.set()
        assert self.may_go_on.wait(30)
        counts = BundleCounts(requests=1)
        self.events.put(BundleDone(bundle=name, counts=counts, parts=(*command.known_parts, part), seconds=1.0))

    def receive(self, timeout_s: float) -> Event | None:
        try:
            return self.events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def death(self, wait_s: float = 0.0) -> Death | None:  # noqa: ARG002 - a told link has ended or has not
        return self.ended

    def silence(self) -> str:
        return ""

    def kill(self) -> None:
        self.ended = self.ended or KILLED
        self.may_go_on.set()

    def close(self) -> None:
        self.closed = True


class ToldBackend:
    """Hands out the links of a test, in their order."""

    def __init__(self, links: Sequence[ToldLink], engines: int = 1) -> None:
        self.left = list(links)
        self.engines = engines
        self.closed = False

    def places(self) -> Sequence[Place]:
        return [Place(index=index) for index in range(self.engines)]

    def start(self, place: Place) -> ToldLink:
        link = self.left.pop(0)
        link.started, link.place = True, place
        return link

    def keep_logs(self, work: Store) -> list[str]:  # noqa: ARG002 - there are none
        return ["a log"]

    def close(self) -> None:
        self.closed = True
