"""The plugin's attention over `CPU_ATTN`, which compares the host's block table with the device's in every step."""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from batchllm_kernels.attention.cost import KernelCalibration
from batchllm_kernels.vllm_plugin.block_table_mirror import rows_of_step
from tests.vllm_plugin.calibrations import free_launches
from tests.vllm_plugin.plain_cpu_backend import SharedBuilder, SharedImpl

NEVER = free_launches("test: no gain", minimum_gain=1.0)


class ComparingBuilder(SharedBuilder):
    """Before it builds a step, compares; on a CPU the device's table can be read at any time."""

    compared: ClassVar[list[dict[str, int]]] = []
    """For each step its requests, the blocks in use, how many of them differ, and 1 where the table was made up."""

    @staticmethod
    def calibration(_shared_impl: str) -> KernelCalibration:
        return NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        lengths = common_attn_metadata.seq_lens_cpu_upper_bound.tolist()
        in_use = [-(-length // self._block_size) for length in lengths]
        host = rows_of_step(common_attn_metadata, max(in_use))
        device = common_attn_metadata.block_table_tensor.numpy()
        step = {"requests": len(lengths), "blocks": sum(in_use), "made_up": int(host is None), "different": 0}
        if host is not None:
            assert len(host) == common_attn_metadata.num_reqs == len(device)
            rows = zip(host, device, in_use, strict=True)
            step["different"] = sum(int((row[:n] != other[:n]).sum()) for row, other, n in rows)
        self.compared.append(step)
        return super().build(common_prefix_len, common_attn_metadata, fast_build)


class ComparingBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[SharedImpl]:
        return SharedImpl

    @staticmethod
    def get_builder_cls() -> type[ComparingBuilder]:
        return ComparingBuilder
