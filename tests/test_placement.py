"""The rule that places requests on replicas, compared with a search over all replicas."""

from __future__ import annotations

import numpy as np

from jax_kvpage.sharding.placement import Request, place


def _everywhere(replica: int, members: list[int], missing: list[int]) -> bool:
    del replica, members, missing
    return True


def test_without_prefixes_the_least_load_wins_and_ties_go_to_the_lower_number() -> None:
    requests = [Request(10, 10, [0, 0, 0])] * 4
    assert place(requests, [0, 0, 0], 32, _everywhere) == [0, 1, 2, 0]
    assert place(requests, [64, 33, 0], 32, _everywhere) == [2, 2, 1, 0]
    assert place([], [0, 0], 32, _everywhere) == []


def test_a_prefix_is_followed_until_the_load_costs_more() -> None:
    for load, wanted in ((0, 1), (80, 1), (81, 0)):
        request = Request(100, 100, [16, 96])
        assert place([request], [0, load], 16, _everywhere) == [wanted]


def test_where_there_is_no_room_the_next_best_is_taken() -> None:
    request = Request(100, 140, [0, 96, 32])
    for full, wanted in (([], [1]), ([1], [2]), ([1, 2], [0]), ([0, 1, 2], None)):

        def has_room(
            replica: int, members: list[int], missing: list[int], full: list[int] = full
        ) -> bool:
            assert members == [0]
            assert missing == [[140], [44], [108]][replica]
            return replica not in full

        assert place([request], [0, 0, 0], 32, has_room) == wanted


def test_requests_of_one_call_that_begin_alike_go_together() -> None:
    ids = np.arange(200, dtype=np.int32)
    alike = [Request(200, 200, [0, 0], ids), Request(100, 100, [0, 0], ids[:100])]
    # 100 - 96 tokens after a load of 200, or 100 tokens on an idle replica.
    assert place(alike, [0, 0], 32, _everywhere) == [0, 1]
    assert place(alike, [0, 150], 32, _everywhere) == [0, 0]
    other = Request(100, 100, [0, 0], ids[100:])
    assert place([alike[0], other], [0, 150], 32, _everywhere) == [0, 1]


def test_random_requests_get_the_least_cost() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 5))
        loads = rng.integers(0, 200, count).tolist()
        tokens = int(rng.integers(1, 200))
        cached = [int(rng.integers(0, tokens)) for _ in loads]
        (got,) = place([Request(tokens, tokens, cached)], loads, 16, _everywhere) or [-1]
        costs = [tokens - found + load for found, load in zip(cached, loads, strict=True)]
        best = [r for r in range(count) if costs[r] == min(costs)]
        assert got == max(best, key=lambda r: (cached[r], -r))
