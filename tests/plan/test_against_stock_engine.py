"""What the cache simulator predicts, against a real vLLM."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from batchllm_operators.plan.cache_simulator import number_blocks, simulate_cache
from batchllm_operators.plan.prefix_order import usable_blocks
from tests.plan.test_prefix_order import sort_prompts

BLOCK, CACHE_BLOCKS, RUNNING, OUTPUT_TOKENS = 32, 200, 8, 20


@pytest.mark.engine
def test_the_predicted_saving_of_a_stock_engine_is_near_the_real_one(tmp_path: Path, tiny_llama: str) -> None:
    chance = random.Random(0)
    documents = [[chance.randrange(1000) for _ in range(chance.randrange(100, 500))] for _ in range(20)]
    prompts = [
        [
            *chance.choice(documents[: 1 + turn % 20]),
            *(chance.randrange(1000) for _ in range(chance.randrange(20, 120))),
        ]
        for turn in range(160)
    ]
    order = sort_prompts(prompts, BLOCK)
    lengths = np.array([len(prompts[row]) for row in order.rows], dtype=np.int32)
    blocks = lengths // BLOCK
    found = simulate_cache(
        np.argsort(order.rows),
        number_blocks(order, blocks),
        usable_blocks(lengths, BLOCK),
        capacity_blocks=CACHE_BLOCKS,
        own_blocks=-(-(lengths + OUTPUT_TOKENS) // BLOCK) - blocks,
        running=RUNNING,
    )
    predicted = BLOCK * int(found.sum()) / int(lengths.sum())

    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    settings = [tiny_llama, tmp_path / "prompts.json", BLOCK, CACHE_BLOCKS, RUNNING, OUTPUT_TOKENS]
    engine = subprocess.run(
        [sys.executable, Path(__file__).with_name("stock_engine.py"), *map(str, settings)],
        capture_output=True,
        text=True,
        check=True,
    )
    real = json.loads(engine.stdout.splitlines()[-1])["cached_tokens"] / int(lengths.sum())
    assert 0.1 < real < 0.75, "the cache must be under pressure for the prediction to mean something"
    assert predicted == pytest.approx(real, abs=0.05)
