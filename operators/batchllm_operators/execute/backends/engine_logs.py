"""The logs of engine processes: local files while they run, and in the work folder where the run has failed."""

from __future__ import annotations

import logging
from pathlib import Path

from batchllm_operators.errors import BatchLLMError
from batchllm_operators.store import Store
from batchllm_operators.temporary_folders import OwnedFolder
from batchllm_operators.work.layout import engine_log

KEPT_BYTES = 1024 * 1024
"""The bytes that are kept of the end of each log."""

_LOGGER = logging.getLogger(__name__)


class EngineLogs:
    """The log files of the engines of one run, in a local folder of their own, which goes at the end."""

    def __init__(self) -> None:
        self._folder = OwnedFolder("engines")
        self._files: dict[int, Path] = {}

    @property
    def folder(self) -> Path:
        """The folder, which engines may use for other files too that go with the logs."""
        return Path(self._folder.name)

    def file(self, index: int) -> Path:
        """The log of the engine with this index, and of those that took its place."""
        return self._files.setdefault(index, self.folder / f"engine-{index}.log")

    def keep(self, work: Store) -> list[str]:
        """Write the end of each log to `logs/` of the work folder; returns the places.

        A store that does not take them is warned of: the fault that made the run fail is what has to be told.
        """
        kept = []
        for index, file in sorted(self._files.items()):
            if not file.exists():
                continue  # of an engine that was never started
            name = engine_log(index)
            try:
                work.write_bytes(name, _end_of(file))
            except BatchLLMError as error:
                _LOGGER.warning("the engine's log could not be kept: %s", error)
            else:
                kept.append(work.uri_of(name))
        return kept

    def remove(self) -> None:
        """Remove the local files; safe to call more than once."""
        self._folder.cleanup()


def _end_of(file: Path) -> bytes:
    """The last bytes of a log, from the begin of a line on."""
    with file.open("rb") as log:
        size = log.seek(0, 2)
        log.seek(max(0, size - KEPT_BYTES))
        end = log.read()
    return end if size <= KEPT_BYTES else end.partition(b"\n")[2]
