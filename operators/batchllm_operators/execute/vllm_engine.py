"""vLLM as an engine. Beside the tasks, the only module of this package that calls vLLM to compute."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchllm_kernels.vllm_plugin import ATTENTION_VARIABLE, scheduler_path
from batchllm_kernels.vllm_plugin.compat import check_vllm_version
from batchllm_operators.errors import RowError, RowErrorCode, TerminalError
from batchllm_operators.execute.engine import EngineLimits, Request
from batchllm_operators.execute.engine_options import engine_arguments, gpu_choices
from batchllm_operators.execute.engine_settings import dtype_name, engine_settings
from batchllm_operators.execute.messages import Load
from batchllm_operators.machine.processor import cpu_name, processor
from batchllm_operators.models.dtype_choice import GIB, DtypeChoice, check_memory, choose_dtype
from batchllm_operators.models.model_files import looks_like_path
from batchllm_operators.models.model_shape import read_model_config
from batchllm_operators.records import EngineSetting
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.tasks import Answer, RefusedAnswerError, Task, TaskRequest, task_named
from batchllm_operators.tasks.generate import GENERATION
from batchllm_operators.wording import counted

if TYPE_CHECKING:
    from batchllm_kernels.vllm_plugin.attention_choice import AttentionChoice

CPU_KV_CACHE_SHARE = 0.25
CPU_KV_CACHE_MOST_BYTES = 4 * GIB
_CPU_KV_CACHE_ARGUMENTS = ("kv_cache_memory_bytes", "gpu_memory_utilization")

_LOGGER = logging.getLogger(__name__)


class VllmEngine:
    """vLLM's `LLMEngine` (V1) with our scheduler, unless `model.engine_args` names another `scheduler_cls`.

    Where the core runs: on a GPU in a process of its own, as is vLLM's default, so that detokenising and writing parts
    overlap with the device; on a CPU in this process, because there both would fight for the same cores (measured on 2
    cores with SmolLM2-135M: 1.6 times the throughput, and half the time to load).
    `VLLM_ENABLE_V1_MULTIPROCESSING` in the environment overrides that.

    KV cache on a CPU: `engine_args` (`kv_cache_memory_bytes`, `gpu_memory_utilization`) or the environment
    (`VLLM_CPU_KVCACHE_SPACE`, GiB) decide; else a quarter of the memory that is free, at most 4 GiB, because vLLM's own
    default of 92 % of all memory suits no shared machine.

    The dtype on a CPU: see `choose_dtype`; vLLM's own `auto` takes bfloat16 also where that is the slow one.

    Args:
        model: the model part of the job.
        block_size: tokens of a KV-cache block.
        gpus: tensor-parallel size.
        task: what the model does with each prompt.
        attention_reason: why `model.attention` is not as the job says; None: it is.

    Raises:
        TerminalError: another vLLM, a bad engine argument, a model folder that is none, weights in float32 that do not
            fit into the memory, or `model.attention` asks for what is not supported.
        Exception: whatever vLLM raises when the model does not load.
    """

    def __init__(
        self,
        model: ModelSpec,
        *,
        block_size: int,
        gpus: int,
        task: Task = GENERATION,
        attention_reason: str | None = None,
    ) -> None:
        _check_model_folder(model.id)
        _check_version()
        _check_environment()
        from vllm.engine.arg_utils import EngineArgs
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.platforms import current_platform

        known = [field.name for field in fields(EngineArgs)]
        arguments = engine_arguments(model, block_size=block_size, gpus=gpus, runner=task.runner, known=known)
        self._dtype: DtypeChoice | None = None
        if current_platform.is_cpu():
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            arguments |= _cpu_kv_cache(arguments)
            self._dtype = _cpu_dtype(model, arguments)
            arguments["dtype"] = self._dtype.dtype
        else:
            arguments |= gpu_choices(arguments)
        self._engine, self._attention = _start(model, arguments)
        self._model = model
        self._task = task
        self._attention_reason = attention_reason
        self._capacity: int = 2 * self._engine.vllm_config.scheduler_config.max_num_seqs
        self._unfinished: dict[str, Request] = {}
        self._submitted = 0
        self._steps = 0
        self._rejections: tuple[type[Exception], ...] = (ValueError, VLLMClientError)
        self._tokens_input: Callable[[list[int]], Any] = tokens_input

    @property
    def capacity(self) -> int:
        """Twice `max_num_seqs`: as many waiting as running."""
        return self._capacity

    @property
    def limits(self) -> EngineLimits:
        """Read from vLLM's configuration as it is after the KV cache has been allocated."""
        config = self._engine.vllm_config
        capacity = config.cache_config.num_gpu_blocks * config.cache_config.block_size
        return EngineLimits(
            device=f"{config.parallel_config.world_size} x {_device_name()}",
            vocabulary=config.model_config.get_vocab_size(),
            # Blocks are not the whole truth where layers keep caches of several kinds.
            kv_capacity_tokens=config.cache_config.kv_cache_size_tokens or capacity,
            max_running_requests=config.scheduler_config.max_num_seqs,
            max_request_tokens=config.model_config.max_model_len,
            max_step_tokens=config.scheduler_config.max_num_batched_tokens,
            dtype=dtype_name(config),
        )

    @property
    def settings(self) -> tuple[EngineSetting, ...]:
        """What decides its throughput, as vLLM resolved it, and who chose it."""
        return engine_settings(
            self._engine.vllm_config, self._model, self._attention, self._dtype, self._attention_reason
        )

    @property
    def unfinished(self) -> int:
        """Requests submitted and neither finished nor aborted."""
        return len(self._unfinished)

    @property
    def computed_tokens(self) -> int:
        """Tokens that the core has computed of the requests it holds; steps, where it is a process of its own."""
        core = getattr(self._engine.engine_core, "engine_core", None)
        if core is None:
            # There a step returns only with tokens that the core has computed.
            return self._steps
        return sum(request.num_computed_tokens for request in core.scheduler.requests.values())

    def submit(self, request: Request) -> Answer | None:
        """Add a request; what vLLM refuses (a prompt longer than the model, say) comes back as an `engine_error`."""
        # vLLM appends random characters to this id for its own use; outputs carry it as given here.
        identity = str(self._submitted)
        self._submitted += 1
        try:
            self._engine.add_request(identity, self._tokens_input(request.prompt_token_ids), self._parameters(request))
        except self._rejections as error:
            return _failed(request, str(error))
        self._unfinished[identity] = request
        return None

    def step(self) -> list[Answer]:
        """One step of the engine, and what it finished."""
        outputs = self._engine.step()
        self._steps += 1
        return [self._answer(self._unfinished.pop(output.request_id), output) for output in outputs if output.finished]

    def abort(self, keys: Collection[bytes]) -> None:
        """Abort unfinished requests."""
        ended = [identity for identity, request in self._unfinished.items() if request.key in keys]
        self._engine.abort_request(ended)
        for identity in ended:
            del self._unfinished[identity]

    def close(self) -> None:
        """Shut the engine core down."""
        self._engine.engine_core.shutdown()

    def _parameters(self, request: Request) -> Any:
        plan = None if request.planned is None else request.planned.as_extra_args()
        return self._task.to_vllm(TaskRequest(request.sampling, plan))

    def _answer(self, request: Request, output: Any) -> Answer:
        try:
            values = self._task.from_vllm(output)
        except RefusedAnswerError as error:
            return _failed(request, str(error))
        except Exception as error:
            # It would fail on every engine, so that no other is to be tried.
            raise TerminalError(f"task {self._task.name!r} failed on an output of vLLM: {error!r}") from error
        return Answer(
            request.key,
            values,
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=output.num_cached_tokens or 0,
            completion_tokens=self._task.completion_tokens(output),
        )


