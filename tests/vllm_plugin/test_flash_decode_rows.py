"""Decode rows of an engine whose shared parts FlashAttention 3 runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from batchllm_kernels.vllm_plugin.attention_choice import AttentionChoice
from batchllm_kernels.vllm_plugin.flash_attention_3 import shared_implementation

INTERPRETED = Path(__file__).with_name("interpreted_flash_rows.py")


def test_mixed_and_captured_steps_have_the_answers_of_the_reference() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_the_settings_of_an_engine_name_what_runs_shared_parts() -> None:
    triton = shared_implementation(torch.half, 64)
    assert str(AttentionChoice(shared=True, stock="FLASH_ATTN", shared_parts=triton)) == "shared over FLASH_ATTN"
    flash = type(triton)("flash_attention_3", "a test")
    named = str(AttentionChoice(shared=True, stock="FLASH_ATTN", shared_parts=flash))
    assert named == "shared over FLASH_ATTN, shared parts by FlashAttention 3"
