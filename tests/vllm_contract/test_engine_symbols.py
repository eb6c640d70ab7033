"""What `execute/vllm_engine.py` relies on in vLLM, symbol by symbol; no model is loaded."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
from importlib.metadata import requires
from typing import Any

import pytest
from packaging.requirements import Requirement

from batchllm_kernels.vllm_plugin.compat import DISTRIBUTION, check_vllm_version, supported_versions
from batchllm_operators.execute.engine_argument_names import ENGINE_ARGUMENTS
from batchllm_operators.execute.engine_options import RESERVED, engine_arguments, known_engine_arguments
from batchllm_operators.machine.processor import processor
from batchllm_operators.specs.execution import ModelSpec

pytestmark = pytest.mark.usefixtures("vllm")


def test_the_installed_version_is_in_the_window_of_our_metadata() -> None:
    check_vllm_version()
    assert supported_versions().startswith("==0.")


def test_both_extras_want_the_same_vllm() -> None:
    wanted = {
        one.name: str(one.specifier)
        for one in map(Requirement, requires(DISTRIBUTION) or ())
        if one.name in ("vllm", "vllm-cpu")
    }
    assert wanted == {"vllm": supported_versions(), "vllm-cpu": supported_versions()}


def test_another_version_is_refused(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.raises(RuntimeError, match=r"expected version ==0\.\d+\.\*, got 0\.99\.0"):
        check_vllm_version()


def test_engine_args_has_every_field_we_set_or_reserve() -> None:
    from vllm.engine.arg_utils import EngineArgs

    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert set(RESERVED) <= fields
    assert set(engine_arguments(ModelSpec(id="m"), block_size=32, gpus=1, runner="generate", known=fields)) <= fields
    assert {"kv_cache_memory_bytes", "gpu_memory_utilization", "max_num_seqs", "enforce_eager"} <= fields
    # What a plan checks names against, without importing vLLM, or without having it.
    assert known_engine_arguments() == ENGINE_ARGUMENTS == fields


@pytest.mark.parametrize("level", [None, "AVX2"], ids=["as it is", "limited to AVX2"])
def test_what_onednn_may_use_of_this_processor_is_what_we_take_it_to_be(level: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_MAX_CPU_ISA")}
    environment |= {} if level is None else {"ONEDNN_MAX_CPU_ISA": level}
    script = "import torch; print(torch.ops.mkldnn._is_mkldnn_bf16_supported())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    # oneDNN takes bfloat16 from AVX-512 on, and emulates it where the processor has no instructions for it.
    onednn = done.stdout.strip() == "True"
    found = processor(environment)
    assert onednn or not found.fast_bf16
    assert onednn == (found.avx512 or bool(found.fast_bf16))


def test_the_engine_is_made_from_engine_args_and_a_usage_context() -> None:
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    assert {"engine_args", "usage_context"} <= set(inspect.signature(LLMEngine.from_engine_args).parameters)
    assert UsageContext.LLM_CLASS


def test_the_engine_takes_requests_steps_and_aborts() -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    assert list(inspect.signature(LLMEngine.add_request).parameters)[1:4] == ["request_id", "prompt", "params"]
    assert list(inspect.signature(LLMEngine.step).parameters) == ["self"]
    # By the ids that we gave, not by those that vLLM made of them.
    abort = inspect.signature(LLMEngine.abort_request).parameters
    assert list(abort) == ["self", "request_ids", "internal"]
    assert abort["internal"].default is False


def test_the_engine_core_can_be_shut_down_in_process_and_out_of_it() -> None:
    from vllm.v1.engine.core_client import InprocClient, SyncMPClient

    for client in (InprocClient, SyncMPClient):
        parameters = list(inspect.signature(client.shutdown).parameters.values())[1:]
        assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters)


def test_the_scheduler_config_says_how_many_requests_run_at_a_time() -> None:
    from vllm.config import SchedulerConfig

    assert "max_num_seqs" in {field.name for field in dataclasses.fields(SchedulerConfig)}


def test_token_ids_are_an_engine_input() -> None:
    from vllm.inputs.engine import tokens_input

    assert tokens_input([1, 2, 3]) == {"type": "token", "prompt_token_ids": [1, 2, 3]}


def test_sampling_parameters_have_our_fields_and_a_final_only_output() -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    parameters = SamplingParams(
        temperature=0.5,
        top_p=0.9,
        seed=1,
        max_tokens=3,
        stop=["x"],
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    assert parameters.stop == ["x"]
    assert parameters.detokenize


def test_a_refused_request_raises_a_client_error_of_vllm() -> None:
    from vllm.exceptions import VLLMClientError, VLLMValidationError

    assert issubclass(VLLMValidationError, VLLMClientError)


def test_an_output_says_what_was_cached_and_why_it_ended() -> None:
    from vllm.outputs import CompletionOutput, RequestOutput

    assert {"request_id", "outputs", "finished", "num_cached_tokens"} <= set(
        inspect.signature(RequestOutput).parameters
    )
    assert {"text", "token_ids", "finish_reason"} <= {field.name for field in dataclasses.fields(CompletionOutput)}


def test_the_reasons_for_an_end_without_an_answer_are_abort_and_error() -> None:
    from vllm.v1.engine import FinishReason

    assert {str(reason) for reason in FinishReason} == {"stop", "length", "abort", "error", "repetition"}


def test_the_platform_says_whether_it_is_a_cpu() -> None:
    from vllm.platforms import current_platform

    assert isinstance(current_platform.is_cpu(), bool)


def test_the_place_of_the_engine_core_is_an_environment_variable() -> None:
    from vllm import envs

    assert "VLLM_ENABLE_V1_MULTIPROCESSING" in envs.environment_variables


def test_the_kv_cache_of_a_cpu_can_be_set_in_the_environment() -> None:
    from vllm.platforms import cpu

    assert '"VLLM_CPU_KVCACHE_SPACE"' in inspect.getsource(cpu)


def test_the_functions_and_modules_by_which_phases_of_loading_are_told_exist() -> None:
    from importlib.util import find_spec

    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    from batchllm_kernels.vllm_plugin.load_phases import FUNCTIONS, MODULES, WORKERS

    for module in (*MODULES, WORKERS):
        assert find_spec(module) is not None
    for function in FUNCTIONS:
        assert any(hasattr(one, function) for one in (CPUModelRunner, GPUModelRunner, Worker))
