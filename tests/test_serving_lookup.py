"""Speculation by prompt lookup."""

from __future__ import annotations

import random

from jax_kvpage.serving.lookup import NgramIndex


def _plain(ids: list[int], shortest: int, longest: int, most: int) -> list[int]:
    for size in range(longest, shortest - 1, -1):
        for begin in range(len(ids) - size - 1, -1, -1):
            if ids[begin : begin + size] == ids[len(ids) - size :]:
                return ids[begin + size : begin + size + most]
    return []


def test_guesses_are_those_of_a_search() -> None:
    rng = random.Random(0)
    for shortest, longest in ((1, 1), (1, 3), (2, 4)):
        index, ids, found = NgramIndex(shortest, longest), [], 0
        for _ in range(300):
            ids += [rng.randrange(4) for _ in range(rng.randint(1, 3))]
            guess = index.guess(ids, 5)
            assert guess == _plain(ids, shortest, longest, 5)
            found += bool(guess)
        assert found > 200
