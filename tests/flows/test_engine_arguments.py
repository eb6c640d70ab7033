"""Engine arguments of a job are checked before anything else is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchllm_flows.planning import plan_job
from batchllm_operators.errors import TerminalError
from tests.flows.jobs import job, questions, write_input


@pytest.mark.parametrize(
    ("name", "hint"),
    [("max_num_seq", "did you mean 'max_num_seqs'?"), ("dtype", "set model.dtype"), ("tokenizer", "tokenised with it")],
)
def test_a_wrong_name_is_refused_before_any_row_is_staged(
    name: str, hint: str, tmp_path: Path, tiny_llama: str
) -> None:
    write_input(str(tmp_path / "in"), questions(4))
    with pytest.raises(TerminalError) as caught:
        plan_job(job(str(tmp_path / "in"), str(tmp_path / "out"), tiny_llama, model__engine_args={name: 1}))
    assert caught.value.message.startswith("model.engine_args: ")
    assert hint in caught.value.message
    assert not (tmp_path / "out").exists()
