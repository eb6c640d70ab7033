"""What is told of an engine's start: vLLM's phases by its loggers, the download by the folder it grows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from batchllm_kernels.vllm_plugin.load_phases import PhaseHandler, last_phase, phase_of
from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.load_watch import LoadWatch, download_folder
from batchllm_operators.execute.messages import BundleEvent, EnginePhase, Load, Loading, Progress
from batchllm_operators.specs.execution import ModelSpec
from tests.execute.engines import StartedEngine


def record(name: str, function: str = "") -> logging.LogRecord:
    return logging.LogRecord(name, logging.INFO, "file.py", 1, "whatever it says", (), None, func=function)


@pytest.mark.parametrize(
    ("name", "function", "phase"),
    [
        ("vllm.model_executor.model_loader.default_loader", "load_weights", "weights"),
        ("vllm.model_executor.model_loader", "get_model", "weights"),
        ("vllm.v1.worker.cpu_model_runner", "load_model", "weights"),
        ("vllm.v1.worker.cpu_model_runner", "warming_up_model", "compilation"),
        ("vllm.v1.worker.gpu_model_runner", "capture_model", "compilation"),
        ("vllm.compilation.backends", "compile", "compilation"),
        ("vllm.v1.core.kv_cache_utils", "_report_kv_cache_config", "KV cache"),
        ("vllm.v1.worker.gpu_worker", "sleep", None),
        ("vllm.compilations", "", None),
        ("vllm.config.model", "", None),
    ],
)
def test_a_record_of_vllm_tells_the_phase_by_who_speaks(name: str, function: str, phase: str | None) -> None:
    assert phase_of(record(name, function)) == phase
    assert phase is None or EnginePhase(phase)


def test_a_phase_is_written_once_until_the_next_one(tmp_path: Path) -> None:
    file = tmp_path / "phases"
    assert last_phase(file) is None
    handler = PhaseHandler(file)
    for name in ("vllm.model_executor.model_loader", "vllm.config", "vllm.model_executor.model_loader"):
        handler.handle(record(name))
    assert file.read_text() == "weights\n"
    handler.handle(record("vllm.compilation.backends"))
    assert last_phase(file) == "compilation"


class Watched:
    """A watch whose thread does nothing, on a clock that the test sets."""

    def __init__(self, phases: Path, downloads: Path) -> None:
        self.now = 0.0
        self.told: list[Loading] = []
        self.watch = LoadWatch(self.told.append, phases, downloads, clock=lambda: self.now)

    def look(self, now: float) -> None:
        self.now = now
        self.watch.look()


def test_a_download_is_told_by_its_bytes_as_long_as_they_come(tmp_path: Path) -> None:
    phases, cache = tmp_path / "phases", tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "of-before").write_bytes(bytes(2_000_000))
    watched = Watched(phases, cache)
    watched.watch.enter(EnginePhase.WEIGHTS)
    (cache / "blobs" / "part.incomplete").write_bytes(b"x" * 3_000_000)
    watched.look(1)
    watched.look(5)
    watched.look(7)
    phases.write_text("weights\ncompilation\n")
    watched.look(8)
    watched.watch.enter(EnginePhase.CALIBRATION)
    assert watched.told == [
        Loading(phase=EnginePhase.WEIGHTS),
        Loading(phase=EnginePhase.DOWNLOAD, detail="3 MB"),
        Loading(phase=EnginePhase.WEIGHTS),
        Loading(phase=EnginePhase.COMPILATION),
        Loading(phase=EnginePhase.CALIBRATION),
    ]


def test_only_a_model_of_the_hub_is_downloaded(tmp_path: Path) -> None:
    assert download_folder(ModelSpec(id=str(tmp_path))) is None
    model = ModelSpec(id="org/name", engine_args={"download_dir": str(tmp_path)})
    assert download_folder(model) == tmp_path / "models--org--name"


def test_a_driver_tells_what_its_engine_does_until_the_first_tokens(
    make_engine: Callable[..., StartedEngine], told_engine: Callable[..., str], load_command: Load, work: Any
) -> None:
    told: list[tuple[str, Loading | None]] = []
    engine = make_engine(python=told_engine(), on_status=lambda *status: told.append(status))
    assert told == [], "nobody waits for it yet"
    engine.driver.load(load_command.model_copy(update={"calibrate": True}))
    for name in ("one", "two"):
        engine.run(work.run_command(work.write_bundle(name)))
    assert {name for name, _ in told} == {"engine 0"}
    phases = [phase for phase, _ in groupby(loading and loading.phase for _, loading in told)]
    assert phases == [
        EnginePhase.ENVIRONMENT, EnginePhase.WEIGHTS, EnginePhase.CALIBRATION, None, EnginePhase.FIRST_TOKENS, None
    ]  # fmt: skip
    first = told[0][1]
    assert first is not None
    log = Path(first.detail.removeprefix("log: "))
    assert log.parent.is_dir()
    assert log.suffix == ".log"


def test_first_tokens_last_until_something_is_computed(
    make_engine: Callable[..., StartedEngine], told_engine: Callable[..., str], load_command: Load, work: Any
) -> None:
    known_parts: tuple[str, ...] = ()
    for requests, known in ((4, 0), (6, 4)):
        told: list[object] = []
        engine = make_engine(python=told_engine(), on_status=lambda _, status, told=told: told.append(status))
        engine.driver.load(load_command)
        told.clear()
        run = work.run_command(work.write_bundle(f"of {requests}", requests=requests), known_parts=known_parts)

        def see(event: BundleEvent, told: list[object] = told) -> None:
            if isinstance(event, Progress):
                told.append(event.counts.requests)

        known_parts = engine.run(run, see).parts
        # Before the first step it tells what earlier attempts have given, which is nothing computed.
        assert told[:3] == [Loading(phase=EnginePhase.FIRST_TOKENS), known, None]
        assert told[-1] == requests


def test_the_end_of_the_log_stands_with_a_fault_of_the_engine_that_explains_nothing(
    make_engine: Callable[..., StartedEngine], told_engine: Callable[..., str], load_command: Load
) -> None:
    engine = make_engine(python=told_engine(load_fault="it failed", prints="what it printed before"))
    with pytest.raises(
        TerminalError, match=r"RuntimeError: it failed(.|\n)*last lines of its log(.|\n)*printed before"
    ):
        engine.driver.load(load_command)
