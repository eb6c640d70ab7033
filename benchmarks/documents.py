"""Seeded questions about documents, as a table of texts, for benchmarks that run whole jobs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pyarrow as pa

TEMPLATE = "{document}\n\nQuestion: {question}\nAnswer:"
"""A prompt, for `str.format`: the document first, so that questions about one share it."""
QUESTIONS_PER_DOCUMENT = 6
DAYS = 16
"""Lines of a document."""


def questions(rows: int, *, seed: int = 0) -> pa.Table:
    """Questions about weather records, shuffled: `id`, `document` (about 330 tokens), `question`; 6 to a document."""
    chance = random.Random(seed)
    skies = ("clear", "cloudy", "rain", "snow", "fog", "wind")
    documents = []
    for station in range(-(-rows // QUESTIONS_PER_DOCUMENT)):
        days = [
            f"Day {day}: {chance.choice(skies)}, {chance.randint(-9, 35)} degrees, {chance.randint(0, 90)} mm of rain."
            for day in range(1, DAYS + 1)
        ]
        documents.append(f"Station {station} of the northern network keeps this record.\n" + "\n".join(days))
    asked = [
        "What was the weather like on day {}?",
        "How many degrees did the station measure on day {}?",
        "How much rain fell on day {}?",
    ]
    table = pa.table(
        {
            "id": [f"row-{row}" for row in range(rows)],
            "document": [documents[row // QUESTIONS_PER_DOCUMENT] for row in range(rows)],
            "question": [asked[row % 3].format(1 + row % QUESTIONS_PER_DOCUMENT * 2) for row in range(rows)],
        }
    )
    order = list(range(rows))
    chance.shuffle(order)
    return table.take(order)


def distinct_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Prompt tokens that an ideal cache computes: every distinct prefix once."""
    ordered = sorted(map(list, prompts))
    shared = 0
    for before, after in pairwise(ordered):
        shared += next((at for at, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    return sum(map(len, ordered)) - shared
