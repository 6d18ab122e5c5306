"""`python -m jax_kvpage`: the doctor. What was built, what this machine offers, what to do next."""

import platform
import sys

import jax
import jax.numpy as jnp
import jaxlib

import jax_kvpage as kvp
from jax_kvpage import _native
from jax_kvpage.spec import max_map_count


def _megabytes(count: int) -> str:
    return "unknown" if count < 0 else f"{count / 2**20:,.0f} MiB"


def _try_cpu() -> str:
    """Writes and reads one token through a pool on the CPU."""
    spec = kvp.CacheSpec(1, 1, 64, max_slots=1, max_seq_len=64, dtype=jnp.float32)
    device = jax.devices("cpu")[0]
    with jax.default_device(device), kvp.KVPool(spec, "1MiB", device=device) as pool:
        slot, cache = pool.acquire(pool.cache(), 1)
        token = jnp.ones((1, 1, 64))
        out, cache = kvp.update_and_attend(
            token, token, token, cache, kvp.Batch.decode([slot]), layer=0
        )
        pool.check(cache)
    return "works" if bool(jnp.all(out == 1)) else "gives a WRONG result"


def main() -> int:
    """Prints the report; returns the exit status."""
    built = ".".join(map(str, _native.FFI_API_VERSION))
    answer = _try_cpu()
    rows = [
        ("python", platform.python_version()),
        ("jax, jaxlib", f"{jax.__version__}, {jaxlib.__version__}"),
        ("built against XLA FFI API", built),
        ("devices that JAX sees", ", ".join(str(d) for d in jax.devices())),
        ("CPU kernels", f"{_native.instruction_set()} (JAX_KVPAGE_ISA chooses another)"),
        ("CPU backend", answer),
        ("CUDA backend", "not part of this version"),
        ("memory limit (machine and cgroup)", _megabytes(_native.memory_limit_bytes())),
        ("memory available now", _megabytes(_native.available_bytes())),
        ("mappings allowed (vm.max_map_count)", f"{max_map_count():,}"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    if answer != "works":
        print("\nThe CPU backend is broken here: please report the lines above.")
        return 1
    print("\nAll well. Next: examples/decode_llama.py, or README's API by example.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
