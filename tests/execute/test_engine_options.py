from __future__ import annotations

from typing import Any

import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.engine_argument_names import ENGINE_ARGUMENTS
from batchllm_operators.execute.engine_options import (
    GPU_MAX_NUM_SEQS,
    RESERVED,
    check_engine_arguments,
    engine_arguments,
    gpu_choices,
    known_engine_arguments,
)
from batchllm_operators.specs.execution import ModelSpec

KNOWN = [*RESERVED, "max_num_seqs", "enforce_eager"]


def arguments(model: ModelSpec) -> dict[str, Any]:
    return engine_arguments(model, block_size=16, gpus=1, runner="generate", known=KNOWN)


def test_the_job_decides_what_it_has_fields_for_and_passes_the_rest_through() -> None:
    model = ModelSpec(id="org/name", revision="v1", dtype="float16", max_model_len=99, engine_args={"max_num_seqs": 3})
    assert engine_arguments(model, block_size=16, gpus=2, runner="generate", known=KNOWN) == {
        "model": "org/name",
        "revision": "v1",
        "tokenizer_revision": "v1",
        "dtype": "float16",
        "max_model_len": 99,
        "runner": "generate",
        "block_size": 16,
        "tensor_parallel_size": 2,
        "enable_prefix_caching": True,
        "max_num_seqs": 3,
    }


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_an_argument_with_its_own_place_is_refused_with_that_place(name: str) -> None:
    with pytest.raises(TerminalError, match=name) as caught:
        engine_arguments(
            ModelSpec(id="m", engine_args={name: 1}), block_size=16, gpus=1, runner="generate", known=KNOWN
        )
    assert RESERVED[name] in str(caught.value)


def test_a_misspelt_argument_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(TerminalError, match="'enforce_eagre'; did you mean 'enforce_eager'"):
        engine_arguments(
            ModelSpec(id="m", engine_args={"enforce_eagre": True}),
            block_size=16,
            gpus=1,
            runner="generate",
            known=KNOWN,
        )


def test_an_argument_like_no_other_is_refused_without_a_guess() -> None:
    with pytest.raises(TerminalError, match="no engine argument 'zzz'; see vLLM's EngineArgs"):
        engine_arguments(
            ModelSpec(id="m", engine_args={"zzz": True}), block_size=16, gpus=1, runner="generate", known=KNOWN
        )


def test_on_gpus_the_number_of_sequences_is_no_limit_below_memory() -> None:
    assert gpu_choices({})["max_num_seqs"] == GPU_MAX_NUM_SEQS
    assert gpu_choices({"max_num_seqs": None, "max_num_batched_tokens": None})["max_num_seqs"] == GPU_MAX_NUM_SEQS
    assert gpu_choices({"max_num_batched_tokens": 512}) == {"max_num_seqs": 512}
    assert gpu_choices({"max_num_seqs": 7}) == {}


def test_decode_steps_of_as_many_requests_as_may_run_are_captured() -> None:
    assert gpu_choices({})["max_cudagraph_capture_size"] == GPU_MAX_NUM_SEQS
    assert gpu_choices({"max_num_seqs": 768}) == {"max_cudagraph_capture_size": 768}
    assert gpu_choices({"max_num_seqs": 512}) == {}  # vLLM's own end
    off_the_grid = gpu_choices({"max_num_seqs": 1000})["cudagraph_capture_sizes"]
    assert off_the_grid[-3:] == [976, 992, 1000]


@pytest.mark.parametrize(
    "given",
    [
        {"enforce_eager": True},
        {"max_cudagraph_capture_size": 64},
        {"cudagraph_capture_sizes": [8]},
        {"compilation_config": {"max_cudagraph_capture_size": 64}},
        {"compilation_config": {"cudagraph_capture_sizes": [8]}},
    ],
)
def test_what_the_job_says_of_cuda_graphs_stays(given: dict[str, Any]) -> None:
    assert gpu_choices(given) == {"max_num_seqs": GPU_MAX_NUM_SEQS}


def test_a_compilation_that_says_nothing_of_sizes_leaves_them_to_us() -> None:
    given = {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}
    assert gpu_choices(given)["max_cudagraph_capture_size"] == GPU_MAX_NUM_SEQS


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_num_seq", "did you mean 'max_num_seqs'?"),
        ("enforce-eager", "did you mean 'enforce_eager'?"),
        ("gpu_memory_utilisation", "did you mean 'gpu_memory_utilization'?"),
        ("zzz", "see vLLM's EngineArgs for the valid names"),
        ("block_size", "set planning.block_size"),
    ],
)
def test_a_name_is_checked_before_any_work_with_no_vllm_imported(name: str, hint: str) -> None:
    with pytest.raises(TerminalError, match=name) as caught:
        check_engine_arguments(ModelSpec(id="m", engine_args={"max_num_seqs": 1, name: 1}))
    assert hint in str(caught.value)


def test_without_vllm_the_names_are_those_of_the_version_that_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    known_engine_arguments.cache_clear()
    monkeypatch.setattr("batchllm_operators.execute.engine_options.find_spec", lambda _: None)
    try:
        assert known_engine_arguments() == ENGINE_ARGUMENTS
    finally:
        known_engine_arguments.cache_clear()
