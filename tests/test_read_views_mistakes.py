"""What read_views refuses, both when a program is traced and when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from harness import RUN_TIME_ERRORS

import jax_kvpage as kvp


def make_spec(**options: Any) -> kvp.CacheSpec:
    return kvp.CacheSpec(
        2, 2, 64, 4, 256, **{"dtype": jnp.float32, "layout": "per_layer"} | options
    )


def total(*views: jax.Array) -> jax.Array:
    return sum((view.astype(jnp.float32).sum() for view in views), jnp.float32(0))


def fails(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(RUN_TIME_ERRORS, match=message):
        jax.block_until_ready(call())


read_total = jax.jit(lambda cache, *views: kvp.read_views(cache, total, *views))


def test_all_mistakes_in_the_views_at_once(make_pool: Any) -> None:
    pool = make_pool(make_spec())
    _, cache = pool.acquire(pool.cache(), 10)
    k, v = pool.view(0)
    with pytest.raises(ValueError) as caught:
        kvp.read_views(cache, total, k[:2], [v, v.astype(jnp.bfloat16), None], 3)
    heading, *mistakes = str(caught.value).split("\n  - ")
    assert heading == "read_views:"
    wanted = (
        "wanted an array from pool.view, float32 [max_slots=4, max_seq_len=256, Hkv=2, D=64] or "
        "the same without max_slots, got"
    )
    assert [mistake.split(": slice")[0] for mistake in mistakes] == [
        f"views[0]: {wanted} float32[2, 256, 2, 64]",
        f"views[1][1]: {wanted} bfloat16[4, 256, 2, 64]",
        f"views[2]: {wanted} int",
    ]


@pytest.mark.parametrize(
    "options", [{"layout": "fused"}, {"dtype": jnp.int8}], ids=["fused", "quantized"]
)
def test_pools_without_views(make_pool: Any, options: dict[str, Any]) -> None:
    cache = make_pool(make_spec(**options)).cache()
    with pytest.raises(ValueError, match=r"read_views:\n  - cache: .* has no views: make it with"):
        kvp.read_views(cache, total, jnp.zeros((4, 256, 2, 64)))


def test_arguments_of_the_wrong_kind(make_pool: Any) -> None:
    pool = make_pool(make_spec())
    cache, (k, v) = pool.cache(), pool.view(0)
    with pytest.raises(ValueError, match="views: got none"):
        kvp.read_views(cache, total)
    with pytest.raises(ValueError, match=r"read_views: cache: wanted a KVCache .*, got function"):
        kvp.read_views(total, cache, k, v)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="read_views: read: wanted a function of the views, got"):
        kvp.read_views(cache, k, v)  # type: ignore[arg-type]
    for read in (lambda k, v: k, lambda k, v: {"all": [k.sum(), v]}):
        with pytest.raises(ValueError, match="read returned a view"):
            jax.eval_shape(lambda k, v, read=read: kvp.read_views(cache, read, k, v), k, v)


def test_no_other_platform_has_views(make_pool: Any) -> None:
    pool = make_pool(make_spec())
    traced = read_total.trace(pool.cache(), *pool.view(0))
    for platform in ("cuda", "rocm"):
        with pytest.raises(ValueError, match=f"read_views: cannot .* platform '{platform}'.* CPU"):
            traced.lower(lowering_platforms=(platform,))


def test_copies_of_views_fail_when_the_program_runs(make_pool: Any) -> None:
    pool = make_pool(make_spec())
    _, cache = pool.acquire(pool.cache(), 10)
    k, v = pool.view(0)
    assert read_total(cache, k, v) == 0
    message = "read_views: array 1 of the views is not the memory of pool .* but a copy"
    fails(message, lambda: read_total(cache, k, v * 2))
    fails(message, lambda: jax.jit(lambda c, k, v: read_total(c, k, v * 2))(cache, k, v))
    fails(message, lambda: read_total(cache, k, make_pool(make_spec()).view(0)[1]))
    fails("array 0 .* copy", lambda: jax.jit(lambda c: read_total(c, k, v))(cache))


def test_caches_that_are_not_the_pools(make_pool: Any) -> None:
    pool = make_pool(make_spec())
    _, cache = pool.acquire(pool.cache(), 10)
    views = pool.view(0)
    newest = pool.cache()
    fails("read_views: stale cache: it belongs to generation", lambda: read_total(cache, *views))
    other = make_pool(make_spec(block_tokens=128)).cache()
    fails("read_views: array 0 .* pool", lambda: read_total(other, *views))
    assert read_total(newest, *views) == 0
    pool.close()
    fails("read_views: pool .* closed|there is no pool", lambda: read_total(newest, *views))
