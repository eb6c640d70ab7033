"""Random decode steps and plan shapes for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from batchllm_kernels.attention.work_plan import WorkPlanShape

from .batches import Request

PATHS = [
    (),
    (("a", 2),),
    (("a", 2), ("b", 30)),
    (("a", 2), ("c", 9)),
    (("d", 12),),
    (("d", 12), ("e", 1), ("f", 7)),
    (("d", 12), ("e", 1), ("f", 7), ("g", 5), ("h", 6)),
    (("d", 12), ("e", 1), ("f", 7), ("i", 5)),
]

rows = st.builds(
    Request,
    own_tokens=st.one_of(st.integers(0, 60), st.sampled_from([16, 32, 300, 900])),
    shares=st.sampled_from(PATHS),
)
padding = st.just(Request(own_tokens=0))
batches = st.lists(st.one_of(rows, rows, rows, padding), min_size=1, max_size=16)

shapes = st.builds(
    WorkPlanShape,
    block_size=st.sampled_from([16, 32]),
    queries_per_kv_head=st.sampled_from([1, 3, 4, 8]),
    element_bytes=st.sampled_from([1, 2, 4]),
    shared_tile_rows=st.sampled_from([8, 16, 64]),
    target_items=st.sampled_from([1, 4, 64]),
    own_target_items=st.sampled_from([1, 4, 64]),
    minimum_split_tokens=st.sampled_from([16, 256]),
)
