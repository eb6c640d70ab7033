"""The inference engine behind one small interface, and vLLM as its implementation. The only module that knows vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from batchllm_operators.errors import RowError, RowErrorCode, TerminalError
from batchllm_operators.execute.engine_options import engine_arguments
from batchllm_operators.execute.spec import ModelSpec
from batchllm_operators.stage.spec import SamplingParameters

VLLM_WINDOW = "0.32"
"""Minor version of vLLM that this module is written for."""

CPU_KV_CACHE_SHARE = 0.25
CPU_KV_CACHE_MOST_BYTES = 4 * 1024**3
_CPU_KV_CACHE_ARGUMENTS = ("kv_cache_memory_bytes", "gpu_memory_utilization")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt with its sampling parameters."""

    key: bytes
    prompt_token_ids: list[int]
    sampling: SamplingParameters


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a request, or why there is none; the token fields are None exactly when `error` is set."""

    request_key: bytes
    output_token_ids: list[int] | None = None
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    error: RowError | None = None


class Engine(Protocol):
    """A loaded model that answers requests in the order they are submitted, many at a time."""

    @property
    def capacity(self) -> int:
        """Requests it should hold, so that it never runs dry between two steps."""

    @property
    def unfinished(self) -> int:
        """Requests it holds now."""

    def submit(self, request: Request) -> Completion | None:
        """Take a request; a refused one comes back as a completion with an error."""

    def step(self) -> list[Completion]:
        """Go on with the requests it holds; return those that finished."""

    def abort(self) -> None:
        """Forget all unfinished requests."""

    def close(self) -> None:
        """Free the device."""


class VllmEngine:
    """vLLM's `LLMEngine` (V1).

    Where the core runs: on a GPU in a process of its own, as is vLLM's default, so that detokenising and writing parts
    overlap with the device; on a CPU in this process, because there both would fight for the same cores (measured on 2
    cores with SmolLM2-135M: 1.6 times the throughput, and half the time to load).
    `VLLM_ENABLE_V1_MULTIPROCESSING` in the environment overrides that.

    KV cache on a CPU: `engine_args` (`kv_cache_memory_bytes`, `gpu_memory_utilization`) or the environment
    (`VLLM_CPU_KVCACHE_SPACE`, GiB) decide; else a quarter of the memory that is free, at most 4 GiB, because vLLM's own
    default of 92 % of all memory suits no shared machine.

    Args:
        model: the model part of the job.
        block_size: tokens of a KV-cache block.
        gpus: tensor-parallel size.

    Raises:
        TerminalError: another vLLM, a bad engine argument, or a model folder that is none.
        Exception: whatever vLLM raises when the model does not load.
    """

    def __init__(self, model: ModelSpec, *, block_size: int, gpus: int) -> None:
        _check_model_folder(model.id)
        _check_version()
        from vllm import SamplingParams
        from vllm.engine.arg_utils import EngineArgs
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind
        from vllm.usage.usage_lib import UsageContext

        arguments = engine_arguments(
            model, block_size=block_size, gpus=gpus, known=[field.name for field in fields(EngineArgs)]
        )
        if current_platform.is_cpu():
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            arguments |= _cpu_kv_cache(arguments)
        from vllm.v1.engine.llm_engine import LLMEngine

        self._engine: Any = LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
        self._capacity: int = 2 * self._engine.vllm_config.scheduler_config.max_num_seqs
        self._unfinished: dict[str, Request] = {}
        self._submitted = 0
        self._rejections: tuple[type[Exception], ...] = (ValueError, VLLMClientError)
        self._tokens_input: Callable[[list[int]], Any] = tokens_input
        self._sampling_params: Callable[..., Any] = SamplingParams
        self._output_kind = RequestOutputKind.FINAL_ONLY

    @property
    def capacity(self) -> int:
        """Twice `max_num_seqs`: as many waiting as running."""
        return self._capacity

    @property
    def unfinished(self) -> int:
        """Requests submitted and neither finished nor aborted."""
        return len(self._unfinished)

    def submit(self, request: Request) -> Completion | None:
        """Add a request; what vLLM refuses (a prompt longer than the model, say) comes back as an `engine_error`."""
        # vLLM appends random characters to this id for its own use; outputs carry it as given here.
        identity = str(self._submitted)
        self._submitted += 1
        try:
            self._engine.add_request(
                identity, self._tokens_input(request.prompt_token_ids), self._parameters(request.sampling)
            )
        except self._rejections as error:
            return _failed(request, str(error))
        self._unfinished[identity] = request
        return None

    def step(self) -> list[Completion]:
        """One step of the engine, and what it finished."""
        outputs = self._engine.step()
        return [
            self._completion(self._unfinished.pop(output.request_id), output) for output in outputs if output.finished
        ]

    def abort(self) -> None:
        """Abort all unfinished requests."""
        self._engine.abort_request(list(self._unfinished))
        self._unfinished.clear()

    def close(self) -> None:
        """Shut the engine core down."""
        self._engine.engine_core.shutdown()

    def _parameters(self, sampling: SamplingParameters) -> Any:
        return self._sampling_params(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            output_kind=self._output_kind,
        )

    def _completion(self, request: Request, output: Any) -> Completion:
        answer = output.outputs[0]
        if answer.finish_reason in ("abort", "error"):
            return _failed(request, f"vLLM ended the request: {answer.finish_reason}")
        return Completion(
            request_key=request.key,
            output_token_ids=list(answer.token_ids),
            text=answer.text,
            finish_reason=answer.finish_reason,
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=output.num_cached_tokens or 0,
            completion_tokens=len(answer.token_ids),
        )


def _failed(request: Request, message: str) -> Completion:
    return Completion(request_key=request.key, error=RowError(RowErrorCode.ENGINE_ERROR, message))


def _check_version() -> None:
    try:
        import vllm
    except ImportError as error:
        raise TerminalError(
            f"no vLLM in the engine's environment: install the extra engine or engine-cpu ({error})"
        ) from error
    version = str(vllm.__version__)
    if not version.startswith(f"{VLLM_WINDOW}."):
        raise TerminalError(f"vLLM: expected version {VLLM_WINDOW}.*, got {version}")


def _check_model_folder(identity: str) -> None:
    """Refuse a path that is no model folder, before vLLM takes it for the name of a repository."""
    looks_like_path = identity.startswith(("/", ".", "~")) or identity.count("/") > 1
    if not looks_like_path or (Path(identity) / "config.json").is_file():
        return
    missing = "no config.json in it" if Path(identity).is_dir() else "no such folder"
    raise TerminalError(f"model.id: expected a Hugging Face id or a model's folder, got {identity!r}: {missing}")


def _cpu_kv_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE") or any(name in arguments for name in _CPU_KV_CACHE_ARGUMENTS):
        return {}
    import psutil  # type: ignore[import-untyped]  # comes with vLLM, without types

    free: int = psutil.virtual_memory().available
    return {"kv_cache_memory_bytes": min(int(CPU_KV_CACHE_SHARE * free), CPU_KV_CACHE_MOST_BYTES)}
