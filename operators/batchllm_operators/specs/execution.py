"""The model and execution parts of a job."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from batchllm_operators.backend_names import BackendName
from batchllm_operators.errors import SecretInJobError
from batchllm_operators.spec_base import SpecModel, is_secret_url

_SECRET = re.compile(r"(^|_)(auth|(hf|auth|access)_token|(api|access)_key|secret\w*|password|credentials?)$")

_CODE = re.compile(
    r"trust_remote_code|\w+_cls|\w*plugins?|logits_processors|kv_connector_module_path|\w*module_path|io_processor\w*"
    r"|model_class_overrides"
)
"""Names of settings whose values are code, or name code to import."""
_DEEPEST_SETTING = 16
_MOST_SETTINGS = 10_000

REUSES = ("sink", "same_job_name", "none")
"""The names that `execution.reuse` may have; all else is a URI."""


OnConcurrent = Literal["wait", "join", "fail"]


class ModelSpec(SpecModel):
    """The model that answers."""

    id: str = Field(min_length=1, description="Hugging Face id, or the path of a folder in that layout")
    revision: str | None = Field(default=None, description="branch, tag or commit of a Hugging Face id")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(default="auto", description="of the weights")
    max_model_len: int | None = Field(
        default=None, ge=1, description="most tokens of prompt and completion; default: the model's own"
    )
    attention: Literal["auto", "shared", "stock"] = Field(
        default="stock",
        description="vLLM's own attention, or prefix-shared attention over it: `shared` insists on it, `auto` takes it "
        "where the plan expects it to pay and device, model and settings support it; not the default, because within "
        "vLLM on a GPU it was seen on one card and without torch.compile only",
    )
    engine_args: dict[str, Any] = Field(default_factory=dict, description="further vLLM EngineArgs, passed through")
    allow_code: bool = Field(
        default=False,
        description="let `engine_args` name code to run: `trust_remote_code`, plugins, classes by dotted path",
    )

    @field_validator("engine_args", mode="before")
    @classmethod
    def _refuse_secrets(cls, value: Any) -> Any:
        for field, depth, inner in _settings_within(value, "model.engine_args"):
            if depth > _DEEPEST_SETTING:
                raise ValueError(f"{field}: expected settings within settings at most {_DEEPEST_SETTING} deep")
            name = field.rpartition(".")[2]
            if isinstance(inner, str) and (_SECRET.search(name) or is_secret_url(inner)):
                raise SecretInJobError(
                    f"{field}: expected no secret in a job, it would stand in databases and logs; "
                    "give it to the engines by their environment (a token of the Hugging Face hub: HF_TOKEN)"
                )
        return value

    @model_validator(mode="after")
    def _code_is_allowed(self) -> Self:
        if not self.allow_code:
            for field, _, value in _settings_within(self.engine_args, "model.engine_args"):
                name = field.rpartition(".")[2]
                is_class = name == "distributed_executor_backend" and "." in str(value)
                if value and (_CODE.fullmatch(name) or is_class):
                    raise ValueError(
                        f"{field} names code that the engines would run: set model.allow_code to true if you trust it"
                    )
        return self

    @model_serializer(mode="wrap")
    def _without_what_changes_no_answer(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Ids of jobs, and what is kept for a model, do not depend on a permission."""
        written: dict[str, Any] = write(self)
        if not self.allow_code:
            written.pop("allow_code", None)
        return written


def _settings_within(value: Any, field: str, depth: int = 0) -> Iterator[tuple[str, int, Any]]:
    """All values of nested settings with their dotted names and depths; stops where there are too many.

    Raises:
        ValueError: more than any engine has.
    """
    waiting, seen = [(field, depth, value)], 0
    while waiting:
        field, depth, value = waiting.pop()
        seen += 1
        if seen > _MOST_SETTINGS:
            raise ValueError(f"expected at most {_MOST_SETTINGS:,} values")
        yield field, depth, value
        if isinstance(value, dict):
            waiting += [(f"{field}.{name}", depth + 1, inner) for name, inner in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(field, depth + 1, inner) for inner in value]


class ExecutionSpec(SpecModel):
    """Where and how the engines run."""

    backend: BackendName = Field(default="local", description="where engines run: `local`, processes of this machine")
    engines: int = Field(default=1, ge=1, description="engines that share the bundles")
    gpus_per_engine: int = Field(default=1, ge=1, description="GPUs of one engine (its tensor-parallel size)")
    engine_python: str | None = Field(
        default=None, description="interpreter of the engine's own environment; default: this one"
    )
    usd_per_gpu_hour: float | None = Field(default=None, ge=0, description="price of a GPU, for the plan's forecast")
    retries: int = Field(default=2, ge=0, le=10, description="further attempts at a bundle after a transient error")
    calibrate: bool = Field(
        default=True,
        description="the first engine measures its rates for the forecast: at most 20 s or 5 % of the job, and not for "
        "jobs forecast below 2 minutes; kept beside the output",
    )
    load_timeout_s: float = Field(default=1800.0, gt=0, description="seconds an engine may take to load its model")
    stall_timeout_s: float = Field(
        default=900.0, gt=0, description="seconds without any progress after which an engine counts as lost"
    )
    part_rows: int = Field(default=1000, ge=1, description="completions in one result part at the most")
    part_seconds: float = Field(default=30.0, gt=0, description="seconds until a smaller part is written")
    max_error_fraction: float = Field(
        default=0.05, ge=0.0, le=1.0, description="share of rows without an answer above which the job fails"
    )
    tokenizer_processes: int = Field(
        default=1, ge=1, description="processes that render and tokenise; more pay from about 100,000 rows on"
    )
    reuse: str = Field(
        default="sink",
        description="answers of earlier runs that are taken and not computed again, where request, model and all its "
        "settings are the same: `sink`: of every job that writes to this sink; `same_job_name`: of jobs of this name "
        "there; `none`: no answers; or a URI, where all jobs that name it share their answers",
    )
    reuse_unseeded: bool = Field(
        default=False,
        description="reuse answers too that were sampled with a temperature and without a seed; else they are always "
        "sampled anew",
    )
    on_concurrent: OnConcurrent = Field(
        default="wait",
        description="what a run does while another run of the same job works: `wait` until it has ended, and take over "
        "where it is not heard of any more; `fail`; or `join`: compute too, so that the faster one writes the output",
    )
    keep_days: float | None = Field(
        default=None, gt=0, description="days after which kept answers are deleted, at the end of a run; null: never"
    )

    @field_validator("reuse", mode="before")
    @classmethod
    def _reuse_is_no_switch(cls, value: Any) -> Any:
        # To YAML, `off` and `no` are false.
        if isinstance(value, bool):
            got = str(value).lower()
            message = f"expected {', '.join(REUSES)} or a URI, got {got}: to reuse no answers, write none"
            raise ValueError(message)  # noqa: TRY004 - pydantic tells of no other
        return value

    @field_validator("reuse")
    @classmethod
    def _reuse_is_a_name_or_a_place(cls, value: str) -> str:
        if value not in REUSES and "/" not in value:
            raise ValueError(f"expected {', '.join(REUSES)} or a URI, got {value!r}")
        return value

    work_uri: str | None = Field(
        default=None, description="where the work folders {job_id}/ of all jobs stand; default: {sink}/_batchllm/"
    )
