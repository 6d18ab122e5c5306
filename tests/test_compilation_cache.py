"""The persistent compilation cache: a second process, whose pool id differs, finds the first one's
programs.
"""

from __future__ import annotations

import pathlib

from subprocesses import run_python

_CODE = """
    import sys
    import jax, jax.numpy as jnp
    import jax_kvpage as kvp

    jax.config.update("jax_compilation_cache_dir", sys.argv[1])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))

    spec = kvp.CacheSpec(2, 2, 64, 4, 256, dtype=jnp.float32)
    others = [kvp.KVPool(spec, "4MiB") for _ in range(int(sys.argv[2]))]
    pool = kvp.KVPool(spec, "8MiB")
    slots, cache = pool.acquire(pool.cache(), [100, 100])
    batch = kvp.Batch.from_lengths(slots, [3, 1])
    x = jnp.arange(4 * 2 * 64, dtype=jnp.float32).reshape(4, 2, 64) / 100

    @jax.jit
    def the_step(cache, batch):
        for layer in range(2):
            out, cache = kvp.update_and_attend(x, x, x, cache, batch, layer=layer)
        return out, kvp.advance(cache, batch)

    lowered = the_step.lower(cache, batch)
    events.clear()
    step = lowered.compile()
    print("hit" if "/jax/compilation_cache/cache_hits" in events else "miss")
    for _ in range(3):
        out, cache = step(cache, batch)
    print(repr(out.tobytes() if hasattr(out, "tobytes") else None), cache.lengths.tolist())
    import numpy as np
    print(np.asarray(out).tobytes().hex())
    for p in (*others, pool):
        p.close()
"""


def test_two_processes_share_programs(tmp_path: pathlib.Path) -> None:
    first = run_python(_CODE, str(tmp_path), "0").stdout.splitlines()
    assert first[0] == "miss"
    assert any(tmp_path.iterdir())
    second = run_python(_CODE, str(tmp_path), "3").stdout.splitlines()
    assert second[0] == "hit"
    assert second[1:] == first[1:]
