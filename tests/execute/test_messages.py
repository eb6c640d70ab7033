from __future__ import annotations

import pytest
from pydantic import ValidationError

from batchllm_operators.cost import CPU_DEFAULT, Calibration
from batchllm_operators.execute.messages import (
    AllRead,
    BundleCounts,
    BundleDone,
    EnginePhase,
    Failed,
    Load,
    Loaded,
    Loading,
    PartWritten,
    Progress,
    Run,
    Shutdown,
    Started,
    decode_command,
    decode_event,
    encode,
)
from batchllm_operators.records import Record
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.specs.sampling import SamplingParameters

COUNTS = BundleCounts(requests=5, errors=1, prompt_tokens=50, cached_tokens=20, completion_tokens=9)
RUN = Run(
    bundle="plan/bundle-00000.parquet",
    work_uri="s3://bucket/work",
    storage=StorageOptions(endpoint_url="http://127.0.0.1:1"),
    task="generate",
    sampling=SamplingParameters(stop=("line\nbreak", "ünï")),
    part_rows=10,
    part_seconds=1.5,
    known_parts=("results/part-1.parquet",),
)


@pytest.mark.parametrize(
    "command",
    [
        Load(
            model=ModelSpec(id="m", engine_args={"enforce_eager": True}),
            block_size=32,
            gpus=1,
            task="generate",
            calibrate=True,
        ),
        RUN,
        Shutdown(),
    ],
    ids=lambda command: command.kind,
)
def test_a_command_comes_back_from_its_one_line(command: Record) -> None:
    line = encode(command)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode_command(line) == command


@pytest.mark.parametrize(
    "event",
    [
        Started(),
        Loading(phase=EnginePhase.DOWNLOAD, detail="1.2 GB"),
        Loaded(seconds=1.5),
        Loaded(
            seconds=1.5,
            calibration=Calibration(rates=CPU_DEFAULT, device="d", measured_at="2026-01-31 12:00:00", seconds=1.0),
        ),
        Progress(bundle="b", counts=COUNTS),
        AllRead(bundle="b"),
        PartWritten(bundle="b", name="results/part-1.parquet"),
        BundleDone(bundle="b", counts=COUNTS, parts=("a", "b"), seconds=2.0),
        Failed(bundle="b", message="first\nsecond", transient=True, engine_lost=False, uri="s3://bucket/x"),
    ],
    ids=lambda event: event.kind,
)
def test_an_event_comes_back_from_its_one_line(event: Record) -> None:
    line = encode(event)
    assert line.count(b"\n") == 1
    assert decode_event(line) == event


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(ValidationError):
        decode_event(b'{"kind": "unheard of"}\n')
    with pytest.raises(ValidationError):
        decode_command(b"INFO 12:00 loading\n")


def test_counts_add_up_field_by_field() -> None:
    total = COUNTS + COUNTS
    assert (total.requests, total.errors) == (10, 2)
    assert (total.prompt_tokens, total.cached_tokens, total.completion_tokens) == (100, 40, 18)
