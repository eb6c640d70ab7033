"""Seeded tables like those of Liu et al., "Optimizing LLM Queries in Relational Data Analytics".

Taken from them: rows, fields, and average prompt lengths (276, 377 and 156 tokens), of which about 100, 100 and 78 are
the question and other text that all prompts share (they report hit rates of 35 %, 27 % and 50 % for tables as given).
How often a film, a product or a beer repeats follows from the 86 %, 83 % and 80 % that they report after reordering.

Assumed, before any run of this generator: rows stand as in the source. A published sample of the movies table (1,020
rows of a join of films and reviews) is in no order by film, and gives the lengths of the texts; reviews of products
come by reviewer or time, which says nothing of the product; ratings of beers come beer by beer. Fields stand in
alphabetical order, which puts much of what repeats first: a strong baseline.

Added after that run: beers in no order. The hit rate reported for beers as given, 50 %, is the share of the question
(78 of 156 tokens), so the source's rows cannot have stood beer by beer.

4 characters make a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from batchllm_operators.columns.arrays import Int64s

CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class TextTable:
    """A table of texts: columns by name, in the order of the source."""

    name: str
    columns: dict[str, list[str]]


def movies(rows: int = 15_000, *, seed: int = 0) -> TextTable:
    """Reviews of films, in no order by film, about 15 a film: what is said of a film repeats with each of them."""
    chance = np.random.default_rng(seed)
    film = _zipf(chance, rows, 1_000, 0.7)
    return TextTable(
        "movies",
        {
            "genres": _texts(film * 7 % 300, 6, "genres"),
            "movieinfo": _texts(film, 85, "info"),
            "movietitle": _texts(film, 4, "title"),
            "productioncompany": _texts(film * 11 % 400, 5, "company"),
            "reviewcontent": _texts(np.arange(rows), 28, "review"),
            "reviewtype": _texts(chance.integers(0, 2, rows), 2, "type"),
            "rottentomatoeslink": _texts(film, 6, "link"),
            "topcritic": _texts((chance.random(rows) < 0.25).astype(np.int64), 1, "top"),
        },
    )


def products(rows: int = 14_890, *, seed: int = 0) -> TextTable:
    """Reviews of products, in no order by product, about 10 a product."""
    chance = np.random.default_rng(seed)
    product = _zipf(chance, rows, 1_500, 0.8)
    return TextTable(
        "products",
        {
            "description": _texts(product, 185, "description"),
            "id": _texts(np.arange(rows), 5, "id"),
            "parent_asin": _texts(product, 3, "asin"),
            "product_title": _texts(product, 25, "product"),
            "rating": _texts(chance.choice(5, rows, p=[0.1, 0.05, 0.1, 0.15, 0.6]), 1, "rating"),
            "review_title": _texts(_zipf(chance, rows, 9_000, 0.6), 5, "headline"),
            "text": _texts(np.arange(rows), 45, "text"),
            "verified_purchase": _texts((chance.random(rows) < 0.9).astype(np.int64), 1, "verified"),
        },
    )


def beer(rows: int = 28_479, *, unordered: bool = False, seed: int = 0) -> TextTable:
    """Ratings of beers, about 26 a beer, beer by beer or unordered; many fields of few values."""
    chance = np.random.default_rng(seed)
    kind = _zipf(chance, rows, 1_100, 0.9)
    kind = kind if unordered else np.sort(kind)
    return TextTable(
        "beer, unordered" if unordered else "beer",
        {
            "beer/beerId": _texts(kind, 4, "id"),
            "beer/name": _texts(kind, 6, "name"),
            "beer/style": _texts(kind * 5 % 89, 5, "style"),
            "review/appearance": _texts(chance.binomial(5, 0.75, rows), 1, "appearance"),
            "review/palate": _texts(chance.binomial(5, 0.7, rows), 1, "palate"),
            "review/profileName": _texts(_zipf(chance, rows, 4_000, 0.8), 4, "profile"),
            "review/taste": _texts(chance.binomial(10, 0.72, rows), 1, "taste"),
            "review/time": _texts(np.arange(rows), 3, "time"),
        },
    )


TABLES: dict[str, Callable[[], TextTable]] = {
    "movies": movies,
    "products": products,
    "beer": beer,
    "beer, unordered": lambda: beer(unordered=True),
}


def _zipf(chance: np.random.Generator, rows: int, values: int, exponent: float) -> Int64s:
    weight = 1 / np.arange(1, values + 1) ** exponent
    return chance.choice(values, rows, p=weight / weight.sum()).astype(np.int64)


def _texts(values: Int64s, tokens: int, word: str) -> list[str]:
    """One text of so many tokens for each distinct value."""
    length = tokens * CHARACTERS_PER_TOKEN
    texts = {value: f"{value} {word} ".ljust(length, "abcdefgh"[value % 8])[:length] for value in set(values.tolist())}
    if len(set(texts.values())) < len(texts):
        raise ValueError(f"{word}: texts of {tokens} tokens are too short to tell {len(texts)} values apart")
    return [texts[value] for value in values.tolist()]
