"""Bundle in, answers out: requests are read as the engine has room for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

from batchllm_kernels.vllm_plugin.options import PlannedRequest
from batchllm_operators.batch_sizes import REQUESTS_AT_A_TIME
from batchllm_operators.errors import BatchLLMError
from batchllm_operators.execute.engine import Engine, Request
from batchllm_operators.execute.messages import BundleCounts
from batchllm_operators.specs.sampling import SamplingParameters
from batchllm_operators.store import Store
from batchllm_operators.tasks.base import Answer, Task
from batchllm_operators.work.bundles import scan_bundle
from batchllm_operators.work.results import COUNT_COLUMNS, read_result_part


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
        return sampling.of_request(overrides, max_tokens)

    for batch in scan_bundle(store, bundle, REQUESTS_AT_A_TIME):
        for row in batch.to_pylist():
            if row["request_key"] not in done:
                yield Request(
                    row["request_key"],
                    row["prompt_token_ids"],
                    parameters(row["sampling"], row["max_tokens"]),
                    # Numbers of groups are those of their bundle.
                    PlannedRequest(f"{bundle}:{row['group_id']}", row["prefix_tokens"], row["expected_output_tokens"]),
                )


def read_rows(
    store: Store, bundle: str, sampling: SamplingParameters, done: set[bytes], rows: tuple[int, int] | None
) -> Iterator[Request]:
    """The same requests, but only of the rows from the first number up to before the second; None: of all rows."""
    if rows is None:
        return read_requests(store, bundle, sampling, done)
    # Rows are counted with those that are done: their numbers stay the same from attempt to attempt.
    numbered = islice(read_requests(store, bundle, sampling, set()), *rows)
    return (request for request in numbered if request.key not in done)


def known_results(store: Store, task: Task, parts: Iterable[str]) -> tuple[set[bytes], BundleCounts]:
    """Request keys of result parts, and what these parts add up to.

    A key counts once, also when two parts hold it. What a damaged part held counts as not done.
    """
    done: set[bytes] = set()
    counts = BundleCounts()
    for name in parts:
        table = read_result_part(store, name, task, COUNT_COLUMNS)
        for row in [] if table is None else table.to_pylist():
            if row["request_key"] not in done:
                done.add(row["request_key"])
                counts += _counts(row["error"], row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"])
    return done, counts


@dataclass(frozen=True, slots=True)
class BundleStep:
    """What one step of the engine gave for one bundle."""

    bundle: str
    finished: list[Answer]
    all_read: bool
    """The engine has been given all of its requests."""
    done: bool
    """The engine has answered all of them too."""
    fault: BatchLLMError | None = None
    """Why its requests cannot be read any further; the bundle is out of the feed."""


class BundleFeed:
    """Drives an engine through bundles without a gap: the next one's requests enter as the last one's leave.

    Args:
        engine: holds at most its capacity of requests, those of the oldest bundle first.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._bundles: dict[str, _FedBundle] = {}

    @property
    def busy(self) -> bool:
        """Whether there is a bundle that is not done."""
        return bool(self._bundles)

    def add(self, bundle: str, requests: Iterator[Request]) -> None:
        """Take a bundle, behind those it has."""
        self._bundles[bundle] = _FedBundle(requests)

    def drop(self, bundle: str) -> None:
        """Forget a bundle, and what the engine holds of it."""
        fed = self._bundles.pop(bundle, None)
        if fed is not None and fed.held:
            self._engine.abort(fed.held)

    def step(self) -> list[BundleStep]:
        """Give the engine what it has room for and let it make one step; what came of it, bundle by bundle."""
        finished, faults = self._fill()
        if self._engine.unfinished:
            for one in self._engine.step():
                self._route(one, finished)
        steps = []
        for name, fed in list(self._bundles.items()):
            all_read = fed.requests is None
            done = (all_read and not fed.held) or name in faults
            steps.append(BundleStep(name, finished.get(name, []), all_read, done, faults.get(name)))
            if done:
                self.drop(name)
        return steps

    def abort(self) -> None:
        """Forget all bundles, and what the engine holds of them."""
        for bundle in list(self._bundles):
            self.drop(bundle)

    def _fill(self) -> tuple[dict[str, list[Answer]], dict[str, BatchLLMError]]:
        """Submit requests; returns those that were refused, and faults of reading, by bundle."""
        refused: dict[str, list[Answer]] = {}
        faults: dict[str, BatchLLMError] = {}
        for name, fed in self._bundles.items():
            while fed.requests is not None and self._engine.unfinished < self._engine.capacity:
                if len(refused.get(name, [])) >= REQUESTS_AT_A_TIME:
                    return refused, faults
                try:
                    request = next(fed.requests, None)
                except BatchLLMError as error:
                    faults[name] = error
                    break
                if request is None:
                    fed.requests = None
                elif (refusal := self._engine.submit(request)) is not None:
                    refused.setdefault(name, []).append(refusal)
                else:
                    fed.held.add(request.key)
        return refused, faults

    def _route(self, one: Answer, finished: dict[str, list[Answer]]) -> None:
        for name, fed in self._bundles.items():
            if one.request_key in fed.held:
                fed.held.remove(one.request_key)
                finished.setdefault(name, []).append(one)
                return


@dataclass(slots=True)
class _FedBundle:
    """A bundle in the feed."""

    requests: Iterator[Request] | None
    """Those that are still to be read; None when all are."""
    held: set[bytes] = field(default_factory=set)
    """Keys of those that the engine has."""


def count(finished: Iterable[Answer]) -> BundleCounts:
    """What answers add up to."""
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
