"""Tokenizers without PyTorch: transformers loads it where it finds it, which takes 2 to 6 of a plan's seconds."""

from __future__ import annotations

import os
import sys

from batchllm_operators.specs.execution import ModelSpec


def leave_out_torch(model: ModelSpec) -> None:
    """Make PyTorch unavailable in this process, which must be one that computes with no model.

    Configurations, tokenizers and chat templates need none of it, as in an orchestrator's environment without it.
    Nothing changes where it is loaded already, or where the model brings code of its own, which may want it.

    Args:
        model: whose tokenizer is going to be loaded.
    """
    if "torch" in sys.modules or model.engine_args.get("trust_remote_code"):
        return
    # Python's own way to say that a module is not there: importing it fails, and find_spec finds nothing.
    sys.modules["torch"] = None  # type: ignore[assignment]
    # transformers would advise to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
