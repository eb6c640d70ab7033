"""Damaged, foreign, missing and outdated objects: the answers stay right, or one error names what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest

from batchllm_flows.report import read_samples
from batchllm_flows.run import open_run
from batchllm_flows.verify import verify_output
from batchllm_operators.cost import Calibration, default_cost_model
from batchllm_operators.digests import digest_of_bytes
from batchllm_operators.errors import DamagedObjectError, TerminalError
from batchllm_operators.execute.calibration_cache import CalibrationCache
from batchllm_operators.merge.claim import IN_PROGRESS_FILE
from batchllm_operators.records import Manifest
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.store import Store
from batchllm_operators.tasks.generate import GENERATION
from batchllm_operators.work.columns import KEY_TYPE
from batchllm_operators.work.layout import (
    JOB_FILE,
    MANIFEST_FILE,
    PLAN_SUMMARY,
    REPORT_FILE,
    SAMPLES_FILE,
    STAGED_SUMMARY,
)
from batchllm_operators.work.results import checked_result_part, read_result_part
from tests.faults.damage import (
    Damage,
    append,
    damage,
    empty,
    flip,
    flip_last_bits,
    parquet,
    replace,
    truncate,
    with_field,
    without_field,
)
from tests.faults.told_jobs import PART_ROWS, ToldJob, result_table
from tests.flows.reports import a_report
from tests.generation import RESULT_SCHEMA

STAGED = "staged/part-00000.parquet"
BUNDLE = "plan/bundle-00000.parquet"
FOREIGN = parquet(n=pa.array([1, 2, 3]))
ALIEN_KEYS = parquet(request_key=pa.array(["a", "b"]))
NULL_KEYS = {"request_key": pa.nulls(2, KEY_TYPE)} | {
    field.name: pa.nulls(2, field.type) for field in RESULT_SCHEMA if field.name != "request_key"
}


def first_part(work: Store) -> str:
    return work.names("results")[0]


@dataclass(frozen=True)
class Case:
    """What happens to a job whose answers are not merged yet, and what the next run must do."""

    do: Callable[[Store], None]
    computed: int = 0
    set_aside: int = 0


def part(how: Damage, **expected: int) -> Case:
    return Case(lambda work: damage(work, first_part(work), how), **expected)


def one(name: str, how: Damage, **expected: int) -> Case:
    return Case(lambda work: damage(work, name, how), **expected)


def extra(name: str, content: bytes, **expected: int) -> Case:
    return Case(lambda work: work.write_bytes(name, content), **expected)


def lost(*names: str, **expected: int) -> Case:
    return Case(lambda work: work.delete(list(names)), **expected)


def copy_part(work: Store) -> None:
    work.write_bytes("results/part-copy.parquet", work.read_bytes(first_part(work)))


def part_of_others(work: Store) -> None:
    rows = [{"request_key": bytes([n]) * 16, "prompt_token_ids": [n, 1, 2]} for n in range(3)]
    work.write_table("results/part-others.parquet", result_table(rows))


def part_of_an_older_version(work: Store) -> None:
    with work.parquet(first_part(work)) as file:
        table = file.read()
    work.write_table(first_part(work), table.drop_columns("output_token_ids"))


RECOVERED = {
    "a bit of a completion's text": part(flip("completion"), computed=PART_ROWS, set_aside=1),
    "a bit of a request key": part(flip("request_key"), computed=PART_ROWS, set_aside=1),
    "a bit of the output's tokens": part(flip("output_token_ids"), computed=PART_ROWS, set_aside=1),
    "a bit of the token counts": part(flip("prompt_tokens"), computed=PART_ROWS, set_aside=1),
    "a truncated part": part(truncate, computed=PART_ROWS, set_aside=1),
    "an emptied part": part(empty, computed=PART_ROWS, set_aside=1),
    "a part with bytes behind its end": part(append, computed=PART_ROWS, set_aside=1),
    "a part whose last bytes are others": part(flip_last_bits, computed=PART_ROWS, set_aside=1),
    "a part that became text": part(replace(b"this is not Parquet"), computed=PART_ROWS, set_aside=1),
    "a part of an older version": Case(part_of_an_older_version, computed=PART_ROWS, set_aside=1),
    "a part that is gone": Case(lambda work: work.delete([first_part(work)]), computed=PART_ROWS),
    "all parts gone": Case(lambda work: work.delete(work.names("results")), computed=20),
    "a part twice": Case(copy_part),
    "answers to requests of nobody": Case(part_of_others),
    "a text beside the parts": extra("results/notes.txt", b"do not delete", set_aside=1),
    "Parquet without keys beside the parts": extra("results/foreign.parquet", FOREIGN, set_aside=1),
    "Parquet with keys of another type beside the parts": extra("results/foreign.parquet", ALIEN_KEYS, set_aside=1),
    "Parquet with null keys beside the parts": extra("results/nulls.parquet", parquet(**NULL_KEYS), set_aside=1),
    "a bit of staged tokens": one(STAGED, flip("prompt_token_ids"), set_aside=1),
    "a bit of staged keys": one(STAGED, flip("request_key"), set_aside=1),
    "a truncated staged part": one(STAGED, truncate, set_aside=1),
    "an emptied staged part": one(STAGED, empty, set_aside=1),
    "another Parquet object in place of a staged part": one(STAGED, replace(FOREIGN), set_aside=1),
    "a staged part that is gone": lost(STAGED),
    "a truncated staged summary": one(STAGED_SUMMARY, truncate, set_aside=1),
    "an emptied staged summary": one(STAGED_SUMMARY, empty, set_aside=1),
    "a staged summary that is other JSON": one(STAGED_SUMMARY, replace(b'{"rows": 3}'), set_aside=1),
    "a staged summary that is a list": one(STAGED_SUMMARY, replace(b"[]"), set_aside=1),
    "a staged summary of an older version": one(STAGED_SUMMARY, without_field("input_digest")),
    "a staged summary of another input": one(STAGED_SUMMARY, with_field("input_digest", "0" * 32)),
    "a staged summary of other settings": one(STAGED_SUMMARY, with_field("settings_digest", "0" * 32)),
    "a staged summary that is gone": lost(STAGED_SUMMARY),
    "a truncated bundle": one(BUNDLE, truncate),
    "a bit of a bundle's tokens": one(BUNDLE, flip("prompt_token_ids")),
    "a truncated plan": one(PLAN_SUMMARY, truncate),
    "an emptied plan": one(PLAN_SUMMARY, empty),
    "a plan that is gone": lost(PLAN_SUMMARY, BUNDLE),
    "a foreign object in the plan": extra("plan/foreign.parquet", FOREIGN),
    "a truncated job file": one(JOB_FILE, truncate, set_aside=1),
    "an emptied job file": one(JOB_FILE, empty, set_aside=1),
    "a job file that is other JSON": one(JOB_FILE, replace(b'{"name": "x"}'), set_aside=1),
    "a job file that is gone": lost(JOB_FILE),
}


@pytest.mark.parametrize("case", RECOVERED.values(), ids=RECOVERED.keys())
def test_the_next_run_gives_the_same_answers_and_computes_only_what_is_lost(
    unmerged: ToldJob, answers: pa.Table, case: Case
) -> None:
    work = unmerged.work()
    case.do(work)
    outcome = unmerged.run()
    assert unmerged.output(outcome.manifest).equals(answers)
    assert (outcome.computed, len(outcome.set_aside)) == (case.computed, case.set_aside), outcome.set_aside


def test_a_damaged_bundle_of_the_plan_that_is_executed_is_never_read(unmerged: ToldJob) -> None:
    work = unmerged.work()
    work.delete(work.names("results"))
    outcome = unmerged.run()
    damage(work, outcome.planned.bundles[0].name, flip("prompt_token_ids"))
    with pytest.raises(DamagedObjectError), work.parquet(outcome.planned.bundles[0].name) as file:
        file.read()


def test_no_flipped_bit_of_a_result_part_is_ever_read_as_an_answer(unmerged: ToldJob) -> None:
    work = unmerged.work()
    name = first_part(work)
    whole, table = work.read_bytes(name), checked_result_part(work, name, GENERATION)
    assert checked_result_part(work, name, GENERATION).equals(table)
    for place in range(0, len(whole), 3):
        work.write_bytes(name, whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(DamagedObjectError):
            checked_result_part(work, name, GENERATION)


def test_a_part_that_could_not_be_read_just_once_is_not_set_aside(
    unmerged: ToldJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = unmerged.work()
    name, whole = first_part(work), checked_result_part(work, first_part(work), GENERATION)
    parquet_of, broken = Store.parquet, [True]

    def breaks_off(self: Store, name: str, **how: Any) -> object:
        if broken:
            broken.pop()
            raise DamagedObjectError("not a readable Parquet object: unexpected end of stream", uri=self.uri_of(name))
        return parquet_of(self, name, **how)

    monkeypatch.setattr(Store, "parquet", breaks_off)
    table = read_result_part(work, name, GENERATION, ["completion"])
    assert table is not None
    assert table.equals(whole.select(["completion"]))
    assert work.exists(name)


def test_of_a_part_with_a_digest_only_the_wanted_columns_are_decoded(unmerged: ToldJob) -> None:
    work = unmerged.work()
    undecodable = flip("completion")(work.read_bytes(first_part(work)))
    told, untold = f"results/part-a-{digest_of_bytes(undecodable)}.parquet", "results/part-a.parquet"
    for name in (told, untold):
        work.write_bytes(name, undecodable)
    table = read_result_part(work, told, GENERATION, ["prompt_tokens"])
    assert table is not None
    assert (table.column_names, table.num_rows) == (["prompt_tokens"], PART_ROWS)
    # The content of a part whose name tells no digest is vouched for by its pages alone, so that all are looked at.
    assert read_result_part(work, untold, GENERATION, ["prompt_tokens"]) is None
    with pytest.raises(DamagedObjectError):
        checked_result_part(work, told, GENERATION)


@pytest.mark.parametrize("how", [truncate, empty, flip_last_bits, replace(b"[]"), replace(b"{}")])
def test_a_damaged_report_of_a_complete_job_is_set_aside_and_made_again(complete: ToldJob, how: Damage) -> None:
    work = complete.work()
    work.write_bytes(REPORT_FILE, a_report(usd_per_engine_hour=1.0).model_dump_json().encode())
    assert open_run(complete.spec(sink__rows_per_file=10)).complete is not None
    damage(work, REPORT_FILE, how)
    outcome = complete.run(sink__rows_per_file=10)
    assert (outcome.computed, len(outcome.set_aside)) == (0, 1)
    assert not work.exists(REPORT_FILE)


def test_a_report_of_another_version_is_left_where_it_is(complete: ToldJob) -> None:
    work = complete.work()
    of_another = a_report(usd_per_engine_hour=1.0).model_dump(mode="json") | {"version": "9.0", "rows": None}
    work.write_bytes(REPORT_FILE, orjson.dumps(of_another))
    with pytest.raises(TerminalError, match=r"report\.json is not as .* delete it and run the job again"):
        complete.run(sink__rows_per_file=10)
    assert orjson.loads(work.read_bytes(REPORT_FILE)) == of_another


@pytest.mark.parametrize("how", [truncate, empty, flip_last_bits, replace(b"[]"), replace(b'{"of_the_future": 1}')])
def test_damaged_samples_are_set_aside_and_the_report_does_without(complete: ToldJob, how: Damage) -> None:
    work = complete.work()
    assert read_samples(work) is not None
    damage(work, SAMPLES_FILE, how)
    assert read_samples(work) is None
    assert not work.exists(SAMPLES_FILE)
    assert len(work.names("quarantine")) == 1


OUTPUT_FAULTS: dict[str, Callable[[Store, Manifest], None]] = {
    "truncated": lambda sink, manifest: damage(sink, manifest.files[0].name, truncate),
    "emptied": lambda sink, manifest: damage(sink, manifest.files[0].name, empty),
    "replaced": lambda sink, manifest: damage(sink, manifest.files[1].name, replace(FOREIGN)),
    "missing": lambda sink, manifest: sink.delete([manifest.files[-1].name]),
}


@pytest.mark.parametrize("fault", OUTPUT_FAULTS.values(), ids=OUTPUT_FAULTS.keys())
def test_an_output_whose_file_is_not_as_written_is_written_again_from_the_kept_answers(
    complete: ToldJob, answers: pa.Table, fault: Callable[[Store, Manifest], None]
) -> None:
    fault(complete.sink, complete.run(sink__rows_per_file=10).manifest)
    outcome = complete.run(sink__rows_per_file=10)
    assert complete.output(outcome.manifest).equals(answers)
    assert outcome.computed == 0
    listed = {MANIFEST_FILE, *(file.name for file in outcome.manifest.files)}
    assert {name for name in complete.sink.names() if "/" not in name} == listed


REFUSED: dict[str, tuple[str, Damage, str]] = {
    "a truncated manifest": (MANIFEST_FILE, truncate, "the manifest there is not one of ours"),
    "an emptied manifest": (MANIFEST_FILE, empty, "the manifest there is not one of ours"),
    "a manifest of an older version": (
        MANIFEST_FILE,
        lambda content: with_field("format_version", 1)(without_field("error_rows")(content)),
        r"written by another version \(its format is 1, this one's 3\)",
    ),
}


@pytest.mark.parametrize(("name", "how", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_an_output_that_cannot_be_told_is_refused_with_the_way_on(
    complete: ToldJob, answers: pa.Table, name: str, how: Damage, expected: str
) -> None:
    damage(complete.sink, name, how)
    with pytest.raises(TerminalError, match=f"{expected}.*overwrite"):
        complete.run()
    assert complete.output(complete.run(sink__mode="overwrite").manifest).equals(answers)


def test_a_claim_that_is_no_claim_of_ours_is_in_nobodys_way(unmerged: ToldJob, answers: pa.Table) -> None:
    unmerged.sink.write_bytes(IN_PROGRESS_FILE, b"not JSON")
    assert unmerged.output(unmerged.run().manifest).equals(answers)


@pytest.mark.parametrize("rate", [1e-300, 0.0, -1.0, 1e300, float("nan")])
def test_a_calibration_with_absurd_rates_counts_for_nothing(tmp_path: Path, rate: float) -> None:
    store = Store(str(tmp_path))
    cache = CalibrationCache(store, ModelSpec(id="model"), block_size=32, gpus_per_engine=1)
    cache.keep(
        Calibration(rates=default_cost_model(), device="a device", measured_at="2026-01-31 12:00:00", seconds=1.0)
    )
    assert cache.latest() is not None
    (name,) = store.names()
    content = orjson.loads(store.read_bytes(name))
    content["rates"]["decode_tokens_per_second"] = rate
    store.write_bytes(name, orjson.dumps(content))
    assert cache.latest() is None


def verified(job: ToldJob) -> list[tuple[str, str]]:
    found = verify_output(SinkSpec(uri=job.sink.uri))
    return [(fault.uri.rpartition("/")[2], fault.what) for fault in found.faults]


VERIFIED: dict[str, tuple[Callable[[ToldJob], tuple[Store, str]], Damage | None, str]] = {
    "a bit of an output file": (lambda job: (job.sink, output_file(job)), flip("completion"), "expected digest"),
    "an emptied output file": (lambda job: (job.sink, output_file(job)), empty, "bytes, found 0"),
    "a missing output file": (lambda job: (job.sink, output_file(job)), None, "it is missing"),
    "a bit of a result": (lambda job: (job.work(), first_part(job.work())), flip("completion"), "expected digest"),
    "a foreign result": (lambda job: (job.work(), first_part(job.work())), replace(FOREIGN), "expected digest"),
    "a bit of a staged part": (lambda job: (job.work(), STAGED), flip("prompt_token_ids"), "expected digest"),
    "a missing staged part": (lambda job: (job.work(), STAGED), None, "it is missing"),
    "a truncated staged summary": (lambda job: (job.work(), STAGED_SUMMARY), truncate, "not as it is written"),
    "a truncated plan": (lambda job: (job.work(), PLAN_SUMMARY), truncate, "not as it is written"),
    "a truncated job file": (lambda job: (job.work(), JOB_FILE), truncate, "not the file of a job"),
}


def output_file(job: ToldJob) -> str:
    return next(name for name in job.sink.names() if name.startswith("part-"))


@pytest.mark.parametrize(("where", "how", "expected"), VERIFIED.values(), ids=VERIFIED.keys())
def test_verify_names_what_is_wrong_and_only_that(
    complete: ToldJob, where: Callable[[ToldJob], tuple[Store, str]], how: Damage | None, expected: str
) -> None:
    store, name = where(complete)
    if how is None:
        store.delete([name])
    else:
        damage(store, name, how)
    ((found, what),) = verified(complete)
    assert found == name.rpartition("/")[2]
    assert expected in what


def test_verify_finds_nothing_wrong_with_what_a_job_has_written(complete: ToldJob) -> None:
    found = verify_output(SinkSpec(uri=complete.sink.uri))
    assert (found.faults, found.rows) == ((), 24)
    assert found.objects > 3 + 4
    with pytest.raises(TerminalError, match="no complete output here"):
        verify_output(SinkSpec(uri=complete.work().uri))


def test_verify_tells_files_that_the_manifest_does_not_list(complete: ToldJob) -> None:
    complete.sink.write_bytes("part-00007.parquet", b"from somebody")
    ((name, what),) = verified(complete)
    assert name == "part-00007.parquet"
    assert "no manifest lists it" in what
