"""What crosses the steps: the small records that Prefect carries.

A record holds names, counts and hashes only; rows live in the work folder, see `batchllm_operators.work`.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from batchllm_operators.task_names import GENERATE
from batchllm_operators.wording import counted, first_of


class Record(BaseModel):
    """A small frozen value that crosses steps, processes and retries."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class InputObject(Record):
    """One object of the input; `version` is its ETag, or its modification time on a local disk."""

    path: str
    size: int
    version: str


class StagedPart(Record):
    """One file of `staged/`: a contiguous range of row indices."""

    name: str
    first_row: int
    rows: int
    digest: str = ""
    """The digest of the file; a part without one is never taken up by a later run."""


class FieldSharing(Record):
    """Prompts of kind `fields`: the share of the fields' text that a row has in common with the row before it."""

    as_given: float
    """Rows and fields as given."""
    sorted_rows: float
    """Rows in the order of a plan, fields as given."""
    chosen: float
    """Rows in the order of a plan, fields in the chosen order."""


class RowErrorExample(Record):
    """A row without a request or an answer, and why."""

    row_id: str
    message: str


class StageSummary(Record):
    """What staging found; `staged/summary.json`, written last."""

    parts: tuple[StagedPart, ...]
    rows: int
    error_rows: dict[str, int]
    error_examples: dict[str, tuple[RowErrorExample, ...]] = {}
    """The first few rows of each kind of error."""
    prompt_tokens: int
    requests: int
    """Rows that make a request (rows without an error)."""
    source_schema: str
    """Schema of the input columns that go to the sink: Arrow IPC bytes, base64."""
    input_digest: str = ""
    """Over path, size and version of every object that was read."""
    settings_digest: str = ""
    """Over all settings that decide what a row becomes."""
    left_out_objects: int = 0
    """Objects beside the input that may be data and were not read."""
    left_out_examples: tuple[str, ...] = ()
    """The first of them, each with the reason."""
    field_sharing: FieldSharing | None = None
    """Where the order of the fields was chosen."""
    task: str = GENERATE
    """What the model does with each prompt; the request keys hold for this task alone."""
    seconds: float

    def left_out_text(self) -> str:
        """How many objects were not read, and the first of them with the reasons; empty where all were."""
        if not self.left_out_objects:
            return ""
        examples = first_of(self.left_out_examples, self.left_out_objects)
        return f"{counted(self.left_out_objects, 'object')} beside the input: {examples}"

    @property
    def errors(self) -> int:
        """Rows that get no request."""
        return sum(self.error_rows.values())


class BundleInfo(Record):
    """One bundle: a file of `plan/` and what is expected of it."""

    name: str
    worker: int = 0
    """The engine it is meant for; engines that take bundles in their order need not mind."""
    requests: int
    groups: int
    prompt_tokens: int
    expected_computed_prompt_tokens: int
    expected_output_tokens: int
    expected_seconds: float
    digest: str = ""
    """The digest of the file."""


class GroupInfo(Record):
    """One prefix group and what is expected of it."""

    requests: int
    prefix_tokens: int
    saved_tokens: int
    expected_output_tokens: int
    expected_seconds: float


class SharingDegree(Record):
    """The groups with a size in (up_to / 2, up_to]; `up_to` is a power of two."""

    up_to: int
    groups: int
    requests: int
    saved_tokens: int


class SharedPrefix(Record):
    """A node of the prefix forest, for a plot of what is shared at which level."""

    parent: int
    """Place of the next shorter shared prefix in the same list; -1: none."""
    prefix_tokens: int
    requests: int
    saved_tokens: int
    """The prompt tokens that this prefix saves beyond those that its parent saves."""


class AttentionForecast(Record):
    """What prefix-shared attention is expected to save on a job whose `model.attention` is `auto`."""

    pays: bool
    """Whether the engines get it, where they support it; else they get vLLM's own."""
    attention_saving: float
    """Share of the time of the attention of generated tokens; negative where it would take longer."""
    engine_saving: float
    """Share of the engines' whole time."""
    needed_saving: float
    """The share of the engines' whole time that must be saved for `pays`."""
    rates: str
    """Where the rates of the kernels come from: measured on a device, or assumed."""


