"""CUDA graphs without a GPU: what a run does to tensors is recorded, and done again to the same tensors.

As in a captured graph, no Python of the model runs in a replay; the operations of the run do, in their order, on the
addresses of the run, whatever lies there by then. Operations are PyTorch's, custom ones included, those of Triton's
interpreter, and functions passed to `launch`, which stand for kernels. Reading a number back is an error, as it is in
a capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_recorders: list[_Recorder] = []


class RecordedGraph:
    """As `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.operations: list[Callable[[], Any]] = []

    def replay(self) -> None:
        for operation in self.operations:
            operation()


@contextlib.contextmanager
def recording(graph: RecordedGraph, *_pool: Any, **_stream: Any) -> Iterator[None]:
    """As `torch.cuda.graph`, except that the run computes."""
    recorder = _Recorder(graph)
    with recorder, _interpreted_launches():
        _recorders.append(recorder)
        try:
            yield
        finally:
            _recorders.pop()


def launch(kernel: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Runs a function that stands for a kernel: in a recording, one operation whatever it does."""
    if not _recorders:
        kernel(*arguments, **options)
        return
    recorder = _recorders.pop()
    try:
        with torch.utils._python_dispatch._disable_current_modes():
            kernel(*arguments, **options)
    finally:
        _recorders.append(recorder)
    recorder.graph.operations.append(lambda: kernel(*arguments, **options))


@contextlib.contextmanager
def _interpreted_launches() -> Iterator[None]:
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__
    GridExecutor.__call__ = lambda *arguments, **options: launch(run, *arguments, **options)
    try:
        yield
    finally:
        GridExecutor.__call__ = run


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "vllm":
            from vllm.model_executor.layers.attention import attention

            with self:  # written in Python: what it does is recorded
                return getattr(attention, func._opname)(*args, **kwargs)
        assert func is not torch.ops.aten._local_scalar_dense.default, "a captured run reads a number back"
        result = func(*args, **kwargs)
        self._record(func, args, kwargs, result)
        return result

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = {_address(one) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        written = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        if func._schema.is_mutable:
            self.graph.operations.append(lambda: func(*args, **kwargs))
        elif func._opname.startswith(("empty", "new_empty")) or all(_address(one) in given for one in written):
            return  # nothing is computed: memory, or a view of it

        else:

            def compute() -> None:
                for old, new in zip(written, tree_leaves(func(*args, **kwargs)), strict=True):
                    old.copy_(new)

            self.graph.operations.append(compute)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
