"""A data pipeline with an LLM step in the middle: the job runs as a subflow.

python examples/compose_in_a_pipeline.py FOLDER MODEL
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from prefect import flow, task

from batchllm_flows import BatchJob, batch_inference


@task
def export_rows(folder: str) -> str:
    rows = pa.table(
        {
            "city": ["Bern", "Oslo", "Lima", "Bern"],
            "note": ["on a river bend", "at the end of a fjord", "by the sea", "on a river bend"],
        }
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, f"{folder}/cities.parquet")
    return folder


@task
def count_answers(output_uri: str) -> int:
    answers = ds.dataset(output_uri, format="parquet", ignore_prefixes=[".", "_"]).to_table()
    return int(pc.sum(pc.is_valid(answers["completion"])).as_py())


@flow(name="describe-cities")
def describe_cities(folder: str, model: str) -> int:
    source = export_rows(f"{folder}/input")
    job = BatchJob.model_validate(
        {
            "name": "city-descriptions",
            "source": {"uri": source, "format": "parquet"},
            "prompt": {"kind": "chat", "user": "Describe {{ city }}, {{ note }}, in one sentence."},
            "model": {"id": model, "max_model_len": 1024, "engine_args": {"enforce_eager": True}},
            "sampling": {"max_tokens": 24},
            "sink": {"uri": f"{folder}/output", "mode": "overwrite"},
        }
    )
    report = batch_inference(job)
    return count_answers(report.output_uri)


if __name__ == "__main__":
    print(f"{describe_cities(sys.argv[1], sys.argv[2])} rows answered")
