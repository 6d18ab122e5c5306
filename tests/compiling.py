"""How test programs are compiled: once per session, and by default without optimizations.

A session and all processes that its tests start share a compilation cache in a temporary folder,
because many tests need the same program. Without LLVM's optimizations a program compiles in half
the time. The kernels are precompiled and XLA's own passes still run, so the library's
contribution to a result is unchanged; an exhaustive run optimizes as users do.
"""

from __future__ import annotations

import os
import tempfile

import jax
import pytest
from covering import is_exhaustive


def configure(config: pytest.Config) -> None:
    """Sets JAX's options in this process and, through the environment, in processes that tests
    start.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="jax_kvpage-programs-")
        config.add_cleanup(folder.cleanup)
        _set("jax_compilation_cache_dir", folder.name)
        _set("jax_persistent_cache_min_compile_time_secs", 0)
        _set("jax_persistent_cache_min_entry_size_bytes", -1)
    if not is_exhaustive():
        _set("jax_disable_most_optimizations", True)


def _set(name: str, value: str | int | bool) -> None:
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
