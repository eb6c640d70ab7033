"""What README says is executed here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from batchllm_flows.cli import app
from batchllm_flows.job import BatchJob
from batchllm_operators.spec_base import SpecModel

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCKS if found == language]


@pytest.mark.parametrize("text", blocks("yaml"))
def test_every_job_file_in_the_readme_is_a_valid_job(text: str) -> None:
    BatchJob.model_validate(yaml.safe_load(text))


@pytest.mark.engine
@pytest.mark.parametrize("text", blocks("python"))
def test_every_python_block_runs_as_it_stands_but_for_the_model(
    text: str, smollm2: str, bucket: str, prefect_server: None
) -> None:
    from tests.flows.jobs import questions, write_input

    write_input(f"{bucket}/questions", questions(8))
    named = text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", smollm2).replace("s3://my-bucket", bucket)
    assert named != text
    exec(compile(named, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102 - our own README


def test_the_readme_and_the_help_name_the_same_commands_and_exit_codes() -> None:
    of_readme = {line.split()[1] for text in blocks("sh") for line in text.splitlines() if line.startswith("batchllm ")}
    assert of_readme == {
        command.callback.__name__.replace("_", "-") for command in app.registered_commands if command.callback
    }
    shown = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout.split())
    for code in ("0 all rows answered", "3 finished with row errors", "1 failed", "2 usage", "130 interrupted"):
        assert code in shown
        assert code in " ".join(README.split())


def test_every_shell_line_names_targets_and_commands_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    lines = [line.split("#")[0].split() for text in blocks("sh") for line in text.splitlines() if line.strip()]
    assert any(words[0] == "make" for words in lines)
    for words in lines:
        if words and words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets
        if words and words[0] == "batchllm":
            arguments = [word for word in words[2:] if word.startswith("--") and word != "--set"]
            shown = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200"}).stdout
            assert all(argument in shown for argument in arguments), shown


def models(model: Any, path: str) -> list[str]:
    """Dotted names of all fields of a spec, prompt kinds included."""
    names = []
    for attribute, field in model.model_fields.items():
        name = field.alias or attribute
        inner = [one for one in _members(field.annotation) if isinstance(one, type) and issubclass(one, SpecModel)]
        names += [piece for one in inner for piece in models(one, f"{path}{name}.")] or [f"{path}{name}"]
    return names


def _members(annotation: Any) -> list[Any]:
    arguments = getattr(annotation, "__args__", ())
    return [annotation] if not arguments else [one for argument in arguments for one in _members(argument)]


def test_the_table_of_fields_names_every_field_of_a_job() -> None:
    told = set(re.findall(r"^\| `([a-z_.]+)` \|", README, flags=re.MULTILINE))
    assert told == set(models(BatchJob, ""))


def test_lines_outside_tables_are_within_120_characters() -> None:
    assert [line for line in README.splitlines() if len(line) > 120 and not line.startswith("|")] == []
