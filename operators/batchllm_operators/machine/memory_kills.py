"""How many processes the kernel has killed for lack of memory, as far as this process can see."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/")


def memory_kills(root: Path = _ROOT) -> int | None:
    """The kernel's count, of the control group of this process where that has one, else of the machine.

    Args:
        root: of the filesystem.

    Returns:
        None where nothing tells.
    """
    for file in (*_files_of_group(root), root / "proc/vmstat"):
        try:
            lines = file.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None


def _files_of_group(root: Path) -> list[Path]:
    """Where the control group counts, in version 2 and in version 1 of the interface."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    files = []
    for _, controllers, path in groups:
        inside = path.lstrip("/")
        if not controllers:
            files.append(root / "sys/fs/cgroup" / inside / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(root / "sys/fs/cgroup/memory" / inside / "memory.oom_control")
    return files
