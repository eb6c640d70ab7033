"""Inputs on their way through stage and merge; the tokenizer is loaded once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.inputs.carried import Carried, carried

Carry = Callable[..., Carried]


@pytest.fixture(scope="module")
def model(tiny_llama: str) -> Iterator[str]:
    """A model whose tokenizer is loaded from disk once: the tests here stage hundreds of inputs of a few rows.

    For a module only: what vLLM loads in other tests has arguments that cannot be cached.
    """
    import transformers

    with pytest.MonkeyPatch.context() as patch:
        for loader in (transformers.AutoTokenizer, transformers.AutoConfig):
            patch.setattr(loader, "from_pretrained", cache(loader.from_pretrained))
        yield tiny_llama


@pytest.fixture
def carry(model: str, tmp_path: Path) -> Carry:
    """Stages and merges objects: a name -> bytes mapping, or a folder, becomes a source."""

    def run(given: dict[str, bytes] | Path, *, name: str = "job", **options: Any) -> Carried:
        folder = given if isinstance(given, Path) else tmp_path / f"{name}-input"
        if not isinstance(given, Path):
            for path, content in given.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
        return carried(model, tmp_path / name, folder, **options)

    return run


@pytest.fixture(scope="module")
def tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
