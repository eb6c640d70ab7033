"""What a process leaves that is killed ends with it, or goes with the next one."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from batchllm_operators.process_identity import is_surely_gone, this_process
from batchllm_operators.temporary_folders import OwnedFolder, upload_folder

SERVER = """
import subprocess, sys, time
from batchllm_flows.prefect_server import _end_with_this_process
from batchllm_operators.process_identity import this_process
server = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"],
    stdout=subprocess.PIPE, start_new_session=True)
server.stdout.readline()
_end_with_this_process(server)
print(server.pid, flush=True)
time.sleep(600)
"""
FOLDER = """
import sys, time
from batchllm_operators.temporary_folders import OwnedFolder
folder = OwnedFolder("of-a-test")
print(folder.name, flush=True)
time.sleep(600)
"""


STARTING = """
import os
os.environ.pop("PREFECT_API_URL", None)
from batchllm_flows.prefect_server import prepare_prefect, require_server
prepare_prefect(120)
print("prepared", flush=True)
require_server()
"""


def started(script: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_the_temporary_server_of_a_killed_run_ends() -> None:
    run, pid = started(SERVER)
    kill_and_wait_for(run, int(pid))


def test_a_temporary_server_that_is_still_starting_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    run, said = started(STARTING)
    assert said == "prepared"
    deadline = time.monotonic() + 120
    while (server := server_that_is_watched(run.pid)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill_and_wait_for(run, server)


def server_that_is_watched(pid: int) -> int | None:
    """The server that the watcher, a child of the main thread of a process, has been told to end."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):
            command = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if any(b"pidfd_open" in word for word in command):
                return int(command[-2])
    return None


def kill_and_wait_for(run: subprocess.Popen[str], child: int) -> None:
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    identity = this_process().model_copy(update={"pid": child, "started": fields[19]})
    assert not is_surely_gone(identity)
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 60
    while not is_surely_gone(identity):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_folders_of_killed_processes_go_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    killed, left = started(FOLDER)
    living, kept = started(FOLDER)
    try:
        killed.kill()
        killed.wait()
        (tmp_path / "batchllm-of-a-test-foreign").mkdir()
        assert Path(left).exists()
        with OwnedFolder("of-a-test") as own:
            assert not Path(left).exists()
            assert Path(kept).exists()
            assert Path(own).exists()
        assert not Path(own).exists()
        assert (tmp_path / "batchllm-of-a-test-foreign").exists(), "whose that is nobody says"
    finally:
        living.kill()
        living.wait()


def test_threads_that_upload_at_the_same_moment_share_a_folder_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    waiting = threading.Barrier(8)

    def ask(_number: int) -> Path:
        waiting.wait(60)
        return upload_folder()

    with ThreadPoolExecutor(8) as threads:
        folders = set(threads.map(ask, range(8)))
    assert len(folders) == 1
    assert folders.pop().exists()
    assert len(list(tmp_path.iterdir())) == 1
