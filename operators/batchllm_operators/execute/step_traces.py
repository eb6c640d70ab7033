"""The step trace of an engine on its way from our scheduler's local file to the work folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from uuid import uuid4

import pyarrow as pa

from batchllm_kernels.vllm_plugin.step_trace import STEP, read_steps
from batchllm_operators.records import TRACE_FOLDER
from batchllm_operators.store import Store


class StepTraces:
    """Writes the steps that were made since the last time.

    Args:
        path: the file that the scheduler appends to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = 0

    def skip(self) -> None:
        """Leave out the steps made so far, which were a calibration's."""
        self._written += len(read_steps(self._path, first=self._written))

    def write(self, work: Store, bundle: str) -> None:
        """Write the new steps as `trace/{bundle}-{uuid}.parquet`; nothing where there are none.

        Args:
            work: the work folder.
            bundle: the bundle that has just ended; steps of the next one, begun meanwhile, are among these.

        Raises:
            BatchLLMError: the store does not take it.
        """
        steps = read_steps(self._path, first=self._written)
        if len(steps) == 0:
            return
        table = pa.table({name: steps[name] for name in STEP.names or ()})
        work.write_table(f"{TRACE_FOLDER}/{PurePosixPath(bundle).stem}-{uuid4().hex}.parquet", table)
        self._written += len(steps)
