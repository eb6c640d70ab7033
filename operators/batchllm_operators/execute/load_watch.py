"""What an engine tells of its start: which phase it is in, and how much of the model has been downloaded."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from batchllm_kernels.vllm_plugin.load_phases import last_phase
from batchllm_operators.execute.messages import EnginePhase, Loading
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.wording import size_text

LOOK_SECONDS = 1.0
DOWNLOAD_PAUSE_SECONDS = 5.0
"""So long after its last byte a download counts as still going on."""

_DISK_BLOCK_BYTES = 512


class LoadWatch:
    """Tells of an engine's start while the block runs, in a thread of its own: imports and compilers block this one.

    Args:
        tell: takes what the engine does, whenever that changes.
        phases: file of vLLM's own phases, see `load_phases`; None: not known.
        downloads: folder that the model's files are downloaded to; None: nothing is downloaded.
        clock: seconds, increasing.
    """

    def __init__(
        self,
        tell: Callable[[Loading], None],
        phases: Path | None,
        downloads: Path | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell = tell
        self._phases = phases
        self._downloads = downloads
        self._clock = clock
        self._phase = EnginePhase.ENVIRONMENT
        self._told: Loading | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._first_bytes = self._bytes = 0 if downloads is None else folder_bytes(downloads)
        self._grew_at = float("-inf")

    def __enter__(self) -> LoadWatch:
        self._thread = threading.Thread(target=self._watch, name="load-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def enter(self, phase: EnginePhase) -> None:
        """Say that a phase begins; `WEIGHTS` is all that vLLM does at its start, and is told in its own phases."""
        with self._lock:
            self._phase = phase
        self.look()

    def look(self) -> None:
        """Tell what the engine does now, unless that has been told."""
        with self._lock:
            loading = self._now()
            if loading == self._told:
                return
            self._told = loading
            self._tell(loading)

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self.look()

    def _now(self) -> Loading:
        if self._phase != EnginePhase.WEIGHTS:
            return Loading(phase=self._phase)
        if self._downloads is not None:
            size = folder_bytes(self._downloads)
            if size > self._bytes:
                self._grew_at = self._clock()
            self._bytes = max(size, self._bytes)
            if self._clock() - self._grew_at < DOWNLOAD_PAUSE_SECONDS:
                return Loading(phase=EnginePhase.DOWNLOAD, detail=size_text(self._bytes - self._first_bytes))
        told = None if self._phases is None else last_phase(self._phases)
        return Loading(phase=EnginePhase.WEIGHTS if told is None else EnginePhase(told))


def download_folder(model: ModelSpec) -> Path | None:
    """Where the files of a model of the Hugging Face hub come to lie; None where the model is a folder itself."""
    if Path(model.id).exists():
        return None
    # It comes with vLLM, as what downloads.
    from huggingface_hub import constants

    cache = Path(model.engine_args.get("download_dir") or constants.HF_HUB_CACHE)
    return cache / f"models--{model.id.replace('/', '--')}"


def folder_bytes(folder: Path) -> int:
    """Bytes that a folder takes on its disk; 0 where there is none. Files may come and go meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).lstat().st_blocks * _DISK_BLOCK_BYTES
            except FileNotFoundError:
                continue  # a part that has just got its final name
    return total
