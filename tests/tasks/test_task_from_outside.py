"""A task that is added in under 60 lines from outside the package, from a job to its output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import orjson
import pyarrow as pa
import pytest

from batchllm_flows.flows import batch_inference
from batchllm_flows.job import BatchJob
from batchllm_flows.verify import verify_output
from batchllm_operators.formats import open_source
from batchllm_operators.keys import RequestKeys
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.store import Store
from batchllm_operators.tasks import unregister_task
from batchllm_operators.work.layout import JOB_FILE
from tests.conftest import REPOSITORY
from tests.flows.jobs import job, questions, read_output, write_input
from tests.installed_packages import install_entry_point


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The task `last_state`, for this process and for those that it starts."""
    site = tmp_path / "site"
    site.mkdir()
    install_entry_point(site, "states", "batchllm_flows.tasks", "last_state = tests.tasks.last_state:LAST_STATE")
    monkeypatch.syspath_prepend(str(site))
    paths = [str(site), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    yield
    with suppress(KeyError):
        unregister_task("last_state")  # as far as a test has used it


@pytest.mark.engine
@pytest.mark.usefixtures("prefect_server", "installed")
def test_a_job_of_a_pooling_task_shares_prefixes_and_writes_the_columns_of_the_task(
    tmp_path: Path, tiny_llama: str
) -> None:
    rows = questions(24)
    write_input(str(tmp_path / "in"), rows)
    this_job = job(str(tmp_path / "in"), str(tmp_path / "out"), tiny_llama, task="last_state", model__dtype="float32")

    report = batch_inference(this_job)

    assert (report.rows_out, report.rows_error, report.duplicate_rows, report.completion_tokens) == (24, 0, 1, 0)
    assert report.saving >= 0.98 * report.optimum_saving > 0.5
    output = read_output(report.output_uri)
    added = [name for name in output.column_names if name not in rows.column_names]
    assert added == ["state_norm", "state", "error", "prompt_tokens", "cached_tokens"]
    assert output.schema.field("state").type == pa.list_(pa.float32())
    states = output["state"].to_pylist()
    assert states[0] == states[1], "equal rows are computed once"
    expected = states_by_transformers(this_job, rows.slice(2, 2).to_pylist())
    assert [pytest.approx(state, abs=2e-3) for state in expected] == states[2:4]
    looked_at_where_the_task_is_missing(report.output_uri, Store(report.work_uri))


def looked_at_where_the_task_is_missing(output_uri: str, work: Store) -> None:
    """Status and verification of a job tell that its task is not here, and all that can be told without it."""
    sink = SinkSpec(uri=output_uri)
    whole = verify_output(sink)
    assert whole.faults == ()
    work.delete(work.names("staged"))
    assert verify_output(sink).faults == (), "the parts of a job are those of its task also where staging is gone"

    file = orjson.loads(work.read_bytes(JOB_FILE))
    file["job"]["task"] = "absent"
    work.write_bytes(JOB_FILE, orjson.dumps(file))
    (fault,) = verify_output(sink).faults
    assert fault.uri == work.uri_of("results")
    assert "its parts were not read: task: expected a task among generate, last_state, got 'absent'" in fault.what


def states_by_transformers(of: BatchJob, rows: list[dict[str, str]]) -> list[list[float]]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(of.model.id)
    model = AutoModel.from_pretrained(of.model.id, dtype=torch.float32)
    states = []
    for row in rows:
        messages = [{"role": "system", "content": row["document"]}, {"role": "user", "content": row["question"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            states.append(model(**tokens).last_hidden_state[0, -1].tolist())
    return states


@pytest.mark.usefixtures("installed")
def test_a_task_counts_in_ids_and_keys_but_generation_does_not(tmp_path: Path, tiny_llama: str) -> None:
    write_input(str(tmp_path / "in"), questions(4))
    places = str(tmp_path / "in"), str(tmp_path / "out"), tiny_llama
    plain, named, other = job(*places), job(*places, task="generate"), job(*places, task="last_state")
    objects = open_source(plain.source).objects
    assert plain.job_id(objects) == named.job_id(objects) != other.job_id(objects)
    tokens = pa.array([1, 2, 3], pa.int32()).to_numpy()

    def key(*task: str) -> bytes:
        return RequestKeys("m", None, *task).key(tokens, {}, row_index=None)

    assert key() == key("generate") != key("last_state")


def test_a_task_that_nobody_brings_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"task\s.*expected a task among generate, got 'embed'"):
        job("/in", "/out", "model", task="embed")
