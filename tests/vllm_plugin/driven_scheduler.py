"""vLLM's scheduler on its real KV cache manager, driven step by step as its engine core does, without a model."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from vllm import PoolingParams, SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import StructuredOutputsParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from batchllm_kernels.vllm_plugin import scheduler_path
from batchllm_kernels.vllm_plugin.options import CONFIG_KEY, PlannedRequest

STOP_TOKEN = 1
"""What a driven request generates last when it ends before its `max_tokens`."""
FIRST_OUTPUT_TOKEN = 1_000_000_000
"""Generated tokens are this plus their position, as a model would go on with equal prompts alike."""
IDLE_STEPS = 4
"""Steps in a row without a token, beyond which a scheduler with requests is stuck."""


@dataclass(frozen=True)
class Limits:
    """Of the engine."""

    block_size: int = 4
    blocks: int = 64
    """Of the cache, vLLM's null block not counted."""
    step_tokens: int = 32
    long_prefill_tokens: int = 0
    max_running: int = 16
    asynchronous: bool = False


@dataclass(frozen=True)
class Ask:
    """A request as a test writes it."""

    prompt: tuple[int, ...]
    output_tokens: int
    """What it will generate."""
    planned: PlannedRequest | None = None
    max_tokens: int | None = None
    """None: as many as it will generate."""
    reads_cache: bool = True
    """Whether it takes blocks from the prefix cache."""


def engine_config(model: str, *, asynchronous: bool) -> VllmConfig:
    """A config to make schedulers from; takes seconds, so it is made once."""
    arguments = EngineArgs(
        model=model,
        dtype="float32",
        max_model_len=2048,
        enforce_eager=True,
        kv_cache_memory_bytes=2**27,
        async_scheduling=asynchronous,
        disable_log_stats=True,
    )
    return arguments.create_engine_config(UsageContext.LLM_CLASS)


