"""No silence: what engines do until their first tokens is told when it changes, and at least every 10 s."""

from __future__ import annotations

import threading

from batchllm_flows.engine_status import EngineStatus
from batchllm_operators.execute.messages import EnginePhase, Loading


class Told:
    """A status on a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.lines: list[str] = []
        self.status = EngineStatus(self.lines.append, clock=lambda: self.now)

    def at(self, seconds: float) -> EngineStatus:
        self.now = 100.0 + seconds
        return self.status


def test_each_phase_is_told_and_repeated_with_its_seconds_before_it_is_quiet_for_long() -> None:
    told = Told()
    told.at(0).tell("engine 0", Loading(phase=EnginePhase.ENVIRONMENT, detail="log: /tmp/engine-0.log"))
    for seconds in range(1, 13):
        told.at(seconds).repeat()
    told.at(14).tell("engine 0", Loading(phase=EnginePhase.DOWNLOAD, detail="1 MB"))
    told.at(20).tell("engine 0", Loading(phase=EnginePhase.DOWNLOAD, detail="1.2 GB"))
    told.at(25).repeat()
    told.at(26).tell("engine 0", Loading(phase=EnginePhase.COMPILATION))
    for seconds in range(27, 120):
        told.at(seconds).repeat()
    told.at(120).tell("engine 0", None)
    told.at(200).repeat()
    assert told.lines == [
        "engine 0: environment (importing vLLM), log: /tmp/engine-0.log",
        "engine 0: environment (importing vLLM), log: /tmp/engine-0.log, 10 s",
        "engine 0: download, 1 MB (14 s in all)",
        "engine 0: download, 1.2 GB, 11 s (25 s in all)",
        "engine 0: compilation (26 s in all)",
        *(f"engine 0: compilation, {10 * n} s ({_said(26 + 10 * n)} in all)" for n in range(1, 6)),
        *(f"engine 0: compilation, {_said(10 * n)} ({_said(26 + 10 * n)} in all)" for n in range(6, 10)),
    ]


def _said(seconds: int) -> str:
    return f"{seconds} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def test_one_line_says_what_all_engines_do_and_nothing_where_they_compute() -> None:
    told = Told()
    assert told.status.line() is None
    told.at(0).tell("engine 0", Loading(phase=EnginePhase.WEIGHTS))
    told.at(5).tell("engine 1", Loading(phase=EnginePhase.FIRST_TOKENS))
    assert told.at(8).line() == "engine 0: weights, 8.0 s; engine 1: first tokens, 3.0 s"
    told.status.tell("engine 0", None)
    told.status.tell("engine 1", None)
    told.status.tell("engine 1", None)
    assert told.status.line() is None


def test_a_thread_of_its_own_repeats_what_goes_on() -> None:
    twice = threading.Event()
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            twice.set()

    with EngineStatus(log, repeat_seconds=0.01) as status:
        status.tell("engine 0", Loading(phase=EnginePhase.WEIGHTS))
        assert twice.wait(30)
    assert all(line.startswith("engine 0: weights") for line in lines)
