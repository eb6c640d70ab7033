"""The columns of running requests against the requests themselves."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.request import Request

from batchllm_kernels.vllm_plugin.admitted_requests import AdmittedRequests

moves = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 9), st.integers(0, 9)), max_size=30)
"""Name of a request that begins, or ends if it runs; its prompt tokens; tokens that all generate then."""


def request(name: str, prompt_tokens: int) -> Request:
    return Request(name, list(range(prompt_tokens)), SamplingParams(max_tokens=100), None)


def generate(one: Request, tokens: int) -> None:
    """As in steps that are all processed: the KV of the last token is not computed."""
    if tokens:
        one.append_output_token_ids([0] * tokens)
        one.num_computed_tokens = one.num_tokens - 1


@given(moves=moves)
def test_the_columns_say_what_the_requests_say(moves: Any) -> None:
    columns, running = AdmittedRequests(), dict[str, Request]()
    for name, prompt_tokens, tokens in moves:
        if name in running:
            columns.remove(name)
            del running[name]
        else:
            running[name] = request(name, prompt_tokens)
            run = ord(name)
            columns.add(running[name], estimate=prompt_tokens, most=100, shared_tokens=prompt_tokens // 2, run=run)
        for one in running.values():
            generate(one, tokens)
        columns.read_tails([one for one in running.values() if not one.num_output_tokens])
        assert len(columns) == len(running)
        for one in running.values():
            row = columns.row(one.request_id)
            tail = one.num_tokens - one.num_prompt_tokens // 2
            assert (columns.tails[row], columns.tail(one)) == (tail, tail)
            assert columns.generated[row] == one.num_output_tokens
            assert (columns.estimates[row], columns.most[row]) == (one.num_prompt_tokens, 100)
            assert columns.runs[row] == ord(one.request_id)
        assert all((other in columns) == (other in running) for other in "abcdef")


def test_there_is_room_for_hundreds() -> None:
    columns = AdmittedRequests()
    for index in range(300):
        columns.add(request(f"r{index}", 3), estimate=index + 1, most=100, shared_tokens=0, run=0)
    for index in range(0, 300, 2):
        columns.remove(f"r{index}")
    assert sorted(columns.estimates) == list(range(2, 301, 2))
    assert all(columns.estimates[columns.row(f"r{index}")] == index + 1 for index in range(1, 300, 2))