class DrivenScheduler:
    """One scheduler, and what was seen of it.

    Args:
        config: of `engine_config`, with the same `asynchronous` as the limits.
        limits: of the engine.
        options: of our scheduler; None: vLLM's own.
    """

    def __init__(self, config: VllmConfig, limits: Limits, options: dict[str, Any] | None) -> None:
        self._limits = limits
        config = _limited(config, limits, options)
        attention = FullAttentionSpec(block_size=limits.block_size, num_kv_heads=1, head_size=32, dtype=torch.float32)
        self.scheduler: Scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(limits.blocks + 1, [], [KVCacheGroupSpec(["layer"], attention)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=limits.block_size,
            hash_block_size=limits.block_size,
        )
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(limits.block_size, hash_function)
        self._in_flight: deque[tuple[SchedulerOutput, dict[str, list[int]], set[str]]] = deque()
        self._most_in_flight = config.max_concurrent_batches
        self._stops: dict[str, int] = {}
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[int]] = {}
        self.admitted: list[str] = []
        """Requests in the order of their first step."""
        self.computed_prompt_tokens = 0
        self.computed_tokens = 0
        self.steps = 0
        self.idle_steps = 0
        self.on_admission: Callable[[Request, int], None] | None = None
        """Called with each request that is scheduled for the first time and the tokens it found in the cache."""

    def add(self, name: str, ask: Ask) -> None:
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=ask.max_tokens or ask.output_tokens,
            stop_token_ids=[STOP_TOKEN],
            extra_args=ask.planned.as_extra_args() if ask.planned else None,
            skip_reading_prefix_cache=not ask.reads_cache,
        )
        request = Request(name, list(ask.prompt), sampling, None, block_hasher=self._hasher)
        self.add_request(request, ask.output_tokens)

    def add_pooling(self, name: str, prompt: Sequence[int]) -> None:
        """A request for an embedding of its prompt."""
        pooling = PoolingParams(task="embed")
        self.add_request(Request(name, list(prompt), None, pooling, block_hasher=self._hasher), 0)

    def add_structured(self, name: str, ask: Ask) -> Future[Any]:
        """A request whose output must match a grammar that somebody compiles meanwhile: give the future a result."""
        sampling = SamplingParams(max_tokens=ask.output_tokens, structured_outputs=StructuredOutputsParams(regex="a*"))
        request = Request(name, list(ask.prompt), sampling, None, block_hasher=self._hasher)
        grammar: Future[Any] = Future()
        request.structured_output_request.grammar = grammar
        self.add_request(request, ask.output_tokens)
        return grammar

    def add_request(self, request: Request, output_tokens: int) -> None:
        self._stops[request.request_id] = output_tokens
        self.requests[request.request_id] = request
        self.outputs[request.request_id] = []
        self.scheduler.add_request(request)

    def abort(self, names: Iterable[str]) -> None:
        self.scheduler.finish_requests(list(names), RequestStatus.FINISHED_ABORTED)

    def step(self, aborted_meanwhile: Iterable[str] = ()) -> None:
        """One step of `EngineCore.step` or, asynchronous, of `EngineCore.step_with_batch_queue`.

        Args:
            aborted_meanwhile: requests aborted while the model runs.
        """
        if self.scheduler.has_requests():
            self._in_flight.append(self._schedule())
            if len(self._in_flight) < self._most_in_flight:
                return
        elif not self._in_flight:
            return
        output, sampled, pooled = self._in_flight.popleft()
        self.abort(aborted_meanwhile)
        names = list(output.num_scheduled_tokens)
        answered = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=[sampled[name] for name in names],
                pooler_output=[torch.zeros(1) if name in pooled else None for name in names],
            ),
        )
        for of_client in answered.values():
            for one in of_client.outputs:
                self.outputs[one.request_id].extend(one.new_token_ids)

    @property
    def busy(self) -> bool:
        return bool(self._in_flight) or self.scheduler.has_requests()

    @property
    def preemptions(self) -> int:
        return sum(request.num_preemptions for request in self.requests.values())

    def finish(self, most_steps: int = 100_000) -> None:
        """Step until nothing is left to do."""
        while self.busy:
            self.step()
            assert self.steps < most_steps, "the scheduler does not come to an end"
            assert self.idle_steps <= IDLE_STEPS, "the scheduler is stuck"

    def assert_everything_is_released(self) -> None:
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == self._limits.blocks
        assert [block.block_id for block in pool.blocks if block.ref_cnt and not block.is_null] == []
        assert not self.scheduler.requests
        assert not self.scheduler.running
        assert len(self.scheduler.waiting) == 0

    def _schedule(self) -> tuple[SchedulerOutput, dict[str, list[int]], set[str]]:
        output = self.scheduler.schedule()
        self.steps += 1
        self.idle_steps = 0 if output.total_num_scheduled_tokens else self.idle_steps + 1
        self.computed_tokens += output.total_num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            self.admitted.append(new.req_id)
            if self.on_admission is not None:
                self.on_admission(self.requests[new.req_id], new.num_computed_tokens)
        sampled: dict[str, list[int]] = {}
        pooled: set[str] = set()
        for name, tokens in output.num_scheduled_tokens.items():
            request = self.requests[name]
            start = request.num_computed_tokens - tokens
            self.computed_prompt_tokens += max(0, min(request.num_prompt_tokens - start, tokens))
            sampled[name] = []
            if request.is_prefill_chunk:
                continue
            if request.pooling_params is not None:
                pooled.add(name)
            else:
                sampled[name].append(self._next_token(request))
        return output, sampled, pooled

    def _next_token(self, request: Request) -> int:
        # The asynchronous scheduler has counted the token of this step as a placeholder already.
        position = request.num_output_tokens + max(request.num_output_placeholders, 1)
        if position >= self._stops[request.request_id]:
            return STOP_TOKEN
        return FIRST_OUTPUT_TOKEN + position


def optimum(prompts: Sequence[Sequence[int]], block_size: int) -> int:
    """Prompt tokens that an ideal block-exact cache which never evicts leaves to compute."""
    seen: set[tuple[int, ...]] = set()
    computed = 0
    for prompt in prompts:
        blocks = [tuple(prompt[: end + block_size]) for end in range(0, len(prompt) - block_size + 1, block_size)]
        # vLLM computes the last token in any case, and with it its whole block.
        most = (len(prompt) - 1) // block_size
        found = sum(1 for _ in itertools.takewhile(seen.__contains__, blocks[:most]))
        computed += len(prompt) - found * block_size
        seen.update(blocks)
    return computed


def _limited(config: VllmConfig, limits: Limits, options: dict[str, Any] | None) -> VllmConfig:
    config = copy.copy(config)
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.block_size = limits.block_size
    config.cache_config.num_gpu_blocks = limits.blocks + 1
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.max_num_seqs = limits.max_running
    config.scheduler_config.max_num_batched_tokens = max(limits.step_tokens, limits.max_running)
    config.scheduler_config.long_prefill_token_threshold = limits.long_prefill_tokens
    if options is not None:
        path = scheduler_path(async_scheduling=limits.asynchronous)
        config.scheduler_config.scheduler_cls = resolve_obj_by_qualname(path)
        config.additional_config = {CONFIG_KEY: options}
    return config
