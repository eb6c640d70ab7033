"""Seeded workloads of the shapes that the paper and its peers report (prompts are token ids).

A prompt is a few pieces one after the other: a template, a document, a question. Every piece has a number; equal
numbers are equal text, other numbers other text, so a workload is a few columns, and its tokens are made when they are
needed.
Prefixes and suffixes are all distinct where the shape does not say otherwise, and rows are shuffled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from batchllm_operators.columns.arrays import Int32s, Int64s
from batchllm_operators.columns.compiled import compiled

VOCABULARY = 32_000


@dataclass(frozen=True)
class Workload:
    """N prompts and what their completions are like.

    Attributes:
        name: of the shape.
        piece: int64 [N, pieces], number of each piece's text.
        length: int32 [N, pieces], its tokens; 0 where a prompt has no such piece.
        output_tokens: int32 [N], tokens that the completion will have.
        max_tokens: int32 [N].
    """

    name: str
    piece: Int64s
    length: Int32s
    output_tokens: Int32s
    max_tokens: Int32s

    def __len__(self) -> int:
        return len(self.piece)

    @property
    def prompt_tokens(self) -> Int32s:
        return self.length.sum(axis=1, dtype=np.int32)

    def prompts(self, low: int = 0, high: int | None = None) -> tuple[Int32s, Int64s]:
        """Token ids of the prompts low..high one after the other, and int64 offsets of each."""
        piece, length = self.piece[low:high], self.length[low:high]
        offsets = np.zeros(len(piece) + 1, dtype=np.int64)
        np.cumsum(length.sum(axis=1, dtype=np.int64), out=offsets[1:])
        tokens = np.empty(int(offsets[-1]), dtype=np.int32)
        _write_tokens(piece, length, offsets, tokens, VOCABULARY)
        return tokens, offsets

    def take(self, rows: Int64s, name: str | None = None) -> Workload:
        return Workload(
            name or self.name, self.piece[rows], self.length[rows], self.output_tokens[rows], self.max_tokens[rows]
        )


def shared_prefix(name: str, requests: int, groups: int, prefix: int, own: int, out: int, *, seed: int = 0) -> Workload:
    """Groups of like size: a prefix each, and a distinct suffix for every request."""
    chance = np.random.default_rng(seed)
    group = np.arange(requests) % max(groups, 1)
    pieces = [(group, np.full(requests, prefix)), (_distinct(requests, 1), np.full(requests, own))]
    return _shuffled(name, chance, pieces, np.full(requests, out))


def no_sharing(requests: int, tokens: int = 512, out: int = 128, *, seed: int = 0) -> Workload:
    """All distinct: planning must not lose."""
    chance = np.random.default_rng(seed)
    return _shuffled(
        "no sharing", chance, [(_distinct(requests, 0), np.full(requests, tokens))], np.full(requests, out)
    )


def ragged_output(requests: int, *, seed: int = 0) -> Workload:
    """No sharing, prompts of 100 tokens, outputs uniform in 100 to 600."""
    chance = np.random.default_rng(seed)
    pieces = [(_distinct(requests, 0), np.full(requests, 100))]
    return _shuffled("ragged output", chance, pieces, chance.integers(100, 601, requests))


def document_questions(documents: int, *, scale: float = 1.0, seed: int = 0) -> Workload:
    """Documents of 500 to 4,000 tokens with 4 to 12 questions each of 20 to 60; outputs of 10 to 120."""
    chance = np.random.default_rng(seed)
    document = np.repeat(np.arange(documents), chance.integers(4, 13, documents))
    length = _scaled(chance.integers(500, 4001, documents), scale)[document]
    requests = len(document)
    question = _scaled(chance.integers(20, 61, requests), scale)
    pieces = [(document, length), (_distinct(requests, 1), question)]
    return _shuffled("document questions", chance, pieces, chance.integers(10, 121, requests))


def few_shot(requests: int, *, prefix: int = 2000, seed: int = 0) -> Workload:
    """One prefix of examples for all; 50 to 300 own tokens; outputs of 1 to 60."""
    chance = np.random.default_rng(seed)
    pieces = [
        (np.zeros(requests, dtype=np.int64), np.full(requests, prefix)),
        (_distinct(requests, 1), chance.integers(50, 301, requests)),
    ]
    return _shuffled("few-shot", chance, pieces, chance.integers(1, 61, requests))


def two_level_tree(
    documents: int, questions: int = 6, templates: int = 1, *, scale: float = 1.0, seed: int = 0
) -> Workload:
    """Templates of 200 tokens, documents of 800 below them, questions of 40 below those."""
    chance = np.random.default_rng(seed)
    document = np.repeat(np.arange(documents), questions)
    requests = len(document)
    lengths = [_scaled(np.full(requests, size), scale) for size in (200, 800, 40)]
    pieces = list(zip([document % templates, _numbered(document, 1), _distinct(requests, 2)], lengths, strict=True))
    return _shuffled("two-level tree", chance, pieces, chance.integers(10, 121, requests))


def zipf_groups(requests: int, *, scale: float = 1.0, seed: int = 0) -> Workload:
    """Group sizes by Zipf's law (1.1), as many groups as 10 % of the rows; prefixes log-normal around 600 tokens."""
    chance = np.random.default_rng(seed)
    groups = max(requests // 10, 1)
    weight = 1 / np.arange(1, groups + 1) ** 1.1
    group = chance.choice(groups, requests, p=weight / weight.sum())
    length = _scaled(np.clip(chance.lognormal(np.log(600), 0.6, groups), 50, 4000).astype(np.int64), scale)[group]
    own = _scaled(chance.integers(40, 400, requests), scale)
    pieces = [(group, length), (_distinct(requests, 1), own)]
    return _shuffled("Zipf groups", chance, pieces, chance.geometric(1 / 80, requests).clip(1, 512))


def density_mix(requests: int, sharing: float, *, seed: int = 0) -> Workload:
    """Half compute-heavy (long prompt, short output), half memory-heavy; `sharing` of the prompt tokens shared."""
    chance = np.random.default_rng(seed)
    heavy = chance.random(requests) < 0.5
    tokens = np.where(heavy, 1500, 200)
    shared = (tokens * min(sharing * 16 / 15, 1.0)).astype(np.int64)
    group = np.arange(requests) // 16 * 2 + heavy
    pieces = [(group, shared), (_distinct(requests, 1), tokens - shared)]
    return _shuffled("density mix", chance, pieces, np.where(heavy, 30, 500))


def with_duplicates(workload: Workload, share: float, *, seed: int = 0) -> Workload:
    """Replace a share of the rows by copies of others."""
    chance = np.random.default_rng(seed)
    rows = np.arange(len(workload))
    copies = chance.random(len(rows)) < share
    rows[copies] = chance.integers(0, len(rows), int(copies.sum()))
    return workload.take(rows)


def mixture(name: str, workloads: list[Workload], *, seed: int = 0) -> Workload:
    """Several workloads in one, their texts distinct, shuffled."""
    pieces = max(one.piece.shape[1] for one in workloads)
    texts, lengths = [], []
    for number, one in enumerate(workloads):
        missing = pieces - one.piece.shape[1]
        texts.append(np.pad(one.piece + (np.int64(number + 1) << 56), ((0, 0), (0, missing))))
        lengths.append(np.pad(one.length, ((0, 0), (0, missing))))
    whole = Workload(
        name,
        np.concatenate(texts),
        np.concatenate(lengths),
        np.concatenate([one.output_tokens for one in workloads]),
        np.concatenate([one.max_tokens for one in workloads]),
    )
    return whole.take(np.random.default_rng(seed).permutation(len(whole)))


def planner_mixture(requests: int, *, seed: int = 0) -> Workload:
    """About 500 tokens a prompt: Zipf groups, two-level trees, some without sharing, 5 % exact duplicates."""
    trees = requests // 3 // 6
    alone = requests // 20
    parts = [
        zipf_groups(requests - trees * 6 - alone, scale=0.6, seed=seed),
        two_level_tree(trees, templates=max(trees // 500, 1), scale=0.5, seed=seed),
        no_sharing(alone, tokens=400, seed=seed),
    ]
    return with_duplicates(mixture("planner mixture", parts, seed=seed), 0.05, seed=seed)


SHAPES: dict[str, Callable[[], Workload]] = {
    "paper-micro": lambda: shared_prefix("paper micro", 6_400, 400, 2000, 200, 100),
    "long-prefix": lambda: shared_prefix("long prefix", 1_600, 100, 16_000, 200, 100),
    "prefix-repetition": lambda: shared_prefix("prefix repetition", 200_000, 512, 256, 256, 128),
    "generated-shared-prefix": lambda: shared_prefix("generated shared prefix", 1_024, 64, 2048, 128, 256),
    "document-questions": lambda: document_questions(500),
    "few-shot": lambda: few_shot(2_000),
    "two-level-tree": lambda: two_level_tree(500),
    "zipf-groups": lambda: zipf_groups(20_000),
    "density-mix-5": lambda: density_mix(2_000, 0.05),
    "density-mix-35": lambda: density_mix(2_000, 0.35),
    "ragged-output": lambda: ragged_output(2_000),
    "no-sharing": lambda: no_sharing(2_000),
}


def _distinct(requests: int, level: int) -> Int64s:
    return _numbered(np.arange(requests), level)


def _numbered(numbers: Int64s, level: int) -> Int64s:
    """Numbers that no other level has."""
    return numbers.astype(np.int64) + (np.int64(level) << 48)


def _scaled(lengths: Int64s, scale: float) -> Int64s:
    return np.maximum(np.round(lengths * scale), 1).astype(np.int64)


def _shuffled(
    name: str,
    chance: np.random.Generator,
    pieces: list[tuple[Int64s, Int64s]],
    output_tokens: Int64s,
) -> Workload:
    output = output_tokens.astype(np.int32)
    workload = Workload(
        name,
        np.stack([number.astype(np.int64) for number, _ in pieces], axis=1),
        np.stack([length.astype(np.int32) for _, length in pieces], axis=1),
        output,
        np.full(len(output), int(output.max(initial=1)), dtype=np.int32),
    )
    return workload.take(chance.permutation(len(output)))


@compiled
def _write_tokens(piece: Int64s, length: Int32s, offsets: Int64s, tokens: Int32s, vocabulary: int) -> None:
    for row in range(len(piece)):
        place = offsets[row]
        for part in range(piece.shape[1]):
            state = np.uint64(piece[row, part]) * np.uint64(0x9E3779B97F4A7C15)
            for _ in range(length[row, part]):
                state += np.uint64(0x9E3779B97F4A7C15)
                mixed = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                tokens[place] = np.int32((mixed >> np.uint64(33)) % np.uint64(vocabulary))
                place += 1
