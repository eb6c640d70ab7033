"""vLLM's worker for CPUs, with whole decode steps captured and replayed by the rules of CUDA graphs.

What to capture, with which dummy batches, and which step replays which graph is vLLM's own choice, as on a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.workspace import current_workspace_manager, init_workspace_manager

from tests.vllm_plugin.cpu_platform_plugin import REPLAYS_VARIABLE
from tests.vllm_plugin.recorded_graph import RecordedGraph, recording


class CapturingWorker(CPUWorker):
    def init_device(self) -> None:
        super().init_device()
        init_workspace_manager(self.device)  # as vLLM's worker for GPUs does

    def determine_available_memory(self) -> int:
        if self.use_v2_model_runner:
            # vLLM samples from a dummy step's uninitialised memory; Triton's interpreter fails on NaN, as no GPU does.
            sample = self.model_runner._dummy_sampler_run
            self.model_runner._dummy_sampler_run = lambda states: sample(torch.nan_to_num(states))
        left: int = super().determine_available_memory()
        trace("memory", "profiled", persistent_bytes())
        return left

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        trace("memory", "built", persistent_bytes())
        if self.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
            with set_current_vllm_config(self.vllm_config):
                (_capture_in_second_runner if self.use_v2_model_runner else _capture_in_first_runner)(self.model_runner)
        return times


def _capture_in_first_runner(runner: Any) -> None:
    runner.model.forward = _RecordedStep(runner.model.forward)
    for mode, batches in runner.cudagraph_dispatcher.get_capture_descs():
        for batch in batches:
            runner._warmup_and_capture(batch, cudagraph_runtime_mode=mode)


class _RecordedStep:
    """As vLLM's `CUDAGraphWrapper` around a model, in its mode `FULL`."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward
        self._captured: dict[Any, tuple[RecordedGraph, Any]] = {}

    def __call__(self, *arguments: Any, **inputs: Any) -> Any:
        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.FULL:
            return self._forward(*arguments, **inputs)
        batch = context.batch_descriptor
        if batch not in self._captured:
            graph = _TracedGraph(batch.num_tokens)
            with recording(graph):
                self._captured[batch] = graph, self._forward(*arguments, **inputs)
        else:
            self._captured[batch][0].replay()
        return self._captured[batch][1]


def _capture_in_second_runner(runner: Any) -> None:
    from vllm.v1.worker.gpu import cudagraph_utils

    manager = runner.cudagraph_manager
    sizes = iter([one.num_tokens for one in manager._capture_descs[CUDAGraphMode.FULL]])
    nothing = mock.Mock(side_effect=lambda *_, **__: contextlib.nullcontext())
    with (
        mock.patch.object(cudagraph_utils, "graph_capture", nothing),
        mock.patch.object(cudagraph_utils, "capture_pool", nothing),
        mock.patch.object(cudagraph_utils, "current_stream", lambda: None),
        mock.patch("torch.cuda.CUDAGraph", lambda: _TracedGraph(next(sizes))),
        mock.patch("torch.cuda.graph", recording),
    ):
        manager.capture(
            runner.model,
            runner.model_state,
            runner.input_buffers,
            runner.intermediate_tensors,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
        )


class _TracedGraph(RecordedGraph):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens
        trace("capture", "FULL", tokens)

    def replay(self) -> None:
        trace("replay", "FULL", self._tokens)
        super().replay()


def trace(what: str, mode: str, number: int) -> None:
    """Appends a line; the number is of tokens, or of bytes."""
    with Path(os.environ[REPLAYS_VARIABLE]).open("a") as file:
        file.write(f"{json.dumps({'what': what, 'mode': mode, 'number': number})}\n")


def persistent_bytes() -> int:
    """What vLLM's workspace keeps of the tensors that were asked of it by name."""
    [resources] = current_workspace_manager()._persistent_resources
    return sum(one.nbytes for one in resources.values())
