"""Kept answers: found by their keys alone, on a disk and on S3, whatever else is kept beside them."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm_operators.answers import AnswerStore, answers_scope
from batchllm_operators.answers import answer_store as module
from batchllm_operators.answers.key_filter import KeyFilter
from batchllm_operators.columns.arrays import UInt64s
from batchllm_operators.columns.request_keys import ascending_keys, distinct_keys, find_in_sorted, find_keys, key_words
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.store import Store
from batchllm_operators.tasks.generate import GENERATION
from batchllm_operators.work.columns import KEY_TYPE
from tests.generation import RESULT_SCHEMA


def keys_of(numbers: Any) -> UInt64s:
    """Keys as hashes are: all bits different."""
    chance = np.random.default_rng(7)
    all_keys = chance.integers(0, 2**63, (200_000, 2), dtype=np.uint64)
    return all_keys[np.fromiter(numbers, dtype=np.int64)]


def answers(numbers: Any, text: str = "answer") -> pa.Table:
    numbers = list(numbers)
    keys = keys_of(numbers).astype(">u8").tobytes()
    return pa.table(
        {
            "request_key": pa.array([keys[16 * at : 16 * at + 16] for at in range(len(numbers))], KEY_TYPE),
            "output_token_ids": [[number] for number in numbers],
            "completion": [f"{text} {number}" for number in numbers],
            "finish_reason": ["stop"] * len(numbers),
            "prompt_tokens": [10] * len(numbers),
            "cached_tokens": [4] * len(numbers),
            "completion_tokens": [1] * len(numbers),
            "error": [None] * len(numbers),
        },
        schema=RESULT_SCHEMA,
    )


def found(store: AnswerStore, numbers: Any) -> dict[int, str]:
    rows = [row for table in store.find(keys_of(numbers)) for row in table.to_pylist()]
    texts = {row["output_token_ids"][0]: row["completion"] for row in rows}
    assert len(texts) == len(rows), "each once"
    return texts


@pytest.fixture
def store(place: Any) -> AnswerStore:
    return AnswerStore(Store(*place), GENERATION)


@pytest.fixture
def local(tmp_path: Any) -> AnswerStore:
    return AnswerStore(Store(str(tmp_path / "answers")), GENERATION)


def test_answers_are_found_by_their_keys_wherever_they_stand(store: AnswerStore) -> None:
    assert found(store, range(10)) == {}
    assert store.add([answers(range(3_000)), answers(range(3_000, 5_000))]) == 5_000
    assert store.add([answers(range(5_000, 5_010))]) == 10
    asked = [4, 2_999, 3_000, 4_999, 5_009, 7_000, *range(1_500, 1_600)]
    assert found(store, asked) == {number: f"answer {number}" for number in asked if number != 7_000}
    assert store.add([]) == 0
    assert len(store.segments()) == 2


def test_the_newest_answer_counts_and_within_one_run_the_first(local: AnswerStore, monkeypatch: Any) -> None:
    local.add([answers(range(5), "old")])
    later(monkeypatch, seconds=1)
    assert local.add([answers([1, 2, 2], "new"), answers([1], "newer still")]) == 2
    assert found(local, range(4)) == {0: "old 0", 1: "new 1", 2: "new 2", 3: "old 3"}


def test_a_segment_that_is_damaged_is_set_aside_and_the_others_go_on(
    local: AnswerStore, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    local.add([answers(range(100))])
    (damaged,) = local.segments()
    path = tmp_path / "answers" / f"{damaged}.answers.parquet"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(bytes(content))
    local.add([answers(range(100, 200))])
    assert found(local, range(200)) == {number: f"answer {number}" for number in range(100, 200)}
    assert f"{damaged}.answers.parquet is damaged" in caplog.text
    assert damaged not in local.segments()
    assert found(local, range(200)) == {number: f"answer {number}" for number in range(100, 200)}


@pytest.mark.parametrize("part", [".answers.parquet", ".filter", ".keys.parquet"])
@pytest.mark.parametrize("damage", ["empty", "short", "other"])
def test_whatever_stands_where_a_segment_stood_ends_no_run(
    local: AnswerStore, tmp_path: Any, monkeypatch: Any, part: str, damage: str
) -> None:
    local.add([answers(range(2_500))])
    (segment,) = local.segments()
    path = tmp_path / "answers" / f"{segment}{part}"
    if damage == "other":
        Store(str(tmp_path / "answers")).write_table(path.name, pa.table({"something": [1, 2, 3]}))
    else:
        path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:100])
    for number in range(module.MOST_SEGMENTS):
        later(monkeypatch, seconds=number + 1)
        local.add([answers(range(3_000 + number, 3_002 + number))])
    assert not found(local, range(2_500)) or (part, damage) == (".filter", "other")
    local.join_small_segments()
    assert len(found(local, range(3_000, 3_017))) == 17


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff"])
def test_what_is_no_list_of_kept_parts_counts_for_none(local: AnswerStore, tmp_path: Any, content: bytes) -> None:
    local.note_parts("job", ["results/part-1.parquet"])
    assert local.parts_of("job") == ["results/part-1.parquet"]
    (tmp_path / "answers" / "job.parts.json").write_bytes(content)
    assert local.parts_of("job") == []
    assert local.parts_of("another") == []


def test_a_segment_that_another_run_has_joined_meanwhile_is_passed_over(local: AnswerStore, tmp_path: Any) -> None:
    local.add([answers(range(10))])
    (segment,) = local.segments()
    for part in (".filter", ".answers.parquet"):
        kept = (tmp_path / "answers" / f"{segment}{part}").read_bytes()
        (tmp_path / "answers" / f"{segment}{part}").unlink()
        assert found(local, range(10)) == {}
        (tmp_path / "answers" / f"{segment}{part}").write_bytes(kept)
    assert len(found(local, range(10))) == 10


def test_what_a_run_that_was_cut_off_left_goes_a_day_later(local: AnswerStore, tmp_path: Any, monkeypatch: Any) -> None:
    local.add([answers(range(10))])
    (segment,) = local.segments()
    (tmp_path / "answers" / f"{segment}.keys.parquet").unlink()
    local.join_small_segments()
    assert len(list((tmp_path / "answers").iterdir())) == 2
    later(monkeypatch, seconds=2 * 86_400)
    local.join_small_segments()
    assert list((tmp_path / "answers").iterdir()) == []


def test_small_segments_are_joined_and_nothing_is_lost(local: AnswerStore, monkeypatch: Any) -> None:
    local.add([answers(range(1_000, 3_000), "large")])
    for number in range(module.MOST_SEGMENTS):
        later(monkeypatch, seconds=number + 1)
        local.add([answers([number, number + 1, 1_000 + number], f"run {number}:")])
    before = found(local, range(3_000))
    local.join_small_segments()
    assert len(local.segments()) == 4
    assert found(local, range(3_000)) == before
    assert before[5] == "run 5: 5"
    local.join_small_segments()
    assert len(local.segments()) == 4


def test_old_segments_go_and_a_joined_one_is_as_old_as_its_newest(tmp_path: Any, monkeypatch: Any) -> None:
    local = AnswerStore(Store(str(tmp_path / ("0f" * 16))), GENERATION)
    for number in range(module.MOST_SEGMENTS + 2):
        later(monkeypatch, seconds=-86_400 * (20 - number))
        local.add([answers([number])])
    local.join_small_segments()
    later(monkeypatch, seconds=0)
    assert local.delete_older(30) == 0
    assert local.delete_older(10) == 4
    assert len(found(local, range(20))) == 14, "the joined segment is as old as the newest in it, of 3 days ago"
    assert local.delete_older(2.5) == 1
    assert found(local, range(20)) == {}


def later(monkeypatch: Any, *, seconds: float) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=seconds)

    monkeypatch.setattr(module, "datetime", Clock)


def test_the_scope_is_of_the_model_and_all_its_settings(tiny_llama: str) -> None:
    model = ModelSpec(id=tiny_llama)
    scopes = {
        answers_scope(model, "bfloat16", "generate"),
        answers_scope(model, "float32", "generate"),
        answers_scope(model, "bfloat16", "generate", "nightly"),
        answers_scope(model, "bfloat16", "embed"),
        answers_scope(model.model_copy(update={"max_model_len": 100}), "bfloat16", "generate"),
        answers_scope(model.model_copy(update={"engine_args": {"quantization": "fp8"}}), "bfloat16", "generate"),
    }
    assert len(scopes) == 6
    assert answers_scope(ModelSpec(id=tiny_llama), "bfloat16", "generate") in scopes


words = st.integers(0, 3).map(lambda number: number * (2**64 // 3))
some_keys = st.lists(st.tuples(words, words), max_size=12).map(lambda rows: np.array(rows, np.uint64).reshape(-1, 2))


@given(some_keys, some_keys)
def test_keys_are_found_among_sorted_ones_as_among_any(keys: UInt64s, others: UInt64s) -> None:
    first, _ = distinct_keys(keys)
    keys, others = keys[first], ascending_keys(others)
    assert find_in_sorted(keys, others).tolist() == find_keys(keys, others).tolist()


@given(some_keys, some_keys)
def test_a_filter_never_denies_a_key_that_it_was_given(keys: UInt64s, others: UInt64s) -> None:
    again = KeyFilter(KeyFilter.of(keys).content)
    assert again.may_have(keys).all()
    assert again.may_have(np.concatenate((others, keys)))[len(others) :].all()


def test_a_filter_takes_one_of_a_hundred_other_keys_for_its_own() -> None:
    assert KeyFilter.of(keys_of(range(20_000))).may_have(keys_of(range(20_000, 120_000))).mean() < 0.02


def test_words_of_keys_sort_as_the_keys_do() -> None:
    table = answers(range(50))
    keys = table["request_key"].combine_chunks()
    ordered = ascending_keys(key_words(keys)).astype(">u8").tobytes()
    assert [ordered[16 * at : 16 * at + 16] for at in range(50)] == sorted(keys.to_pylist())
