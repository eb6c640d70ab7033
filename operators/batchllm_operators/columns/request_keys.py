"""Request keys as pairs of integers, which sort as their bytes do."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from batchllm_operators.columns.arrays import Int32s, Int64s, UInt64s
from batchllm_operators.keys import REQUEST_KEY_BYTES


def key_words(keys: pa.Array) -> UInt64s:
    """Keys as integers: uint64 [N, 2].

    Args:
        keys: a fixed-size binary array of N keys, none of them null.
    """
    content = keys.buffers()[1]
    words = np.frombuffer(content, dtype=">u8", count=2 * len(keys), offset=keys.offset * REQUEST_KEY_BYTES)
    return words.reshape(-1, 2).astype(np.uint64)


def distinct_keys(keys: UInt64s) -> tuple[Int64s, Int32s]:
    """Where each distinct key stands for the first time, increasing; and for each key, which of these it is."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    new = np.ones(len(keys), dtype=np.bool_)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    # lexsort is stable: the first of a run of equal keys is the one that stands first.
    firsts = order[new]
    by_place = np.argsort(firsts)
    number = np.empty(len(firsts), dtype=np.int32)
    number[by_place] = np.arange(len(firsts), dtype=np.int32)
    which = np.empty(len(keys), dtype=np.int32)
    which[order] = number[np.cumsum(new) - 1]
    return firsts[by_place].astype(np.int64), which


def ascending_keys(keys: UInt64s) -> UInt64s:
    """The distinct ones of some keys, in ascending order: uint64 [M, 2]."""
    ordered = keys[np.lexsort((keys[:, 1], keys[:, 0]))]
    new = np.ones(len(keys), dtype=np.bool_)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    distinct: UInt64s = ordered[new]
    return distinct


def find_keys(keys: UInt64s, others: UInt64s) -> Int64s:
    """Where each key stands among other, distinct keys; -1 where it does not.

    Args:
        keys: uint64 [N, 2], distinct.
        others: uint64 [M, 2], distinct.
    """
    found = np.full(len(keys), -1, dtype=np.int64)
    both = np.concatenate((others, keys))
    order = np.lexsort((both[:, 1], both[:, 0]))
    ordered = both[order]
    twin = np.flatnonzero((ordered[1:] == ordered[:-1]).all(axis=1))
    found[order[twin + 1] - len(others)] = order[twin]
    return found


def find_in_sorted(keys: UInt64s, others: UInt64s) -> Int64s:
    """As `find_keys`, among keys that stand in ascending order, which takes no time to sort them.

    Args:
        keys: uint64 [N, 2].
        others: uint64 [M, 2], distinct and ascending.
    """
    found = np.full(len(keys), -1, dtype=np.int64)
    place = np.searchsorted(others[:, 0], keys[:, 0])
    open_ = np.arange(len(keys))
    # One round, but for keys whose first words are equal, which nobody makes by chance.
    while len(open_ := open_[place[open_] < len(others)]):
        at = place[open_]
        open_ = open_[others[at, 0] == keys[open_, 0]]
        at = place[open_]
        same = others[at, 1] == keys[open_, 1]
        found[open_[same]] = at[same]
        open_ = open_[~same]
        place[open_] += 1
    return found
