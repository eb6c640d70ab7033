"""How the driver tells of engines that are lost, on links that fail at the moments that no real one can be made to."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from batchllm_operators.errors import EngineDiedError
from batchllm_operators.execute.driver import Deadlines, EngineDriver
from batchllm_operators.execute.messages import Event, Load, Run, Shutdown
from batchllm_operators.specs.execution import ModelSpec
from tests.execute.told_links import KILLED, ToldLink

LOAD = Load(model=ModelSpec(id="m"), block_size=64, gpus=1, task="generate")


class BusyLink(ToldLink):
    """Takes bundles and computes nothing."""

    def run(self, command: Run, number: int) -> None:  # noqa: ARG002 - nothing is told of it
        self.entered.set()


class SlowKillLink(BusyLink):
    """Takes its time to be killed, as a process group with GPU memory does."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_to_end = threading.Event()
        self.may_end = threading.Event()

    def kill(self) -> None:
        self.asked_to_end.set()
        assert self.may_end.wait(30)
        super().kill()


class BlindLink(BusyLink):
    """Says nothing until the test lets it, so that its death is known before it is heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.may_receive = threading.Event()

    def receive(self, timeout_s: float) -> Event | None:
        if self.entered.is_set():
            assert self.may_receive.wait(30)
        return super().receive(timeout_s)

    def kill(self) -> None:
        super().kill()
        self.may_receive.set()


class BrokenLink(BusyLink):
    """Fails in ways that its contract does not name, once it has a bundle."""

    def receive(self, timeout_s: float) -> Event | None:
        if self.entered.is_set():
            raise RuntimeError("the other side was taken apart")
        return super().receive(timeout_s)


class DeafLink(BusyLink):
    """Cannot be told to shut down."""

    def send(self, command: Load | Run | Shutdown) -> None:
        if isinstance(command, Shutdown):
            raise RuntimeError("no such actor")  # noqa: TRY004 - the type of the command is as it should be
        super().send(command)


def driven(link: ToldLink, *, stall_s: float = 30) -> EngineDriver:
    driver = EngineDriver(link, Deadlines(load_s=30, stall_s=stall_s, close_grace_s=0.1))
    driver.load(LOAD)
    return driver


def running(driver: EngineDriver, work: Any, threads: ThreadPoolExecutor) -> Future[None]:
    """A bundle that the engine computes for ever, in a thread."""
    command = work.run_command(work.write_bundle())

    def run() -> None:
        with closing(driver.run(command)) as events:
            for _ in events:
                pass

    return threads.submit(run)


def test_an_engine_that_is_closed_because_it_was_found_dead_is_told_as_dead(work: Any) -> None:
    link = BlindLink()
    driver = driven(link)
    with ThreadPoolExecutor(1) as threads:
        bundle = running(driver, work, threads)
        assert link.entered.wait(30)
        link.ended = KILLED
        assert not driver.usable
        driver.close()
        with pytest.raises(EngineDiedError, match="engine 0 died while running: killed by signal 9"):
            bundle.result(30)


def test_an_engine_that_is_closed_while_a_silent_one_is_killed_is_told_as_silent(work: Any) -> None:
    link = SlowKillLink()
    driver = driven(link, stall_s=0.1)
    with ThreadPoolExecutor(2) as threads:
        bundle = running(driver, work, threads)
        assert link.asked_to_end.wait(30)
        assert not driver.usable
        closed = threads.submit(driver.close)
        link.may_end.set()
        with pytest.raises(EngineDiedError, match=r"no sign of life for 0\.1 s"):
            bundle.result(30)
        closed.result(30)
    assert link.closed


def test_a_link_that_fails_in_a_way_of_its_own_is_a_lost_engine(work: Any) -> None:
    link = BrokenLink()
    driver = driven(link)
    lost = "engine 0 was lost while running: its link failed with RuntimeError: the other side was taken apart"
    with ThreadPoolExecutor(1) as threads, pytest.raises(EngineDiedError, match=lost):
        running(driver, work, threads).result(30)
    assert not driver.usable
    driver.close()
    assert link.closed


def test_an_engine_that_cannot_be_told_to_shut_down_is_killed_all_the_same() -> None:
    link = DeafLink()
    driver = driven(link)
    with pytest.raises(RuntimeError, match="no such actor"):
        driver.close()
    assert link.ended == KILLED
    assert link.closed
