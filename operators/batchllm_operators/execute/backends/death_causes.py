"""Why an engine died, where its end or its log tells: memory, the memory of a GPU, or a GPU that failed."""

from __future__ import annotations

import re
from collections.abc import Iterable

OUT_OF_MEMORY = (
    "the kernel killed a process for lack of memory: lower execution.engines, model.max_model_len or the KV cache"
    " (model.engine_args.kv_cache_memory_bytes), or give the machine more memory"
)
OUT_OF_GPU_MEMORY = (
    "the GPU ran out of memory: lower model.engine_args.gpu_memory_utilization or max_num_seqs, or model.max_model_len,"
    " or spread the model by execution.gpus_per_engine"
)
LOST_GPU = "the GPU or its driver failed: if it happens again, look at the machine (nvidia-smi, Xid in its kernel log)"

_GPU_MEMORY = re.compile(r"CUDA out of memory|OutOfMemoryError|CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED")
_GPU_FAILED = re.compile(
    r"\bXid\b|GPU is lost|fallen off the bus|CUDA_ERROR_(ECC|DEVICE_UNAVAILABLE)|uncorrectable (NVLink|ECC) error"
    r"|CUDA error: (unspecified launch failure|an illegal memory access|unknown error|device|hardware|misaligned)",
    re.IGNORECASE,
)
_CAUSES = ((_GPU_MEMORY, OUT_OF_GPU_MEMORY), (_GPU_FAILED, LOST_GPU))


def cause_of_death(log_lines: Iterable[str], kills_before: int | None, kills_now: int | None) -> str:
    """What the user can do about a death, and why; empty where nothing tells.

    Args:
        log_lines: the end of the engine's log.
        kills_before: what `memory_kills` was when the engine started.
        kills_now: what it is now.
    """
    if kills_before is not None and kills_now is not None and kills_now > kills_before:
        return OUT_OF_MEMORY
    lines = list(log_lines)
    return next((cause for pattern, cause in _CAUSES if any(map(pattern.search, lines))), "")
