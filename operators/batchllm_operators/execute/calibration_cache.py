"""Calibrations on the store, one object for each engine setting and device, so that no job measures what is known."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

from batchllm_operators.cost import Calibration, engine_seconds
from batchllm_operators.keys import canonical_json
from batchllm_operators.records import BundleResult
from batchllm_operators.specs.execution import ModelSpec
from batchllm_operators.store import Store
from batchllm_operators.work.json_objects import read_record, write_record
from batchllm_operators.work.layout import FORMAT_VERSION

WRONG_BY = 2.0
TELLING_SECONDS = 10.0
"""The least engine time that says something: shorter work is mostly what every run costs, whatever it computes."""

_LOGGER = logging.getLogger(__name__)


class CalibrationCache:
    """The kept calibrations of one model under one set of engine settings.

    Args:
        store: the folder of all calibrations.
        model: the model part of the job.
        block_size: tokens of a KV-cache block.
        gpus_per_engine: GPUs of one engine.
    """

    def __init__(self, store: Store, model: ModelSpec, *, block_size: int, gpus_per_engine: int) -> None:
        self._store = store
        settings = {
            "format_version": FORMAT_VERSION,
            "model": model.model_dump(mode="json"),
            "block_size": block_size,
            "gpus_per_engine": gpus_per_engine,
        }
        self._settings = _hash(canonical_json(settings))

    def latest(self) -> Calibration | None:
        """The newest calibration, of whatever device: who plans may have no device. None when there is none.

        An object that does not hold a calibration counts for nothing, with a warning.
        """
        found = [calibration for name in self._names() if (calibration := self._read(name)) is not None]
        return max(found, key=lambda one: one.measured_at, default=None)

    def keep(self, calibration: Calibration) -> None:
        """Write a calibration, in the place of an earlier one of the same device, dtype and versions."""
        made_on = canonical_json([calibration.device, calibration.dtype, calibration.versions])
        name = f"{self._settings}-{_hash(made_on)}.json"
        write_record(self._store, name, calibration)

    def hold_against(self, calibration: Calibration, facts: Sequence[BundleResult]) -> None:
        """Delete a calibration that is more than 2 times off what engines then took, so that the next job measures.

        Its rates alone are judged: by the tokens that were really computed and generated, not by those of the plan.
        Bundles of less than `TELLING_SECONDS` together say nothing.

        Args:
            calibration: with which the bundles were planned.
            facts: what executing them gave.
        """
        taken = sum(one.seconds for one in facts)
        expected = sum(
            engine_seconds(
                calibration.rates,
                requests=one.requests,
                prompt_tokens=one.prompt_tokens,
                computed_tokens=one.prompt_tokens - one.cached_tokens,
                output_tokens=one.completion_tokens,
            )
            for one in facts
        )
        if max(taken, expected) < TELLING_SECONDS or expected <= WRONG_BY * taken <= WRONG_BY**2 * expected:
            return
        _LOGGER.warning(
            "the engines took %.0f s for what the rates measured at %s UTC on %s make %.0f s: the calibration is "
            "deleted, the next run measures again",
            taken, calibration.measured_at, calibration.device, expected,
        )  # fmt: skip
        self._store.delete([name for name in self._names() if self._read(name) == calibration])

    def _names(self) -> list[str]:
        return [name for name in self._store.names() if name.startswith(f"{self._settings}-")]

    def _read(self, name: str) -> Calibration | None:
        return read_record(Calibration, self._store, name, only_looks=True)


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8, person=b"batchllm-rates").hexdigest()
