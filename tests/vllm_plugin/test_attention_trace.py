"""The trace of prefix-shared attention, written and read at the same time."""

from __future__ import annotations

from pathlib import Path

from batchllm_kernels.attention.cost import Decision
from batchllm_kernels.vllm_plugin.attention_trace import AttentionTraceWriter, read_attention_steps

SHARED = Decision(share=True, reason="expected gain 50 %", stock_seconds=4e-6, shared_seconds=2e-6)


def test_a_step_reads_back_with_its_decision(tmp_path: Path) -> None:
    AttentionTraceWriter(tmp_path / "trace", rank=1).write(requests=4, query_tokens=7, decision=SHARED)
    (step,), _ = read_attention_steps(tmp_path / "trace")
    assert step.pop("time_s") > 1e9
    assert step == {
        "rank": 1, "requests": 4, "query_tokens": 7, "share": True, "reason": "expected gain 50 %",
        "stock_us": 4.0, "shared_us": 2.0,
    }  # fmt: skip


def test_a_step_that_was_not_looked_at_says_so(tmp_path: Path) -> None:
    AttentionTraceWriter(tmp_path / "trace", rank=0).write(requests=1, query_tokens=1, decision=None)
    (step,), _ = read_attention_steps(tmp_path / "trace")
    assert (step["share"], step["reason"], step["stock_us"], step["shared_us"]) == (False, "not looked at", None, None)


def test_steps_of_all_ranks_are_read_from_any_byte_on_and_half_a_line_is_not(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    writers = [AttentionTraceWriter(file, rank) for rank in (0, 1)]
    read, end = [], 0
    for number in range(4):
        writers[number % 2].write(requests=number, query_tokens=1, decision=None)
        whole = file.read_bytes()
        file.write_bytes(whole + b'{"time_s": 1')
        steps, end = read_attention_steps(file, end)
        read += [(step["rank"], step["requests"]) for step in steps]
        assert read_attention_steps(file, end) == ([], end)
        file.write_bytes(whole)
    assert read == [(0, 0), (1, 1), (0, 2), (1, 3)]


def test_a_trace_that_nobody_has_begun_has_no_steps(tmp_path: Path) -> None:
    assert read_attention_steps(tmp_path / "missing") == ([], 0)
