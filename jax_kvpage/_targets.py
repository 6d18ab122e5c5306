"""Registers the compiled handlers with XLA; must be imported before any op is lowered."""

import jax

from jax_kvpage import _compat

__all__: list[str] = []

_native = _compat.load_native()
# JAX keeps the handlers of a platform that is not available here until it would need them.
for _platform in ("cpu", "cuda"):
    for _name, _capsule in _native.registrations(_platform).items():
        jax.ffi.register_ffi_target(
            _name, _capsule, platform="CUDA" if _platform == "cuda" else "cpu"
        )
