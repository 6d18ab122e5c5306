"""What host calls do for a GPU pool besides updating its table, tested on CPU: waiting for queued
programs and forwarding warnings. tests/gpu runs them on a GPU.
"""

from __future__ import annotations

import types
import warnings

import jax
import jax.numpy as jnp
import pytest

import jax_kvpage as kvp
from jax_kvpage._native_pool import NativePool

_SPEC = kvp.CacheSpec(1, 1, 64, 2, 64)


@pytest.fixture
def mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Python treat pools as if they were on a GPU."""
    monkeypatch.setattr(NativePool, "mirrored", True)


def test_a_new_generation_waits_for_what_is_queued(mirrored: None) -> None:
    with kvp.KVPool(_SPEC, "1MiB") as pool, warnings.catch_warnings():
        warnings.simplefilter("error")
        work = jax.jit(lambda x: x @ x)(jnp.ones((512, 512)))
        with jax.transfer_guard("disallow"):
            cache = pool.cache()
        slot, cache = pool.acquire(cache, 8)
        pool.check(cache)
        assert pool.slot_table(cache)[0].slot == slot
        del work


def test_warnings_reach_the_caller_once(mirrored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with kvp.KVPool(_SPEC, "1MiB") as pool:
        texts = ["ops run on several compute streams", "", ""]
        native = types.SimpleNamespace(take_warning=lambda: texts.pop(0))
        warn = NativePool.warn
        monkeypatch.setattr(
            NativePool, "warn", lambda self: warn(types.SimpleNamespace(pool=native))
        )
        with pytest.warns(RuntimeWarning, match="several compute streams"):
            cache = pool.cache()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, cache = pool.acquire(cache, 8)
            pool.check(cache)
        assert not texts
