"""An engine in a process of its own: prints the greedy output tokens of some prompts.

python -m tests.vllm_plugin.attention_engine MODEL PROMPTS.json (stock | shared) (sync | async)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    model, prompts, attention, scheduling = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if attention == "shared":
        register_backend(AttentionBackendEnum.CPU_ATTN, "tests.vllm_plugin.plain_cpu_backend.SharedBackend")
    engine = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=200,
        max_num_seqs=8,
        max_num_batched_tokens=96,
        max_model_len=512,
        enable_prefix_caching=True,
        async_scheduling=scheduling == "async",
    )
    finished = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in json.loads(Path(prompts).read_text())],
        SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True),
        use_tqdm=False,
    )
    print(json.dumps([one.outputs[0].token_ids for one in finished]))


if __name__ == "__main__":
    main()
