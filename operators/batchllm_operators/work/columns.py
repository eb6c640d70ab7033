"""Types of the columns that several objects of a work folder have."""

from __future__ import annotations

import pyarrow as pa

from batchllm_operators.keys import REQUEST_KEY_BYTES

KEY_TYPE = pa.binary(REQUEST_KEY_BYTES)
TOKENS_TYPE = pa.list_(pa.int32())
ERROR_TYPE = pa.struct([("code", pa.string()), ("message", pa.string())])
