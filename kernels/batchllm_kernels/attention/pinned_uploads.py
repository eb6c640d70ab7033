"""A ring of pinned host buffers from which plans go to the device: one copy a step, which the host does not wait for.

A copy that is not waited for reads its host buffer later, when the device comes to it. The next plan is therefore
written to another buffer of the ring, and a buffer is used again only when the copy out of it is done. That is what an
event behind the copy tells, whatever the engine does; with as many buffers as it has steps under way
(`VllmConfig.max_concurrent_batches`), the event has practically always come and the host goes on at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from batchllm_kernels.arrays import Int32s


class Fence(Protocol):
    """A point in the device's queue of work, as `torch.cuda.Event` is one."""

    def record(self) -> None:
        """Puts it behind what was queued on the current stream."""

    def synchronize(self) -> None:
        """Returns when the device has come to it; at once if it was never recorded."""


class PinnedUploads:
    """Brings arrays to one int32 buffer at a fixed address on the device.

    On a CPU the host buffers are plain memory and a copy is done when it returns.

    Args:
        target: int32 [capacity], contiguous, on the device. A copy is queued on the stream that is current, so that
            kernels queued there before still read what was in it.
        depth: host buffers.
        fence: makes what tells that a copy is done; without it `torch.cuda.Event` on CUDA, and nothing on a CPU.

    Raises:
        ValueError: another shape or type of `target`, or no host buffers.
    """

    def __init__(self, target: torch.Tensor, depth: int, *, fence: Callable[[], Fence] | None = None) -> None:
        if target.dtype != torch.int32 or target.ndim != 1 or not target.is_contiguous():
            raise ValueError(f"target: expected int32 [capacity], contiguous, got {target.dtype} {tuple(target.shape)}")
        if depth < 1:
            raise ValueError(f"depth: expected at least 1, got {depth}")
        cuda = target.is_cuda
        if fence is None and cuda:
            fence = torch.cuda.Event
        self._target = target
        self._hosts = [torch.zeros(len(target), dtype=torch.int32, pin_memory=cuda) for _ in range(depth)]
        self._arrays: list[Int32s] = [host.numpy() for host in self._hosts]
        self._fences = [fence() for _ in range(depth)] if fence is not None else None
        self._next = 0

    @property
    def capacity(self) -> int:
        """Numbers that the buffers hold."""
        return len(self._target)

    def load(self, parts: Iterable[tuple[int, Int32s]]) -> None:
        """Queues one copy of all parts to the device.

        The copy goes from the buffer's start to the end of the last part. What lies between parts, and so much of it,
        is overwritten with anything: short parts and those with a fixed place stand first.

        Args:
            parts: offset in the target, and an int32 array of any shape, which may be changed when this returns.

        Raises:
            ValueError: a part that does not fit; nothing is copied then.
            RuntimeError: a CUDA graph is being captured, which would repeat the copy instead of reading new plans.
        """
        if self._target.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("upload of a plan: expected no CUDA graph to be captured meanwhile")
        slot = self._next
        if self._fences is not None:
            self._fences[slot].synchronize()
        staged, end = self._arrays[slot], 0
        for offset, part in parts:
            if offset < 0 or offset + part.size > len(staged):
                raise ValueError(
                    f"part of a plan: expected within {len(staged)} numbers, got {part.size} from {offset} on"
                )
            staged[offset : offset + part.size] = part.reshape(-1)
            end = max(end, offset + part.size)
        self._target[:end].copy_(self._hosts[slot][:end], non_blocking=True)
        if self._fences is not None:
            self._fences[slot].record()
        self._next = (slot + 1) % len(self._hosts)
