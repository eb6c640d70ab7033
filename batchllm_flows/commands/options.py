"""Arguments and options that several commands take, and the job that they name."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from batchllm_flows.job import BatchJob
from batchllm_flows.job_yaml import RepeatedKeyError, TooLargeError, load_yaml

JobFile = Annotated[Path, typer.Argument(help="job file, YAML or JSON", show_default=False)]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="set a field of the job; may be repeated")
]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no log, no progress; only the result and errors")]
Day = Annotated[
    datetime | None,
    typer.Option(
        "--date", formats=["%Y-%m-%d"], help="the day of {date} in source.uri and sink.uri; default: today (UTC)"
    ),
]
EndpointUrl = Annotated[str | None, typer.Option(help="S3 endpoint, where it is not AWS")]

_TEMPLATE_MARKS = ("{{", "{%")


def load_job(job_file: Path, settings: list[str] | None) -> BatchJob:
    """The job of a file with the fields that `--set` sets.

    Args:
        job_file: the file.
        settings: `KEY.PATH=VALUE` each.

    Raises:
        InvalidJobError: see `BatchJob.from_file`.
    """
    return BatchJob.from_file(job_file, dict(_setting(one) for one in settings or []))


def _setting(setting: str) -> tuple[str, Any]:
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise typer.BadParameter(f"--set: expected KEY.PATH=VALUE, got {setting!r}")
    return path, _value(path, text)


def _value(path: str, text: str) -> Any:
    """The value of a setting: YAML, but a template is a text without quotes too."""
    is_template = any(mark in text for mark in _TEMPLATE_MARKS)
    try:
        value = load_yaml(text)
    except (RepeatedKeyError, TooLargeError) as error:
        raise typer.BadParameter(f"--set {path}: {error}") from error
    except yaml.YAMLError as error:
        if is_template:
            return text
        fault = getattr(error, "problem", None) or "not YAML"
        raise typer.BadParameter(
            f"--set {path}: {text!r} is no YAML value ({fault}); a text needs quotes, as in --set '{path}=\"...\"'"
        ) from error
    # To YAML, `Title: {{ title }}` and `{{ title }}` are mappings, and only one in braces of its own is meant as one.
    begin = text.lstrip()
    is_mapping = begin.startswith("{") and not begin.startswith(_TEMPLATE_MARKS)
    return text if is_template and isinstance(value, dict) and not is_mapping else value


def parsed_age(option: str, text: str) -> float:
    """Seconds of an age that an option gives, as `90m`, `12h`, `7d` or `2w`; another text is an error of usage."""
    from batchllm_flows.cleaning import parse_age

    try:
        return parse_age(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: {error}") from error
