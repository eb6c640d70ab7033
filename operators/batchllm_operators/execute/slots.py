"""The places of a pool's engines, and what a thread gets that takes one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from batchllm_operators.execute.handle import EngineHandle


@dataclass(frozen=True, slots=True)
class Lease:
    """An engine with its model loaded, for one thread."""

    handle: EngineHandle
    load_seconds: float
    """Seconds that were waited for the model to load, for the first lease of the engine; 0 for the next."""
    admit_next: Callable[[], None]
    """Let another thread have the engine too, because it has room for the next bundle's requests."""


@dataclass(slots=True)
class Slot:
    """The place of one engine; its pool's lock guards it."""

    index: int
    handle: EngineHandle | None = None
    loaded: bool = False
    """Whether the handle has loaded its model."""
    taken_by: int | None = None
    """The thread whose bundle is being read; None: the engine takes another bundle."""
    bundles: int = 0
    """Those it computes."""
    load_seconds: float = 0.0
    """That a thread has waited for its model, and no lease has told yet."""
    loading: threading.Lock = field(default_factory=threading.Lock)
    """Held by who makes the engine ready; the others wait for it."""

    @property
    def warm(self) -> bool:
        """Whether its model is loaded."""
        return self.handle is not None and self.loaded and self.handle.usable
