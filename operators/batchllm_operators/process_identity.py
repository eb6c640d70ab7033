"""Which process of which machine something belongs to, and whether that process is surely gone."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from batchllm_operators.records import Record

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_STARTED_FIELD = 19
"""Place of the start time in /proc/PID/stat, counted behind the name, which may hold spaces."""


class ProcessIdentity(Record):
    """A process."""

    host: str
    """Name of its machine, for a person."""
    pid: int
    place: str
    """The machine since its last start, and the process namespace there: processes of one place see each other."""
    started: str
    """When it started, in ticks since the machine did: numbers of processes are used again."""


def this_process() -> ProcessIdentity:
    """The process that asks."""
    return ProcessIdentity(
        host=socket.gethostname(), pid=os.getpid(), place=_place(), started=_started(os.getpid()) or ""
    )


def is_surely_gone(process: ProcessIdentity) -> bool:
    """Whether a process has ended, as far as it can be told from here: not so for other machines and containers."""
    return process.place == _place() != "" and _started(process.pid) != process.started


def _place() -> str:
    """Empty where the system does not tell."""
    try:
        return f"{_BOOT_ID.read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process started; None: there is none, or it has ended and nobody has asked how."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[_STARTED_FIELD]
