"""What happens when engines die, hang, cannot be loaded, or are closed while they work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from batchllm_operators.errors import EngineDiedError, TerminalError, TransientError
from batchllm_operators.execute.messages import BundleCounts, BundleEvent, Load, Progress
from batchllm_operators.specs.execution import ModelSpec
from tests.execute.engines import StartedEngine, WatchedRuns

pytestmark = pytest.mark.engine

Gone = Callable[[int], bool]
MakeEngine = Callable[..., StartedEngine]


@pytest.fixture
def pool(load_command: Load, work: Any) -> Iterator[WatchedRuns]:
    runs = WatchedRuns(work.engine_work(load_command, part_rows=4), stall_s=5.0)
    with runs.fleet:
        yield runs


def test_a_killed_or_stopped_engine_is_replaced_and_only_unfinished_requests_are_computed_again(
    pool: WatchedRuns, work: Any, group_is_gone: Gone
) -> None:
    bundle = work.write_bundle(requests=48, max_tokens=64)

    def kill(_: str, counts: BundleCounts) -> None:
        # Parts are written beside the computing: what is counted need not be visible yet.
        if counts.requests >= 8 and work.store.names("results"):
            os.kill(pool.links[0].pid, signal.SIGKILL)

    with pytest.raises(TransientError, match="killed by signal 9") as caught:
        pool.run(bundle, kill)
    assert caught.value.bundle == bundle.name
    assert group_is_gone(pool.links[0].pid)
    written = work.answers(tuple(work.store.names("results")))
    assert len(written) >= 4

    result = pool.run(bundle)
    assert len(pool.links) == 2
    assert result.load_seconds > 0
    assert result.requests == 48
    assert len(work.answers(result.parts)) == 48
    assert result.completion_tokens == 48 * 64

    with pytest.raises(TransientError, match="no sign of life for 5 s"):
        pool.run(
            work.write_bundle("next", requests=64, max_tokens=64), lambda *_: os.kill(pool.links[1].pid, signal.SIGSTOP)
        )
    assert group_is_gone(pool.links[1].pid)


def test_an_engine_that_is_told_to_terminate_writes_its_finished_rows_first(
    pool: WatchedRuns, work: Any, group_is_gone: Gone
) -> None:
    seen = 0

    def terminate(_: str, counts: BundleCounts) -> None:
        nonlocal seen
        seen = counts.requests
        if counts.requests >= 6:
            os.kill(pool.links[0].pid, signal.SIGTERM)

    with pytest.raises(TransientError, match="told to stop"):
        pool.run(work.write_bundle(requests=400, max_tokens=200), terminate)
    assert len(work.answers(tuple(work.store.names("results")))) >= seen >= 6
    assert group_is_gone(pool.links[0].pid)


def test_closing_from_another_thread_ends_a_running_bundle_and_keeps_finished_rows(
    pool: WatchedRuns, work: Any, group_is_gone: Gone
) -> None:
    assert pool.run(work.write_bundle("first")).load_seconds > 0
    assert pool.run(work.write_bundle("second")).load_seconds == 0
    before = set(work.store.names("results"))
    some_done = threading.Event()

    def close() -> None:
        some_done.wait(60)
        pool.fleet.close()

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(TerminalError, match="closed"):
        pool.run(
            work.write_bundle("third", requests=400, max_tokens=200),
            lambda _, counts: some_done.set() if counts.requests >= 6 else None,
        )
    closer.join()
    assert group_is_gone(pool.links[0].pid)
    kept = work.answers(tuple(set(work.store.names("results")) - before))
    assert 6 <= len(kept) < 400
    with pytest.raises(TerminalError, match="closed"):
        pool.run(work.write_bundle("fourth"))


def test_an_engine_core_in_its_own_process_is_killed_with_its_dead_leader(
    make_engine: MakeEngine,
    load_command: Load,
    work: Any,
    group_is_gone: Gone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # vLLM's default on GPUs
    engine = make_engine()
    engine.driver.load(load_command)
    assert engine.run(work.run_command(work.write_bundle())).counts.requests == 12
    with pytest.raises(TransientError, match="killed by signal 9"):
        engine.run(
            work.run_command(work.write_bundle(requests=400, max_tokens=200)),
            lambda _: os.kill(engine.pid, signal.SIGKILL),
        )
    assert not engine.driver.usable
    assert group_is_gone(engine.pid)


def test_a_model_folder_that_does_not_exist_is_named_and_not_tried_again(tmp_path: Path, work: Any) -> None:
    missing = str(tmp_path / "no-such-model")
    pool = WatchedRuns(work.engine_work(Load(model=ModelSpec(id=missing), block_size=32, gpus=1, task="generate")))
    with pool.fleet:
        for _ in range(2):
            with pytest.raises(TerminalError, match="no such folder") as caught:
                pool.run(work.write_bundle())
            assert missing in str(caught.value)
    assert len(pool.links) == 1


def test_an_unknown_engine_argument_is_refused_with_the_nearest_name(
    make_engine: MakeEngine, load_command: Load, group_is_gone: Gone
) -> None:
    model = load_command.model.model_copy(update={"engine_args": {"max_num_seq": 8}})
    engine = make_engine()
    with pytest.raises(TerminalError, match="no engine argument 'max_num_seq'; did you mean 'max_num_seqs'"):
        engine.driver.load(load_command.model_copy(update={"model": model}))
    assert not engine.driver.usable
    assert group_is_gone(engine.pid)


def test_a_model_that_does_not_load_says_why(make_engine: MakeEngine, load_command: Load) -> None:
    arguments = {**load_command.model.engine_args, "kv_cache_memory_bytes": 1024}
    model = load_command.model.model_copy(update={"engine_args": arguments})
    with pytest.raises(TerminalError, match="No available memory for the cache blocks"):
        make_engine().driver.load(load_command.model_copy(update={"model": model}))


def test_an_interpreter_without_this_package_is_a_terminal_error_with_its_last_words(
    make_engine: MakeEngine, load_command: Load, tmp_path: Path
) -> None:
    with pytest.raises(TerminalError, match="cannot start"):
        make_engine(python=str(tmp_path / "python"))
    strange = tmp_path / "strange-python"
    strange.write_text("#!/bin/sh\necho no module of that name\nexit 3\n")
    strange.chmod(0o755)
    with pytest.raises(TerminalError, match=r"exit code 3(.|\n)*no module of that name"):
        make_engine(python=str(strange)).driver.load(load_command)


def test_a_model_that_takes_too_long_to_load_is_given_up(
    make_engine: MakeEngine, load_command: Load, group_is_gone: Gone
) -> None:
    engine = make_engine(load_s=0.3)
    with pytest.raises(TransientError, match="loading the model"):
        engine.driver.load(load_command)
    assert group_is_gone(engine.pid)


def test_closing_while_a_model_loads_does_not_wait_for_it(
    make_engine: MakeEngine, load_command: Load, group_is_gone: Gone
) -> None:
    engine = make_engine()
    log = Path(engine.link.log)

    def close() -> None:
        while not log.stat().st_size:
            time.sleep(0.01)
        engine.driver.close()

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(TerminalError, match="closed"):
        engine.driver.load(load_command)
    closer.join()
    assert group_is_gone(engine.pid)


def test_the_engine_process_ends_when_its_parent_is_killed(tmp_path: Path, group_is_gone: Gone) -> None:
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import os, socket, subprocess, sys, time\n"
        "ours, theirs = socket.socketpair()\n"
        "engine = subprocess.Popen(\n"
        "    [sys.executable, '-m', 'batchllm_operators.execute.backends.local_worker',\n"
        "     '--channel-fd', str(theirs.fileno()), '--parent-pid', str(os.getpid()), '--folder', sys.argv[1]],\n"
        "    pass_fds=[theirs.fileno()], start_new_session=True)\n"
        "assert b'started' in ours.recv(100)\n"
        "print(engine.pid, flush=True)\n"
        "os.set_inheritable(ours.fileno(), True)\n"
        # Another process keeps the socket open, so that only the parent's death can be what the engine sees.
        "subprocess.Popen(['sleep', '30'], close_fds=False, stdout=subprocess.DEVNULL)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, str(parent), str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            engine = int(process.stdout.readline())
            assert process.stdout.readline() == "ready\n"
            assert not group_is_gone(engine)
            process.kill()
            deadline = time.monotonic() + 60
            while not group_is_gone(engine) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert group_is_gone(engine)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["two_bundles", "one_bundle"])
def test_sigterm_keeps_the_finished_rows_of_all_bundles(
    make_engine: MakeEngine, load_command: Load, told_engine: Callable[..., str], work: Any, name: str
) -> None:
    engine = make_engine(python=told_engine(capacity=8, step_seconds=0.01))
    engine.driver.load(load_command)
    bundles = [work.write_bundle("first", requests=10, max_tokens=2, long_rows={8, 9})]
    if name == "two_bundles":
        bundles.append(work.write_bundle("second", requests=2000, max_tokens=2, first=100))
    answered: dict[str, int] = {}
    enough = threading.Event()

    def see(event: BundleEvent) -> None:
        if isinstance(event, Progress):
            answered[event.bundle] = event.counts.requests
        if answered.get(bundles[0].name) == 8 and answered.get(bundles[-1].name, 0) >= 4:
            enough.set()

    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(engine.run, work.run_command(bundle, part_rows=1), see) for bundle in bundles]
        assert enough.wait(60)
        before = dict(answered)
        os.kill(engine.pid, signal.SIGTERM)
        for bundle, run in zip(bundles, runs, strict=True):
            with pytest.raises(TransientError, match="told to stop") as caught:
                run.result(60)
            assert not isinstance(caught.value, EngineDiedError)
            assert caught.value.bundle == bundle.name
    kept = work.answers(tuple(work.store.names("results")))
    assert sum(number < 100 for number in kept) >= before[bundles[0].name] == 8
    if name == "two_bundles":
        assert sum(number >= 100 for number in kept) >= before[bundles[1].name] >= 4


def test_a_silent_engine_is_told_of_with_the_state_of_its_process(
    make_engine: MakeEngine, load_command: Load, told_engine: Callable[..., str], work: Any
) -> None:
    engine = make_engine(python=told_engine(step_seconds=0.01), stall_s=1.0)
    engine.driver.load(load_command)
    with pytest.raises(EngineDiedError, match=r"no sign of life for 1 s while running \(its process is stopped\)"):
        engine.run(work.run_command(work.write_bundle()), lambda _: os.kill(engine.pid, signal.SIGSTOP))
