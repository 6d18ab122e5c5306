"""What of CUDA this build has, and what this process can see of the machine's cards.

Nothing here starts CUDA: the driver is asked through `_native.cuda_report`, which opens no context.
"""

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

# As CMake names them ("80-real,90a-real,90-virtual"); empty in a build without CUDA.
ARCHITECTURES: str = _native.CUDA_ARCHITECTURES
BUILT = bool(ARCHITECTURES)
# As the driver gives its own: 13000 for CUDA 13.0; 0 in a build without CUDA.
TOOLKIT: int = _native.CUDA_TOOLKIT
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


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a pool lives.

    Attributes:
        platform: whose block sizes and layout a spec gets there.
        backend: whose memory management serves the pool. "fake" is CUDA's over a driver that
            pretends, with programs that run on CPU; CPU devices have different fake ones.
        ordinal: the CUDA runtime's number of the device, among those that this process can see.
    """

    platform: Literal["cpu", "cuda"]
    backend: Literal["cpu", "cuda", "fake"]
    ordinal: int = 0


def place_of(device: Any) -> Place:
    """The place that a JAX device is.

    For this package's tests, in a build with JAX_KVPAGE_TESTING: JAX_KVPAGE_FAKE_DRIVER=1 in the
    environment puts pools of CPU devices into the fake driver's memory, JAX_KVPAGE_FAKE_DRIVER=cuda
    uses CUDA's block sizes too.

    Raises:
        ValueError: no pool can live there, with the reasons.
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
    """For a message about a full card: what JAX holds of it here.

    Args:
        device: the JAX device.
    """
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # this allocator keeps no account
        stats = {}
    numbers = ""
    if "bytes_limit" in stats:
        in_use = stats.get("bytes_in_use", 0)
        numbers = f": {stats['bytes_limit']:,} bytes, of which its arrays use {in_use:,}"
    return f"In this process JAX's allocator takes {preallocation()}{numbers}"
