"""benchmarks/partial_reuse.py: a model's logits after a reused document."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from llama.arguments import BUNDLED
from llama.checkpoint import load_model

_FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"
_RNG = np.random.default_rng(4)
_BEFORE, _DOCUMENT, _AFTER = ([0, *_RNG.integers(2, 2048, n).tolist()] for n in (40, 63, 15))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(_FOLDER))
    return importlib.import_module("partial_reuse")


@pytest.fixture
def reuser(script: Any) -> Iterator[Any]:
    reuser = script.Reuser(load_model(BUNDLED, dtype=jnp.float32))
    yield reuser
    reuser.pool.close()


def test_nothing_is_lost_where_nothing_is_approximate(reuser: Any) -> None:
    """All tokens are recomputed, or the document is reused in the context it was computed in."""
    source, slot = reuser.compute([0]), reuser.compute(_BEFORE)
    reuser.pool.extend([source, slot], [200, 200])
    reuser.run(source, _DOCUMENT)
    full = reuser.prompt(_BEFORE, _DOCUMENT, _AFTER, source, 1.0)
    reuser.run(slot, _DOCUMENT)
    np.testing.assert_array_equal(reuser.run(slot, _AFTER), full)
    reuser.cache = reuser.pool.release(reuser.cache, slot)
    same = reuser.prompt([0], _DOCUMENT, _AFTER, source, 0.0)
    np.testing.assert_array_equal(reuser.prompt([0], _DOCUMENT, _AFTER, source, 1.0), same)


def test_the_error_is_that_of_the_context_alone(script: Any, reuser: Any) -> None:
    """It decreases as more is recomputed, and is large without the rotation."""
    source = reuser.compute([0, *_DOCUMENT])
    full = reuser.prompt(_BEFORE, _DOCUMENT, _AFTER, source, 1.0)

    def error(share: float, **options: bool) -> float:
        got = reuser.prompt(_BEFORE, _DOCUMENT, _AFTER, source, share, **options)
        return script.compare(full, got)["mean abs"]

    assert 0 < error(0.9) < error(0.0)
    assert 3 * error(0.0) < error(0.0, rotated=False)
