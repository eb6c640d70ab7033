"""What the scheduler plugin relies on in vLLM, symbol by symbol; no model is loaded."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from collections import deque
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's and torch's own, while they are imported
    pytest.importorskip("vllm")
    import vllm.v1.engine.llm_engine  # noqa: F401  # what the tests use of it imports all the rest

from vllm.config import SchedulerConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.request import Request, RequestStatus

from batchllm_kernels.vllm_plugin import scheduler_path
from tests.vllm_plugin.driven_scheduler import Ask, DrivenScheduler, Limits, engine_config

PROMPT = tuple(range(10, 31))
"""21 tokens: five blocks of four and one token."""


@pytest.fixture(scope="module")
def config(tiny_llama: str) -> Any:
    return engine_config(tiny_llama, asynchronous=False)


@pytest.fixture
def stock(config: Any) -> DrivenScheduler:
    """vLLM's own scheduler."""
    return DrivenScheduler(config, Limits(block_size=4, blocks=32, step_tokens=64), None)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


# How the scheduler comes into an engine.


def test_the_scheduler_class_of_a_config_is_a_dotted_path_or_else_vllms_own(config: Any) -> None:
    for asynchronous, own in ((False, Scheduler), (True, AsyncScheduler)):
        ours = copy.copy(config.scheduler_config)
        ours.async_scheduling = asynchronous
        assert ours.get_scheduler_cls() is own
        ours.scheduler_cls = scheduler_path(async_scheduling=asynchronous)
        assert issubclass(ours.get_scheduler_cls(), own)


def test_an_engine_is_made_from_a_config_that_was_changed_after_it_was_resolved() -> None:
    assert parameters(EngineArgs.create_engine_config)[:2] == ["self", "usage_context"]
    assert {"vllm_config", "usage_context", "disable_log_stats"} <= set(parameters(LLMEngine.from_vllm_config))


def test_additional_config_is_an_engine_argument_and_a_field_of_the_config(config: Any) -> None:
    assert "additional_config" in {field.name for field in dataclasses.fields(EngineArgs)}
    assert hasattr(config, "additional_config")


def test_the_scheduler_config_has_the_limits_that_admission_counts_with() -> None:
    fields = {field.name for field in dataclasses.fields(SchedulerConfig)}
    assert {"async_scheduling", "long_prefill_token_threshold", "scheduler_cls"} <= fields


# What the scheduler has.


def test_the_scheduler_has_the_attributes_that_we_read(stock: DrivenScheduler) -> None:
    scheduler = stock.scheduler
    assert scheduler.block_size == scheduler.hash_block_size == 4
    assert scheduler.max_num_scheduled_tokens == 64
    assert scheduler.policy == SchedulingPolicy.FCFS
    assert scheduler.connector is None
    assert scheduler.max_num_active_reqs == 16
    assert scheduler.num_waiting_for_streaming_input == 0
    assert scheduler.max_model_len == 2048
    assert scheduler.running == []
    assert scheduler.requests == {}
    assert scheduler.cache_config.enable_prefix_caching is True
    assert scheduler.scheduler_config.async_scheduling is False
    assert scheduler.vllm_config.additional_config is not None
    (group,) = scheduler.kv_cache_config.kv_cache_groups
    assert isinstance(group.kv_cache_spec, FullAttentionSpec)
    assert not issubclass(SlidingWindowSpec, FullAttentionSpec)
    assert isinstance(scheduler.kv_cache_manager, KVCacheManager)
    assert isinstance(scheduler.kv_cache_manager.block_pool, BlockPool)


def test_the_methods_that_we_extend_have_the_parameters_that_we_pass_on() -> None:
    assert parameters(Scheduler.schedule) == ["self", "throttle_prefills"]
    assert parameters(Scheduler.reset_prefix_cache) == ["self", "reset_running_requests", "reset_connector"]
    assert parameters(Scheduler._free_request_blocks) == ["self", "request"]
    assert "schedule" not in vars(AsyncScheduler), "one mixin serves both schedulers"
    assert "_free_request_blocks" not in vars(AsyncScheduler)


# The waiting queue.


def test_the_waiting_queue_is_a_deque_whose_truth_can_be_overridden(stock: DrivenScheduler) -> None:
    assert type(stock.scheduler.waiting) is FCFSRequestQueue
    assert issubclass(FCFSRequestQueue, deque)
    assert not FCFSRequestQueue()
    abstract = {"add_request", "pop_request", "peek_request", "prepend_request", "prepend_requests", "remove_requests"}
    assert abstract <= set(dir(FCFSRequestQueue))


class OpenUntil(FCFSRequestQueue):  # type: ignore[misc]  # mypy does not follow vLLM
    """Says that it is empty when its head is the one named."""

    closed_to: str | None = None

    def __bool__(self) -> bool:
        return len(self) > 0 and self[0].request_id != self.closed_to


