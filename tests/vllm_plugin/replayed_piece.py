"""A compiled piece of a model under the rules of CUDA graphs, on a CPU: vLLM's `CUDAGraphWrapper` without a GPU.

A captured graph reads where it read when it was captured, and writes where it wrote then. Here the piece runs again for
a replay; other addresses, which a GPU would not notice, are an error.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, get_forward_context

from tests.vllm_plugin.capturing_worker import trace


class ReplayedPiece:
    """As vLLM's `AbstractStaticGraphWrapper`."""

    def __init__(self, runnable: Any, runtime_mode: CUDAGraphMode, **_others: Any) -> None:
        self.runnable = runnable
        self._runtime_mode = runtime_mode
        self._captured: dict[BatchDescriptor, tuple[list[int], Any]] = {}

    def __call__(self, *inputs: Any) -> Any:
        context = get_forward_context()
        if context.cudagraph_runtime_mode != self._runtime_mode:
            return self.runnable(*inputs)
        batch = context.batch_descriptor
        addresses = [one.data_ptr() for one in inputs if isinstance(one, torch.Tensor)]
        trace("replay" if batch in self._captured else "capture", self._runtime_mode.name, batch.num_tokens)
        if batch not in self._captured:
            self._captured[batch] = addresses, self.runnable(*inputs)
            return self._captured[batch][1]
        read, written = self._captured[batch]
        assert addresses == read, f"captured with inputs at {read}, got {addresses}"
        _overwrite(written, self.runnable(*inputs))
        return written


def _overwrite(written: Any, computed: Any) -> None:
    if isinstance(written, torch.Tensor):
        written.copy_(computed)
        return
    for old, new in zip(written, computed, strict=True):
        if isinstance(old, torch.Tensor):
            old.copy_(new)
