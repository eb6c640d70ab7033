"""An engine measures its own rates: what a step costs, and each token of prefill, of decode, and of KV read."""

from __future__ import annotations

import logging
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from uuid import uuid4

import numpy as np

from batchllm_operators.execute.engine import Completion, Engine, EngineLimits, Request
from batchllm_operators.plan.cost import Calibration, MeasuredRuns, fit_cost_model
from batchllm_operators.stage.spec import SamplingParameters

OUTPUT_TOKENS = 17
ENOUGH_SECONDS = 4.0
"""After this long no further load is begun; the first ones always run."""

SHORT_PROMPT = 128
LONG_PROMPT = 512
WIDTHS_ALWAYS = (1, 8)
WIDTHS_IN_TIME = (64, 256)

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


def calibrate(engine: Engine, *, clock: Callable[[], float] = time.monotonic) -> Calibration | None:
    """Measure an idle engine: a few seconds of random prompts.

    None, with the reason in the log, where the model gives nothing to measure: every completion ends at its first
    token, say.

    Args:
        engine: loaded and without requests.
        clock: seconds, increasing.
    """
    started = clock()
    limits = engine.limits
    try:
        rates = fit_cost_model(
            _columns(list(measure(engine, clock=clock))),
            kv_capacity_tokens=limits.kv_capacity_tokens,
            max_running_requests=limits.max_running_requests,
        )
    except ValueError as error:
        _LOGGER.warning("no calibration: %s", error)
        return None
    return Calibration(
        rates=rates,
        device=limits.device,
        measured_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        seconds=round(clock() - started, 3),
    )


def measure(engine: Engine, *, clock: Callable[[], float] = time.monotonic) -> Iterator[MeasuredRun]:
    """Run synthetic loads: prefill alone, on new prompts twice; then decode on prompts that are in the cache by then.

    The faster prefill counts, and decode counts by its median step: what else the machine does can only slow it down.

    What a run has computed is counted from its completions, so that it is right also where the engine takes requests
    while it already works, or ends one early. The first load is run before, uncounted, as warm-up.

    Raises:
        ValueError: the engine refuses a request.
    """
    limits = engine.limits
    chance = random.Random(0)  # noqa: S311 - token ids, nothing secret
    always, in_time = synthetic_loads(limits)
    _run(engine, _prompts(always[-1], limits, chance), always[-1].output_tokens, clock)
    started = clock()
    for number, load in enumerate(always + in_time):
        if number >= len(always) and clock() - started > ENOUGH_SECONDS:
            return
        first, prompts = _prompts(load, limits, chance), _prompts(load, limits, chance)
        yield min(_run(engine, first, 1, clock), _run(engine, prompts, 1, clock), key=lambda run: run.seconds)
        yield _run(engine, prompts, load.output_tokens, clock)


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


def _run(engine: Engine, prompts: list[list[int]], output_tokens: int, clock: Callable[[], float]) -> MeasuredRun:
    sampling = SamplingParameters(max_tokens=output_tokens)
    requests = [Request(uuid4().bytes, prompt, sampling) for prompt in prompts]
    finished: list[Completion] = []
    times = [clock()]
    for request in requests:
        if (refusal := engine.submit(request)) is not None:
            raise ValueError(
                f"the engine refused a synthetic request: {refusal.error.message if refusal.error else ''}"
            )
    while engine.unfinished:
        finished += engine.step()
        times.append(clock())
    steps = [after - before for before, after in pairwise(times)]
    return _measured(finished, steps, engine.limits.max_step_tokens)


def _measured(finished: list[Completion], steps: list[float], max_step_tokens: int) -> MeasuredRun:
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
