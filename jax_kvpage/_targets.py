"""Registers the compiled handlers with XLA; imported before anything that is lowered to them."""

import jax

from jax_kvpage import _compat

__all__: list[str] = []

for _name, _capsule in _compat.load_native().registrations().items():
    jax.ffi.register_ffi_target(_name, _capsule, platform="cpu")
