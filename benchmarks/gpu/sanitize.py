"""Runs every kernel on small inputs under compute-sanitizer, and compares results with float64.

    compute-sanitizer --tool memcheck python benchmarks/gpu/sanitize.py

Inputs are small because a checked kernel runs a hundred times slower. Sizes are not multiples of
any tile, because out-of-bounds accesses happen at the edges.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "tests"))

import jax
import jax.numpy as jnp
import numpy as np
from harness import Rig, input_dtype, make_batch
from reference_numpy import Variant, attend_ragged, check_lse, check_output, rounded

import jax_kvpage as kvp

# layout, storage, queries, KV heads, group, head size
_CONFIGS = [
    ("fused", "bfloat16", "bfloat16", 2, 4, 128),
    ("per_layer", "float16", "float16", 1, 8, 64),
    ("fused", "float32", "float32", 2, 1, 80),
    ("per_layer", "bfloat16", "bfloat16", 1, 3, 256),
    ("fused", "int8", "bfloat16", 2, 4, 128),
    ("fused", "float8_e4m3fn", "float32", 1, 2, 64),
]
_MAX = 700


def _pool_ops(config: tuple[str, str, str, int, int, int]) -> None:
    """Append, decode, prefill, mixed batches and variants; acquire, release and rollback."""
    layout, storage, query, heads, group, dim = config
    spec = kvp.CacheSpec(2, heads, dim, 5, _MAX, dtype=jnp.dtype(storage), layout=layout)
    spec = spec.resolve("cuda" if jax.default_backend() == "gpu" else "cpu")
    capacity = 3 * spec.num_ranges * spec.blocks_per_range * spec.block_bytes
    with kvp.KVPool(spec, capacity, poison=True) as pool:
        rig = Rig(pool, group=group, query_dtype=jnp.dtype(query), max_tokens=70)
        slots = rig.acquire_scattered([640, 290, 20])
        rig.write({slots[0]: 601, slots[1]: 211})
        heads *= group
        every = Variant(
            scale=0.3,
            sliding_window=333,
            logits_soft_cap=5.0,
            sinks=np.linspace(-1, 1, heads, dtype=np.float32),
            alibi_slopes=np.linspace(0, 0.3, heads, dtype=np.float32),
        )
        for batch, variant in (
            ([(slots[0], 1), (-1, 0), (slots[1], 1)], Variant()),
            ([(slots[0], 17), (slots[1], 1), (slots[2], 13)], Variant()),
            ([(slots[0], 1), (slots[1], 30), (slots[2], 2)], every),
        ):
            out, lse, want_out, want_lse = rig.step(batch, variant, one_call=variant.scale is None)
            check_output(out, want_out, jnp.dtype(query), 6.0, config)
            check_lse(lse, want_lse, config)
        _by_table(rig, slots[0], spec)
        rig.cache = kvp.set_lengths(rig.cache, jnp.asarray([slots[0]]), jnp.asarray([9]))
        rig.model.truncate(slots[0], 9)
        rig.release(slots[1])
        rig.check_lengths()
        # implementation="xla" reads the cache with the gather kernel.
        out, _, want_out, _ = rig.step([(slots[0], 2), (slots[2], 1)], implementation="xla")
        check_output(out, want_out, jnp.dtype(query), 6.0, config)
        pool.check(rig.cache)


def _by_table(rig: Rig, slot: int, spec: kvp.CacheSpec) -> None:
    """Writes and reads a sequence's next tokens through the pool's block table."""
    n = 19
    k, v = (jnp.asarray(x[0], input_dtype(spec)) for x in rig.random_kv(n))
    q = jnp.asarray(rig.random_q(n)[0], rig.query_dtype)
    batch = make_batch([(slot, n)])
    out, cache = kvp.update_and_attend(q, k, v, rig.cache, batch, layer=0, addressing="table")
    again = kvp.paged_attention(q, cache, batch, layer=0)
    assert np.asarray(out).tobytes() == np.asarray(again).tobytes()
    rig.cache = cache  # not advanced: the next step writes these tokens again


def _tables() -> None:
    """Attention through block tables over plain arrays."""
    rng = np.random.default_rng(0)
    pages, size, heads, dim = 9, 16, 2, 64
    k, v = rng.standard_normal((2, pages, size, heads, dim), np.float32)
    q = rng.standard_normal((5, 4 * heads, dim), np.float32)
    lengths, new = [50, 17], [1, 4]
    tables = np.asarray([[3, 8, 1, 0], [6, 2, 10**6, -7]], np.int32)
    for layout, order in (("NHD", (0, 1, 2, 3)), ("HND", (0, 2, 1, 3))):
        out = kvp.paged_attention_with_tables(
            jnp.asarray(q),
            jnp.asarray(k.transpose(order)),
            jnp.asarray(v.transpose(order)),
            jnp.asarray(tables),
            jnp.asarray(lengths, jnp.int32),
            query_offsets=jnp.asarray([0, 1, 5], jnp.int32),
            kv_layout=layout,
        )
        contexts = [
            tuple(
                rounded(x, jnp.float32)[tables[s, : -(-n // size)]].reshape(-1, heads, dim)[:n]
                for x in (k, v)
            )
            for s, n in enumerate(lengths)
        ]
        before = [n - m for n, m in zip(lengths, new, strict=True)]
        want, _ = attend_ragged(q, contexts, before, [0, 1, 5])
        check_output(out, want, jnp.float32, 6.0, layout)


def _fault() -> None:
    """A launch that fails its check must not access invalid memory either."""
    spec = kvp.CacheSpec(1, 1, 64, 2, 64, dtype=jnp.float32)
    with kvp.KVPool(spec, "16MiB") as pool:
        slot, cache = pool.acquire(pool.cache(), 10)
        x = jnp.ones((2, 1, 64))
        try:
            bad = kvp.append_kv(cache, x, x, make_batch([(slot, 1), (slot, 1)]), layer=0)
            pool.check(bad)
        except (RuntimeError, ValueError) as error:
            print("a bad batch is refused:", str(error).splitlines()[0][:120])
            return
    raise AssertionError("a slot named twice was not refused")


def main() -> int:
    """Runs everything; stopped by an assertion or the sanitizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu" if arguments.platform == "cpu" else "cuda,cpu")
    for config in _CONFIGS:
        _pool_ops(config)
        print("ok:", *config, flush=True)
    _tables()
    print("ok: tables", flush=True)
    _fault()
    return 0


if __name__ == "__main__":
    sys.exit(main())