class VllmMaker:
    """Makes vLLM's engine, see `EngineMaker`."""

    def prepare(self) -> None:
        """Import vLLM's engine, which takes most of the time of its start, and is needed for every model.

        Raises:
            TerminalError: there is no vLLM, or another version than ours is for.
        """
        _check_version()
        import vllm.v1.engine.llm_engine  # noqa: F401

    def load(self, command: Load) -> VllmEngine:
        """Load the model of a command, see `VllmEngine`."""
        return VllmEngine(
            command.model,
            block_size=command.block_size,
            gpus=command.gpus,
            task=task_named(command.task),
            attention_reason=command.attention_reason,
        )


def _failed(request: Request, message: str) -> Answer:
    return Answer(request.key, error=RowError(RowErrorCode.ENGINE_ERROR, message))


def _start(model: ModelSpec, arguments: dict[str, Any]) -> tuple[Any, AttentionChoice]:
    """vLLM's engine with our scheduler, and the attention it got."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    from batchllm_kernels.vllm_plugin.attention_choice import UnsupportedAttentionError, start_with_attention

    def make_config() -> Any:
        config = EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)
        if config.scheduler_config.scheduler_cls is None:
            # Not among the arguments, because only the finished configuration says whether scheduling is asynchronous.
            config.scheduler_config.scheduler_cls = scheduler_path(
                async_scheduling=config.scheduler_config.async_scheduling
            )
        return config

    def start(config: Any) -> Any:
        # As vllm.LLM does: statistics cost time in every step, and nobody watches an offline engine's log.
        return LLMEngine.from_vllm_config(config, UsageContext.LLM_CLASS, disable_log_stats=True)

    try:
        return start_with_attention(model.attention, make_config, start)
    except UnsupportedAttentionError as error:
        raise TerminalError(
            "model.attention: 'shared' expected a device, a model and settings that prefix-shared attention supports, "
            f"got: {error}; 'auto' falls back to vLLM's own"
        ) from error


def _check_environment() -> None:
    """Refuse a choice of the attention that the job does not know of."""
    if given := os.environ.get(ATTENTION_VARIABLE):
        raise TerminalError(
            f"environment variable {ATTENTION_VARIABLE}: expected it unset, got {given!r}; set model.attention"
        )


def _check_version() -> None:
    try:
        check_vllm_version()
    except ImportError as error:
        raise TerminalError(
            f"no vLLM in the engine's environment: install the extra engine or engine-cpu ({error})"
        ) from error
    except RuntimeError as error:
        raise TerminalError(str(error)) from error


def _device_name() -> str:
    """Name of the GPU, or of the CPU with the number of cores this process may use."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return str(current_platform.get_device_name())
    return f"{cpu_name()}, {counted(len(os.sched_getaffinity(0)), 'core')}"


