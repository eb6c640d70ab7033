"""What the engines of a run are to do, as one small record: a parameter of each task run."""

from __future__ import annotations

from batchllm_operators.execute.messages import Load, Run
from batchllm_operators.records import AttentionForecast, BundleInfo, Record
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.execution import ExecutionSpec
from batchllm_operators.specs.sampling import SamplingParameters


class EngineWork(Record):
    """Where engines run, what they load, and how they compute bundles."""

    execution: ExecutionSpec
    load: Load
    """The command by which an engine loads the model."""
    sampling: SamplingParameters
    """The job's own; the bundle's rows hold what single requests override."""
    work_uri: str
    """The work folder."""
    storage: StorageOptions
    """How to reach it."""

    def with_attention(self, forecast: AttentionForecast | None) -> EngineWork:
        """The same work, with vLLM's own attention where the job leaves it to its plan and sharing does not pay.

        Args:
            forecast: of the plan; None: there is none, and the engines are loaded as the job says.
        """
        model = self.load.model
        if forecast is None or forecast.pays or model.attention != "auto":
            return self
        reason = (
            f"model.attention: auto; prefix-shared attention is expected to save {forecast.engine_saving:.1%} of the "
            f"engines' time, {forecast.needed_saving:.1%} needed (rates of its kernels: {forecast.rates})"
        )
        stock = model.model_copy(update={"attention": "stock"})
        load = self.load.model_copy(update={"model": stock, "attention_reason": reason})
        return self.model_copy(update={"load": load})

    def run_command(self, bundle: BundleInfo, rows: tuple[int, int] | None, known_parts: tuple[str, ...]) -> Run:
        """The command by which an engine computes a bundle, or some rows of it; see `Run`."""
        return Run(
            bundle=bundle.name,
            digest=bundle.digest,
            work_uri=self.work_uri,
            storage=self.storage,
            task=self.load.task,
            sampling=self.sampling,
            part_rows=self.execution.part_rows,
            part_seconds=self.execution.part_seconds,
            rows=rows,
            known_parts=known_parts,
        )
