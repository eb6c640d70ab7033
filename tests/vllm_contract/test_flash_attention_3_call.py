"""The benchmark and the engine call FlashAttention 3 with the very arguments of vLLM's own functions."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from batchllm_kernels.attention.flash_shared import VarlenAttention
from batchllm_kernels.bench.flash_attention_3 import SPLITS_IN_CUDA_GRAPHS, FlashAttention3

pytestmark = pytest.mark.usefixtures("vllm")


class Recorder:
    """Stands for the operators of the library, and keeps what they are called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def fwd(self, *arguments: Any) -> list[torch.Tensor]:
        self.calls.append(arguments)
        return [torch.zeros(1), torch.ones(1), torch.zeros(0), torch.zeros(0)]

    def get_scheduler_metadata(self, *arguments: Any) -> torch.Tensor:
        self.calls.append(arguments)
        return torch.zeros(1)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(torch.ops, "_vllm_fa3_C", made, raising=False)
    monkeypatch.setattr(torch.ops, "load_library", lambda _: None)
    return made


def interface() -> ModuleType:
    """vLLM's functions around the library; their package asks for a build with CUDA."""
    import vllm

    path = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    spec = spec_from_file_location("flash_attn_interface", path)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> bool:
    return len(ours) == len(theirs) and all(
        a is b or (not isinstance(a, torch.Tensor) and type(a) is type(b) and a == b)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("causal", [True, False])
def test_attention_and_its_metadata_have_the_arguments_of_vllm(recorder: Recorder, causal: bool) -> None:
    vllms = interface()
    query, output = torch.zeros(3, 8, 128), torch.zeros(3, 8, 128)
    keys, values = torch.zeros(7, 2, 16, 256).transpose(1, 2).split(128, dim=-1)
    table, lengths, starts = torch.zeros(3, 4).int(), torch.ones(3).int(), torch.arange(4).int()
    splits = SPLITS_IN_CUDA_GRAPHS

    library = FlashAttention3(Path("a library"))
    metadata = library.scheduler_metadata(
        query, keys, starts, lengths, max_query_len=1, max_seq_len=50, causal=causal, splits=splits
    )
    result, lse = library.attend(
        query, keys, values, table, starts, lengths, max_query_len=1, max_seq_len=50, scale=0.1, causal=causal,
        splits=splits, metadata=metadata, output=output,
    )  # fmt: skip
    assert (result.item(), lse.item()) == (0.0, 1.0)

    vllms.get_scheduler_metadata(
        batch_size=3, max_seqlen_q=1, max_seqlen_k=50, num_heads_q=8, num_heads_kv=2, headdim=128,
        cache_seqlens=lengths, qkv_dtype=query.dtype, cu_seqlens_q=starts, page_size=16, causal=causal,
        window_size=(-1, -1), num_splits=splits,
    )  # fmt: skip
    vllms.flash_attn_varlen_func(
        q=query, k=keys, v=values, out=output, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=lengths, max_seqlen_k=50,
        softmax_scale=0.1, causal=causal, window_size=[-1, -1], block_table=table, softcap=0.0,
        scheduler_metadata=metadata, fa_version=3, num_splits=splits,
    )  # fmt: skip
    assert same(recorder.calls[0], recorder.calls[2])
    assert same(recorder.calls[1], recorder.calls[3])


def test_shared_parts_are_called_for_through_vllm_as_through_the_library(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from batchllm_kernels.vllm_plugin.flash_attention_3 import VllmFlashAttention3

    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", interface())
    query, output = torch.zeros(3, 8, 128), torch.zeros(3, 8, 128)
    keys, values = torch.zeros(7, 2, 16, 256).transpose(1, 2).split(128, dim=-1)
    table, lengths, starts = torch.zeros(2, 4).int(), torch.ones(2).int(), torch.tensor([0, 2, 3]).int()
    metadata = torch.zeros(9).int()
    bounds = {"max_query_len": 3, "max_seq_len": 64, "causal": False, "splits": 1}
    called: VarlenAttention
    for called in (FlashAttention3(Path("a library")), VllmFlashAttention3()):
        called.scheduler_metadata(query, keys, starts, lengths, **bounds)  # type: ignore[arg-type]
        result, lse = called.attend(
            query, keys, values, table, starts, lengths, scale=0.1, metadata=metadata, output=output, **bounds
        )  # type: ignore[arg-type]
        assert (result.item(), lse.item()) == (0.0, 1.0)
    assert same(recorder.calls[0], recorder.calls[2])
    assert same(recorder.calls[1], recorder.calls[3])


@pytest.mark.parametrize(
    ("capability", "missing", "implementation"),
    [((9, 0), None, "flash_attention_3"), ((9, 0), "FA3 is unavailable", "triton"), ((10, 0), None, "triton")],
)
def test_shared_parts_run_in_flash_attention_3_where_vllm_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], missing: str | None, implementation: str
) -> None:
    from vllm.platforms.interface import DeviceCapability

    from batchllm_kernels.vllm_plugin import flash_attention_3

    vllms = interface()
    assert callable(vllms.fa_version_unsupported_reason)
    monkeypatch.setattr(vllms, "fa_version_unsupported_reason", lambda version: missing if version == 3 else "another")
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", vllms)
    platform = SimpleNamespace(
        is_cuda=lambda: True, get_device_capability=lambda: DeviceCapability(*capability), device_name="cuda"
    )
    monkeypatch.setattr(flash_attention_3, "current_platform", platform)
    chosen = flash_attention_3.shared_implementation(torch.bfloat16, 128)
    assert chosen.implementation == implementation
    assert missing is None or chosen.reason == missing


def test_without_cuda_the_triton_kernel_runs_shared_parts() -> None:
    from batchllm_kernels.vllm_plugin.flash_attention_3 import shared_implementation

    assert shared_implementation(torch.bfloat16, 128).implementation == "triton"


def test_captured_steps_have_as_many_splits_as_vllm_allows() -> None:
    from vllm.config.attention import AttentionConfig

    assert AttentionConfig().flash_attn_max_num_splits_for_cuda_graph == SPLITS_IN_CUDA_GRAPHS
