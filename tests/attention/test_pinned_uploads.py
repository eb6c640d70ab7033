"""Uploads of plans: one copy for all parts, and no host buffer is written while a copy may still read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from batchllm_kernels.attention.pinned_uploads import PinnedUploads


def numbers(*values: int) -> Any:
    return np.array(values, dtype=np.int32)


def target(capacity: int = 8) -> torch.Tensor:
    return torch.full((capacity,), -1, dtype=torch.int32)


def test_parts_come_to_their_offsets_and_what_lies_behind_them_stays() -> None:
    device = target()
    PinnedUploads(device, depth=2).load([(0, numbers(7)), (1, numbers(1, 2, 3, 4).reshape(2, 2))])
    assert device.tolist() == [7, 1, 2, 3, 4, -1, -1, -1]


def test_parts_of_any_order_are_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    copy = torch.Tensor.copy_

    def counted(to: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        copies.append((len(to), options))
        return copy(to, *args, **options)

    device = target()
    uploads = PinnedUploads(device, depth=2)
    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    uploads.load([(4, numbers(5, 6)), (0, numbers(7))])
    assert copies == [(6, {"non_blocking": True})]
    assert device[[0, 4, 5]].tolist() == [7, 5, 6]


def test_the_callers_arrays_may_change_at_once() -> None:
    device, mine = target(), numbers(1, 2)
    PinnedUploads(device, depth=1).load([(0, mine)])
    mine[:] = 0
    assert device[:2].tolist() == [1, 2]


def test_more_loads_than_buffers_arrive_one_after_another() -> None:
    device = target()
    uploads = PinnedUploads(device, depth=2)
    for step in range(7):
        uploads.load([(0, numbers(step, -step))])
        assert device[:2].tolist() == [step, -step]


def test_a_load_of_nothing_changes_nothing() -> None:
    device = target()
    PinnedUploads(device, depth=1).load([])
    assert device.tolist() == [-1] * 8


@pytest.mark.parametrize("part", [(7, numbers(1, 2)), (-1, numbers(1)), (0, np.arange(9, dtype=np.int32))])
def test_a_part_outside_the_target_is_refused_and_the_next_load_is_right(part: tuple[int, Any]) -> None:
    device = target()
    uploads = PinnedUploads(device, depth=2)
    with pytest.raises(ValueError, match="part of a plan: expected within 8 numbers, got"):
        uploads.load([(0, numbers(3)), part])
    assert device.tolist() == [-1] * 8
    uploads.load([(0, numbers(4))])
    assert device[0] == 4


@pytest.mark.parametrize(
    ("bad", "depth", "message"),
    [
        (torch.zeros(4), 1, "target: expected int32"),
        (torch.zeros((2, 2), dtype=torch.int32), 1, "target: expected int32"),
        (torch.zeros(8, dtype=torch.int32)[::2], 1, "target: expected int32"),
        (torch.zeros(4, dtype=torch.int32), 0, "depth: expected at least 1, got 0"),
    ],
)
def test_unfit_buffers_are_refused(bad: torch.Tensor, depth: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PinnedUploads(bad, depth)


class SlowDevice:
    """A device that comes to queued copies only when a fence behind them is waited for, or at the end."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.queue: list[Callable[[], object]] = []
        self.done = self.waits = 0
        copy = torch.Tensor.copy_

        def queued(to: torch.Tensor, source: torch.Tensor, *, non_blocking: bool) -> None:
            assert non_blocking
            self.queue.append(lambda: copy(to, source))

        patch.setattr(torch.Tensor, "copy_", queued)

    def reach(self, position: int) -> None:
        while self.done < position:
            self.queue[self.done]()
            self.done += 1

    def fence(self) -> DeviceFence:
        return DeviceFence(self)


class DeviceFence:
    def __init__(self, device: SlowDevice) -> None:
        self._device = device
        self._behind = 0

    def record(self) -> None:
        self._behind = len(self._device.queue)

    def synchronize(self) -> None:
        self._device.waits += self._behind > self._device.done
        self._device.reach(self._behind)


def test_a_device_that_lags_more_steps_than_there_are_buffers_still_gets_every_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow, device, seen = SlowDevice(monkeypatch), target(1), []
    uploads = PinnedUploads(device, depth=3, fence=slow.fence)
    for step in range(9):
        uploads.load([(0, numbers(step))])
        slow.queue.append(lambda: seen.append(int(device[0])))  # the step's kernels, on the same stream
    slow.reach(len(slow.queue))
    assert seen == list(range(9))


def test_nobody_waits_while_the_device_is_within_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowDevice(monkeypatch)
    uploads = PinnedUploads(target(1), depth=3, fence=slow.fence)
    for step in range(12):
        slow.reach(len(slow.queue) - 2)  # two steps under way
        uploads.load([(0, numbers(step))])
    assert slow.waits == 0
    for step in range(4):
        uploads.load([(0, numbers(step))])
    assert slow.waits > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_plans_arrive_behind_work_that_keeps_the_device_busy() -> None:
    device = torch.zeros(1 << 16, dtype=torch.int32, device="cuda")
    seen = torch.zeros((8, 1 << 16), dtype=torch.int32, device="cuda")
    uploads = PinnedUploads(device, depth=2)
    for step in range(8):
        torch.cuda._sleep(20_000_000)
        uploads.load([(0, np.full(1 << 16, step + 1, dtype=np.int32))])
        seen[step].copy_(device)
    expected = torch.arange(1, 9, dtype=torch.int32, device="cuda")[:, None].expand_as(seen)
    assert torch.equal(seen, expected)
