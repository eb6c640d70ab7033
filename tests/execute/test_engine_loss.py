"""What happens when engines die, hang, cannot be loaded, or are closed while they work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchllm_operators.errors import TerminalError, TransientError
from batchllm_operators.execute.handle import BundleCallbacks, LocalEngineHandle
from batchllm_operators.execute.messages import BundleCounts, Load
from batchllm_operators.execute.pool import EnginePool
from batchllm_operators.specs.execution import ExecutionSpec, ModelSpec
from batchllm_operators.specs.sampling import SamplingParameters

pytestmark = pytest.mark.engine

Gone = Callable[[int], bool]
MakeHandle = Callable[..., LocalEngineHandle]


def nothing(*_: object) -> None:
    return None


QUIET = BundleCallbacks(nothing, nothing, nothing)


@pytest.fixture
def handles() -> list[LocalEngineHandle]:
    return []


@pytest.fixture
def pool(
    tiny_model: ModelSpec, work: Any, make_handle: MakeHandle, handles: list[LocalEngineHandle]
) -> Iterator[EnginePool]:
    """A pool of one engine, whose handles the test can see."""

    def make(_index: int) -> LocalEngineHandle:
        handles.append(make_handle(stall_timeout_s=5.0))
        return handles[-1]

    with EnginePool(
        model=tiny_model,
        execution=ExecutionSpec(part_rows=4),
        block_size=32,
        sampling=SamplingParameters(),
        work=work.store,
        make_handle=make,
    ) as pool:
        yield pool


def test_a_killed_or_stopped_engine_is_replaced_and_only_unfinished_requests_are_computed_again(
    pool: EnginePool, handles: list[LocalEngineHandle], work: Any, group_is_gone: Gone
) -> None:
    bundle = work.write_bundle(requests=48, max_tokens=64)

    def kill(_: str, counts: BundleCounts) -> None:
        # Parts are written beside the computing: what is counted need not be visible yet.
        if counts.requests >= 8 and work.store.names("results"):
            os.kill(handles[0].pid, signal.SIGKILL)

    with pytest.raises(TransientError, match="killed by signal 9") as caught:
        pool.run_bundle(bundle, kill)
    assert caught.value.bundle == bundle.name
    assert group_is_gone(handles[0].pid)
    written = work.answers(tuple(work.store.names("results")))
    assert len(written) >= 4

    result = pool.run_bundle(bundle, nothing)
    assert len(handles) == 2
    assert result.load_seconds > 0
    assert result.requests == 48
    assert len(work.answers(result.parts)) == 48
    assert result.completion_tokens == 48 * 64

    with pytest.raises(TransientError, match="no sign of life for 5 s"):
        pool.run_bundle(
            work.write_bundle("next", requests=64, max_tokens=64), lambda *_: os.kill(handles[1].pid, signal.SIGSTOP)
        )
    assert group_is_gone(handles[1].pid)


def test_an_engine_that_is_told_to_terminate_writes_its_finished_rows_first(
    pool: EnginePool, handles: list[LocalEngineHandle], work: Any, group_is_gone: Gone
) -> None:
    seen = 0

    def terminate(_: str, counts: BundleCounts) -> None:
        nonlocal seen
        seen = counts.requests
        if counts.requests >= 6:
            os.kill(handles[0].pid, signal.SIGTERM)

    with pytest.raises(TransientError, match="told to stop"):
        pool.run_bundle(work.write_bundle(requests=400, max_tokens=200), terminate)
    assert len(work.answers(tuple(work.store.names("results")))) >= seen >= 6
    assert group_is_gone(handles[0].pid)


def test_closing_from_another_thread_ends_a_running_bundle_and_keeps_finished_rows(
    pool: EnginePool, handles: list[LocalEngineHandle], work: Any, group_is_gone: Gone
) -> None:
    assert pool.run_bundle(work.write_bundle("first"), nothing).load_seconds > 0
    assert pool.run_bundle(work.write_bundle("second"), nothing).load_seconds == 0
    before = set(work.store.names("results"))
    some_done = threading.Event()

    def close() -> None:
        some_done.wait(60)
        pool.close()

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(TerminalError, match="closed"):
        pool.run_bundle(
            work.write_bundle("third", requests=400, max_tokens=200),
            lambda _, counts: some_done.set() if counts.requests >= 6 else None,
        )
    closer.join()
    assert group_is_gone(handles[0].pid)
    kept = work.answers(tuple(set(work.store.names("results")) - before))
    assert 6 <= len(kept) < 400
    with pytest.raises(TerminalError, match="closed"):
        pool.run_bundle(work.write_bundle("fourth"), nothing)


def test_an_engine_core_in_its_own_process_is_killed_with_its_dead_leader(
    make_handle: MakeHandle,
    load_command: Load,
    work: Any,
    group_is_gone: Gone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # vLLM's default on GPUs
    handle = make_handle()
    handle.load(load_command)
    assert handle.run_bundle(work.run_command(work.write_bundle()), QUIET).counts.requests == 12
    with pytest.raises(TransientError, match="killed by signal 9"):
        handle.run_bundle(
            work.run_command(work.write_bundle(requests=400, max_tokens=200)),
            BundleCallbacks(lambda *_: os.kill(handle.pid, signal.SIGKILL), nothing, nothing),
        )
    assert not handle.usable
    assert group_is_gone(handle.pid)


def test_a_model_folder_that_does_not_exist_is_named_and_not_tried_again(tmp_path: Path, work: Any) -> None:
    missing = str(tmp_path / "no-such-model")
    with EnginePool(
        model=ModelSpec(id=missing),
        execution=ExecutionSpec(),
        block_size=32,
        sampling=SamplingParameters(),
        work=work.store,
    ) as pool:
        for _ in range(2):
            with pytest.raises(TerminalError, match="no such folder") as caught:
                pool.run_bundle(work.write_bundle(), nothing)
            assert missing in str(caught.value)


def test_an_unknown_engine_argument_is_refused_with_the_nearest_name(
    make_handle: MakeHandle, load_command: Load, group_is_gone: Gone
) -> None:
    model = load_command.model.model_copy(update={"engine_args": {"max_num_seq": 8}})
    handle = make_handle()
    with pytest.raises(TerminalError, match="no engine argument 'max_num_seq'; did you mean 'max_num_seqs'"):
        handle.load(load_command.model_copy(update={"model": model}))
    assert not handle.usable
    assert group_is_gone(handle.pid)


def test_a_model_that_does_not_load_says_why(make_handle: MakeHandle, load_command: Load) -> None:
    arguments = {**load_command.model.engine_args, "kv_cache_memory_bytes": 1024}
    model = load_command.model.model_copy(update={"engine_args": arguments})
    with pytest.raises(TerminalError, match="No available memory for the cache blocks"):
        make_handle().load(load_command.model_copy(update={"model": model}))


def test_an_interpreter_without_this_package_is_a_terminal_error_with_its_last_words(
    make_handle: MakeHandle, load_command: Load, tmp_path: Path
) -> None:
    with pytest.raises(TerminalError, match="cannot start"):
        make_handle(python=str(tmp_path / "python")).load(load_command)
    strange = tmp_path / "strange-python"
    strange.write_text("#!/bin/sh\necho no module of that name\nexit 3\n")
    strange.chmod(0o755)
    with pytest.raises(TerminalError, match=r"exit code 3(.|\n)*no module of that name"):
        make_handle(python=str(strange)).load(load_command)


def test_a_model_that_takes_too_long_to_load_is_given_up(
    make_handle: MakeHandle, load_command: Load, group_is_gone: Gone
) -> None:
    handle = make_handle(load_timeout_s=0.3)
    with pytest.raises(TransientError, match="loading the model"):
        handle.load(load_command)
    assert group_is_gone(handle.pid)


def test_closing_while_a_model_loads_does_not_wait_for_it(
    make_handle: MakeHandle, load_command: Load, tmp_path: Path, group_is_gone: Gone
) -> None:
    log = tmp_path / "loading.log"
    handle = make_handle(log_file=log)

    def close() -> None:
        while not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        handle.close()

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(TerminalError, match="closed"):
        handle.load(load_command)
    closer.join()
    assert group_is_gone(handle.pid)


def test_the_engine_process_ends_when_its_parent_is_killed(tmp_path: Path, group_is_gone: Gone) -> None:
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import os, socket, subprocess, sys, time\n"
        "ours, theirs = socket.socketpair()\n"
        "engine = subprocess.Popen(\n"
        "    [sys.executable, '-m', 'batchllm_operators.execute.engine_process',\n"
        "     '--channel-fd', str(theirs.fileno()), '--parent-pid', str(os.getpid())],\n"
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
        [sys.executable, str(parent)], stdout=subprocess.PIPE, text=True, start_new_session=True
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


def test_an_engine_left_in_the_midst_of_a_bundle_by_a_failing_callback_is_not_used_again(
    make_handle: MakeHandle, load_command: Load, work: Any, told_engine: Callable[..., str], group_is_gone: Gone
) -> None:
    handle = make_handle(python=told_engine(step_seconds=0.01))
    handle.load(load_command)

    def fail(*_: object) -> None:
        raise KeyError("in the callback")

    with pytest.raises(KeyError, match="in the callback"):
        handle.run_bundle(work.run_command(work.write_bundle()), BundleCallbacks(fail, nothing, nothing))
    assert not handle.usable
    assert group_is_gone(handle.pid)
