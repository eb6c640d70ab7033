"""The arguments of vLLM's engine: what the job decides, what the user passes through, and what is nobody's to set."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.engine_argument_names import ENGINE_ARGUMENTS
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.wording import did_you_mean

# Arguments that have one right place in the job, or one right value.
RESERVED = {
    "model": "set model.id",
    "revision": "set model.revision",
    "dtype": "set model.dtype",
    "max_model_len": "set model.max_model_len",
    "block_size": "set planning.block_size: the plan shares prefixes in these blocks",
    "tensor_parallel_size": "set execution.gpus_per_engine",
    "tokenizer": "the tokenizer is the model's, because the rows were tokenised with it",
    "tokenizer_mode": "the tokenizer is the model's, because the rows were tokenised with it",
    "tokenizer_revision": "the tokenizer is the model's, because the rows were tokenised with it",
    "skip_tokenizer_init": "completions are text, so the engine needs the tokenizer",
    "enable_prefix_caching": "always on: the plan is made of shared prefixes",
    "runner": "set task",
    "data_parallel_size": "set execution.engines",
}

GPU_MAX_NUM_SEQS = 1024
"""vLLM's choice for its largest GPUs; the others get 256 from it. Admission lets run what the KV cache holds, and with
shared prefixes that is often more than 256 requests. It costs memory for 1,024 rows of logits."""

VLLM_LARGEST_GRAPH = 512
"""Tokens of the largest step that vLLM captures as a CUDA graph by itself, on Hopper and Ampere. One with more requests
runs from Python, in each of its layers; so we let it capture as many as there are sequences."""

GRAPH_SPACING = 16
"""Tokens between two of vLLM's captured steps of 256 tokens or more; a step is padded to the next."""


def check_engine_arguments(model: ModelSpec, known: Collection[str] | None = None) -> None:
    """Refuse names in `model.engine_args` that vLLM does not know, or that have another place in the job.

    For who plans as for the engine: a misspelt name costs no staging and no loading of a model.

    Args:
        model: the model part of the job.
        known: the fields of `EngineArgs`; default: `known_engine_arguments()`.

    Raises:
        TerminalError: with the place to set it, or the nearest valid name.
    """
    for name in model.engine_args:
        if name in RESERVED:
            raise TerminalError(f"model.engine_args: {name!r} cannot be set here: {RESERVED[name]}")
        names = known_engine_arguments() if known is None else known
        if name not in names:
            hint = did_you_mean(name, names, "see vLLM's EngineArgs for the valid names")
            raise TerminalError(f"model.engine_args: vLLM has no engine argument {name!r}; {hint}")


@cache
def known_engine_arguments() -> frozenset[str]:
    """The fields of vLLM's `EngineArgs`: of the vLLM installed here, else those of the version that we support.

    Read from the source of vLLM, because importing it takes seconds and an orchestrator has no other use for it.
    """
    vllm = find_spec("vllm")
    for folder in (vllm.submodule_search_locations or ()) if vllm else ():
        source = Path(folder) / "engine" / "arg_utils.py"
        if source.is_file():
            return _fields(source.read_text(encoding="utf-8"), "EngineArgs")
    return ENGINE_ARGUMENTS


def _fields(source: str, dataclass: str) -> frozenset[str]:
    """The annotated names in the body of a class at the top of a module.

    By its text: to parse it in one thread while another one parses something makes CPython 3.11 fail now and then
    ("AST constructor recursion depth mismatch"), and a run imports packages in threads.
    """
    body = re.split(rf"^class {dataclass}\b.*:$", source, maxsplit=1, flags=re.MULTILINE)[1]
    body = re.split(r"^\S", body, maxsplit=1, flags=re.MULTILINE)[0]
    return frozenset(re.findall(r"^    (\w+):", body, flags=re.MULTILINE))


def engine_arguments(
    model: ModelSpec, *, block_size: int, gpus: int, runner: str, known: Collection[str]
) -> dict[str, Any]:
    """Keyword arguments for vLLM's `EngineArgs`.

    Args:
        model: the model part of the job.
        block_size: tokens of a KV-cache block.
        gpus: tensor-parallel size.
        runner: of vLLM, by the job's task.
        known: the fields of `EngineArgs`.

    Raises:
        TerminalError: `model.engine_args` names a reserved or an unknown argument.
    """
    check_engine_arguments(model, known)
    arguments: dict[str, Any] = {
        "model": model.id,
        "revision": model.revision,
        "tokenizer_revision": model.revision,
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
        "runner": runner,
        "block_size": block_size,
        "tensor_parallel_size": gpus,
        "enable_prefix_caching": True,
    }
    return arguments | model.engine_args


def gpu_choices(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What we choose on GPUs of the arguments that are still open.

    On CPUs vLLM's own 256 sequences stay: measured with SmolLM2-135M on 2 cores, the tokens decoded a second hardly
    grow beyond 64 requests. The token budget stays vLLM's everywhere: measured there, 256 to 4,096 tokens made no
    difference of more than 7 %.

    Args:
        arguments: of `EngineArgs`, as `engine_arguments` returns them.
    """
    choices: dict[str, Any] = {}
    sequences = arguments.get("max_num_seqs")
    if sequences is None:
        budget = arguments.get("max_num_batched_tokens")
        # vLLM refuses a budget that is smaller than the number of sequences, and a budget that is no number.
        sequences = min(GPU_MAX_NUM_SEQS, budget) if isinstance(budget, int) else GPU_MAX_NUM_SEQS
        choices["max_num_seqs"] = sequences
    if isinstance(sequences, int) and sequences > VLLM_LARGEST_GRAPH and not chooses_graphs(arguments):
        # A decode step has a token for each sequence.
        if sequences % GRAPH_SPACING:
            choices["cudagraph_capture_sizes"] = [*graph_sizes(sequences), sequences]
        else:
            choices["max_cudagraph_capture_size"] = sequences
    return choices


def graph_sizes(largest: int) -> list[int]:
    """The steps, in tokens, that vLLM captures as CUDA graphs by itself where the largest is given."""
    return [1, 2, 4, *range(8, min(largest + 1, 256), 8), *range(256, largest + 1, GRAPH_SPACING)]


def chooses_graphs(arguments: Mapping[str, Any]) -> bool:
    """Whether arguments of `EngineArgs` say which steps are captured as CUDA graphs, or that none is."""
    compilation = arguments.get("compilation_config")
    given = {**(compilation if isinstance(compilation, Mapping) else {}), **arguments}
    return bool(arguments.get("enforce_eager")) or any(
        given.get(name) is not None for name in ("max_cudagraph_capture_size", "cudagraph_capture_sizes")
    )
