"""read_views: a program that appends and reads zero-copy views sees its own writes, with XLA's
optimizations, in loops, and without copying a view.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import is_exhaustive
from harness import RUN_TIME_ERRORS

import jax_kvpage as kvp

LAYERS, KV_HEADS, HEADS, DIM, SLOTS, MAX, STEPS = 2, 2, 4, 64, 4, 256, 8
VIEW = f"[{SLOTS},{MAX},{KV_HEADS},{DIM}]"

Program = Callable[..., tuple[kvp.KVCache, jax.Array, jax.Array]]


def make_spec(dtype: Any = jnp.float32, layout: str = "per_layer") -> kvp.CacheSpec:
    return kvp.CacheSpec(
        LAYERS, KV_HEADS, DIM, SLOTS, MAX, dtype=dtype, layout=layout, block_tokens=32
    )


@pytest.fixture(autouse=True)
def optimized() -> Iterator[None]:
    """Enables optimizations, because the tests are about the order that XLA gives to a program."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", not is_exhaustive())


def random(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def tokens(dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns q, k, v of three sequences for all steps and layers."""
    return (
        random(STEPS, LAYERS, 3, HEADS, DIM, dtype=dtype, seed=1),
        random(STEPS, LAYERS, 3, KV_HEADS, DIM, dtype=dtype, seed=2),
        random(STEPS, LAYERS, 3, KV_HEADS, DIM, dtype=dtype, seed=3),
    )


def attend(q: jax.Array, batch: kvp.Batch, cache: kvp.KVCache) -> Callable[..., jax.Array]:
    """Returns attention over two views for one decode token per sequence that is not yet
    advanced.
    """
    lengths = cache.lengths[batch.slots] + 1

    def read(k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q[:, None], k[batch.slots], v[batch.slots], key_value_seq_lengths=lengths
        )[:, 0]

    return read


def both(
    cache: kvp.KVCache, views: Any, q: Any, k: Any, v: Any, batch: kvp.Batch, layer: int
) -> Any:
    """Appends to a layer and reads it back, through its views and with paged_attention."""
    cache = kvp.append_kv(cache, k, v, batch, layer=layer)
    got = kvp.read_views(cache, attend(q, batch, cache), *views[layer])
    return cache, got, kvp.paged_attention(q, cache, batch, layer=layer)


def one_step(cache: Any, views: Any, q: Any, k: Any, v: Any, batch: Any) -> Any:
    results = []
    for layer in range(LAYERS):
        cache, *out = both(cache, views, q[layer], k[layer], v[layer], batch, layer)
        results.append(jnp.stack(out))
    return kvp.advance(cache, batch), jnp.stack(results, axis=1)


def straight(cache: Any, views: Any, q: Any, k: Any, v: Any, batch: Any) -> Any:
    results = []
    for i in range(2):
        cache, out = one_step(cache, views, q[i], k[i], v[i], batch)
        results.append(out)
    return cache, jnp.stack(results)


def scanned(cache: Any, views: Any, q: Any, k: Any, v: Any, batch: Any) -> Any:
    return jax.lax.scan(lambda c, x: one_step(c, views, *x, batch), cache, (q, k, v))


def fori(cache: Any, views: Any, q: Any, k: Any, v: Any, batch: Any) -> Any:
    def body(i: jax.Array, state: Any) -> Any:
        cache, results = state
        cache, out = one_step(cache, views, q[i], k[i], v[i], batch)
        return cache, results.at[i].set(out)

    results = jnp.zeros((STEPS, 2, *q.shape[1:]), q.dtype)
    return jax.lax.fori_loop(0, STEPS, body, (cache, results))


def traced_layers(cache: Any, views: Any, q: Any, k: Any, v: Any, batch: Any) -> Any:
    """Scans steps and layers; a switch selects the views of the traced layer."""

    def step(cache: kvp.KVCache, x: Any) -> Any:
        def one(cache: kvp.KVCache, x: Any) -> Any:
            layer, q, k, v = x
            cache = kvp.append_kv(cache, k, v, batch, layer=layer)
            read = attend(q, batch, cache)
            got = kvp.read_views(
                cache,
                lambda views: jax.lax.switch(layer, [lambda kv=kv: read(*kv) for kv in views]),
                views,
            )
            return cache, jnp.stack([got, kvp.paged_attention(q, cache, batch, layer=layer)])

        cache, out = jax.lax.scan(one, cache, (jnp.arange(LAYERS), *x))
        return kvp.advance(cache, batch), jnp.moveaxis(out, 1, 0)

    return jax.lax.scan(step, cache, (q, k, v))


def start(pool: kvp.KVPool) -> tuple[kvp.KVCache, kvp.Batch, list[Any]]:
    slots, cache = pool.acquire(pool.cache(), [100, 100, 100])
    return cache, kvp.Batch.decode(slots), [pool.view(layer) for layer in range(LAYERS)]


@pytest.mark.parametrize(("dtype", "donate"), [(jnp.float32, True), (jnp.bfloat16, False)])
@pytest.mark.parametrize("program", [straight, scanned, fori, traced_layers])
def test_reads_see_the_programs_own_writes(
    make_pool: Any, program: Program, donate: bool, dtype: Any
) -> None:
    cache, batch, views = start(make_pool(make_spec(dtype), poison=True))
    step = jax.jit(program, donate_argnums=(0,) if donate else ())
    cache, out = step(cache, views, *tokens(dtype), batch)
    got, want = np.moveaxis(np.asarray(out, np.float32), 1, 0)
    tolerance = 2e-6 if dtype == jnp.float32 else 2**-6
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=0)
    assert np.abs(want).max() > 0.5
    assert cache.lengths.tolist() == [len(got)] * 3 + [-1]


def test_without_jit(make_pool: Any) -> None:
    cache, batch, views = start(make_pool(make_spec()))
    q, k, v = (x[0, 0] for x in tokens())
    cache, got, want = both(cache, views, q, k, v, batch, 0)
    np.testing.assert_allclose(got, want, atol=2e-6)
    with jax.disable_jit():
        _, got, want = both(cache, views, q, k, v, batch, 1)
    np.testing.assert_allclose(got, want, atol=2e-6)


# Computations on complete views, each of which XLA may want to move, convert or transpose.
READS = {
    "slices and sums": lambda k, v: k[0].astype(jnp.float32).sum(0) * 2 + v[1].max(0),
    "a copy of a slot": lambda k, v: (k[1], v[2]),
    "a transposed product": lambda k, v: jnp.einsum("bshd,bshe->bhde", k, v),
    "a batched product": lambda k, v: k.transpose(0, 2, 3, 1) @ v.transpose(0, 2, 1, 3),
    "a scalar": lambda k, v: jnp.vdot(k, v),
}


def computations(text: str) -> dict[str, list[str]]:
    """Returns the instructions of each computation of a compiled program."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and "->" in line:
            name = re.search(r"%[\w.-]+", line)
            assert name is not None
            lines = found.setdefault(name.group(), [])
        elif " = " in line:
            lines.append(line.strip().removeprefix("ROOT "))
    return found


def ancestors(lines: list[str], name: str) -> str:
    """Returns all instructions of a computation on which an instruction depends."""
    by_name = {line.split(" = ")[0]: line for line in lines}
    todo, seen = [name], {}
    while todo:
        line = by_name.get(todo.pop())
        if line is not None and line not in seen:
            seen[line] = None
            todo += re.findall(r"%[\w.-]+", line.split(" = ")[1])
    return "\n".join(seen)


@pytest.mark.parametrize(("dtype", "loop"), [(jnp.float32, False), (jnp.bfloat16, True)])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_compiled_programs_read_in_a_branch_behind_the_append(
    make_pool: Any, read: Callable[..., Any], loop: bool, dtype: Any
) -> None:
    cache, batch, views = start(make_pool(make_spec(dtype)))

    def step(cache: kvp.KVCache, x: Any, views: Any) -> Any:
        for layer in range(LAYERS):
            cache = kvp.append_kv(cache, *x, batch, layer=layer)
        return kvp.advance(cache, batch), kvp.read_views(cache, read, *views)

    def program(cache: kvp.KVCache, xs: Any, views: Any) -> Any:
        if loop:
            return jax.lax.scan(lambda cache, x: step(cache, x, views), cache, xs)
        return step(cache, jax.tree.map(lambda x: x[0], xs), views)

    _, k, v = tokens(dtype)
    args = (cache, (k[:, 0], v[:, 0]), views[0])
    compiled = jax.jit(program, donate_argnums=0).lower(*args).compile()
    found = computations(compiled.as_text())
    conditionals = [(c, line) for c in found for line in found[c] if " conditional(" in line]
    ((where, conditional),) = conditionals
    predicate = re.search(r" conditional\((?:[\w\[\]{}]+ )?(%[\w.-]+)", conditional)
    assert predicate is not None
    path = ancestors(found[where], predicate.group(1))
    assert "jax_kvpage_check_views" in path
    assert "jax_kvpage_append_kv" in path
    # Only the branches use views; everywhere else they are just passed on.
    branches = re.findall(r"%[\w.-]+", conditional.split("branch_computations=")[1])[:2]
    assert any("jax_kvpage_check_views" in line for b in branches for line in found[b])
    handing = r" (parameter|get-tuple-element|tuple|while|conditional|call|bitcast|opt-barrier)\("
    for name in {where, next(reversed(found))}:
        for line in found[name]:
            operands = [
                other for other in found[name] if other.split(" = ")[0] in line.split(" = ")[1]
            ]
            if any(VIEW in operand.split(" = ")[1].split("(")[0] for operand in operands):
                assert re.search(handing, line), line

    cache, got = compiled(*args)
    want = jax.jit(read)(*views[0])
    last = jax.tree.map(lambda x: x[-1], got) if loop else got
    for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=1e-5
        )
        assert np.abs(np.asarray(b, np.float32)).max() > 0.5


def test_after_orders_the_next_write_behind_a_read(make_pool: Any) -> None:
    cache, batch, views = start(make_pool(make_spec()))
    _, k, v = tokens()

    @jax.jit
    def step(cache: kvp.KVCache, views: Any) -> Any:
        outs = []
        for i in range(STEPS):
            cache = kvp.append_kv(cache, k[i, 0], v[i, 0], batch, layer=0)
            out = kvp.read_views(cache, lambda k, v: (k[:3, 0], v[:3, 0]), *views[0])
            cache = kvp.after(cache, out)  # the next append overwrites the same positions
            outs.append(out)
        return outs

    for i, (got_k, got_v) in enumerate(step(cache, views)):
        np.testing.assert_array_equal(got_k, k[i, 0])
        np.testing.assert_array_equal(got_v, v[i, 0])


def test_a_view_of_one_slot(make_pool: Any) -> None:
    pool = make_pool(make_spec())
    cache, batch, _ = start(pool)
    _, k, v = (x[0, 1] for x in tokens())
    k1, v1 = pool.view(1, 1)

    @jax.jit
    def step(cache: kvp.KVCache, k1: jax.Array, v1: jax.Array) -> Any:
        cache = kvp.append_kv(cache, k, v, batch, layer=1)
        return cache, kvp.read_views(cache, lambda k, v: (k[0], v[0]), k1, v1)

    cache, (got_k, got_v) = step(cache, k1, v1)
    np.testing.assert_array_equal(got_k, k[1])
    np.testing.assert_array_equal(got_v, v[1])
    cache = pool.release(cache, 1)
    with pytest.raises(RUN_TIME_ERRORS, match="read_views: slot 1 is free in this cache"):
        jax.block_until_ready(jax.jit(kvp.read_views, static_argnums=1)(cache, jnp.sum, k1))


def test_vmap_and_gradients_of_what_reads(make_pool: Any) -> None:
    cache, batch, views = start(make_pool(make_spec()))
    q, k, v = (x[0, 0] for x in tokens())
    cache = kvp.append_kv(cache, k, v, batch, layer=0)

    def out(q: jax.Array, views: Any) -> jax.Array:
        return kvp.read_views(cache, attend(q, batch, cache), *views)

    many = jnp.stack([q, 2 * q])
    got = jax.jit(jax.vmap(out, in_axes=(0, None)))(many, views[0])
    want = [attend(x, batch, cache)(*views[0]) for x in many]
    np.testing.assert_allclose(got, want, atol=1e-6)
    slope = jax.jit(jax.grad(lambda q, views: out(q, views).sum()))(q, views[0])
    wanted = jax.jit(jax.grad(lambda q: attend(q, batch, cache)(*views[0]).sum()))(q)
    np.testing.assert_allclose(slope, wanted, atol=1e-5)
    slope = jax.jit(jax.grad(lambda k: kvp.read_views(cache, lambda k: (k[:3, 0] ** 2).sum(), k)))
    np.testing.assert_allclose(slope(views[0][0])[:3, 0], 2 * k, atol=1e-6)
    with pytest.raises(ValueError, match="read_views:\n  - a view is batched"):
        jax.vmap(lambda k: kvp.read_views(cache, jnp.sum, k))(views[0][0][None])
    caches = jax.tree.map(lambda x: x[None], cache)
    with pytest.raises(ValueError, match="read_views:\n  - the cache is batched"):
        jax.vmap(lambda cache: kvp.read_views(cache, jnp.sum, views[0][0]))(caches)
