"""One job as a call of our flow, on local folders.

    python ours.py '{"input": "questions.parquet", "output": "answers", "result": "result.json", ...}'

The settings are those that `benchmarks/job.py` makes. The Prefect server that the flow starts for itself is part of the
program. Needs batchllm-flows with an engine.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def run(settings: dict[str, Any]) -> dict[str, Any]:
    from batchllm_flows import BatchJob, batch_inference

    engine_args = dict(settings["engine_args"])
    block_size = engine_args.pop("block_size")
    job = BatchJob.model_validate(
        {
            "name": "job-benchmark",
            "source": {"uri": settings["input"], "format": "parquet", "id_column": "id", "columns": ["id"]},
            "prompt": {
                "kind": "template",
                "template": settings["template"].format(document="{{ document }}", question="{{ question }}"),
            },
            "model": {
                "id": engine_args.pop("model"),
                "dtype": engine_args.pop("dtype"),
                "max_model_len": engine_args.pop("max_model_len"),
                "engine_args": engine_args,
            },
            "sampling": {"temperature": 0.0, "max_tokens": settings["max_tokens"]},
            "planning": {"block_size": block_size},
            "execution": {"calibrate": False},
            "sink": {"uri": settings["output"]},
        }
    )
    report = batch_inference(job)
    return {
        # What was waited for: staging and planning go on while the engine loads.
        "load_seconds": report.engine_wait_seconds,
        # From the begin of the flow to its end, reports included.
        "work_seconds": time.time() - report.started.timestamp() - report.engine_wait_seconds,
        "prompt_tokens": report.prompt_tokens,
        "cached_tokens": report.prompt_tokens - report.computed_prompt_tokens,
    }


if __name__ == "__main__":
    _settings = json.loads(sys.argv[1])
    Path(_settings["result"]).write_text(json.dumps(run(_settings)))
