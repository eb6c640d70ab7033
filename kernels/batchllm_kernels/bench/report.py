"""What a run on a device has found: a short table, which goals are met, and which points miss them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from batchllm_kernels.bench.grid import GridPoint
from batchllm_kernels.bench.ours import SHARED, UNSHARED
from batchllm_kernels.bench.results import Row, read_rows
from batchllm_kernels.bench.rivals import FLASH_ATTENTION_3, FLASH_ATTENTION_3_HEURISTIC

OWN_BYTES_PER_SECOND = 2.4e12
GAIN_2000X16, GAIN_16000X64, NO_LOSS = 1.5, 4.0, 0.98


@dataclass(frozen=True, slots=True)
class Goal:
    """A number that a point must reach."""

    point: str
    what: str
    expected: float
    got: float

    @property
    def shortfall(self) -> float:
        """Expected over got: more than 1 where the goal is missed."""
        return self.expected / self.got if self.got else float("inf")


def goals(rows: list[Row]) -> Iterator[Goal]:
    """The goals of issue 18 for the points that were timed."""
    for row in rows:
        point = GridPoint(**row["point"])
        gain = row["flash_attention_3_over_ours"]
        if gain is not None:
            expected = NO_LOSS
            if not point.shuffled and (point.prefix, point.degree) == (2000, 16):
                expected = GAIN_2000X16
            if not point.shuffled and (point.prefix, point.degree) == (16000, 64):
                expected = GAIN_16000X64
            yield Goal(row["key"], "gain over FlashAttention 3", expected, gain)
        if row.get("own_bytes_per_second"):
            yield Goal(row["key"], "bytes/s of own parts", OWN_BYTES_PER_SECOND, row["own_bytes_per_second"])


def missed_points(rows: list[Row], most: int) -> list[GridPoint]:
    """The points that miss a goal by most, the worst first."""
    worst: dict[str, float] = {}
    for goal in goals(rows):
        if goal.shortfall > 1:
            worst[goal.point] = max(goal.shortfall, worst.get(goal.point, 0.0))
    points = {row["key"]: GridPoint(**row["point"]) for row in rows}
    return [points[key] for key in sorted(worst, key=worst.__getitem__, reverse=True)[:most]]


def summary(path: Path) -> str:
    """A table of a file of results."""
    rows = read_rows(path)
    by_stage: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "key" in row:
            by_stage.setdefault(row["stage"], {})[row["key"]] = row
    complete = {row["stage"] for row in rows if "complete" in row}
    lines = []
    for stage, found in by_stage.items():
        failed = [row for row in found.values() if "failed" in row]
        state = "complete" if stage in complete and not failed else "cut off" if not failed else "with failures"
        lines.append(f"{stage}: {len(found) - len(failed)} results, {state}")
        lines += [f"  FAILED {row['key']}: {row['failed'][:300]}" for row in failed]
    timed = [row for row in by_stage.get("time", {}).values() if "failed" not in row]
    lines += _table(timed)
    skipped = {(name, reason) for row in timed for name, reason in row.get("skipped", {}).items()}
    lines += [f"skipped {name}: {reason}" for name, reason in sorted(skipped)]
    for goal in goals(timed):
        met = "met   " if goal.shortfall <= 1 else "MISSED"
        lines.append(f"{met} {goal.what}: {goal.got:.3g} of {goal.expected:.3g}, {goal.point}")
    for stage in ("facts", "host", "replay", "calibrate", "best"):
        lines += [f"{stage} {row}" for row in by_stage.get(stage, {}).values()]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    columns = ("ours us", "unshared", "FA3", "FA3 32", "FA3/ours", "of copy", "own TB/s", "max error")
    lines = [f"{'point':88}" + "".join(f"{name:>10}" for name in columns)]
    for row in rows:
        times = row["microseconds"]
        own = row.get("own_bytes_per_second")
        cells = (
            times[SHARED],
            times[UNSHARED],
            times.get(FLASH_ATTENTION_3_HEURISTIC),
            times.get(FLASH_ATTENTION_3),
            row["flash_attention_3_over_ours"],
            row["share_of_copy_bandwidth"],
            own / 1e12 if own else None,
            row["relative_error"],
        )
        lines.append(f"{row['key']:88}" + "".join("         -" if c is None else f"{c:10.3g}" for c in cells))
    return lines
