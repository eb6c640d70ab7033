"""Seeded tables like those of Liu et al.: their rows, fields, cardinalities and lengths (4 characters make a token)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CHARACTERS_PER_TOKEN = 4

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TextTable:
    """A table of texts: columns by name, in the order of the source."""

    name: str
    columns: dict[str, list[str]]


def movies(rows: int = 15_000, *, seed: int = 0) -> TextTable:
    """Reviews of films by date: about 276 tokens a row; what is said of a film repeats with each of its reviews."""
    chance = np.random.default_rng(seed)
    film = _zipf(chance, rows, 1_300, 0.7)
    return TextTable(
        "movies",
        {
            "genres": _texts(film * 7 % 300, 8, "genres"),
            "movie_info": _texts(film, 200, "info"),
            "movie_title": _texts(film, 6, "title"),
            "production_company": _texts(film * 11 % 400, 6, "company"),
            "review_content": _texts(np.arange(rows), 32, "review"),
            "review_type": _texts(chance.integers(0, 2, rows), 2, "type"),
            "rotten_tomatoes_link": _texts(film, 10, "link"),
            "top_critic": _texts((chance.random(rows) < 0.25).astype(np.int64), 1, "top"),
        },
    )


def products(rows: int = 14_890, *, seed: int = 0) -> TextTable:
    """Reviews of products: about 377 tokens a row; the review's own id stands before the product's description."""
    chance = np.random.default_rng(seed)
    product = _zipf(chance, rows, 1_500, 0.8)
    return TextTable(
        "products",
        {
            "review_id": _texts(np.arange(rows), 6, "id"),
            "rating": _texts(chance.choice(5, rows, p=[0.1, 0.05, 0.1, 0.15, 0.6]), 1, "rating"),
            "review_title": _texts(_zipf(chance, rows, 9_000, 0.6), 8, "headline"),
            "text": _texts(np.arange(rows), 60, "text"),
            "verified_purchase": _texts((chance.random(rows) < 0.9).astype(np.int64), 1, "verified"),
            "parent_asin": _texts(product, 6, "asin"),
            "product_title": _texts(product, 25, "product"),
            "description": _texts(product, 250, "description"),
        },
    )


def beer(rows: int = 28_479, *, seed: int = 0) -> TextTable:
    """Ratings of beers: about 156 tokens a row with its instruction; many fields of few values."""
    chance = np.random.default_rng(seed)
    kind = _zipf(chance, rows, 900, 0.9)
    return TextTable(
        "beer",
        {
            "beer_id": _texts(kind, 4, "id"),
            "review_time": _texts(np.arange(rows), 6, "time"),
            "profile_name": _texts(_zipf(chance, rows, 4_000, 0.8), 5, "profile"),
            "beer_name": _texts(kind, 8, "name"),
            "style": _texts(kind * 5 % 90, 6, "style"),
            "appearance": _texts(chance.binomial(8, 0.75, rows), 2, "appearance"),
            "palate": _texts(chance.binomial(8, 0.7, rows), 2, "palate"),
            "taste": _texts(chance.binomial(8, 0.72, rows), 2, "taste"),
        },
    )


TABLES: dict[str, Callable[[], TextTable]] = {"movies": movies, "products": products, "beer": beer}


def _zipf(chance: np.random.Generator, rows: int, values: int, exponent: float) -> Numbers:
    weight = 1 / np.arange(1, values + 1) ** exponent
    return chance.choice(values, rows, p=weight / weight.sum()).astype(np.int64)


def _texts(values: Numbers, tokens: int, word: str) -> list[str]:
    """One text of so many tokens for each distinct value."""
    length = tokens * CHARACTERS_PER_TOKEN
    texts = {value: f"{word}-{value} ".ljust(length, "abcdefgh"[value % 8])[:length] for value in set(values.tolist())}
    if tokens > 2 and len(set(texts.values())) < len(texts):
        raise ValueError(f"{word}: texts of {tokens} tokens are too short to tell {len(texts)} values apart")
    return [texts[value] for value in values.tolist()]
