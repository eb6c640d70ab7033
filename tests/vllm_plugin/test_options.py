"""Options of the scheduler, and what a request carries to it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm_kernels.vllm_plugin.options import CONFIG_KEY, PlannedRequest, SchedulerOptions


def test_every_mechanism_is_on_unless_asked_otherwise() -> None:
    for additional_config in (None, {}, {"another plugin": 1}, {CONFIG_KEY: {}}):
        assert SchedulerOptions.from_additional_config(additional_config) == SchedulerOptions()
    assert all(field.default for field in fields(SchedulerOptions))


@pytest.mark.parametrize("name", [field.name for field in fields(SchedulerOptions) if isinstance(field.default, bool)])
def test_each_mechanism_can_be_switched_off(name: str) -> None:
    options = SchedulerOptions.from_additional_config({CONFIG_KEY: {name: False}})
    assert options == SchedulerOptions(**{name: False})


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"lead_frist": True}, "unknown option 'lead_frist', expected one of .*'lead_first'"),
        ({"lead_first": 1}, r"\['lead_first'\]: expected bool, got 1"),
        ({"watermark": True}, r"\['watermark'\]: expected float, got True"),
        ({"watermark": "0.1"}, r"\['watermark'\]: expected float, got '0.1'"),
        ({"watermark": 1.0}, r"\['watermark'\]: expected 0 <= watermark < 1, got 1.0"),
        ({"watermark": -0.1}, r"\['watermark'\]: expected 0 <= watermark < 1, got -0.1"),
        ({"watermark": float("nan")}, r"\['watermark'\]: expected 0 <= watermark < 1, got nan"),
        ("lead_first", "expected a mapping, got 'lead_first'"),
    ],
)
def test_a_bad_option_is_refused_by_name(given: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        SchedulerOptions.from_additional_config({CONFIG_KEY: given})


@given(st.builds(PlannedRequest, st.text(), st.integers(0), st.integers(0)))
def test_a_request_gets_through_its_extra_arguments_unchanged(planned: PlannedRequest) -> None:
    assert PlannedRequest.from_extra_args(planned.as_extra_args()) == planned


@pytest.mark.parametrize("extra_args", [None, {}, {"another plugin": 1}])
def test_a_request_that_no_plan_knows_carries_nothing(extra_args: Any) -> None:
    assert PlannedRequest.from_extra_args(extra_args) is None
