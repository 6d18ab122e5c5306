"""The CUDA support of this build, the places where pools live, and JAX's share of GPU memory."""

import dataclasses
import os
from typing import Any, Literal

import jax

from jax_kvpage import _native
from jax_kvpage._compat import platform_of

__all__ = [
    "ARCHITECTURES",
    "BUILT",
    "HOW_TO_BUILD",
    "TOOLKIT",
    "Place",
    "memory_hint",
    "missing_here",
    "place_of",
    "preallocation",
]

# In CMake's notation ("80-real,90a-real,90-virtual"); empty in a build without CUDA.
ARCHITECTURES: str = _native.CUDA_ARCHITECTURES
BUILT = bool(ARCHITECTURES)
# Encoded like the driver's version: 13000 for CUDA 13.0; 0 in a build without CUDA.
TOOLKIT: int = _native.CUDA_TOOLKIT
HOW_TO_BUILD = (
    "install jax_kvpage where nvcc is found (pip install --force-reinstall --no-deps "
    "-C cmake.define.JAX_KVPAGE_CUDA=ON . in a checkout)"
)
# JAX's default.
_MEM_FRACTION = "0.75"


def missing_here() -> bool:
    """Whether JAX can run programs on CUDA here but this build has no CUDA kernels."""
    if BUILT:
        return False
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:  # no such backend in this process
        return False


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a pool lives.

    Attributes:
        platform: selects the block sizes and the layout of a spec.
        backend: the memory management of the pool. "fake" is the CUDA backend over a fake driver,
            with programs that run on CPU; each CPU device has its own fake device.
        ordinal: the CUDA runtime's number of the device, among those visible to this process.
    """

    platform: Literal["cpu", "cuda"]
    backend: Literal["cpu", "cuda", "fake"]
    ordinal: int = 0


def place_of(device: Any) -> Place:
    """The place of a pool on a JAX device.

    For this package's tests, in a build with JAX_KVPAGE_TESTING: JAX_KVPAGE_FAKE_DRIVER=1 in the
    environment puts pools of CPU devices into the fake driver's memory; JAX_KVPAGE_FAKE_DRIVER=cuda
    also uses CUDA's block sizes.

    Raises:
        ValueError: no pool can live on this device; the message says why.
    """
    platform = platform_of(device)
    if platform == "cpu":
        fake = os.environ.get("JAX_KVPAGE_FAKE_DRIVER", "")
        if fake in ("", "0"):
            return Place("cpu", "cpu")
        if not hasattr(_native, "fake_driver"):
            raise ValueError(
                f"KVPool: JAX_KVPAGE_FAKE_DRIVER={fake} is set, but this build of jax_kvpage has "
                "no fake driver: unset it, or install a build for tests (pip install "
                "--force-reinstall --no-deps -C cmake.define.JAX_KVPAGE_TESTING=ON . in a checkout)"
            )
        return Place("cuda" if fake == "cuda" else "cpu", "fake", int(device.id))
    ways = "pass device=jax.devices('cpu')[0] and run the programs there (jax.default_device)"
    if platform != "cuda":
        raise ValueError(
            f"KVPool: {device} is a {platform} device; pools live on cpu and cuda: {ways}"
        )
    if not BUILT:
        raise ValueError(
            f"KVPool: {device} is a cuda device, but this build of jax_kvpage has no CUDA backend: "
            f"{HOW_TO_BUILD}, or {ways}"
        )
    number = getattr(device, "local_hardware_id", None)
    return Place("cuda", "cuda", int(device.id if number is None else number))


def preallocation() -> str:
    """How JAX's own allocator takes GPU memory, according to the environment."""
    allocator = os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default").lower()
    if allocator == "platform":
        return "nothing ahead of time (XLA_PYTHON_CLIENT_ALLOCATOR=platform)"
    preallocate = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower()
    if preallocate in ("0", "false"):
        return "on demand, and keeps it (XLA_PYTHON_CLIENT_PREALLOCATE=false)"
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if os.environ.get(name):
            return f"{float(os.environ[name]):.0%} of the GPU when it starts ({name})"
    return f"{float(_MEM_FRACTION):.0%} of the GPU when it starts (the default)"


def memory_hint(device: Any) -> str:
    """How much memory JAX's allocator holds, for a message about a full GPU.

    Args:
        device: the JAX device.
    """
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # this allocator has no statistics
        stats = {}
    numbers = ""
    if "bytes_limit" in stats:
        in_use = stats.get("bytes_in_use", 0)
        numbers = f": {stats['bytes_limit']:,} bytes, of which its arrays use {in_use:,}"
    return f"In this process JAX's allocator takes {preallocation()}{numbers}"
