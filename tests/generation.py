"""The schemas of generation, the task of most tests."""

from __future__ import annotations

from batchllm_operators.tasks.generate import GENERATION
from batchllm_operators.work.results import answer_columns, result_schema

RESULT_SCHEMA = result_schema(GENERATION)
OUTPUT_FIELDS = answer_columns(GENERATION)
