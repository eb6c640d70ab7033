"""What a finished job reports: figures for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

import orjson
from pydantic import ValidationError

from batchllm_flows import __version__
from batchllm_flows.job import BatchJob
from batchllm_operators.cost import USD_DECIMALS, usd_of
from batchllm_operators.errors import DamagedObjectError, TerminalError
from batchllm_operators.merge.sink import newest_added_manifest, work_of_output
from batchllm_operators.records import (
    BundleInfo,
    BundleResult,
    EngineSetting,
    Manifest,
    OutputSamples,
    PlanSummary,
    Record,
)
from batchllm_operators.specs.sampling import SamplingParameters
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.store import Store
from batchllm_operators.wording import counted
from batchllm_operators.work.json_objects import first_fault, read_record
from batchllm_operators.work.layout import MANIFEST_FILE, MANIFESTS_FOLDER, REPORT_FILE, REPORT_PAGE, SAMPLES_FILE

Kind = TypeVar("Kind", bound=Record)


class StepSeconds(Record):
    """Wall-clock seconds of each step of one run."""

    stage: float
    plan: float
    execute: float
    merge: float
    total: float


class ExpectedActual(Record):
    """A figure as the plan expected it, and as it came."""

    expected: int | float
    actual: int | float

    @property
    def ratio(self) -> float | None:
        """Fact over forecast; None where nothing was expected."""
        return self.actual / self.expected if self.expected else None


class ForecastAgainstFact(Record):
    """The forecast of the plans of one run, a pilot's included, against what the run did.

    All but the saving are of this run alone: what earlier runs of the job had computed is in neither side.
    """

    saving: ExpectedActual
    """Share of the prompt tokens of the whole job; what earlier runs computed is in both sides."""
    computed_prompt_tokens: ExpectedActual
    output_tokens: ExpectedActual
    execute_seconds: ExpectedActual
    """The seconds of the execute step, without the wait for engines to load."""
    usd: ExpectedActual | None
    """The fact is the time of all engines from the begin of the execute step to its end, loading included."""


class JobOutline(Record):
    """What was asked of which model about which input."""

    model: str
    """Id or folder, with its revision where the job names one."""
    input_uri: str
    input_objects: int
    not_read: str = ""
    """Objects beside the input that may be data and were not read; empty where there are none."""
    prompt_kind: str
    sampling: SamplingParameters

    @classmethod
    def of(cls, job: BatchJob, input_objects: int, not_read: str = "") -> JobOutline:
        """The outline of a job on an input of so many objects."""
        model = job.model
        return cls(
            model=model.id if model.revision is None else f"{model.id} at {model.revision}",
            input_uri=job.source.uri,
            input_objects=input_objects,
            not_read=not_read,
            prompt_kind=job.prompt.kind,
            sampling=job.sampling.parameters,
        )

    def sampling_text(self) -> str:
        """How completions are sampled, in one line; what is as by default is left out."""
        sampling = self.sampling
        pieces = ["greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"]
        if sampling.top_p != 1:
            pieces.append(f"top_p {sampling.top_p:g}")
        if sampling.seed is not None:
            pieces.append(f"seed {sampling.seed}")
        said = ("temperature", "top_p", "seed", "max_tokens", "stop")
        more = {name: value for name, value in sampling.values.items() if name not in said}
        pieces += [f"{name} {orjson.dumps(value).decode()}" for name, value in more.items()]
        pieces.append(f"at most {counted(sampling.max_tokens, 'token')}")
        if sampling.stop:
            pieces.append(f"stop at {', '.join(map(repr, sampling.stop))}")
        return ", ".join(pieces)


class JobReport(Record):
    """One run of a job, `report.json` of the work folder.

    Savings are shares of `prompt_tokens`; `optimum_saving` is that of an ideal block-exact cache that never evicts.
    """

    job_id: str
    job_name: str
    version: str
    """The version of batchllm-flows that wrote the report."""
    started: datetime
    already_complete: bool
    """This run found the complete output and computed nothing; the figures are of the run that completed it."""
    rows_in: int
    rows_out: int
    rows_error: int
    error_rows: dict[str, int]
    """Rows without an answer, by error code."""
    requests: int
    """Distinct requests, duplicates counted once."""
    computed_requests: int
    """Requests this run computed; the others were answered by earlier runs."""
    reused_requests: int = 0
    """Requests whose answers come from what earlier runs, of this job or of others, had kept (`execution.reuse`)."""
    answered_tokens: int
    """Prompt and completion tokens of the requests this run computed."""
    duplicate_rows: int
    prompt_tokens: int
    computed_prompt_tokens: int
    completion_tokens: int
    saving: float
    optimum_saving: float
    forecast: ForecastAgainstFact
    bundles: int
    engines: int
    engine_load_seconds: float
    """The seconds of importing vLLM and of loading the model, summed over engines; other work may go on meanwhile."""
    engine_wait_seconds: float = 0.0
    """The seconds that bundles waited for engines to load, summed over them: a part of the execute step."""
    engine_settings: tuple[EngineSetting, ...] = ()
    set_aside: tuple[str, ...] = ()
    """Objects of the work folder that were damaged and stand in its `quarantine/`; what they held was made again."""
    storage_retries: int = 0
    """Requests to object stores that the process of the flow run sent again; those of engines are not counted."""
    seconds: StepSeconds
    output_uri: str
    work_uri: str
    outline: JobOutline | None = None
    samples: OutputSamples | None = None

    @property
    def truncated_rows(self) -> int:
        """Rows whose answer ended at `max_tokens`."""
        return 0 if self.samples is None else self.samples.truncated_rows

    @property
    def tokens_per_second(self) -> float:
        """Prompt and completion tokens this run answered in a second of the execute step, engine loading left out."""
        busy = self.forecast.execute_seconds.actual
        return self.answered_tokens / busy if busy > 0 else 0.0


@dataclass(frozen=True)
class ExecutedPlan:
    """A plan and what executing its bundles gave."""

    plan: PlanSummary
    results: tuple[BundleResult, ...]

    def bundles(self) -> Iterator[tuple[BundleInfo, BundleResult]]:
        """Each bundle of the plan with its result, in the plan's order."""
        by_name = {result.bundle: result for result in self.results}
        return ((bundle, by_name[bundle.name]) for bundle in self.plan.bundles)


