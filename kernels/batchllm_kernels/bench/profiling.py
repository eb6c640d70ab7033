"""One run of our kernels on chosen points, for a profiler to look at."""

from __future__ import annotations

from batchllm_kernels.bench.grid import GridPoint
from batchllm_kernels.bench.layered_step import layered_step
from batchllm_kernels.bench.ours import our_call, plan_of
from batchllm_kernels.bench.setup import Setup


def run_once(setup: Setup, point: GridPoint) -> None:
    """Our attention of one layer, shared and then not."""
    inputs = layered_step(point, setup.device, setup.dtype, layers=1)
    for share in (True, False):
        our_call(inputs, plan_of(inputs, share=share))(0)
