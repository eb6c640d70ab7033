"""Whether sharing pays: seconds of the attention of decode rows on both paths, on a device as it was measured.

Prefill rows are vLLM's own attention's on either path, so that they do not stand here. A launch takes its fixed cost,
and beyond it as long as the slowest of: bytes from memory, bytes through the second-level cache, operations. Launches
run one after the other, so that their times are added.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import resources

TABLE = "calibration.json"
ASSUMED = "assumed"
"""Entry of the table for devices that were not measured."""

PARTIAL_BYTES = 4  # partial results and their log-sum-exp are fp32
CAPTURED_LAUNCHES = 3
"""The launches of the shared path in a captured step: shared, own and merge, whether there is work for them or not."""


@dataclass(frozen=True, slots=True)
class ModelHeads:
    """Attention heads of one rank: query heads, KV heads, numbers of a head, bytes of a number."""

    heads: int
    kv_heads: int
    head_size: int
    element_bytes: int = 2

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of the keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_size * self.element_bytes

    @property
    def query_token_bytes(self) -> int:
        """Bytes of one token's query, or of its output."""
        return self.heads * self.head_size * self.element_bytes

    @property
    def partial_bytes(self) -> int:
        """Bytes of one partial result of one token, with its log-sum-exp."""
        return self.heads * (self.head_size + 1) * PARTIAL_BYTES


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one launch moves and computes in one layer.

    Attributes:
        first_bytes: read from memory or written to it; bytes that several programs read count once.
        again_bytes: read again by others, so soon that they are still in the second-level cache.
        flops: operations of both products, those on the padding of tiles included.
    """

    first_bytes: float
    again_bytes: float = 0.0
    flops: float = 0.0

    @property
    def total_bytes(self) -> float:
        """Everything read or written, in bytes."""
        return self.first_bytes + self.again_bytes

    @property
    def without_l2(self) -> Traffic:
        """As if every read came from memory: what members that stand far apart in the batch would read."""
        return Traffic(self.total_bytes, 0.0, self.flops)


@dataclass(frozen=True, slots=True)
class StepWork:
    """Traffic of the decode rows of a step in one layer, on both paths.

    Attributes:
        stock: every row reads its own context, one launch.
        shared: the shared runs, with the queries of all their members; None where nothing is shared.
        own: what each row reads alone.
        merge: combines split own parts; None where no own part is split.
    """

    stock: Traffic
    shared: Traffic | None
    own: Traffic
    merge: Traffic | None = None


@dataclass(frozen=True, slots=True)
class KernelCalibration:
    """What a device reaches in these kernels and in the stock ones.

    Attributes:
        source: the device measured, or why these numbers are assumed.
        stock_bytes_per_second: vLLM's own attention, from memory.
        l2_bytes_per_second: what kernels read from the second-level cache.
        l2_bytes: its size.
        processors: programs of the stock kernel that run at once: rows whose programs do meet in the cache.
        shared_bytes_per_second, shared_flops_per_second: the shared launch, where memory bounds it, and arithmetic.
        own_bytes_per_second: the own launch and the merge.
        captured_launch_seconds: fixed cost of a launch in a replayed graph, also of one without work.
        uncaptured_launch_seconds: fixed cost of a launch by the host.
        uncaptured_layer_seconds: what a layer of a decode step takes longer where the step is not captured whole.
        minimum_gain: share of the other path's time that must be saved before a step shares.
    """

    source: str
    stock_bytes_per_second: float
    l2_bytes_per_second: float
    l2_bytes: float
    processors: int
    shared_bytes_per_second: float
    shared_flops_per_second: float
    own_bytes_per_second: float
    captured_launch_seconds: float
    uncaptured_launch_seconds: float
    uncaptured_layer_seconds: float
    minimum_gain: float

    def stock_seconds(self, traffic: Traffic) -> float:
        """The time of vLLM's own attention, without the launch."""
        return self._seconds(traffic, self.stock_bytes_per_second)

    def shared_seconds(self, traffic: Traffic) -> float:
        """The time of the shared launch, without its fixed cost."""
        return self._seconds(traffic, self.shared_bytes_per_second)

    def own_seconds(self, traffic: Traffic) -> float:
        """Seconds of the own launch or the merge, without its fixed cost."""
        return self._seconds(traffic, self.own_bytes_per_second)

    def _seconds(self, traffic: Traffic, bytes_per_second: float) -> float:
        return max(
            traffic.first_bytes / bytes_per_second,
            traffic.total_bytes / self.l2_bytes_per_second,
            traffic.flops / self.shared_flops_per_second,
        )