def build_report(
    manifest: Manifest,
    executed: Sequence[ExecutedPlan],
    seconds: StepSeconds,
    *,
    started: datetime,
    engines: int,
    output_uri: str,
    work_uri: str,
    usd_per_engine_hour: float | None = None,
    outline: JobOutline | None = None,
    samples: OutputSamples | None = None,
    set_aside: Sequence[str] = (),
    storage_retries: int = 0,
) -> JobReport:
    """Put together what the steps returned.

    Args:
        manifest: of the output.
        executed: the plans of this run in their order; the last one is that of all requests that were left.
        seconds: of the steps.
        started: begin of the run.
        engines: how many computed.
        output_uri: the sink.
        work_uri: the work folder.
        usd_per_engine_hour: price of one engine; None: not known.
        outline: what was asked.
        samples: some of the output.
        set_aside: damaged objects, as they stand in the work folder now.
        storage_retries: requests to object stores that were sent again.
    """
    plan = executed[-1].plan
    results = [result for one in executed for result in one.results]
    wait_seconds = sum(result.load_seconds for result in results)
    loads = [load for result in results for load in result.loads]
    saving = 1 - manifest.computed_prompt_tokens / manifest.prompt_tokens if manifest.prompt_tokens else 0.0
    return JobReport(
        job_id=manifest.job_id,
        job_name=manifest.job_name,
        version=__version__,
        started=started,
        already_complete=False,
        rows_in=plan.counts.rows,
        rows_out=manifest.rows,
        rows_error=sum(manifest.error_rows.values()),
        error_rows=manifest.error_rows,
        requests=plan.counts.requests + plan.counts.done_requests,
        computed_requests=sum(result.requests for result in results),
        reused_requests=plan.counts.answered_before.requests,
        answered_tokens=sum(result.prompt_tokens + result.completion_tokens for result in results),
        duplicate_rows=plan.counts.duplicate_rows,
        prompt_tokens=manifest.prompt_tokens,
        computed_prompt_tokens=manifest.computed_prompt_tokens,
        completion_tokens=manifest.completion_tokens,
        saving=saving,
        optimum_saving=plan.saving.optimum,
        forecast=ForecastAgainstFact(
            saving=ExpectedActual(expected=_expected_saving(executed), actual=saving),
            computed_prompt_tokens=ExpectedActual(
                expected=sum(one.plan.forecast.computed_prompt_tokens for one in executed),
                actual=sum(_computed(result) for result in results),
            ),
            output_tokens=ExpectedActual(
                expected=sum(one.plan.forecast.output_tokens for one in executed),
                actual=sum(result.completion_tokens for result in results),
            ),
            execute_seconds=ExpectedActual(
                expected=round(sum(one.plan.forecast.seconds for one in executed), 3),
                actual=round(max(seconds.execute - wait_seconds / max(engines, 1), 0.0), 3),
            ),
            usd=None if usd_per_engine_hour is None else _price(executed, usd_per_engine_hour, engines, seconds),
        ),
        bundles=len(results),
        engines=engines,
        engine_load_seconds=sum(load.seconds for load in loads),
        engine_wait_seconds=wait_seconds,
        engine_settings=loads[-1].settings if loads else (),
        set_aside=tuple(set_aside),
        storage_retries=storage_retries,
        seconds=seconds,
        output_uri=output_uri,
        work_uri=work_uri,
        outline=outline,
        samples=samples,
    )


