"""A default run covers what the markers promise, and an exhaustive one leaves nothing out."""

from __future__ import annotations

import itertools

import covering
import pytest

_AXES = {"layout": ["fused", "per_layer"], "dtype": ["f32", "bf16", "int8"], "n": [1, 2, 3, 4]}
_ROWS = [dict(zip(_AXES, row, strict=True)) for row in itertools.product(*_AXES.values())]


@pytest.mark.parametrize(("strength", "at_most"), [(1, 4), (2, 14), (3, 24), (9, 24)])
def test_each_combination_is_kept(strength: int, at_most: int) -> None:
    kept = [_ROWS[i] for i in covering.covering_subset(_ROWS, strength)]
    assert len(kept) <= at_most
    for names in itertools.combinations(_AXES, min(strength, len(_AXES))):
        for values in itertools.product(*(_AXES[name] for name in names)):
            assert any(all(row[n] == v for n, v in zip(names, values, strict=True)) for row in kept)


def test_rows_need_not_be_a_product() -> None:
    rows = [{"a": 1, "b": 1}, {"a": 2, "b": 2}, {"a": 2, "b": 1}]
    assert covering.covering_subset(rows, 1) == [0, 1]
    assert covering.covering_subset(rows, 2) == [0, 1, 2]
    assert covering.covering_subset([{}], 2) == [0]


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_marked(layout: str, dtype: str) -> None:
    """Collected by the next test."""


def test_the_mark_drops_by_default_only(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The current run has already deselected some items, so the function is expanded again.
    module = request.node.parent
    items = [item for item in module.collect() if item.originalname == "test_marked"]
    assert len(items) == 6
    monkeypatch.setenv(covering.VARIABLE, "0")
    dropped = covering.dropped_by_default(items)
    assert len(dropped) == 3
    kept = [item.callspec.params for item in items if item not in dropped]
    assert {params["layout"] for params in kept} == {"fused", "per_layer"}
    assert {params["dtype"] for params in kept} == {"f32", "bf16", "int8"}
    assert covering.num_cases(3, exhaustive=9) == 3
    monkeypatch.setenv(covering.VARIABLE, "1")
    assert covering.dropped_by_default(items) == []
    assert covering.num_cases(3, exhaustive=9) == 9
