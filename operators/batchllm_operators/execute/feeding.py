"""Bundle in, completions out: requests are read as the engine has room for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import orjson

from batchllm_operators.execute.engine import Completion, Engine, Request
from batchllm_operators.execute.messages import BundleCounts
from batchllm_operators.stage.spec import SamplingParameters
from batchllm_operators.store import Store

READ_ROWS = 256
"""Requests in memory ahead of the engine."""


def read_requests(store: Store, bundle: str, sampling: SamplingParameters, done: set[bytes]) -> Iterator[Request]:
    """The requests of a bundle in their order, without those that are done.

    Args:
        store: the work folder.
        bundle: name of the bundle's object there.
        sampling: the job's sampling parameters; a row's own override them field by field.
        done: request keys to leave out.

    Raises:
        TerminalError: no such bundle, or not readable as Parquet.
    """

    @lru_cache(maxsize=1024)
    def parameters(overrides: str | None, max_tokens: int) -> SamplingParameters:
        values: dict[str, Any] = sampling.model_dump(include=set(SamplingParameters.model_fields))
        values |= orjson.loads(overrides) if overrides is not None else {}
        return SamplingParameters(**{**values, "max_tokens": max_tokens})

    columns = ["request_key", "prompt_token_ids", "max_tokens", "sampling"]
    for batch in store.scan_parquet(bundle, columns, READ_ROWS):
        for row in batch.to_pylist():
            if row["request_key"] not in done:
                yield Request(
                    row["request_key"], row["prompt_token_ids"], parameters(row["sampling"], row["max_tokens"])
                )


def known_results(store: Store, parts: Iterable[str]) -> tuple[set[bytes], BundleCounts]:
    """Request keys of result parts, and what these parts add up to.

    A key counts once, also when two parts hold it.
    """
    done: set[bytes] = set()
    counts = BundleCounts()
    columns = ["request_key", "prompt_tokens", "cached_tokens", "completion_tokens", "error"]
    for name in parts:
        with store.parquet(name) as file:
            for row in file.read(columns=columns).to_pylist():
                if row["request_key"] not in done:
                    done.add(row["request_key"])
                    counts += _counts(
                        row["error"], row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"]
                    )
    return done, counts


def completions(
    engine: Engine, requests: Iterator[Request], stopping: Callable[[], bool]
) -> Iterator[list[Completion]]:
    """Drive the engine through the requests; yields after every step what finished, also when that is nothing.

    The engine holds at most its capacity. When the caller stops iterating, or `stopping()` turns true between two
    steps, unfinished requests are aborted, and the engine is free for the next bundle.
    """
    waiting = True
    try:
        while (waiting or engine.unfinished) and not stopping():
            finished: list[Completion] = []
            while waiting and engine.unfinished < engine.capacity and len(finished) < READ_ROWS:
                request = next(requests, None)
                if request is None:
                    waiting = False
                elif (refusal := engine.submit(request)) is not None:
                    finished.append(refusal)
            if engine.unfinished:
                finished += engine.step()
            yield finished
    finally:
        if engine.unfinished:
            engine.abort()


def count(finished: Iterable[Completion]) -> BundleCounts:
    """What completions add up to."""
    counts = BundleCounts()
    for one in finished:
        counts += _counts(one.error, one.prompt_tokens, one.cached_tokens, one.completion_tokens)
    return counts


def _counts(
    error: object, prompt_tokens: int | None, cached_tokens: int | None, completion_tokens: int | None
) -> BundleCounts:
    return BundleCounts(
        requests=1,
        errors=int(error is not None),
        prompt_tokens=prompt_tokens or 0,
        cached_tokens=cached_tokens or 0,
        completion_tokens=completion_tokens or 0,
    )
