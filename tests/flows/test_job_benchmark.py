"""The benchmark of whole programs, small: it runs our flow and vLLM from file to file, and refuses wrong results."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from benchmarks.documents import TEMPLATE, distinct_tokens, questions
from benchmarks.job_results import WrongResultError, check_answers, equal_share

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "job.py"
ROWS = 12

# An interpreter whose programs leave the first row out.
FORGETFUL_PYTHON = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
if "-c" in sys.argv:
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
import pyarrow.parquet as pq
settings = json.loads(sys.argv[2])
ids = pq.read_table(settings["input"], columns=["id"]).slice(1)
Path(settings["output"]).mkdir()
pq.write_table(ids.append_column("answer", ids["id"]), Path(settings["output"]) / "answers.parquet")
"""


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(BENCHMARK),
        "--json",
        "--rows",
        str(ROWS),
        "--rounds",
        "1",
        "--startup-rounds",
        "0",
        *options,
    ]
    # vLLM loads faster in one process.
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.engine
def test_our_flow_and_vllm_answer_every_row_and_a_program_without_its_packages_is_listed(
    tiny_llama: str, tmp_path: Path
) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    bare = tmp_path / "bare" / "bin" / "python"
    done = run("--programs", "ours", "llm", "daft", "--model", tiny_llama, "--python", f"daft={bare}")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert list(result["programs"]) == ["ours", "llm"]
    prompt_tokens, distinct = result["input"]["prompt_tokens"], result["input"]["distinct_prompt_tokens"]
    for one in result["programs"].values():
        assert one["rows_answered"] == ROWS
        assert one["prompt_tokens"] == prompt_tokens
        assert distinct <= one["computed_prompt_tokens"] < prompt_tokens
        assert 0 < one["work_seconds"] < one["work_seconds"] + one["load_seconds"] < one["wall_seconds"]
    assert result["programs"]["llm"]["same_text_as_llm"] == 1.0
    assert result["not_run"] == {"daft": "daft is not installed, vllm is not installed in the environment of --python"}
    assert {"processor", "cores", "device", "date", "command"} <= set(result["machine"])


def test_a_program_that_leaves_a_row_out_is_no_figure(tiny_llama: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(FORGETFUL_PYTHON, encoding="utf-8")
    python.chmod(0o755)
    done = run("--programs", "llm", "--model", tiny_llama, "--python", f"llm={python}")
    assert done.returncode == 1
    assert done.stdout == ""
    first = questions(ROWS)["id"][0].as_py()
    assert f"llm: expected each of {ROWS} rows once with text, got 1 rows not answered ({first})" in done.stderr


@pytest.mark.parametrize(
    ("ids", "texts", "told"),
    [
        (["a"], ["x"], r"1 rows not answered \(b\)"),
        (["a", "b", "b"], ["x", "y", "y"], r"1 rows answered more than once \(b\)"),
        (["a", "b", "c"], ["x", "y", "z"], r"1 rows never asked \(c\)"),
        (["a", "b"], ["x", ""], r"1 rows answered without text \(b\)"),
        (["a", "b"], [None, "y"], r"1 rows answered without text \(a\)"),
    ],
)
def test_every_row_must_be_answered_once_with_text(ids: list[str], texts: list[str | None], told: str) -> None:
    check_answers("llm", ["a", "b"], ["b", "a"], ["x", "y"])
    with pytest.raises(WrongResultError, match=rf"llm: .*{told}"):
        check_answers("llm", ["a", "b"], ids, texts)


def test_answers_are_compared_row_by_row() -> None:
    assert equal_share({"b": "y", "a": "x"}, {"a": "x", "b": "y"}) == 1.0
    assert equal_share({"a": "x", "b": "y"}, {"a": "y", "b": "y"}) == 0.5


def test_questions_share_the_beginning_of_their_document() -> None:
    rows = questions(ROWS).to_pylist()
    assert len({row["id"] for row in rows}) == len({(row["document"], row["question"]) for row in rows}) == ROWS
    assert len({row["document"] for row in rows}) == 2
    characters = [[ord(one) for one in TEMPLATE.format(**row)] for row in rows]
    assert 2 * len(rows[0]["document"]) < distinct_tokens(characters) < sum(map(len, characters)) / 3


def test_a_shared_prefix_counts_once() -> None:
    assert distinct_tokens([[1, 2, 3], [1, 2, 4], [1, 2], [5]]) == 5
