"""The order of fields in prompts where it does not matter to the question."""

import random
from itertools import permutations, product

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm_operators.stage.field_order import FieldEncoder, FieldOrder, choose_field_order

# The loops are compiled at their first call, which takes seconds on a machine without the compiled ones.
no_deadline = settings(deadline=None)


def order_of(rows: list[tuple[str | None, ...]], names: list[str] | None = None) -> FieldOrder:
    encoder = FieldEncoder(names or [f"field{place}" for place in range(len(rows[0]))])
    encoder.add([pa.array(column, pa.string()) for column in zip(*rows, strict=True)])
    return choose_field_order(encoder.table())


def shared_length(rows: list[tuple[str, ...]], orders: list[tuple[int, ...]], name_length: int) -> int:
    """Length that each row shares with any row before it, at best."""
    texts = [[(field, row[field]) for field in order] for row, order in zip(rows, orders, strict=True)]
    prefixes: set[tuple[tuple[int, str], ...]] = set()
    shared = 0
    for text in texts:
        ends = [end for end in range(len(text) + 1) if tuple(text[:end]) in prefixes or end == 0]
        shared += sum(name_length + len(value) for _, value in text[: max(ends)])
        prefixes |= {tuple(text[:end]) for end in range(1, len(text) + 1)}
    return shared


@no_deadline
@given(st.lists(st.tuples(*[st.sampled_from(["a", "bb", "cccc", "dddddddd"])] * 4), min_size=1, max_size=20))
def test_every_row_keeps_all_its_fields_and_nothing_gets_worse(rows: list[tuple[str, ...]]) -> None:
    order = order_of(rows)
    assert (np.sort(order.fields, axis=1) == np.arange(4)).all()
    assert order.hit_rate >= order.hit_rate_as_given >= 0
    total = sum(len("field0") + len(value) for row in rows for value in row)
    orders = [tuple(fields) for fields in order.fields.tolist()]
    assert order.hit_rate * total == pytest.approx(shared_length(rows, orders, len("field0")))


@no_deadline
@given(st.lists(st.tuples(*[st.sampled_from(["a", "bbb"])] * 2), min_size=1, max_size=4))
def test_small_tables_come_near_the_best_of_all_orders(rows: list[tuple[str, ...]]) -> None:
    every = list(permutations(range(2)))
    best = max(shared_length(rows, list(choice), len("field0")) for choice in product(every, repeat=len(rows)))
    orders = [tuple(fields) for fields in order_of(rows).fields.tolist()]
    assert shared_length(rows, orders, len("field0")) >= 0.7 * best


def test_a_long_value_that_repeats_goes_before_one_that_does_not() -> None:
    rows = [(f"review {number}", "a long description " * 5) for number in range(10)]
    order = order_of(rows)
    assert (order.fields == [1, 0]).all()
    assert order.hit_rate_as_given == 0
    assert order.hit_rate > 0.7


def test_what_depends_on_a_value_goes_with_it_and_the_wider_value_first() -> None:
    chance = random.Random(0)
    rows = [
        (str(number), f"film {film} " * 4, f"studio {film % 3} " * 8)
        for number, film in enumerate(chance.choices(range(12), k=200))
    ]
    order = order_of(rows)
    assert (order.fields == [2, 1, 0]).all()


def test_rows_may_differ_in_their_order() -> None:
    rows = [("left value " * 5, f"{number}") for number in range(9)]
    rows += [(f"{number + 100}", "right value " * 5) for number in range(9)]
    order = order_of(rows)
    assert (order.fields[:9] == [0, 1]).all()
    assert (order.fields[9:] == [1, 0]).all()


def test_missing_values_are_values_too() -> None:
    order = order_of([(None, "x" * 30), (None, "y" * 30), (None, "z" * 30)])
    assert (order.fields == [0, 1]).all()


def test_batches_give_what_one_batch_gives() -> None:
    rows = [(f"{number % 3}", f"{number % 5}" * 9, f"{number}") for number in range(60)]
    encoder = FieldEncoder(["a", "b", "c"])
    for begin in range(0, 60, 7):
        encoder.add([pa.array(column) for column in zip(*rows[begin : begin + 7], strict=True)])
    assert (choose_field_order(encoder.table()).fields == order_of(rows, ["a", "b", "c"]).fields).all()


def test_a_table_without_rows_has_an_order_without_rows() -> None:
    order = choose_field_order(FieldEncoder(["a", "b"]).table())
    assert order.fields.shape == (0, 2)
    assert order.hit_rate == 0


@pytest.mark.parametrize("count", [0, 64])
def test_too_few_or_too_many_fields_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"expected 1 to 63 fields, got {count}"):
        FieldEncoder([f"f{number}" for number in range(count)])