def test_a_queue_that_says_false_stops_admission_at_its_head(stock: DrivenScheduler) -> None:
    queue = OpenUntil()
    queue.closed_to = "b"
    stock.scheduler.waiting = queue
    for first, name in ((0, "a"), (100, "b"), (200, "c")):
        stock.add(name, Ask((first, first + 1), 9))
    stock.step()
    stock.step()
    assert stock.admitted == ["a"]
    assert stock.scheduler.get_request_counts() == (1, 2)
    assert stock.scheduler.has_requests()
    queue.closed_to = None
    stock.step()
    assert stock.admitted == ["a", "b", "c"]


def test_admitted_requests_stand_at_the_end_of_the_running_list(stock: DrivenScheduler) -> None:
    for first, name in ((0, "a"), (100, "b")):
        stock.add(name, Ask((first, first + 1), 9))
        stock.step()
    assert [request.request_id for request in stock.scheduler.running] == ["a", "b"]


def test_a_request_is_passed_over_until_its_grammar_is_compiled(stock: DrivenScheduler) -> None:
    assert parameters(Scheduler._handle_blocked_waiting_request) == ["self", "request"]
    assert "_handle_blocked_waiting_request" not in vars(AsyncScheduler)
    grammar = stock.add_structured("a", Ask((1, 2), 9))
    stock.add("b", Ask((3, 4), 9))
    stock.step()
    assert stock.admitted == ["b"]
    first, second = stock.requests["a"], stock.requests["b"]
    assert Scheduler._is_blocked_waiting_status(first.status)
    assert not Scheduler._is_blocked_waiting_status(second.status)
    assert not stock.scheduler._handle_blocked_waiting_request(first)
    grammar.set_result(object())
    assert stock.scheduler._handle_blocked_waiting_request(first)
    assert not Scheduler._is_blocked_waiting_status(first.status)


# Freeing and preemption.


@pytest.fixture
def freed(stock: DrivenScheduler, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, RequestStatus, bool]]:
    """Requests whose blocks were freed: id, status, whether the scheduler still knew them."""
    seen: list[tuple[str, RequestStatus, bool]] = []
    free = stock.scheduler._free_request_blocks

    def noting(request: Request) -> None:
        free(request)
        seen.append((request.request_id, request.status, request.request_id in stock.scheduler.requests))

    monkeypatch.setattr(stock.scheduler, "_free_request_blocks", noting)
    return seen


def test_blocks_are_freed_through_one_method_at_an_end_and_at_an_abort(stock: DrivenScheduler, freed: Any) -> None:
    stock.add("ends", Ask((1, 2), 1))
    stock.add("aborted", Ask((3, 4), 9))
    stock.add("aborted while it waits", Ask((5, 6), 9))
    stock.abort(["aborted while it waits"])
    stock.step()
    stock.abort(["aborted"])
    assert freed == [
        ("aborted while it waits", RequestStatus.FINISHED_ABORTED, True),
        ("ends", RequestStatus.FINISHED_STOPPED, True),
        ("aborted", RequestStatus.FINISHED_ABORTED, True),
    ]
    assert all(RequestStatus.is_finished(status) for _, status, _ in freed)
    assert stock.scheduler.requests == {}


