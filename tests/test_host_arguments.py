"""Host calls with invalid arguments of every kind raise a ValueError that names the argument, and
leave the pool unchanged. NumPy and JAX integers are as good as Python's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pool_checks import make_spec

import jax_kvpage as kvp


@dataclasses.dataclass
class At:
    """A pool with one active slot."""

    pool: kvp.KVPool
    cache: kvp.KVCache
    slot: int

    def state(self) -> Any:
        table = self.pool.slot_table(self.cache)
        return self.pool.stats(), table, self.pool.committed(self.slot)


@pytest.fixture(scope="module")
def at() -> Iterator[At]:
    with kvp.KVPool(make_spec(), "2MiB") as pool:
        slot, cache = pool.acquire(pool.cache(), 40)
        pool.commit(slot, [1, 2])
        yield At(pool, jax.block_until_ready(cache), slot)


@pytest.fixture
def unchanged(at: At) -> Iterator[None]:
    before = at.state()
    yield
    assert at.state() == before


# The calls that take integers, as functions of the argument under test.
INTEGERS: dict[str, Callable[[At, Any], Any]] = {
    "acquire: num_tokens": lambda at, x: at.pool.acquire(at.cache, x),
    "extend: slot": lambda at, x: at.pool.extend(x, 100),
    "extend: num_tokens": lambda at, x: at.pool.extend(at.slot, x),
    "release: slot": lambda at, x: at.pool.release(at.cache, x),
    "commit: slot": lambda at, x: at.pool.commit(x, [7]),
    "commit: token_ids": lambda at, x: at.pool.commit(at.slot, x),
    "committed: slot": lambda at, x: at.pool.committed(x),
    "block_map: slot": lambda at, x: at.pool.block_map(x),
}
ONE_INT = ("commit: slot", "committed: slot", "block_map: slot")

NO_INTEGERS: dict[str, Any] = {
    "None": None,
    "bool": True,
    "NumPy bool": np.True_,
    "JAX bool": jnp.bool_(True),
    "float": 1.0,
    "NumPy float": np.float32(1),
    "JAX float": jnp.float32(1),
    "text": "1",
    "set": {1, 2},
    "dict": {1: 2},
    "2**40": 2**40,
    "2**70": 2**70,
    "-2**40": -(2**40),
    "list of 2**40": [1, 2**40],
    "list of floats": [1, 2.0],
    "list of bools": [1, True],
    "list of lists": [[1], [2]],
    "list of None": [1, None],
    "matrix": np.ones((2, 2), np.int32),
    "JAX matrix": jnp.ones((2, 2), jnp.int32),
    "array of floats": np.ones(2),
    "shape": jax.ShapeDtypeStruct((), jnp.int32),
    "object": object(),
}


@pytest.mark.parametrize("kind", NO_INTEGERS)
@pytest.mark.parametrize("call", INTEGERS)
def test_no_integers(at: At, unchanged: None, call: str, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"{call}.*wanted"):
        INTEGERS[call](at, NO_INTEGERS[kind])


@pytest.mark.parametrize("call", INTEGERS)
def test_generators_and_lists(at: At, unchanged: None, call: str) -> None:
    with pytest.raises(ValueError, match=f"{call}.*generator"):
        INTEGERS[call](at, (i for i in [1]))
    if call in ONE_INT:
        with pytest.raises(ValueError, match=f"{call}: wanted an int, got list"):
            INTEGERS[call](at, [at.slot])


@pytest.mark.parametrize("make", [lambda x: x, lambda x: [x, 1], lambda x: jnp.stack([x, x])])
@pytest.mark.parametrize("call", INTEGERS)
def test_traced_integers(
    at: At, unchanged: None, call: str, make: Callable[[jax.Array], Any]
) -> None:
    def traced(x: jax.Array) -> jax.Array:
        INTEGERS[call](at, make(x))
        return x

    op = call.partition(":")[0]
    wanted = rf"{call}.*wanted an int.*(traced ~?int32\[|got list)|{op} is a host call"
    with pytest.raises(ValueError, match=wanted):
        jax.jit(traced)(at.slot)


@pytest.mark.parametrize("call", [name for name in INTEGERS if not name.endswith("token_ids")])
def test_negative_integers(at: At, unchanged: None, call: str) -> None:
    with pytest.raises(ValueError, match="-5"):
        INTEGERS[call](at, -5)


@pytest.mark.parametrize("integer", [int, np.int64, np.uint8, np.array, jnp.int32, jnp.uint8])
def test_integers_of_any_library(make_pool: Any, integer: Any) -> None:
    pool = make_pool(make_spec())
    slot, cache = pool.acquire(pool.cache(), integer(20))
    slots, cache = pool.acquire(cache, [integer(20), 3])
    assert {type(s) for s in (slot, *slots)} == {int}
    pool.extend(integer(slot), integer(40))
    pool.extend([integer(slot), slots[0]], (integer(41), integer(42)))
    pool.commit(integer(slot), [integer(3), 4])
    pool.commit(integer(slot), integer(5))
    assert pool.committed(integer(slot)) == [3, 4, 5]
    assert pool.block_map(integer(slot)) == pool.block_map(slot)
    cache = pool.release(cache, integer(slot))
    pool.release(cache, [integer(s) for s in slots])
    assert pool.stats().slots_occupied == 0


def test_sequences_of_any_kind(make_pool: Any) -> None:
    pool = make_pool(make_spec())
    slots, cache = pool.acquire(pool.cache(), range(16, 19))
    pool.extend(np.asarray(slots), jnp.asarray([17, 18, 19]))
    pool.commit(slots[0], np.asarray([1, 2]))
    pool.commit(slots[0], jnp.asarray([3]))
    pool.commit(slots[0], range(4, 6))
    pool.commit(slots[0], np.asarray([]))
    assert pool.committed(slots[0]) == [1, 2, 3, 4, 5]
    pool.release(cache, jnp.asarray(slots))
    assert pool.stats().slots_occupied == 0


CACHE_CALLS: dict[str, Callable[[At, Any], Any]] = {
    "acquire": lambda at, cache: at.pool.acquire(cache, 5),
    "release": lambda at, cache: at.pool.release(cache, at.slot),
    "slot_table": lambda at, cache: at.pool.slot_table(cache),
    "check": lambda at, cache: at.pool.check(cache),
}
NO_CACHES: dict[str, Callable[[kvp.KVCache], Any]] = {
    "a tuple": lambda cache: (cache,),
    "an int": lambda cache: 3,
    "device_get": jax.device_get,
    "eval_shape": lambda cache: jax.eval_shape(lambda c: c, cache),
    "one field of eval_shape": lambda cache: dataclasses.replace(
        cache, lengths=jax.ShapeDtypeStruct(cache.lengths.shape, jnp.int32)
    ),
    "None in it": lambda cache: dataclasses.replace(cache, lengths=None),
    "batched": lambda cache: jax.tree.map(lambda x: x[None], cache),
    "of floats": lambda cache: dataclasses.replace(cache, lengths=jnp.zeros(6)),
    "of another spec": lambda cache: dataclasses.replace(cache, spec=make_spec("per_layer")),
}


@pytest.mark.parametrize("kind", NO_CACHES)
@pytest.mark.parametrize("call", CACHE_CALLS)
def test_no_caches(at: At, unchanged: None, call: str, kind: str) -> None:
    bad = NO_CACHES[kind](at.cache)
    with pytest.raises(ValueError, match=rf"^{call}: "):
        CACHE_CALLS[call](at, bad)


@pytest.mark.parametrize("field", ["handle", "epoch", "lengths"])
@pytest.mark.parametrize("call", CACHE_CALLS)
def test_caches_with_one_field_gone_or_traced(
    at: At, unchanged: None, call: str, field: str
) -> None:
    gone = jnp.array(getattr(at.cache, field))
    gone.delete()
    with pytest.raises(ValueError, match=f"{call}: this cache was donated"):
        CACHE_CALLS[call](at, dataclasses.replace(at.cache, **{field: gone}))

    def traced(x: jax.Array) -> jax.Array:
        CACHE_CALLS[call](at, dataclasses.replace(at.cache, **{field: x}))
        return x

    with pytest.raises(ValueError, match=f"{call} is a host call"):
        jax.jit(traced)(getattr(at.cache, field))


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad])
@pytest.mark.parametrize("call", CACHE_CALLS)
def test_host_calls_in_a_traced_function(
    at: At, unchanged: None, call: str, transform: Callable[..., Any]
) -> None:
    """Also with an untraced cache: the pool would decide once, the program each time it runs."""

    def traced(x: jax.Array) -> jax.Array:
        CACHE_CALLS[call](at, at.cache)
        return x

    with pytest.raises(ValueError, match=f"{call} is a host call and cannot be traced"):
        transform(traced)(jnp.ones(2) if transform is jax.vmap else 1.0)


@pytest.mark.parametrize("wait", [1, "yes", None, np.int32(1)])
def test_flags(at: At, unchanged: None, wait: Any) -> None:
    with pytest.raises(ValueError, match="acquire: wait: wanted True or False"):
        at.pool.acquire(at.cache, 5, wait=wait)
    with pytest.raises(ValueError, match="KVPool: poison: wanted True or False"):
        kvp.KVPool(make_spec(), "2MiB", poison=wait)


@pytest.mark.parametrize(
    "capacity",
    ["120%", True, 2**63, 2**70, 0, -5, 1.5, {1}, [1], "many", "9" * 400 + "GiB", jnp.float32(3)],
)
def test_capacities(at: At, unchanged: None, capacity: Any) -> None:
    with pytest.raises(ValueError, match="capacity must be"):
        at.pool.resize(capacity)
    with pytest.raises(ValueError, match="capacity must be"):
        kvp.KVPool(make_spec(), capacity)


@pytest.mark.parametrize("device", ["cpu", 0, {}, [None]])
def test_devices(device: Any) -> None:
    with pytest.raises(ValueError, match=r"device: wanted a jax\.Device"):
        kvp.KVPool(make_spec(), "2MiB", device)


@pytest.mark.parametrize(
    "slots", [3, None, {1, 2}, {1: 2}, "01", [[1]], [1, None], [1, True], [0.5], [2**31], object()]
)
def test_slots_of_batches(slots: Any) -> None:
    with pytest.raises(ValueError, match=r"Batch.decode: slots: wanted"):
        kvp.Batch.decode(slots)
    with pytest.raises(ValueError, match=r"Batch.from_lengths:"):
        kvp.Batch.from_lengths(slots, [1, 1, 1])
    with pytest.raises(ValueError, match=r"Batch.from_lengths:"):
        kvp.Batch.from_lengths([0, 1, 2], slots)


def test_generators_are_no_slots(at: At) -> None:
    with pytest.raises(ValueError, match=r"Batch.decode: slots: wanted.*generator"):
        kvp.Batch.decode(i for i in [0, 1])
    with pytest.raises(ValueError, match=r"Batch.mask: keep: wanted bool\[S\]"):
        kvp.Batch.decode([0, 1]).mask({True})
    with pytest.raises(ValueError, match=r"map_slots: slots: wanted"):
        kvp.map_slots(at.cache, {0, 1}, 5)
    with pytest.raises(ValueError, match=r"set_lengths: lengths: wanted"):
        kvp.set_lengths(at.cache, [0], "5")


@pytest.mark.parametrize("tokens", [-1, 2.0, True, "2", jnp.float32(2), 2**40])
def test_numbers_of_tokens(at: At, tokens: Any) -> None:
    with pytest.raises(ValueError, match=r"num_tokens: wanted an int"):
        kvp.Batch([0, 1], [0, 1, 2], num_tokens=tokens)
    with pytest.raises(ValueError, match=r"num_tokens: wanted an int"):
        kvp.Batch.from_lengths([0, 1], [1, 1], num_tokens=tokens)
    with pytest.raises(ValueError, match=r"num_tokens: wanted an int"):
        kvp.positions(at.cache, kvp.Batch([0, 1], [0, 1, 2]), num_tokens=tokens)


def test_lists_of_scalars_make_batches() -> None:
    def traced(a: jax.Array, b: jax.Array) -> tuple[kvp.Batch, ...]:
        return (
            kvp.Batch.decode([a, 1, b]),
            kvp.Batch.from_lengths([a, b], [b, np.int32(2)], num_tokens=9),
            kvp.Batch((b, a), [0, a, b], num_tokens=2),
        )

    for make in (traced, jax.jit(traced)):
        decode, ragged, plain = make(jnp.int32(3), jnp.int32(5))
        np.testing.assert_array_equal(decode.slots, [3, 1, 5])
        np.testing.assert_array_equal(ragged.query_offsets, [0, 5, 7])
        np.testing.assert_array_equal(plain.slots, [5, 3])
        np.testing.assert_array_equal(plain.query_offsets, [0, 3, 5])
    with pytest.raises(ValueError, match=r"slots\[0\]: wanted an integer scalar"):
        jax.jit(lambda x: kvp.Batch.decode([x, 1]))(1.0)


def test_ops_refuse_shapes_in_place_of_arrays(at: At) -> None:
    batch = kvp.Batch.decode([at.slot])
    kv = jnp.zeros((1, 2, 64))
    shapes = jax.eval_shape(lambda *x: x, at.cache, batch)
    with pytest.raises(ValueError, match=r"append_kv: cache: .*ShapeDtypeStruct"):
        kvp.append_kv(shapes[0], kv, kv, batch, layer=0)
    with pytest.raises(ValueError, match=r"advance: batch: .*ShapeDtypeStruct"):
        kvp.advance(at.cache, shapes[1])
    with pytest.raises(ValueError, match=r"positions: cache: .*ShapeDtypeStruct"):
        kvp.positions(shapes[0], batch)


@pytest.mark.parametrize("resolved", [False, True])
def test_a_spec_from_its_dictionary(resolved: bool) -> None:
    spec = make_spec().resolve("cpu") if resolved else kvp.CacheSpec(2, 2, 64, 4, 256)
    again = kvp.CacheSpec(**dataclasses.asdict(spec))
    assert again == spec
    assert hash(again) == hash(spec)
    assert dataclasses.replace(spec, max_slots=9).max_slots == 9


@pytest.mark.parametrize(
    "wrong", [{"layout": ["fused"]}, {"dtype": {}}, {"granule": []}, {"block_tokens": {}}]
)
def test_a_spec_of_unhashable_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        kvp.CacheSpec(2, 2, 64, 4, 256, **wrong)