def _check_model_folder(identity: str) -> None:
    """Refuse a path that is no model folder, before vLLM takes it for the name of a repository."""
    if not looks_like_path(identity) or (Path(identity) / "config.json").is_file():
        return
    missing = "no config.json in it" if Path(identity).is_dir() else "no such folder"
    raise TerminalError(f"model.id: expected a Hugging Face id or a model's folder, got {identity!r}: {missing}")


def _cpu_kv_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE") or any(name in arguments for name in _CPU_KV_CACHE_ARGUMENTS):
        return {}
    import psutil  # type: ignore[import-untyped]  # comes with vLLM, without types

    free: int = psutil.virtual_memory().available
    return {"kv_cache_memory_bytes": min(int(CPU_KV_CACHE_SHARE * free), CPU_KV_CACHE_MOST_BYTES)}


def _cpu_dtype(model: ModelSpec, arguments: dict[str, Any]) -> DtypeChoice:
    """The dtype for this CPU, with a warning in the log where it is a slow one that the job insists on."""
    import psutil

    config = read_model_config(model)
    choice = choose_dtype(model, processor(), config)
    if choice.warning:
        _LOGGER.warning(choice.warning)
    given = arguments.get("kv_cache_memory_bytes")
    kv_bytes = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 0) * GIB or (given if isinstance(given, int) else 0)
    check_memory(model, choice.dtype, config, free_bytes=psutil.virtual_memory().available - kv_bytes)
    return choice
