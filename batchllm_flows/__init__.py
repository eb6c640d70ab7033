"""Large offline LLM jobs as Prefect flows: object storage in, plan by shared prefixes, vLLM, object storage out.

Importing this package loads neither Prefect nor any engine: Prefect imports every registered collection at start.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchllm_flows.flows import batch_inference as batch_inference
    from batchllm_flows.job import BatchJob as BatchJob
    from batchllm_flows.nights import nightly_inference as nightly_inference
    from batchllm_flows.report import JobReport as JobReport

__version__ = "0.1.0"

_PUBLIC = {
    "BatchJob": "batchllm_flows.job",
    "JobReport": "batchllm_flows.report",
    "batch_inference": "batchllm_flows.flows",
    "nightly_inference": "batchllm_flows.nights",
}

__all__ = ["BatchJob", "JobReport", "__version__", "batch_inference", "nightly_inference"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {sorted(_PUBLIC)}")
    return getattr(import_module(_PUBLIC[name]), name)
