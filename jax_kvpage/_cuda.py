"""What of CUDA this build has, and what this process can see of the machine's cards.

Nothing here starts CUDA: the driver is asked through `_native.cuda_report`, which opens no context.
"""

import os
from typing import Any

import jax

from jax_kvpage import _native

__all__ = [
    "ARCHITECTURES",
    "BUILT",
    "HOW_TO_BUILD",
    "memory_hint",
    "missing_here",
    "ordinal",
    "preallocation",
]

# As CMake names them ("80;90a-real"); empty in a build without CUDA.
ARCHITECTURES: str = _native.CUDA_ARCHITECTURES
BUILT = bool(ARCHITECTURES)
HOW_TO_BUILD = (
    "install jax_kvpage where nvcc is found (pip install --force-reinstall --no-deps "
    "-C cmake.define.JAX_KVPAGE_CUDA=ON . in a checkout)"
)
# JAX's own defaults.
_MEM_FRACTION = "0.75"


def missing_here() -> bool:
    """Whether programs compiled here could run on CUDA but this build has no kernels for it."""
    if BUILT:
        return False
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:  # no such backend in this process
        return False


def ordinal(device: Any) -> int:
    """The CUDA runtime's number of a JAX device, among those that this process can see."""
    number = getattr(device, "local_hardware_id", None)
    return int(device.id if number is None else number)


def preallocation() -> str:
    """How JAX's own allocator takes the cards' memory, according to the environment."""
    allocator = os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default").lower()
    if allocator == "platform":
        return "nothing ahead of time (XLA_PYTHON_CLIENT_ALLOCATOR=platform)"
    preallocate = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower()
    if preallocate in ("0", "false"):
        return "as it goes, and keeps it (XLA_PYTHON_CLIENT_PREALLOCATE=false)"
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if os.environ.get(name):
            return f"{float(os.environ[name]):.0%} of the card when it starts ({name})"
    return f"{float(_MEM_FRACTION):.0%} of the card when it starts (the default)"


def memory_hint(device: Any) -> str:
    """For a message about a full card: what JAX holds of it, and how to make it hold less.

    Args:
        device: the JAX device.
    """
    numbers = ""
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # this allocator keeps no account
        stats = {}
    if "bytes_limit" in stats:
        used = stats.get("bytes_in_use", 0)
        numbers = f" ({stats['bytes_limit']} bytes, of which {used} are in use)"
    return (
        f"JAX's allocator takes {preallocation()}{numbers}, and a pool's blocks lie beside it: "
        "start the process with a smaller XLA_PYTHON_CLIENT_MEM_FRACTION (say .4) or with "
        "XLA_PYTHON_CLIENT_PREALLOCATE=false, or give the pool a smaller capacity"
    )
