"""What an engine and its driver say to each other: JSON lines, one record each.

Commands go to the engine, events come back. Rows never pass here: the engine reads its bundle from the work folder and
writes its answers there. Credentials never pass either: the engine inherits the environment of its parent.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from batchllm_operators.cost import Calibration
from batchllm_operators.records import EngineSetting, Record
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.planning import CostModel
from batchllm_operators.specs.sampling import SamplingParameters


class BundleCounts(Record):
    """What a bundle has given so far: totals since its start, so that a message may be lost or repeated."""

    requests: int = 0
    """Answered requests, those with an error included."""
    errors: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    """Generated tokens; 0 for tasks that generate none."""

    def __add__(self, other: BundleCounts) -> BundleCounts:
        return BundleCounts(
            requests=self.requests + other.requests,
            errors=self.errors + other.errors,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


class Load(Record):
    """Command: load the model. Once, before the first bundle."""

    kind: Literal["load"] = "load"
    model: ModelSpec
    block_size: int
    """Tokens of a KV-cache block."""
    gpus: int
    """GPUs of this engine: its tensor-parallel size."""
    task: str
    """The name of what the model does with each prompt."""
    attention_reason: str | None = None
    """Why the model's attention is not as the job says; None: it is."""
    calibrate: bool = False
    """Whether the engine is to measure its rates before it takes its first bundle."""
    calibration_seconds: float = Field(default=20.0, gt=0)
    """The seconds that the measurement may take."""
    default_rates: CostModel | None = None
    """The rates for what there is no time to measure; None: the hardware's."""


class Run(Record):
    """Command: compute one bundle."""

    kind: Literal["run"] = "run"
    bundle: str
    """Name of the bundle's object in the work folder."""
    digest: str = ""
    """The digest of that object; empty: the plan tells none."""
    work_uri: str
    storage: StorageOptions
    task: str
    """The name of the engine's task."""
    sampling: SamplingParameters
    """The job's own; the bundle's rows hold what single requests override."""
    part_rows: int
    part_seconds: float
    rows: tuple[int, int] | None = None
    """Only the bundle's rows from the first number up to before the second; None: all."""
    known_parts: tuple[str, ...] = ()
    """Result parts that an earlier attempt at this bundle has written: their requests are not computed again."""


class Shutdown(Record):
    """Command: write what is finished and end."""

    kind: Literal["shutdown"] = "shutdown"


class Started(Record):
    """Event: the process is up and takes commands."""

    kind: Literal["started"] = "started"


class EnginePhase(StrEnum):
    """What an engine does until its first tokens; the value is what a person reads."""

    ENVIRONMENT = "environment (importing vLLM)"
    DOWNLOAD = "download"
    WEIGHTS = "weights"
    COMPILATION = "compilation"
    KV_CACHE = "KV cache"
    CALIBRATION = "calibration"
    FIRST_TOKENS = "first tokens"


class Loading(Record):
    """Event: what the engine does now; a phase may come again."""

    kind: Literal["loading"] = "loading"
    phase: EnginePhase
    detail: str = ""
    """How far it is, where that is known: `1.2 GB`."""


class Loaded(Record):
    """Event: the model is loaded."""

    kind: Literal["loaded"] = "loaded"
    seconds: float
    """The seconds of importing vLLM and of loading, without what lay between, and without calibration."""
    calibration: Calibration | None = None
    """Its rates, where it was to measure them and could."""
    settings: tuple[EngineSetting, ...] = ()


class Progress(Record):
    """Event: the engine has computed tokens since its last message, which is its sign of life, or begins a bundle."""

    kind: Literal["progress"] = "progress"
    bundle: str
    counts: BundleCounts
    computed: bool = True
    """Whether it has computed anything of the bundle; False: it begins, with what earlier attempts have given."""


class AllRead(Record):
    """Event: the engine has been given all requests of the bundle and has room for the next one's."""

    kind: Literal["all_read"] = "all_read"
    bundle: str


class PartWritten(Record):
    """Event: a result part is visible on the store."""

    kind: Literal["part_written"] = "part_written"
    bundle: str
    name: str


class BundleDone(Record):
    """Event: every request of the bundle stands in a result part."""

    kind: Literal["bundle_done"] = "bundle_done"
    bundle: str
    counts: BundleCounts
    parts: tuple[str, ...]
    seconds: float
    """Seconds since this bundle began or the one before it was done, whichever was later. Their sum over all bundles is
    the time in which the engine was busy."""


class Failed(Record):
    """Event: the command could not be carried out."""

    kind: Literal["failed"] = "failed"
    bundle: str | None = None
    """None: not a bundle, but the load."""
    message: str
    transient: bool
    engine_lost: bool
    """Whether the process ends now; else it takes further commands."""
    stopped: bool = False
    """Whether it ends because it was told to, which is no request's fault."""
    explained: bool = True
    """Whether the message says what is wrong; else the end of the engine's log is shown with it."""
    uri: str | None = None


Command = Annotated[Load | Run | Shutdown, Field(discriminator="kind")]
BundleEvent = Progress | AllRead | PartWritten | BundleDone | Failed
Event = Started | Loading | Loaded | BundleEvent

_COMMANDS: TypeAdapter[Load | Run | Shutdown] = TypeAdapter(Command)
_EVENTS: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def encode(message: Record) -> bytes:
    """One command or event as a line."""
    return message.model_dump_json().encode() + b"\n"


def decode_command(line: bytes) -> Load | Run | Shutdown:
    """The command of a line; `pydantic.ValidationError` when it is none."""
    return _COMMANDS.validate_json(line)


def decode_event(line: bytes) -> Event:
    """The event of a line; `pydantic.ValidationError` when it is none."""
    return _EVENTS.validate_json(line)
