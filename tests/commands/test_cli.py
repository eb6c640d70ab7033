"""The command line: in this process where that proves the same, a run in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import LogSort

from batchllm_flows import __version__
from tests.commands import job_folders
from tests.commands.conftest import Batchllm
from tests.faults.damage import damage, truncate
from tests.flows.jobs import job_values, questions, write_input


@pytest.fixture
def environment(prefect_server: None) -> dict[str, str]:
    from prefect.settings import get_current_settings

    return os.environ | {"PREFECT_API_URL": str(get_current_settings().api.url), "HF_HUB_OFFLINE": "1"}


def in_a_process(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from batchllm_flows.cli import main; main()", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def write_job(folder: Path, model: str, **changes: object) -> str:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job_values(str(folder / "in"), str(folder / "out"), model, **changes)))
    return str(path)


def test_the_version_is_printed(batchllm: Batchllm) -> None:
    assert batchllm("--version").stdout == f"batchllm-flows {__version__}\n"


def test_the_schema_is_printed_as_json(batchllm: Batchllm) -> None:
    printed = batchllm("schema")
    assert printed.exit_code == 0
    assert "prompt" in json.loads(printed.stdout)["properties"]


def test_wrong_usage_and_wrong_job_files_end_with_2(tmp_path: Path, batchllm: Batchllm) -> None:
    path = write_job(tmp_path, "model", sampling={"max_tokns": 3})
    for arguments in (["run"], ["run", path], ["run", str(tmp_path / "none.yaml")], ["run", path, "--set", "nothing"]):
        assert batchllm(*arguments).exit_code == 2
    assert "did you mean 'max_tokens'" in batchllm("run", path).stderr


def test_a_job_that_cannot_run_ends_with_1_and_one_clear_line(
    tmp_path: Path, environment: dict[str, str], tiny_llama: str
) -> None:
    path = write_job(tmp_path, tiny_llama)
    quiet = in_a_process(["run", path, "--quiet"], environment)
    assert quiet.returncode == 1
    assert quiet.stderr.startswith("batchllm: source.uri: no object matches")
    assert quiet.stderr.count("\n") == 1
    told = in_a_process(["run", path], environment)
    assert told.returncode == 1
    assert "batchllm: source.uri: no object matches" in told.stderr, told.stderr
    assert "Traceback" not in told.stderr


def test_a_plan_is_printed_for_people_and_for_programs(tmp_path: Path, batchllm: Batchllm, tiny_llama: str) -> None:
    write_input(str(tmp_path / "in"), questions())
    path = write_job(tmp_path, tiny_llama)
    as_json = batchllm("plan", path, "--json", "--quiet")
    assert as_json.exit_code == 0, as_json.stderr
    assert json.loads(as_json.stdout)["counts"]["requests"] == 39
    printed = batchllm("plan", path, "--quiet").stdout
    for words in (
        "need not be computed (possible:", "with one prefix a request:", "a stock engine on the rows as given:",
        "### Forecast", "| its prefill |", "| its decode |", "### Order", "### Groups that save most",
        "### How many share a prefix", "### Bundles",
    ):  # fmt: skip
        assert words in printed
    page = re.search(r"With plots: `(.*)`", printed)
    assert page is not None
    assert page[1] == json.loads(as_json.stdout)["page_uri"]
    assert "<svg" in Path(page[1]).read_text()


@pytest.mark.engine
def test_a_run_reports_row_errors_with_3_and_its_report_is_found_again(
    tmp_path: Path, environment: dict[str, str], tiny_llama: str
) -> None:
    table = questions(30)
    without = [None if index == 4 else text for index, text in enumerate(table["question"].to_pylist())]
    write_input(str(tmp_path / "in"), table.set_column(2, "question", [without]))
    path = write_job(tmp_path, tiny_llama)
    printed = in_a_process(["run", path, "--json", "--quiet", "--set", "sampling.max_tokens=2"], environment)
    assert printed.returncode == 3, printed.stderr
    assert printed.stderr == ""
    report = json.loads(printed.stdout)
    assert report["error_rows"] == {"invalid_row": 1}
    again = in_a_process(["report", str(tmp_path / "out"), "--json"], environment)
    assert json.loads(again.stdout) == report
    page = tmp_path / "report.html"
    shown = in_a_process(["report", str(tmp_path / "out"), "--html", str(page)], environment)
    assert "forecast against fact" in shown.stdout
    assert page.read_text() == (Path(report["work_uri"]) / "report.html").read_text()
    assert "Forecast against fact" in page.read_text()
    elsewhere = in_a_process(["report", str(tmp_path / "out"), "--html", str(tmp_path / "no" / "folder")], environment)
    assert elsewhere.returncode == 1
    assert "cannot write" in elsewhere.stderr

    # A report as another version wrote it: one line that says what to do, which then helps.
    report_file = Path(report["work_uri"]) / "report.json"
    report_file.write_text(json.dumps(report | {"of_another_version": 1}))
    for arguments in (["report", str(tmp_path / "out")], ["run", path, "--quiet", "--set", "sampling.max_tokens=2"]):
        refused = in_a_process(arguments, environment)
        assert refused.returncode == 1
        assert "report.json is not as batchllm-flows" in refused.stderr
        assert "Traceback" not in refused.stderr
    report_file.unlink()
    rewritten = in_a_process(["run", path, "--json", "--quiet", "--set", "sampling.max_tokens=2"], environment)
    assert rewritten.returncode == 3, rewritten.stderr
    assert json.loads(rewritten.stdout)["computed_requests"] == 0
    assert json.loads(rewritten.stdout)["rows_out"] == 30


def test_a_warning_of_a_step_is_printed_once_and_stands_in_the_log_of_its_flow_run(
    tmp_path: Path, environment: dict[str, str], tiny_llama: str
) -> None:
    no_engine = {"engine_python": str(tmp_path / "no-python"), "calibrate": False}
    job_file = job_folders.write_job(tmp_path, tiny_llama, execution=no_engine)
    run, staged = job_folders.planned_job(job_file)
    job_folders.answer(run, staged, 0, 8)
    damage(run.work, staged.parts[0].name, truncate)

    done = in_a_process(["run", str(job_file)], environment)

    assert done.returncode == 0, done.stderr
    warning = f"{staged.parts[0].name} is damaged and now stands as"
    lines = [line for line in done.stderr.splitlines() if "is damaged and now" in line]
    assert len(lines) == 1, done.stderr
    assert warning in lines[0]
    with get_client(sync_client=True) as client:
        messages = [one.message for one in client.read_logs(sort=LogSort.TIMESTAMP_DESC)]
    assert sum(warning in message and run.work.uri in message for message in messages) == 1


def test_quiet_leaves_the_logs_of_engines_alone_which_go_to_files(
    tmp_path: Path, batchllm: Batchllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    monkeypatch.delenv("PREFECT_LOGGING_LEVEL", raising=False)
    assert batchllm("plan", write_job(tmp_path, str(tmp_path)), "--quiet").stderr.count("\n") == 1
    assert os.environ["PREFECT_LOGGING_LEVEL"] == "CRITICAL"
    assert "VLLM_LOGGING_LEVEL" not in os.environ


def test_ctrl_c_in_a_terminal_ends_a_run_with_130_and_the_server_hears_of_it(tmp_path: Path, tiny_llama: str) -> None:
    write_input(str(tmp_path / "in"), questions())
    path = write_job(tmp_path, tiny_llama)
    # With a temporary server of its own, which a terminal's Ctrl-C must not reach before the run has told it.
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    # A terminal's commands hear of Ctrl-C; where these tests run in the background, they inherit that it is ignored.
    as_in_a_terminal = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{as_in_a_terminal}; from batchllm_flows.cli import main; main()", "run", path],
        env=environment | {"HF_HUB_OFFLINE": "1", "PREFECT_HOME": str(tmp_path / "prefect")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        before: list[str] = []
        for line in process.stderr:
            before.append(line)
            if "Beginning flow run" in line:
                break
        # A terminal sends it to all processes of the command.
        os.killpg(process.pid, signal.SIGINT)
        told = process.stderr.read()
    assert "Beginning flow run" in before[-1]
    assert sum("waiting for a temporary Prefect server" in line for line in before) == 1
    assert process.returncode == 130, told
    assert "batchllm: interrupted; what is done is kept" in told
    assert "Finished in state Crashed" in told
    assert "Traceback" not in told
