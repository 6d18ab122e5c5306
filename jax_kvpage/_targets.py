"""Registers the compiled handlers with XLA; imported before anything that is lowered to them."""

import jax

from jax_kvpage import _compat

__all__: list[str] = []

_native = _compat.load_native()
# JAX keeps those of a platform that this process does not have until it would need them.
for _platform in ("cpu", "cuda"):
    for _name, _capsule in _native.registrations(_platform).items():
        jax.ffi.register_ffi_target(
            _name, _capsule, platform="CUDA" if _platform == "cuda" else "cpu"
        )
