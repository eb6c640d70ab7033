"""Calibrations on the store, one object for each engine setting and device, so that no job measures what is known."""

from __future__ import annotations

import hashlib
import logging

from pydantic import ValidationError

from batchllm_operators.execute.spec import ModelSpec
from batchllm_operators.keys import canonical_json
from batchllm_operators.plan.cost import Calibration
from batchllm_operators.records import FORMAT_VERSION
from batchllm_operators.store import Store

CALIBRATIONS_FOLDER = "calibrations"

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
        names = [name for name in self._store.names() if name.startswith(f"{self._settings}-")]
        found = [calibration for name in names if (calibration := self._read(name)) is not None]
        return max(found, key=lambda one: one.measured_at, default=None)

    def keep(self, calibration: Calibration) -> None:
        """Write a calibration, in the place of an earlier one of the same device."""
        name = f"{self._settings}-{_hash(calibration.device.encode())}.json"
        self._store.write_bytes(name, calibration.model_dump_json(indent=2).encode())

    def _read(self, name: str) -> Calibration | None:
        try:
            return Calibration.model_validate_json(self._store.read_bytes(name))
        except ValidationError as error:
            _LOGGER.warning("%s is no calibration: %s", self._store.uri_of(name), error)
            return None


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8, person=b"batchllm-rates").hexdigest()
