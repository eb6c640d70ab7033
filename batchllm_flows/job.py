"""The job: what a user writes in a YAML file or builds in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from batchllm_flows.job_yaml import RepeatedKeyError, TooLargeError, load_yaml
from batchllm_operators.digests import digest_of_bytes
from batchllm_operators.errors import SecretInJobError, TerminalError
from batchllm_operators.keys import canonical_json, job_id
from batchllm_operators.models.generation_defaults import with_model_defaults
from batchllm_operators.models.model_files import model_versions
from batchllm_operators.records import InputObject
from batchllm_operators.spec_base import SpecModel
from batchllm_operators.specs.execution import REUSES, ExecutionSpec, ModelSpec
from batchllm_operators.specs.planning import PlanningSpec
from batchllm_operators.specs.sampling import SamplingSpec
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.specs.source import FieldsPrompt, PromptSpec, SourceSpec
from batchllm_operators.store import Store
from batchllm_operators.task_names import GENERATE, TaskName
from batchllm_operators.wording import fault_text
from batchllm_operators.work.layout import FORMAT_VERSION, WORK_FOLDER


class InvalidJobError(TerminalError):
    """The job file cannot be read, or is not a valid job."""


_SLICE_DIGITS = 16
_SHOWN_CHARACTERS = 200
_PARTS_WITHOUT_INFLUENCE = {"name", "execution", "sink", "planning"}
_SOURCE_FIELDS_WITHOUT_INFLUENCE = {"filter": None, "partitioning": "none"}
"""Fields of the source with the values by which they change no answer: jobs without them keep their ids."""


class BatchJob(SpecModel):
    """One large LLM job: which rows, which prompt, which model, and where the answers go."""

    name: str = Field(default="batch-inference", min_length=1, description="name of the job in reports and artifacts")
    task: TaskName = Field(default=GENERATE, description="what the model does with each prompt")
    source: SourceSpec
    prompt: PromptSpec
    model: ModelSpec
    sampling: SamplingSpec = SamplingSpec()
    planning: PlanningSpec = PlanningSpec()
    execution: ExecutionSpec = ExecutionSpec()
    sink: SinkSpec

    @classmethod
    def from_file(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> BatchJob:
        """Load a job from a YAML or JSON file.

        Args:
            path: the file; JSON is YAML too.
            overrides: values by dotted path, e.g. `{"sampling.max_tokens": 64}`, set before validation.

        Raises:
            InvalidJobError: no such file, not YAML, or not a valid job; names each field, what was expected and got.
        """
        try:
            values = load_yaml(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidJobError(f"cannot read job file: {error.strerror}", uri=str(path)) from error
        except (RepeatedKeyError, TooLargeError) as error:
            raise InvalidJobError(f"job file: {error}", uri=str(path)) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InvalidJobError(f"job file is not YAML or JSON: {error}", uri=str(path)) from error
        if not isinstance(values, dict):
            raise InvalidJobError(f"job file: expected a mapping, got {type(values).__name__}", uri=str(path))
        for dotted, value in (overrides or {}).items():
            _set(values, dotted, value)
        try:
            return cls.model_validate(values)
        except SecretInJobError as error:
            raise InvalidJobError(f"invalid job: {error.message}", uri=str(path)) from None
        except ValidationError as error:
            raise InvalidJobError(explain(error), uri=str(path)) from error

    def job_id(self, fingerprint: list[InputObject], pinned: ModelSpec | None = None) -> str:
        """Id of this job on this input: what decides the answers counts; sink, execution and planning do not.

        The files of the model count, see `model_versions`, and so does the format of the work folder. Of planning, the
        order of the fields does where it is part of the prompt.

        Args:
            fingerprint: the objects of the input.
            pinned: the model with the commit that a hub id stands for, where the caller knows it; the id is the same.
        """
        spec = self.model_dump(mode="json", exclude=_PARTS_WITHOUT_INFLUENCE)
        # It decides which objects count, and these count themselves.
        del spec["source"]["storage"], spec["source"]["new_objects_only"]
        for name, default in _SOURCE_FIELDS_WITHOUT_INFLUENCE.items():
            if spec["source"][name] == default:
                del spec["source"][name]
        spec["model_versions"] = model_versions(pinned or self.model)
        spec["format_version"] = FORMAT_VERSION
        spec["sampling"] = self.sampling.values | {"override_column": self.sampling.override_column}
        if self.task == GENERATE:
            del spec["task"]  # its ids are older than the other tasks
        if isinstance(self.prompt, FieldsPrompt):
            spec["field_order"] = self.planning.field_order
        return job_id(spec, [(one.path, one.size, one.version) for one in fingerprint])

    def slice_id(self, identity: str) -> str | None:
        """What tells the output of a run from others that are added to the same sink; None: it is the only one there.

        A later run with the same one replaces the output: a night that is run again, whatever its input is then. Where
        only new objects are taken, that is a run on the same objects.

        Args:
            identity: the job's id.
        """
        if not self.sink.adds:
            return None
        night = identity if self.source.new_objects_only else (self.source.uri, self.source.filter)
        return digest_of_bytes(canonical_json([self.name, night]))[:_SLICE_DIGITS]

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        if self.source.new_objects_only and not self.sink.adds:
            raise ValueError(
                "source.new_objects_only: expected sink.mode append or partition, which keep what earlier runs have"
                f" answered, got {self.sink.mode!r}"
            )
        if self.sink.carry == "key_only" and self.source.id_column is None:
            raise ValueError("sink.carry: key_only carries source.id_column, expected a column there, got none")
        return self

    def with_model_defaults(self) -> Self:
        """This job with all of its sampling said, also where it leaves that to the model (`sampling.defaults`).

        Raises:
            TerminalError: the model's recommendation cannot be read, or is not one.
        """
        return self.model_copy(update={"sampling": with_model_defaults(self.sampling, self.model)})

    def first_rows(self, rows: int) -> BatchJob:
        """This job on the first rows of its input only: another job, whose output is `{sink}/_first_{rows}`.

        The folder is hidden from whoever reads the sink, and the whole job can be run after it.
        """
        source = self.source.model_copy(update={"limit": rows})
        sink = self.sink.model_copy(update={"uri": f"{self.sink.uri.rstrip('/')}/_first_{rows}"})
        return self.model_copy(update={"source": source, "sink": sink})

    def work_store(self, identity: str) -> Store:
        """The work folder of the job with this id."""
        place = self.execution.work_uri or f"{self.sink.uri.rstrip('/')}/{WORK_FOLDER}"
        return Store(f"{place.rstrip('/')}/{identity}", self.sink.storage)

    def answers_store(self) -> Store | None:
        """The folder of kept answers, where the job names one; None: they are kept beside the output, or not at all.

        Raises:
            TerminalError: what it names can be no folder; names the field.
        """
        if self.execution.reuse in REUSES:
            return None
        try:
            store = Store(self.execution.reuse, self.sink.storage)
            folder, _, name = store.uri.rpartition("/")
            is_object = bool(folder) and not folder.endswith("/") and Store(folder, store.options).exists(name)
        except TerminalError as error:
            raise TerminalError(f"execution.reuse: {error.message}", uri=error.uri) from error
        if is_object:
            raise TerminalError("execution.reuse: expected a folder, got an object", uri=store.uri)
        return store

    def sink_store(self) -> Store:
        """The folder of the output."""
        return Store(self.sink.uri, self.sink.storage)


def explain(error: ValidationError) -> str:
    """A validation error in one line a fault: field, what is wrong, and what was got."""
    lines = []
    for fault in error.errors(include_url=False):
        field = ".".join(str(piece) for piece in fault["loc"]) or "job"
        is_shown = not isinstance(fault["input"], dict) and fault["type"] != "missing"
        got = f" (got {_shown(fault['input'])})" if is_shown else ""
        lines.append(f"{field}: {fault_text(fault['msg'])}{got}")
    return "invalid job: " + "; ".join(lines)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *folders, last = dotted.split(".")
    place = values
    for folder in folders:
        inner = place.setdefault(folder, {})
        if not isinstance(inner, dict):
            raise InvalidJobError(f"--set {dotted}: {folder} is not a section but {inner!r}")
        place = inner
    place[last] = value