def test_the_last_of_the_running_list_is_preempted_and_its_blocks_freed(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven = DrivenScheduler(config, Limits(block_size=4, blocks=6, step_tokens=64), None)
    freed: list[str] = []
    free = driven.scheduler._free_request_blocks
    monkeypatch.setattr(
        driven.scheduler, "_free_request_blocks", lambda request: (freed.append(request.request_id), free(request))
    )
    for first, name in ((0, "a"), (100, "b"), (200, "c")):
        driven.add(name, Ask(tuple(range(first, first + 7)), 9))
    driven.step()
    driven.scheduler.running.reverse()
    while not freed:
        driven.step()
    assert freed == ["a"]
    preempted = driven.requests["a"]
    assert preempted.status == RequestStatus.PREEMPTED
    assert (preempted.num_preemptions, preempted.num_computed_tokens) == (1, 0)
    assert driven.scheduler.waiting.peek_request() is preempted


def test_a_step_says_what_it_schedules_and_preempts() -> None:
    fields = {field.name for field in dataclasses.fields(SchedulerOutput)}
    assert {"num_scheduled_tokens", "total_num_scheduled_tokens", "preempted_req_ids"} <= fields
    assert {"scheduled_new_reqs"} <= fields
    assert {"req_id", "num_computed_tokens"} <= {field.name for field in dataclasses.fields(NewRequestData)}


def test_counters_stand_behind_the_step_when_it_is_scheduled(stock: DrivenScheduler) -> None:
    stock.add("a", Ask(PROMPT, 3))
    output = stock.scheduler.schedule()
    assert output.num_scheduled_tokens == {"a": 21}
    assert stock.requests["a"].num_computed_tokens == 21
    assert not stock.requests["a"].is_prefill_chunk


# Requests.


def test_a_request_has_the_fields_that_we_read(stock: DrivenScheduler) -> None:
    stock.add("a", Ask(PROMPT, 3, max_tokens=7))
    stock.step()
    request = stock.requests["a"]
    assert request.sampling_params.extra_args is None
    assert (request.num_prompt_tokens, request.num_tokens, request.num_output_tokens) == (21, 22, 1)
    assert (request.num_computed_tokens, request.num_output_placeholders, request.num_preemptions) == (21, 0, 0)
    assert request.max_tokens == 7
    assert request.status == RequestStatus.RUNNING
    assert not request.is_finished()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_request_that_generates_has_computed_all_but_its_last_token(tiny_llama: str, asynchronous: bool) -> None:
    limits = Limits(block_size=4, blocks=32, step_tokens=16, asynchronous=asynchronous)
    driven = DrivenScheduler(engine_config(tiny_llama, asynchronous=asynchronous), limits, None)
    driven.add("a", Ask(PROMPT, 6))
    seen = []
    while driven.busy:
        driven.step()
        if driven.scheduler.running:
            (request,) = driven.scheduler.running
            tokens = request.num_tokens + request.num_output_placeholders
            seen.append((tokens, request.num_computed_tokens))
    assert seen[0] == (21, 16)
    assert len(seen) > 5
    assert all(tokens == computed + 1 for tokens, computed in seen[1:])


def test_a_request_of_a_pooling_model_has_no_sampling_parameters_and_one_token(stock: DrivenScheduler) -> None:
    stock.add_pooling("a", PROMPT)
    stock.add("b", Ask(PROMPT, 3))
    stock.add("c", Ask(PROMPT, 3, reads_cache=False))
    request = stock.requests["a"]
    assert request.sampling_params is None
    assert request.max_tokens == 1
    assert [stock.requests[name].skip_reading_prefix_cache for name in "abc"] == [False, False, True]
    stock.step()
    assert request.status == RequestStatus.FINISHED_STOPPED
    assert request.num_output_tokens == 0


def test_block_hashes_are_chained_one_for_each_full_block(stock: DrivenScheduler) -> None:
    other_end, other_start = (*PROMPT[:8], 1, *PROMPT[9:]), (1, *PROMPT[1:])
    for name, prompt in (("a", PROMPT), ("b", PROMPT), ("c", other_end), ("d", other_start)):
        stock.add(name, Ask(prompt, 1))
    a, b, c, d = (stock.requests[name].block_hashes for name in "abcd")
    assert isinstance(a, list)
    assert len(a) == 5
    assert a == b
    assert [mine == other for mine, other in zip(a, c, strict=True)] == [True, True, False, False, False]
    assert not set(a) & set(d)


# The KV cache.


def test_one_block_of_the_pool_is_vllms_null_block(stock: DrivenScheduler) -> None:
    pool = stock.scheduler.kv_cache_manager.block_pool
    assert pool.num_gpu_blocks == 33
    assert pool.get_num_free_blocks() == 32


def test_a_touched_block_stays_when_its_request_is_gone_and_is_freed_by_free_blocks(stock: DrivenScheduler) -> None:
    stock.add("a", Ask(PROMPT, 1))
    stock.scheduler.schedule()
    pool = stock.scheduler.kv_cache_manager.block_pool
    blocks = stock.scheduler.kv_cache_manager.get_blocks("a").blocks[0][:2]
    assert [block.ref_cnt for block in blocks] == [1, 1]
    pool.touch(blocks)
    stock.abort(["a"])
    assert pool.get_num_free_blocks() == 30
    assert [block.ref_cnt for block in blocks] == [1, 1]
    pool.free_blocks(reversed(blocks))
    assert pool.get_num_free_blocks() == 32


def test_full_blocks_are_found_by_their_hash_as_soon_as_they_are_scheduled(stock: DrivenScheduler) -> None:
    stock.add("a", Ask(PROMPT, 1))
    manager = stock.scheduler.kv_cache_manager
    hashes = stock.requests["a"].block_hashes
    assert manager.block_pool.get_cached_block(hashes[0], [0]) is None
    stock.scheduler.schedule()
    own = manager.get_blocks("a").blocks[0]
    found = [manager.block_pool.get_cached_block(one, [0]) for one in hashes]
    assert found == [[block] for block in own[:5]]


def test_a_lookup_finds_whole_blocks_before_the_last_token_and_changes_nothing(stock: DrivenScheduler) -> None:
    stock.add("a", Ask(PROMPT, 9))
    stock.step()
    manager = stock.scheduler.kv_cache_manager
    for name, prompt, expected in (("longer", PROMPT, 20), ("all full blocks", PROMPT[:20], 16), ("other", (1, 2), 0)):
        stock.add(name, Ask(prompt, 1))
        free = manager.block_pool.get_num_free_blocks()
        blocks, found_tokens, _ = manager.get_computed_blocks(stock.requests[name])
        assert found_tokens == expected
        assert len(blocks.blocks[0]) == expected // 4
        assert manager.block_pool.get_num_free_blocks() == free


def test_the_cache_is_reset_only_when_nothing_is_referenced(stock: DrivenScheduler) -> None:
    stock.add("a", Ask(PROMPT, 9))
    stock.step()
    assert not stock.scheduler.reset_prefix_cache()
    stock.abort(["a"])
    assert stock.scheduler.reset_prefix_cache()