class AnsweredBefore(Record):
    """Requests of a job that earlier runs, of this job or of others, had answered: what their engines did for them."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Those of the prompt tokens that were found in the KV cache then."""
    completion_tokens: int = 0

    def __add__(self, other: AnsweredBefore) -> AnsweredBefore:
        return AnsweredBefore(
            requests=self.requests + other.requests,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


class PlanCounts(Record):
    """Rows, requests and prompt tokens of a job, and what is left of them to compute."""

    rows: int
    error_rows: dict[str, int] = {}
    """Rows that make no request, by kind of error."""
    error_examples: dict[str, tuple[RowErrorExample, ...]] = {}
    requests: int
    """Distinct requests to compute now."""
    duplicate_rows: int
    """Rows served by another row's computation."""
    done_requests: int
    """Distinct requests that readable results already answer."""
    answered_before: AnsweredBefore = AnsweredBefore()
    """Those of the done requests whose answers were taken from what earlier runs had kept."""
    prompt_tokens: int
    """The prompt tokens of all rows that make a request, duplicates and done ones included."""
    planned_prompt_tokens: int
    """The prompt tokens of the distinct requests to compute now."""


class PlanSaving(Record):
    """Shares of the prompt tokens of all rows that make a request."""

    planned: float
    """The saving of the planned order, deeper sharing included; for a pilot's plan, the optimum."""
    optimum: float
    """The saving of an ideal cache that never evicts."""
    single_level: float
    """When each request shares one prefix at the most."""
    stock: float | None = None
    """What a stock engine is expected to save on the input order; None when the job is too large to replay."""


class PlanForecast(Record):
    """What engines are expected to compute and generate, and how long that takes them; loading is left out."""

    avoided_seconds: float = 0.0
    """What the answers of earlier runs would have taken one engine to compute again."""
    avoided_usd: float | None = None
    computed_prompt_tokens: int
    output_tokens: int
    estimate_sources: dict[str, int] = {}
    """Where the expected output tokens come from: requests by source."""
    cache_tokens: int = 0
    """KV capacity of an engine."""
    rates: str = "hardware default"
    """Where the rates come from: `job`, `calibrated on ... at ...`, or `hardware default`."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    seconds: float
    """Until the last engine has finished."""
    usd: float | None = None
    """Price of the engines until then."""


class PlanShape(Record):
    """How the requests stand: their groups, what these share, and the order."""

    groups: int
    largest_groups: tuple[GroupInfo, ...]
    """The groups that save most."""
    sharing_degrees: tuple[SharingDegree, ...] = ()
    shared_prefixes: tuple[SharedPrefix, ...] = ()
    """The shared prefixes that save most, with all that stand above them."""
    order: str = "decode_first"
    block_size: int
    """Tokens of a KV-cache block."""
    parted_trees: int = 0
    """Top-level prefixes computed more than once, because the reorder of what is below them is worth more."""
    workers: int = 1
    split_prefix_tokens: int = 0
    """Shared tokens computed again, because groups are split over engines."""
    field_sharing: FieldSharing | None = None
    """Where the order of the fields was chosen."""


class PlanSummary(Record):
    """The plan in figures; `plan/summary.json`, written last."""

    bundles: tuple[BundleInfo, ...]
    pilot: bool = False
    """Whether this plan holds only a sample, to learn output lengths from."""
    counts: PlanCounts
    saving: PlanSaving
    forecast: PlanForecast
    shape: PlanShape
    attention: AttentionForecast | None = None
    """Where the job leaves the choice of the attention to its plan."""
    stage_seconds: float = 0.0
    """What staging took, when it was done."""
    seconds: float
    """What planning took."""
    page_uri: str | None = None
    """Where the plan stands as a page with plots; None when none was written."""

    @property
    def saving_to_come(self) -> float:
        """Share of the prompt tokens of the requests to compute that need not be computed."""
        planned = self.counts.planned_prompt_tokens
        return 1 - self.forecast.computed_prompt_tokens / planned if planned else 0.0


class EngineSetting(Record):
    """A setting of the engine, and who chose it for which reason."""

    name: str
    value: str
    reason: str
    warning: str | None = None
    """What to know of a choice of the job that is slow on this machine."""


class EngineLoad(Record):
    """What loading an engine took, and the settings it came to."""

    seconds: float
    """The seconds of importing vLLM and of loading, whether anybody waited or not."""
    settings: tuple[EngineSetting, ...] = ()
    """What decides the throughput of the engine, and who chose it."""


class BundleResult(Record):
    """What executing one bundle gave."""

    bundle: str
    requests: int
    errors: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    parts: tuple[str, ...]
    load_seconds: float
    """Seconds this bundle waited for engines to load; 0 on a warm engine."""
    loads: tuple[EngineLoad, ...] = ()
    """What loading gave, for the engines that were lent to this bundle first."""
    seconds: float


class SampleAnswer(Record):
    """An answer and the row it belongs to."""

    row_id: str
    text: str
    """Its begin, where it is long."""


class OutputSamples(Record):
    """What an output looks like; `samples.json` of the work folder."""

    truncated_rows: int
    """Rows whose answer ended at `max_tokens`."""
    answers: tuple[SampleAnswer, ...]
    errors: dict[str, tuple[RowErrorExample, ...]]
    """Rows without an answer, by kind of error."""


class OutputFile(Record):
    """One file of the sink."""

    name: str
    rows: int
    bytes: int
    digest: str


class OutputLayout(Record):
    """How the output is written: what of the sink part of a job decides the bytes of its files."""

    format: str
    rows_per_file: int
    prefix: str = ""
    carry: str | tuple[str, ...] = "all"
    partition_by: tuple[str, ...] = ()


class Manifest(Record):
    """`_manifest.json` of the sink, or one of `_manifests/`: its presence says that the output is complete."""

    format_version: int
    job_id: str
    job_name: str
    work_uri: str
    """Where the job's plan, results and report are."""
    rows: int
    error_rows: dict[str, int]
    files: tuple[OutputFile, ...]
    layout: OutputLayout
    slice_id: str | None = None
    """Of an output beside others: what tells it from them."""
    inputs: str | None = None
    """The object of the sink that lists the input, where later runs take new objects only."""
    prompt_tokens: int
    cached_tokens: int
    computed_prompt_tokens: int
    completion_tokens: int
