"""The two settings of a run: by default, few random cases and a covering subset of the parameter
combinations; with --exhaustive (or JAX_KVPAGE_TEST_EXHAUSTIVE=1), all of them.

By default, a test marked `covering(n)` runs for a subset of its parameter combinations that has
every combination of values of any n parameters that the full set has: with 1, each layout and each
dtype; with 2, each layout with each dtype.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import seed, settings

Test = TypeVar("Test", bound=Callable[..., Any])

VARIABLE = "JAX_KVPAGE_TEST_EXHAUSTIVE"


def is_exhaustive() -> bool:
    """Whether this run, or the run that started this process, is exhaustive."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def num_cases(default: int, exhaustive: int) -> int:
    """The number of random cases to draw in this run."""
    return exhaustive if is_exhaustive() else default


def own_cases(name: object) -> Callable[[Test], Test]:
    """Decorates a Hypothesis test so that it draws random cases specific to `name`.

    A derandomized profile draws the same cases each time a function is run. With several
    configurations, different cases for each of them cover more.
    """
    if settings().derandomize:
        return seed(zlib.crc32(str(name).encode()))
    return lambda test: test


def covering_subset(rows: Sequence[Mapping[str, object]], strength: int) -> list[int]:
    """Returns the ascending indices of rows that together hold each combination of `strength`
    values that any row holds. Greedy and deterministic.
    """

    def combinations(row: Mapping[str, object]) -> set[tuple[tuple[str, str], ...]]:
        values = sorted((name, repr(value)) for name, value in row.items())
        return set(itertools.combinations(values, min(strength, len(values))))

    left = [combinations(row) for row in rows]
    chosen = []
    while any(left):
        best = max(range(len(rows)), key=lambda i: len(left[i]))
        chosen.append(best)
        found = left[best].copy()
        for combination in left:
            combination -= found
    return sorted(chosen)


def dropped_by_default(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Returns the items outside the covering subsets of their tests; none in an exhaustive run."""
    if is_exhaustive():
        return []
    functions: dict[tuple[object, str], list[pytest.Function]] = {}
    for item in items:
        if item.get_closest_marker("covering") and isinstance(item, pytest.Function):
            functions.setdefault((item.parent, item.originalname), []).append(item)
    dropped: list[pytest.Item] = []
    for same in functions.values():
        (strength,) = same[0].get_closest_marker("covering").args
        kept = set(covering_subset([item.callspec.params for item in same], strength))
        dropped += [item for index, item in enumerate(same) if index not in kept]
    return dropped
