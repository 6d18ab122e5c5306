"""jax.export: a step exported in one process runs in another one, on a pool that the first process
never saw.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
from subprocesses import run_python

import jax_kvpage as kvp

_COMMON = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    import jax_kvpage as kvp

    spec = kvp.CacheSpec(2, 2, 64, 4, 256, dtype=jnp.float32, layout=sys.argv[2])
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((4, 4, 64)), jnp.float32)
    k, v = jnp.asarray(rng.standard_normal((2, 4, 2, 64)), jnp.float32)

    def step(handle, epoch, lengths, slots, offsets, q, k, v):
        cache = kvp.KVCache(handle, epoch, lengths, spec.resolve("cpu"))
        batch = kvp.Batch(slots, offsets)
        cache, ok = kvp.map_slots(cache, slots, cache.lengths[slots] + 4)
        batch = batch.mask(ok)
        for layer in range(2):
            out, cache = kvp.update_and_attend(q, k, v, cache, batch, layer=layer)
        cache = kvp.advance(cache, batch)
        return out, cache.epoch, cache.lengths

    def life(step):
        with kvp.KVPool(spec, "8MiB") as pool:
            slots, cache = pool.acquire(pool.cache(), [1, 1])
            batch = kvp.Batch.from_lengths(slots, [3, 1])
            epoch, lengths, outs = cache.epoch, cache.lengths, []
            for _ in range(5):
                state = (cache.handle, epoch, lengths, batch.slots, batch.query_offsets)
                out, epoch, lengths = step(*state, q, k, v)
                outs.append(np.asarray(out))
            return np.stack(outs).tobytes().hex() + str(lengths.tolist())
"""

_WRITE = (
    _COMMON
    + """
    from jax import export
    ops = ("map_slots", "update_and_attend", "advance")
    checks = [export.DisabledSafetyCheck.custom_call(f"jax_kvpage_{op}") for op in ops]
    ints = [((2,), jnp.int32), ((1,), jnp.uint32), ((4,), jnp.int32), ((2,), jnp.int32)]
    floats = [((4, heads, 64), jnp.float32) for heads in (4, 2, 2)]
    shapes = [jax.ShapeDtypeStruct(*x) for x in (*ints, ((3,), jnp.int32), *floats)]
    exported = export.export(jax.jit(step), disabled_checks=checks, platforms=["cpu"])(*shapes)
    with open(sys.argv[1], "wb") as file:
        file.write(exported.serialize())
    print(life(jax.jit(step)))
    """
)

_READ = (
    _COMMON
    + """
    from jax import export
    other = kvp.KVPool(spec, "4MiB")  # so that ids differ between the processes
    with open(sys.argv[1], "rb") as file:
        exported = export.deserialize(bytearray(file.read()))
    print(life(jax.jit(exported.call)))
    other.close()
    """
)


def test_round_trip_in_another_process(tmp_path: pathlib.Path) -> None:
    for layout in ("fused", "per_layer"):
        path = str(tmp_path / layout)
        wrote = run_python(_WRITE, path, layout).stdout
        read = run_python(_READ, path, layout).stdout
        assert wrote == read
        assert len(wrote) > 1000


def test_a_batch_of_any_number_of_sequences() -> None:
    (sequences,) = jax.export.symbolic_shape("S")
    slots = jax.ShapeDtypeStruct((sequences,), jnp.int32)
    exported = jax.export.export(jax.jit(lambda slots: kvp.Batch.decode(slots).query_offsets))(
        slots
    )
    assert exported.call(jnp.zeros(3, jnp.int32)).tolist() == [0, 1, 2, 3]
