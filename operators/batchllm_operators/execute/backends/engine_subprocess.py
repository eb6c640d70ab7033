"""The operating system's side of an engine process: start, exit code, log, and an end without survivors."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from batchllm_operators.execute.backends.death_causes import cause_of_death
from batchllm_operators.machine.memory_kills import memory_kills

GROUP_END_SECONDS = 10.0
LOG_LINES = 16
_LOG_BYTES = 65_536
_SILENT_STATES = {
    "T": "its process is stopped",
    "t": "a debugger stops its process",
    "D": "its process waits for a disk or a device",
}


class EngineSubprocess:
    """A process that leads a session of its own; all methods may be called from any thread.

    Args:
        arguments: the program and its arguments.
        environment: the variables of its environment.
        pass_fd: an open file that it inherits.
        log_file: where its output goes; appended to.

    Raises:
        OSError: there is no such program.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], *, pass_fd: int, log_file: Path
    ) -> None:
        self.log_file = log_file
        self._lock = threading.Lock()
        self._kills_before = memory_kills()
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[pass_fd],
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process id, which is that of its group and its session too."""
        return self._process.pid

    def kill(self) -> None:
        """Kill the whole group, also when its leader is dead: vLLM's engine core outlives it and holds the GPU."""
        with self._lock:
            if self._process.returncode is not None:
                return
            # The leader has not been waited for, so its id, the group's, cannot have gone to anyone else.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            _wait_until_gone(self._process.pid)

    def state(self) -> str:
        """Why a living process may be silent, by its state in `/proc`; empty where it seems to work."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return _SILENT_STATES.get(fields[0], "")

    def exit_code(self, wait_s: float) -> int | None:
        """Exit code, or minus the signal, of the process, within so many seconds; it is left to be waited for."""
        deadline = time.monotonic() + wait_s
        while True:
            with self._lock:
                if self._process.returncode is not None:
                    return self._process.returncode
                status = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if status is not None:
                return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.01)

    def last_lines(self) -> str:
        """The end of its log, to stand behind an error message; empty when there is none."""
        lines = self._log_tail()[-LOG_LINES:]
        return "".join(f"\n    {line}" for line in ["; last lines of its log:", *lines])[5:] if lines else ""

    def root_cause(self) -> str:
        """The last error the engine core's own process logged; vLLM's exception says only that it failed."""
        causes = [line for line in self._log_tail() if line.startswith("(EngineCore") and "Error: " in line]
        return " ".join(causes[-1].split()) if causes else ""

    def cause_of_death(self) -> str:
        """What the machine did to it, see `death_causes`."""
        return cause_of_death(self._log_tail(), self._kills_before, memory_kills())

    def _log_tail(self) -> list[str]:
        if not self.log_file.exists():
            return []
        with self.log_file.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        return [line for line in lines if line.strip("^~ ")]  # without those that only mark a place in a traceback


def _wait_until_gone(group: int) -> None:
    """Wait until a killed group has no process left: a dying engine core still holds its GPU memory for a moment.

    Not for ever: where nobody reaps orphans, the group stays.
    """
    deadline = time.monotonic() + GROUP_END_SECONDS
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