class Launching(Enum):
    """How the launches of a step come to the device."""

    CAPTURED = "captured"
    """The step is one graph with the launches of the shared path in it. Where a step does not share, the own launch
    covers whole contexts: that is what sharing is compared with."""
    PIECES = "pieces"
    """The host launches attention, vLLM's own or ours."""
    STOCK_CAPTURED = "stock captured"
    """The host launches ours, where vLLM's own would be part of a captured step."""


@dataclass(frozen=True, slots=True)
class StepSetting:
    """What there is to know of a step beside its decode rows.

    Attributes:
        layers: that run its plan.
        launching: how its launches come to the device.
        prefill_rows: whether it has rows of vLLM's own attention too, whose launch would take the decode rows along.
        exposed_host_seconds: of planning, where no work of the device hides it.
    """

    layers: int
    launching: Launching
    prefill_rows: bool = False
    exposed_host_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a step shares, why, and the seconds that a layer is expected to take without and with sharing."""

    share: bool
    reason: str
    stock_seconds: float
    shared_seconds: float


def decide(work: StepWork, setting: StepSetting, calibration: KernelCalibration) -> Decision:
    """Whether the step is expected to be faster with sharing by at least the calibrated minimum gain.

    Args:
        work: of one layer.
        setting: of the step.
        calibration: of the device.
    """
    other = unshared_seconds(work, setting.launching, calibration)
    shared = shared_path_seconds(work, setting.launching, calibration, prefill_rows=setting.prefill_rows)
    if work.shared is None:
        return Decision(False, "nothing worth sharing", other, shared)
    saved = other - shared - setting.exposed_host_seconds / setting.layers
    gain = saved / other
    reason = f"expected gain {gain:.1%} of {other * 1e6:.0f} us a layer, needed {calibration.minimum_gain:.1%}"
    return Decision(gain >= calibration.minimum_gain, reason, other, shared)


def unshared_seconds(work: StepWork, launching: Launching, calibration: KernelCalibration) -> float:
    """Seconds of a layer without sharing: of our own launch in captured steps, else of vLLM's own attention."""
    if launching is Launching.CAPTURED:
        return CAPTURED_LAUNCHES * calibration.captured_launch_seconds + calibration.own_seconds(work.stock)
    captured = launching is Launching.STOCK_CAPTURED
    fixed = calibration.captured_launch_seconds if captured else calibration.uncaptured_launch_seconds
    return fixed + calibration.stock_seconds(work.stock)


def shared_path_seconds(
    work: StepWork, launching: Launching, calibration: KernelCalibration, *, prefill_rows: bool = False
) -> float:
    """Seconds of a layer on the shared path: the launches and their fixed costs, one after the other.

    Args:
        work: of one layer.
        launching: how the launches come to the device.
        calibration: of the device.
        prefill_rows: whether the step has rows of vLLM's own attention, which then need a launch of their own.
    """
    launches = CAPTURED_LAUNCHES
    fixed = calibration.captured_launch_seconds
    if launching is not Launching.CAPTURED:
        launches = 1 + (work.shared is not None) + (work.merge is not None) + prefill_rows
        fixed = calibration.uncaptured_launch_seconds
    seconds = launches * fixed + calibration.own_seconds(work.own)
    if work.shared is not None:
        seconds += calibration.shared_seconds(work.shared)
    if work.merge is not None:
        seconds += calibration.own_seconds(work.merge)
    if launching is Launching.STOCK_CAPTURED:
        seconds += calibration.uncaptured_layer_seconds
    return seconds


def calibration_for(device_name: str, shared_impl: str = "triton") -> KernelCalibration:
    """The measured entry of a device, else the assumed one, which says so in its source.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        shared_impl: what runs the shared parts; one that was not measured on the device is taken for the Triton kernel.
    """
    table = _table()
    measured = table.get(device_name, table[ASSUMED])
    return table.get(f"{device_name}, {shared_impl}", measured)


@cache
def _table() -> dict[str, KernelCalibration]:
    text = resources.files(__package__).joinpath(TABLE).read_text(encoding="utf-8")
    return {name: KernelCalibration(**entry) for name, entry in json.loads(text)["devices"].items()}
