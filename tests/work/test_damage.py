"""One policy for damaged objects: a run sets them aside, who only looks leaves them, and all steps count alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from batchllm_operators.errors import DamagedObjectError
from batchllm_operators.execute.feeding import known_results
from batchllm_operators.merge.requests import choose_results, index_requests
from batchllm_operators.plan.requests import read_results
from batchllm_operators.plan.unanswered import count_requests
from batchllm_operators.records import OutputSamples, StageSummary
from batchllm_operators.store import Store
from batchllm_operators.tasks.generate import GENERATION
from batchllm_operators.work.damage import quarantined
from batchllm_operators.work.json_objects import checked_record, read_record, write_record
from batchllm_operators.work.layout import SAMPLES_FILE
from batchllm_operators.work.results import encoded_part, part_names
from tests.faults.damage import Damage, append, empty, flip, flip_last_bits, replace, truncate
from tests.plan.staged_jobs import stage_prompts, write_results

WHOLE, DAMAGED = [[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12], [13, 14, 15]]
SAMPLES = OutputSamples(truncated_rows=1, answers=(), errors={})


def answered_by_plan(work: Store, stage: StageSummary) -> int:
    return len(read_results([work], GENERATION).keys)


def answered_by_merge(work: Store, stage: StageSummary) -> int:
    index = index_requests(stage, work)
    return len(index) - len(choose_results(index, part_names(work), work, GENERATION).missing)


def answered_by_execute(work: Store, stage: StageSummary) -> int:
    return len(known_results(work, GENERATION, part_names(work))[0])


def answered_by_status(work: Store, stage: StageSummary) -> int:
    return count_requests(work, stage)[1]


STEPS = {
    "plan": answered_by_plan,
    "merge": answered_by_merge,
    "execute": answered_by_execute,
    "status": answered_by_status,
}
DAMAGES = {
    "a flipped bit of a column that no step counts": flip("completion"),
    "a flipped bit of a key": flip("request_key"),
    "cut off": truncate,
    "empty": empty,
    "bytes behind the end": append,
    "other last bytes": flip_last_bits,
    "a text": replace(b"not Parquet"),
}


def with_digest(work: Store, name: str) -> str:
    """Give a part the name that an engine would have given it."""
    with work.parquet(name) as file:
        told, content = encoded_part(file.read())
    work.write_bytes(told, content)
    work.delete([name])
    return told


@pytest.mark.parametrize("how", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("step", STEPS, ids=STEPS.keys())
def test_every_step_counts_the_same_result_parts(tmp_path: Path, step: str, how: Damage) -> None:
    work = Store(str(tmp_path))
    stage = stage_prompts(work, [*WHOLE, *DAMAGED])
    write_results(work, WHOLE, name="results/whole.parquet")
    write_results(work, DAMAGED, name="results/damaged.parquet")
    with_digest(work, "results/whole.parquet")
    damaged = with_digest(work, "results/damaged.parquet")
    work.write_bytes(damaged, how(work.read_bytes(damaged)))

    assert STEPS[step](work, stage) == len(WHOLE)

    only_looks = step == "status"
    assert (damaged in part_names(work)) == only_looks
    assert len(quarantined(work)) == (0 if only_looks else 1)


def test_an_object_that_is_not_there_is_no_damage(tmp_path: Path) -> None:
    work = Store(str(tmp_path))
    assert read_record(OutputSamples, work, SAMPLES_FILE) is None
    assert checked_record(OutputSamples, work, SAMPLES_FILE) is None
    assert work.names() == []


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    work = Store(str(tmp_path))
    write_record(work, SAMPLES_FILE, SAMPLES)
    for read in (read_record, checked_record):
        assert read(OutputSamples, work, SAMPLES_FILE) == SAMPLES


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "cut off": truncate,
    "empty": empty,
    "a list": replace(b"[]"),
    "of another version": replace(b'{"truncated_rows": 1, "of_the_future": 2}'),
}


@pytest.mark.parametrize("how", BROKEN.values(), ids=BROKEN.keys())
def test_a_damaged_record_is_set_aside_by_a_run_left_by_who_looks_and_told_by_who_checks(
    tmp_path: Path, how: Damage
) -> None:
    work = Store(str(tmp_path))
    write_record(work, SAMPLES_FILE, SAMPLES)
    broken = how(work.read_bytes(SAMPLES_FILE))
    work.write_bytes(SAMPLES_FILE, broken)

    with pytest.raises(DamagedObjectError, match="not as it is written"):
        checked_record(OutputSamples, work, SAMPLES_FILE)
    assert read_record(OutputSamples, work, SAMPLES_FILE, only_looks=True) is None
    assert work.read_bytes(SAMPLES_FILE) == broken

    assert read_record(OutputSamples, work, SAMPLES_FILE) is None
    assert not work.exists(SAMPLES_FILE)
    assert [work.read_bytes(name) for name in quarantined(work)] == [broken]
