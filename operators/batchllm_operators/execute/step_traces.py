"""The traces of an engine's steps on their way from local files to the work folder."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from batchllm_kernels.vllm_plugin.attention_trace import read_attention_steps
from batchllm_kernels.vllm_plugin.step_trace import STEP, read_steps
from batchllm_operators.store import Store
from batchllm_operators.work.traces import ATTENTION_TRACE_SCHEMA, write_attention_steps, write_steps


class StepTraces:
    """Writes the steps that were made since the last time.

    Args:
        steps: the file that the scheduler appends to.
        attention: the file that prefix-shared attention appends to; missing where that is not in use.
    """

    def __init__(self, steps: Path, attention: Path) -> None:
        self._steps = steps
        self._written = 0
        self._attention = attention
        self._attention_written = 0

    def skip(self) -> None:
        """Leave out the steps made so far, which were a calibration's."""
        self._written += len(read_steps(self._steps, first=self._written))
        self._attention_written = read_attention_steps(self._attention, self._attention_written)[1]

    def write(self, work: Store, bundle: str) -> None:
        """Write the new steps as traces of the work folder; nothing is written where there are none.

        Args:
            work: the work folder.
            bundle: the bundle that has just ended; steps of the next one, begun meanwhile, are among these.

        Raises:
            BatchLLMError: the store does not take it.
        """
        steps = read_steps(self._steps, first=self._written)
        if len(steps):
            write_steps(work, bundle, pa.table({column: steps[column] for column in STEP.names or ()}))
            self._written += len(steps)
        decided, end = read_attention_steps(self._attention, self._attention_written)
        if decided:
            write_attention_steps(work, bundle, pa.Table.from_pylist(decided, schema=ATTENTION_TRACE_SCHEMA))
            self._attention_written = end