def read_samples(work: Store) -> OutputSamples | None:
    """What the merge has noted of the output; None where it had nothing to write.

    Samples that are damaged or of another version are set aside, and the report does without: the job is done.
    """
    return read_record(OutputSamples, work, SAMPLES_FILE)


def read_report(sink: SinkSpec) -> JobReport:
    """The report of the job whose complete output a sink holds.

    Raises:
        TerminalError: the folder holds no complete output, or one that this version does not read.
    """
    return load_report(_work_of(sink))


def read_report_page(sink: SinkSpec) -> bytes:
    """The page of that report, as `read_report`."""
    work = _work_of(sink)
    if not work.exists(REPORT_PAGE):
        raise TerminalError("this job has no report page", uri=work.uri_of(REPORT_PAGE))
    return work.read_bytes(REPORT_PAGE)


def load_report(work: Store) -> JobReport:
    """The report in a work folder.

    Raises:
        DamagedObjectError: it is there, and no version of this package has written it so.
        TerminalError: there is none, or it was written by another version of this package.
    """
    return _load(
        JobReport,
        work,
        REPORT_FILE,
        "read it with that version, or delete it and run the job again: its answers are kept and not computed again",
    )


def _work_of(sink: SinkSpec) -> Store:
    """The work folder of the output in a folder; of several that were added there, of the last."""
    store = Store(sink.uri, sink.storage)
    if not store.exists(MANIFEST_FILE):
        added = newest_added_manifest(store)
        if added is None:
            raise TerminalError(
                f"no complete output here: expected {MANIFEST_FILE} or {MANIFESTS_FOLDER}/", uri=store.uri
            )
        return work_of_output(store, added)
    manifest = _load(Manifest, store, MANIFEST_FILE, "read it with that version")
    return work_of_output(store, manifest)


def _load(kind: type[Kind], store: Store, name: str, advice: str) -> Kind:
    content = store.read_bytes(name)
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        of_another_version = _is_of_another_version(content, error)
        raise (TerminalError if of_another_version else DamagedObjectError)(
            f"{name} is not as batchllm-flows {__version__} writes it ({first_fault(error)}), but perhaps as "
            f"another version does; {advice}",
            uri=store.uri_of(name),
        ) from error


def _is_of_another_version(content: bytes, error: ValidationError) -> bool:
    """Whether an object that this version does not read tells that another one wrote it; else it is damaged."""
    try:
        values = orjson.loads(content)
    except orjson.JSONDecodeError:
        return False
    if not isinstance(values, dict) or not isinstance(values.get("version"), str):
        return False
    # Versions in development share a number: a later one adds fields.
    only_more = all(one["type"] == "extra_forbidden" for one in error.errors(include_url=False, include_input=False))
    return values["version"] != __version__ or only_more


def _computed(result: BundleResult) -> int:
    return result.prompt_tokens - result.cached_tokens


def _expected_saving(executed: Sequence[ExecutedPlan]) -> float:
    """The saving of the whole job as the plans forecast it: the last one knows the facts of a pilot before it."""
    last = executed[-1].plan
    known = sum(
        sum(_computed(result) for result in one.results) - one.plan.forecast.computed_prompt_tokens
        for one in executed[:-1]
    )
    return last.saving.planned + known / last.counts.prompt_tokens if last.counts.prompt_tokens else 0.0


def _price(
    executed: Sequence[ExecutedPlan], usd_per_engine_hour: float, engines: int, seconds: StepSeconds
) -> ExpectedActual:
    return ExpectedActual(
        expected=round(sum(one.plan.forecast.usd or 0.0 for one in executed), USD_DECIMALS),
        actual=usd_of(engines * seconds.execute, usd_per_engine_hour),
    )
