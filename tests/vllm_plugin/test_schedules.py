"""Random jobs on vLLM's scheduler and KV cache manager: nothing is stuck, leaked, reordered or computed twice."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.request import Request, RequestStatus

from batchllm_kernels.vllm_plugin.options import PlannedRequest, SchedulerOptions
from tests.vllm_plugin.conftest import MakeScheduler
from tests.vllm_plugin.driven_scheduler import IDLE_STEPS, STOP_TOKEN, Ask, DrivenScheduler, Limits, optimum

BLOCK = 4
SWITCHES = [field.name for field in fields(SchedulerOptions) if isinstance(field.default, bool)]
EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class Job:
    """Requests in the order of a plan, and an engine that can hold each of them alone."""

    asks: tuple[Ask, ...]
    limits: Limits


@st.composite
def jobs(draw: st.DrawFn, *, exact: bool) -> Job:
    """Sibling groups under common parents, and requests that share nothing between them."""
    tokens = itertools.count(10)

    def fresh(most_tokens: int, least: int = 0) -> tuple[int, ...]:
        return tuple(itertools.islice(tokens, draw(st.integers(least, most_tokens))))

    def fresh_blocks(most_blocks: int) -> tuple[int, ...]:
        return tuple(itertools.islice(tokens, BLOCK * draw(st.integers(0, most_blocks))))

    def ask(prefix: tuple[int, ...], group: str | None) -> Ask:
        # The whole prompt may be the prefix, and prompts may be equal.
        prompt = prefix + fresh(3 * BLOCK, least=0 if prefix else 1)
        output_tokens = draw(st.integers(1, 20))
        expected = output_tokens if exact else draw(st.integers(1, 30))
        planned = None if group is None else PlannedRequest(group, len(prefix), expected)
        return Ask(prompt, output_tokens, planned, output_tokens + (0 if exact else draw(st.integers(0, 10))))

    asks: list[Ask] = []
    long_prefill_tokens = draw(st.sampled_from([0, 0, 3, 7]))
    for family in range(draw(st.integers(1, 4))):
        parent = fresh_blocks(3)
        for child in range(draw(st.integers(1, 3))):
            prefix = parent + fresh_blocks(3)
            members = draw(st.integers(1, 5))
            group = f"{family}/{child}" if exact or draw(st.integers(0, 4)) else None
            asks += [ask(prefix, group) for _ in range(members)]
        if draw(st.booleans()):
            asks.append(ask((), f"{family}/alone"))
    largest = max(-(-(len(one.prompt) + (one.max_tokens or one.output_tokens)) // BLOCK) for one in asks)
    step_tokens = draw(st.sampled_from([8, 16, 64]))
    limits = Limits(
        block_size=BLOCK,
        blocks=largest + draw(st.one_of(st.integers(0, 6), st.integers(0, 60))),
        step_tokens=step_tokens,
        long_prefill_tokens=long_prefill_tokens,
        max_running=draw(st.sampled_from([2, 8])),
        asynchronous=draw(st.booleans()),
    )
    return Job(tuple(asks), limits)


@st.composite
def trees(draw: st.DrawFn) -> Job:
    """Requests that share more than the prefix of their group, or are equal, and a cache that holds all of them."""
    tokens = itertools.count(10)
    paths: list[tuple[int, ...]] = [()]
    for _ in range(draw(st.integers(1, 6))):
        blocks = draw(st.integers(1, 4))
        paths.append(draw(st.sampled_from(paths)) + tuple(itertools.islice(tokens, BLOCK * blocks)))
    asks: list[Ask] = []
    for _ in range(draw(st.integers(2, 10))):
        path = draw(st.sampled_from(paths[1:]))
        prompt = path + tuple(itertools.islice(tokens, draw(st.integers(0, BLOCK + 1))))
        output_tokens = draw(st.integers(1, 8))
        # A plan that knows of no more than the first blocks.
        prefix_tokens = BLOCK * draw(st.integers(0, len(path) // BLOCK))
        asks.append(Ask(prompt, output_tokens, PlannedRequest(f"{path[0]}", prefix_tokens, output_tokens)))
    limits = Limits(
        block_size=BLOCK,
        blocks=10 + sum(-(-(len(one.prompt) + one.output_tokens) // BLOCK) for one in asks),
        step_tokens=draw(st.sampled_from([8, 16, 64])),
        long_prefill_tokens=draw(st.sampled_from([0, 1, 3, 4, 7])),
        max_running=draw(st.sampled_from([2, 8])),
        asynchronous=draw(st.booleans()),
    )
    return Job(tuple(asks), limits)


def names(job: Job) -> list[str]:
    return [f"r{index:03}" for index in range(len(job.asks))]


def planned_of(job: Job, request: Request) -> PlannedRequest:
    planned = job.asks[int(request.request_id[1:])].planned
    return planned or PlannedRequest(request.request_id, 0, request.max_tokens)


def aborts_of(job: Job, comes: list[int]) -> st.SearchStrategy[dict[int, list[tuple[str, bool]]]]:
    """Aborts (name, while the model runs) by step, some before the request comes, runs or ends, some after."""
    one = st.tuples(st.integers(0, comes[-1] + 12), st.tuples(st.sampled_from(names(job)), st.booleans()))

    def by_step(found: list[tuple[int, tuple[str, bool]]]) -> dict[int, list[tuple[str, bool]]]:
        return {step: [abort for at, abort in found if at == step] for step, _ in found}

    return st.lists(one, max_size=6).map(by_step)


def arrivals(asks: tuple[Ask, ...]) -> st.SearchStrategy[list[int]]:
    """Steps in which requests come, in their order."""
    gaps = st.one_of(st.just([0] * len(asks)), st.lists(st.integers(0, 3), min_size=len(asks), max_size=len(asks)))
    return gaps.map(lambda found: list(itertools.accumulate(found)))


def run(driven: DrivenScheduler, job: Job, comes: list[int], aborts: dict[int, list[tuple[str, bool]]]) -> None:
    """Feed the requests at their steps, with aborts (name, while the model runs) by step."""
    due = list(zip(names(job), job.asks, comes, strict=True))
    last = max([*comes, *aborts], default=0)
    for step in itertools.count():
        while due and due[0][2] <= step:
            name, one, _ = due.pop(0)
            driven.add(name, one)
        now = aborts.get(step, [])
        driven.abort(name for name, meanwhile in now if not meanwhile)
        driven.step([name for name, meanwhile in now if meanwhile])
        if step >= last and not driven.busy:
            return
        assert step < 20_000, "the scheduler does not come to an end"
        assert driven.idle_steps <= IDLE_STEPS, "the scheduler is stuck"


@given(data=st.data())
@EXAMPLES
def test_with_exact_estimates_nothing_is_preempted_or_computed_twice(drive: MakeScheduler, data: st.DataObject) -> None:
    job = data.draw(jobs(exact=True))
    driven = drive(job.limits, {})
    run(driven, job, data.draw(arrivals(job.asks)), {})
    assert driven.preemptions == 0
    admitted = [job.asks[int(name[1:])].prompt for name in driven.admitted]
    assert driven.computed_prompt_tokens == optimum(admitted, BLOCK)
    # Less where a request has overtaken that is nothing but the prefix, and computed it for the others.
    assert driven.computed_prompt_tokens <= optimum([one.prompt for one in job.asks], BLOCK)
    assert_answered(driven, job, set())


@given(data=st.data())
@EXAMPLES
def test_all_that_is_shared_is_computed_once_in_a_cache_that_holds_it(
    drive: MakeScheduler, data: st.DataObject
) -> None:
    job = data.draw(trees())
    driven = drive(job.limits, {})
    run(driven, job, data.draw(arrivals(job.asks)), {})
    assert driven.preemptions == 0
    assert driven.computed_prompt_tokens == optimum([one.prompt for one in job.asks], BLOCK)
    assert_answered(driven, job, set())


@given(data=st.data())
@EXAMPLES
def test_whatever_happens_every_request_is_answered_and_every_block_is_free_in_the_end(
    drive: MakeScheduler, data: st.DataObject
) -> None:
    job = data.draw(jobs(exact=False))
    options = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(SWITCHES, st.booleans())))
    comes = data.draw(arrivals(job.asks))
    driven = drive(job.limits, options)
    aborts = data.draw(aborts_of(job, comes))
    run(driven, job, comes, aborts)
    assert_answered(driven, job, {name for of_step in aborts.values() for name, _ in of_step})


@given(data=st.data())
@EXAMPLES
def test_no_member_runs_before_its_lead_has_the_prefix(drive: MakeScheduler, data: st.DataObject) -> None:
    job = data.draw(jobs(exact=False))
    comes = data.draw(arrivals(job.asks))
    driven = drive(job.limits, {})
    leads: dict[str, Request] = {}

    def has_its_prefix(request: Request, cached_tokens: int) -> None:
        planned = planned_of(job, request)
        lead = leads.setdefault(planned.group, request)
        if lead is request or lead.num_preemptions or lead.status != RequestStatus.RUNNING:
            return
        # vLLM computes the last token in any case, and with it its whole block.
        most = (request.num_prompt_tokens - 1) // BLOCK * BLOCK
        assert cached_tokens >= min(planned.prefix_tokens, most)

    driven.on_admission = has_its_prefix
    run(driven, job, comes, data.draw(aborts_of(job, comes)))


@given(data=st.data())
@EXAMPLES
def test_without_overtaking_requests_run_in_the_order_they_came(drive: MakeScheduler, data: st.DataObject) -> None:
    job = data.draw(jobs(exact=False))
    comes = data.draw(arrivals(job.asks))
    driven = drive(job.limits, {"overtake": False})
    run(driven, job, comes, data.draw(aborts_of(job, comes)))
    assert driven.admitted == sorted(driven.admitted)


@given(data=st.data())
@EXAMPLES
def test_whoever_overtakes_the_members_of_a_group_run_one_after_the_other(
    drive: MakeScheduler, data: st.DataObject
) -> None:
    job = data.draw(jobs(exact=False))
    comes = data.draw(arrivals(job.asks))
    driven = drive(job.limits, {})
    run(driven, job, comes, data.draw(aborts_of(job, comes)))
    planned = [planned_of(job, driven.requests[name]) for name in driven.admitted]
    runs = [group for group, _ in itertools.groupby(one.group for one in planned if one.prefix_tokens > 0)]
    assert len(runs) == len(set(runs))


def assert_answered(driven: DrivenScheduler, job: Job, aborted: set[str]) -> None:
    for name, one in zip(names(job), job.asks, strict=True):
        if name not in aborted:
            assert len(driven.outputs[name]) == one.output_tokens
            assert driven.outputs[name][-1] == STOP_TOKEN
    driven.assert_everything_is_released()
