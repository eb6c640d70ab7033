"""`model.attention` on real engines: on the CPU as it is, and on one that takes our backend as a GPU does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.messages import Load
from batchllm_operators.work.layout import ATTENTION_TRACE_FOLDER, TRACE_FOLDER
from tests.execute.engines import StartedEngine
from tests.vllm_plugin import cpu_platform_plugin
from tests.vllm_plugin.cpu_platform_plugin import REPLAYS_VARIABLE

pytestmark = pytest.mark.engine
REPOSITORY = Path(__file__).parents[2]
ON_A_CPU = "vLLM's own attention backend on cpu: expected FLASH_ATTN or TRITON_ATTN, got CPU_ATTN"
TRACE = "BATCHLLM_ATTENTION_TRACE"
FOLDERS = (TRACE_FOLDER, ATTENTION_TRACE_FOLDER)


def python_path(platform: Path) -> str:
    """For processes that find a platform there, and all that this process finds."""
    return os.pathsep.join([str(platform), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])


def asking(load: Load, attention: str) -> Load:
    model = load.model.model_copy(update={"attention": attention})
    return load.model_copy(update={"model": model})


def test_auto_is_vllms_own_attention_on_a_cpu_and_says_why(
    make_engine: Callable[..., StartedEngine], load_command: Load, work: Any, tmp_path: Path
) -> None:
    engine = make_engine()
    settings = {one.name: one for one in engine.driver.load(asking(load_command, "auto")).settings}
    assert settings["attention"].value == "stock (CPU_ATTN)"
    assert settings["attention"].reason == f"model.attention: auto; prefix-shared attention not supported: {ON_A_CPU}"
    done = engine.run(work.run_command(work.write_bundle()))
    assert (done.counts.requests, done.counts.errors) == (12, 0)
    log = Path(engine.link.log).read_text()
    assert log.count(f"prefix-shared attention is not supported: {ON_A_CPU}") == 1


def test_shared_is_refused_on_a_cpu_with_what_was_expected(
    make_engine: Callable[..., StartedEngine], load_command: Load
) -> None:
    with pytest.raises(TerminalError) as caught:
        make_engine().driver.load(asking(load_command, "shared"))
    assert "model.attention: 'shared' expected" in str(caught.value)
    assert ON_A_CPU in str(caught.value)


def test_what_attention_decides_in_each_step_stands_in_the_work_folder(
    make_engine: Callable[..., StartedEngine],
    load_command: Load,
    work: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu_platform_plugin.announce(tmp_path / "platform")
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path / "platform"))
    engine = make_engine()
    settings = {one.name: one for one in engine.driver.load(asking(load_command, "shared")).settings}
    assert settings["attention"].value == "shared over CPU_ATTN"
    engine.run(work.run_command(work.write_bundle()))
    steps, decided = ([row for name in work.store.names(folder) for row in rows_of(work, name)] for folder in FOLDERS)
    assert len(decided) == len(steps)
    assert [step["query_tokens"] for step in decided] == [
        step["prefill_tokens"] + step["decode_tokens"] for step in steps
    ]
    assert any(step["share"] and step["reason"].startswith("expected gain") for step in decided)


def rows_of(work: Any, name: str) -> list[dict[str, Any]]:
    with work.store.parquet(name) as file:
        rows: list[dict[str, Any]] = file.read().to_pylist()
    return rows


def test_a_choice_in_the_environment_that_the_job_does_not_know_of_is_refused(
    make_engine: Callable[..., StartedEngine], load_command: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHLLM_ATTENTION", "FLASH_ATTN")
    with pytest.raises(TerminalError, match=r"BATCHLLM_ATTENTION: expected it unset, got 'FLASH_ATTN'; set model\.att"):
        make_engine().driver.load(load_command)


@pytest.fixture(scope="module")
def tiny_granite(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small model with attention sinks, which only its layers tell vLLM of; without weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-granite"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "layer_types": ["full_attention"] * config["num_hidden_layers"],
        "attention_sinks": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


PROMPTS = [[*range(1000, 1096), *range(2000 + 10 * n, 2009 + 11 * n)] for n in range(4)]
NO_SINKS = "attention sinks not supported"


def asked(model: str, attention: str, ranks: int = 1, **engine_args: Any) -> dict[str, Any]:
    arguments = {"enforce_eager": True, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 * 1024**2, **engine_args}
    spec = {"id": model, "attention": attention, "dtype": "float32", "max_model_len": 512, "engine_args": arguments}
    return {"model": spec, "ranks": ranks, "prompts": PROMPTS}


def test_each_engine_of_a_process_gets_what_its_job_asks_for(
    tiny_llama: str, tiny_granite: str, tmp_path: Path
) -> None:
    jobs = [
        asked(tiny_granite, "auto", load_format="dummy"),
        asked(tiny_granite, "shared", load_format="dummy"),
        asked(tiny_llama, "shared"),
        asked(tiny_llama, "stock"),
    ]
    auto, refused, shared, stock = run_engines(jobs, tmp_path, core_process=False)
    assert_fell_back(auto)
    assert "model.attention: 'shared' expected" in refused["error"]
    assert f"got: {NO_SINKS}" in refused["error"]
    assert_shared(shared, tmp_path)
    assert (stock["value"], stock["reason"]) == ("stock (CPU_ATTN)", "model.attention: stock")
    assert shared["tokens"] == stock["tokens"]
    assert [one["left"] for one in (auto, refused, shared, stock)] == [[TRACE]] * 4


def test_the_choice_reaches_the_processes_of_an_engine_core_and_their_refusals_come_back(
    tiny_llama: str, tiny_granite: str, tmp_path: Path
) -> None:
    one_rank, two_ranks = asked(tiny_llama, "shared"), asked(tiny_llama, "shared", ranks=2)
    auto, shared, parallel = run_engines(
        [asked(tiny_granite, "auto", load_format="dummy"), one_rank, two_ranks], tmp_path, core_process=True
    )
    assert_fell_back(auto)
    assert_shared(shared, tmp_path)
    assert parallel["value"] == shared["value"]
    assert parallel["tokens"] == shared["tokens"]
    steps = traced(tmp_path)[shared["traced"] :]
    decided = Counter((step["requests"], step["query_tokens"], step["share"]) for step in steps)
    assert any(share for *_, share in decided)
    assert all(count % 2 == 0 for count in decided.values()), "both ranks decide alike"


RUNNERS = {
    "first": {},
    "second": {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"},
}


@pytest.mark.parametrize(
    ("runner", "mode"),
    [
        ("first", "FULL_AND_PIECEWISE"),
        ("first", "FULL_DECODE_ONLY"),
        ("first", "PIECEWISE"),
        ("second", "FULL_AND_PIECEWISE"),
    ],
)
def test_captured_steps_answer_as_vllms_own_attention_does_from_python(
    tiny_llama: str, tmp_path: Path, runner: str, mode: str
) -> None:
    """Decode steps as whole graphs, padded to a size that was captured; the others between captured pieces.

    Five requests, four at a time, that end at different steps: some replays share and others have a single row. The
    kernels run interpreted in the second runner, the reference in the first.
    """
    job = {"max_num_seqs": 4, "max_num_batched_tokens": 128}
    compilation = {"cudagraph_mode": mode, "cudagraph_capture_sizes": [1, 2, 4]}
    stock = asked(tiny_llama, "stock", **job)
    captured = asked(tiny_llama, "shared", **job, enforce_eager=False, compilation_config=compilation)
    for one in (stock, captured):
        one["prompts"], one["max_tokens"] = [*PROMPTS, PROMPTS[0][:70]], [4, 8, 6, 8, 7]
    replays = tmp_path / "replays.jsonl"
    variables = RUNNERS[runner] | {REPLAYS_VARIABLE: str(replays)}
    expected, got = run_engines([stock, captured], tmp_path, core_process=False, **variables)
    assert (expected["value"], got["value"]) == ("stock (CPU_ATTN)", "shared over CPU_ATTN")
    kernels = ["vllm.v1.worker.cpu.model_runner", "batchllm_kernels.attention.launch"]
    assert got["modules"] == (kernels if runner == "second" else [])
    assert got["tokens"] == expected["tokens"]
    steps = traced(tmp_path)[expected["traced"] :]
    assert {step["query_tokens"] == step["requests"] for step in steps if step["share"]} == {True, False}
    lines = [tuple(json.loads(line).values()) for line in replays.read_text().splitlines()]
    traces = Counter(lines)
    captures = [1, 2, 4] if "FULL" in mode else []
    assert sorted(tokens for what, kind, tokens in traces if (what, kind) == ("capture", "FULL")) == captures
    replayed = [tokens for what, kind, tokens in traces.elements() if (what, kind) == ("replay", "FULL")]
    if captures:
        decode_steps = [step for step in steps if step["query_tokens"] == step["requests"] > 1]
        assert len(replayed) >= 5
        assert {2, 4} <= set(replayed)
        assert any(step["requests"] == 3 for step in decode_steps)  # padded to 4
    assert any(kind == "PIECEWISE" for _, kind, _ in traces) == ("PIECEWISE" in mode)
    memory = [(kind, number) for what, kind, number in lines if what == "memory"][-2:]
    assert memory == [("profiled", memory[0][1]), ("built", memory[0][1])]
    assert memory[0][1] > 0


def test_the_kernels_answer_alike_in_vllms_second_model_runner(tiny_llama: str, tmp_path: Path) -> None:
    """The runner that GPUs get, which keeps block tables on the device; Triton is interpreted."""
    variables = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    jobs = [asked(tiny_llama, "shared"), asked(tiny_llama, "stock")]
    shared, stock = run_engines(jobs, tmp_path, core_process=False, **variables)
    assert_shared(shared, tmp_path)
    assert shared["modules"] == ["vllm.v1.worker.cpu.model_runner", "batchllm_kernels.attention.launch"]
    assert stock["value"] == "stock (CPU_ATTN)"
    assert shared["tokens"] == stock["tokens"]


def assert_fell_back(engine: dict[str, Any]) -> None:
    assert engine["value"] == "stock (CPU_ATTN)"
    assert engine["reason"] == f"model.attention: auto; prefix-shared attention not supported: {NO_SINKS}"
    assert [len(tokens) for tokens in engine["tokens"]] == [8] * len(PROMPTS)


def assert_shared(engine: dict[str, Any], folder: Path) -> None:
    assert (engine["value"], engine["reason"]) == ("shared over CPU_ATTN", "model.attention: shared")
    assert any(step["share"] for step in traced(folder))


def traced(folder: Path) -> list[dict[str, Any]]:
    """The steps of all engines and ranks."""
    return [json.loads(line) for line in (folder / "attention.jsonl").read_text().splitlines()]


def run_engines(
    jobs: list[dict[str, Any]], folder: Path, *, core_process: bool, **variables: str
) -> list[dict[str, Any]]:
    """The engines of `attention_engines.py` on a platform that takes our backend."""
    cpu_platform_plugin.announce(folder / "platform")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {
        "PYTHONPATH": python_path(folder / "platform"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(core_process)),
        TRACE: str(folder / "attention.jsonl"),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.execute.attention_engines", str(folder / "jobs.json")],
        check=False, capture_output=True, text=True, timeout=500, cwd=REPOSITORY, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found
