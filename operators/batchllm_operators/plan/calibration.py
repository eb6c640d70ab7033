"""Measured rates of engines, kept per model and device, so that a plan need not guess."""

from __future__ import annotations

import hashlib
import re

from pydantic import ValidationError

from batchllm_operators.keys import canonical_json
from batchllm_operators.plan.spec import CostModel
from batchllm_operators.store import Store

CALIBRATION_FOLDER = "calibration"


def calibration_name(model: str, revision: str | None, dtype: str, device: str) -> str:
    """Name of the object that holds the rates of a model on a device, e.g. `NVIDIA H100 80GB HBM3`."""
    content = canonical_json({"model": model, "revision": revision, "dtype": dtype})
    digest = hashlib.blake2b(content, digest_size=8, person=b"batchllm-rates").hexdigest()
    return f"{CALIBRATION_FOLDER}/{digest}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def write_calibration(store: Store, name: str, cost: CostModel) -> None:
    """Keep measured rates."""
    store.write_bytes(name, cost.model_dump_json(indent=2).encode())


def read_calibration(store: Store, name: str) -> CostModel | None:
    """Measured rates, or None where there are none, or none that this version understands."""
    if not store.exists(name):
        return None
    try:
        return CostModel.model_validate_json(store.read_bytes(name))
    except ValidationError:
        return None
