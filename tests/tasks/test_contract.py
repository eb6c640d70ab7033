"""What holds for every task: the one that is built in, and one from outside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from batchllm_kernels.vllm_plugin.options import PlannedRequest
from batchllm_operators.errors import RowError, RowErrorCode, TerminalError
from batchllm_operators.specs.sampling import SamplingParameters
from batchllm_operators.tasks import Answer, Task, TaskRequest, register_task, task_named, unregister_task
from batchllm_operators.work.results import COUNT_COLUMNS, answer_columns, answers_table, output_fields, result_schema
from tests.tasks.last_state import LAST_STATE

PLANNED = PlannedRequest("bundle:3", 64, 7)


@pytest.fixture(params=["generate", "last_state"])
def task(request: pytest.FixtureRequest) -> Iterator[Task]:
    register_task(LAST_STATE)
    yield task_named(request.param)
    unregister_task("last_state")


def test_its_columns_are_its_own_nullable_and_known(task: Task) -> None:
    names = [field.name for field in task.answer_fields]
    assert len(set(names)) == len(names)
    assert not set(names) & set(COUNT_COLUMNS)
    assert all(field.nullable for field in task.answer_fields)
    assert set(task.output_names) <= set(names)
    assert task.text_name is None or task.text_name in task.output_names


def test_its_results_have_the_columns_of_all_tasks_and_its_own(task: Task) -> None:
    schema = result_schema(task)
    assert set(schema.names) == {*COUNT_COLUMNS, *(field.name for field in task.answer_fields)}
    output = [field.name for field in answer_columns(task)]
    assert output[: len(task.output_names)] == list(task.output_names)
    assert set(output[len(task.output_names) :]) <= set(COUNT_COLUMNS)
    assert ("completion_tokens" in output) == task.generates
    assert [field.name for field in output_fields(task, "x_")] == [f"x_{name}" for name in output]


def test_an_error_is_a_row_of_nulls(task: Task) -> None:
    table = answers_table(task, [Answer(bytes(16), error=RowError(RowErrorCode.ENGINE_ERROR, "why"))])
    (row,) = table.to_pylist()
    assert row.pop("request_key") == bytes(16)
    assert row.pop("error") == {"code": "engine_error", "message": "why"}
    assert set(row.values()) == {None}
    assert answers_table(task, []).schema == table.schema == result_schema(task)


def test_an_answer_that_does_not_fit_its_columns_is_a_fault_of_the_task(task: Task) -> None:
    right: tuple[Any, ...] = ([1], "a", "stop") if task.generates else ([0.5], 0.5)
    assert answers_table(task, [Answer(bytes(16), right, 1, 0, 0)]).num_rows == 1
    for wrong in ((*right, 1), right[1:], ("no list", *right[1:])):
        with pytest.raises(TerminalError, match=f"task '{task.name}': expected answers of .*, got others"):
            answers_table(task, [Answer(bytes(16), wrong, 1, 0, 0)])


def test_what_the_plan_says_of_a_request_reaches_the_scheduler(task: Task, vllm: Any) -> None:
    from vllm import PoolingParams, SamplingParams
    from vllm.v1.request import Request

    from batchllm_kernels.vllm_plugin.planned import planned_request

    options = TaskRequest(SamplingParameters(max_tokens=5), PLANNED.as_extra_args())
    parameters = task.to_vllm(options)
    assert isinstance(parameters, SamplingParams if task.generates else PoolingParams)
    sampling, pooling = (parameters, None) if task.generates else (None, parameters)
    request = Request("r", [1, 2, 3], sampling, pooling, arrival_time=0.0)
    assert planned_request(request) == PLANNED
    unplanned = task.to_vllm(TaskRequest(SamplingParameters(max_tokens=5), None))
    sampling, pooling = (unplanned, None) if task.generates else (None, unplanned)
    assert planned_request(Request("r", [1, 2, 3], sampling, pooling, arrival_time=0.0)) is None


def test_the_columns_of_generation_stay_as_they_are() -> None:
    generation = task_named("generate")
    assert [(field.name, field.type) for field in result_schema(generation)] == [
        ("request_key", pa.binary(16)),
        ("output_token_ids", pa.list_(pa.int32())),
        ("completion", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("cached_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("error", pa.struct([("code", pa.string()), ("message", pa.string())])),
    ]
    assert [field.name for field in answer_columns(generation)] == [
        "completion", "finish_reason", "error", "prompt_tokens", "cached_tokens", "completion_tokens",
    ]  # fmt: skip
