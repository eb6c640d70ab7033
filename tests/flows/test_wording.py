"""What a person reads: numbers with their nouns, and texts of rows and names that are no Markdown."""

import re
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from batchllm_flows.job_status import JobStatus, status_text
from batchllm_flows.live import progress_line
from batchllm_flows.verify import Fault, Verification, verification_markdown
from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.messages import BundleCounts
from batchllm_operators.execute.progress import ProgressBoard
from batchllm_operators.plan.markdown import plan_markdown
from batchllm_operators.records import RowErrorExample
from batchllm_operators.row_errors import refuse_too_many_errors
from batchllm_operators.wording import artifact_slug, counted, first_of, markdown_code, markdown_text, size_text
from tests.flows.reports import a_plan

ONE_AS_MANY = re.compile(r"(?<![\d.,])1 (rows|requests|errors|bundles|engines|objects|files|groups|prefix groups)\b")


@pytest.mark.parametrize(
    ("number", "nouns", "text"),
    [
        (0, ("row",), "0 rows"),
        (1, ("row",), "1 row"),
        (3201, ("row",), "3,201 rows"),
        (1, ("entry", "entries"), "1 entry"),
        (2, ("entry", "entries"), "2 entries"),
    ],
)
def test_a_number_stands_with_its_noun(number: int, nouns: tuple[str, ...], text: str) -> None:
    assert counted(number, *nouns) == text


def test_one_of_a_kind_is_never_written_as_many() -> None:
    single = a_plan(1, counts__requests=1, counts__rows=1, shape__groups=1)
    assert not ONE_AS_MANY.search(plan_markdown(single))
    board = ProgressBoard([single.bundles[0].model_copy(update={"requests": 1})])
    board.update(single.bundles[0].name, BundleCounts(requests=1, errors=1, prompt_tokens=4))
    assert progress_line(board.snapshot()).startswith("1 of 1 request, 1 error,")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (1_240, "1.2 kB"),
        (9_960, "10 kB"),
        (999_499, "999 kB"),
        (999_999, "1 MB"),
        (350_000_000, "350 MB"),
        (1_240_000_000, "1.2 GB"),
        (3 * 10**12, "3 TB"),
        (10**16, "10,000 TB"),
    ],
)
def test_a_size_has_two_or_three_digits_and_the_unit_they_fit(size: int, text: str) -> None:
    assert size_text(size) == text


def test_one_row_without_answer_is_no_rows() -> None:
    examples = {"invalid_row": [RowErrorExample(row_id="0", message="empty")]}
    with pytest.raises(TerminalError, match=r"^1 of 1 row has errors, more than max_error_fraction 0\.0 allows"):
        refuse_too_many_errors({"invalid_row": 1}, 1, 0.0, examples)


def test_one_object_and_one_row_are_verified_as_one() -> None:
    found = Verification(output_uri="out", work_uris=("work",), objects=1, rows=1, faults=(), set_aside=())
    assert verification_markdown(found) == "out: whole. 1 object read, 1 row.\n"
    found = found.model_copy(update={"faults": (Fault(uri="out/part", what="it is missing"),)})
    assert verification_markdown(found).startswith("out: 1 of 1 check failed.\n")


def test_one_request_has_the_status_of_one() -> None:
    status = JobStatus(
        job_id="1",
        job_name="one",
        complete=False,
        rows=1,
        requests=1,
        answered=1,
        left=0,
        bundles=1,
        parts=1,
        bytes=1,
        last_write=datetime(2026, 1, 2, tzinfo=UTC),
        output_uri="out",
        work_uri="work",
    )
    text = status_text(status)
    assert "1 of 1 request in 1 part, 0 left" in text
    assert "1 byte, last written" in text
    assert ONE_AS_MANY.search(text) is None


def shown(markdown: str) -> str:
    """What Markdown of one paragraph shows, as text."""
    (inline,) = (token for token in MarkdownIt("js-default").parse(markdown) if token.type == "inline")
    assert all(token.type in ("text", "text_special", "code_inline") for token in inline.children or [])
    return "".join(token.content for token in inline.children or [])


LINES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zs", "Zl", "Zp", "Cs"]), max_size=40)


@given(LINES)
def test_any_text_is_shown_as_it_is(text: str) -> None:
    assert shown(f"row {markdown_text(text)}.") == f"row {text}."


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "a | b", "[x](y)", "**x** `y` _z_ ~~w~~ &lt; \\| #", "a_b_c"]
)
def test_marks_of_markdown_and_html_are_only_text(text: str) -> None:
    assert shown(f"row {markdown_text(text)}") == f"row {text}"


@pytest.mark.parametrize("name", ["s3://bucket/a_b/", "tick`s", "``", "a<b>"])
def test_a_name_is_shown_as_code(name: str) -> None:
    assert shown(f"at {markdown_code(name)}") == f"at {name}"


def test_a_bar_in_a_name_does_not_end_its_cell() -> None:
    page = MarkdownIt("js-default").render(
        f"| a | b |\n|---|---|\n| {markdown_code('x|y')} | {markdown_text('p|q')} |\n"
    )
    assert "<td><code>x|y</code></td>" in page
    assert "<td>p|q</td>" in page


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Nightly Run", "nightly-run"),
        ("a__b..c", "a-b-c"),
        ("été", "t"),
        ("---", "batch-inference"),
        ("日本", "batch-inference"),
    ],
)
def test_a_key_has_the_characters_that_prefect_allows(name: str, slug: str) -> None:
    assert artifact_slug(name) == slug


@pytest.mark.parametrize(
    ("names", "number", "text"),
    [
        (["a"], None, "a"),
        (["a", "b", "c", "d", "e"], None, "a, b, c, d, e"),
        (["a", "b", "c", "d", "e", "f"], None, "a, b, c, d, e and 1 more"),
        (["a", "b"], 1002, "a, b and 1,000 more"),
    ],
)
def test_the_first_of_many_names_and_how_many_more(names: list[str], number: int | None, text: str) -> None:
    assert first_of(names, number) == text
