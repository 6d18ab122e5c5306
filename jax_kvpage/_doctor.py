"""The report of `python -m jax_kvpage`: the build, the machine and the next steps."""

import dataclasses
import platform
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from jax_kvpage import _cuda, _native
from jax_kvpage._compat import platform_of
from jax_kvpage._version import VERSION
from jax_kvpage.cache import Batch
from jax_kvpage.ops.update_and_attend import update_and_attend
from jax_kvpage.pool import KVPool
from jax_kvpage.spec import CacheSpec

__all__ = ["Findings", "examine"]

_WORKS = "works"
# The oldest compute capability that the CUDA kernels support.
_OLDEST_GPU = (8, 0)


@dataclasses.dataclass
class Findings:
    """The doctor's report.

    Attributes:
        rows: (subject, finding) pairs.
        broken: features that should work here but do not.
        advice: next steps.
    """

    rows: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    broken: list[str] = dataclasses.field(default_factory=list)
    advice: list[str] = dataclasses.field(default_factory=list)

    def add(self, what: str, found: Any) -> None:
        """Adds a row."""
        self.rows.append((what, str(found)))


def _release(version: int) -> str:
    """A CUDA version as text: 13.0 for 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _mebibytes(count: int) -> str:
    return "unknown" if count < 0 else f"{count / 2**20:,.0f} MiB"


def _try(device: jax.Device) -> str:
    """Writes and reads one token through a pool on a device; returns "works" or the error."""
    spec = CacheSpec(1, 1, 64, max_slots=1, max_seq_len=64, dtype=jnp.float32)
    try:
        with jax.default_device(device), KVPool(spec, "2MiB", device=device) as pool:
            slot, cache = pool.acquire(pool.cache(), 1)
            token = jnp.ones((1, 1, 64))
            out, cache = update_and_attend(
                token, token, token, cache, Batch.decode([slot]), layer=0
            )
            pool.check(cache)
            right = bool(np.all(np.asarray(out) == 1))
    except (RuntimeError, ValueError) as error:
        return f"fails: {error}"
    return _WORKS if right else "gives a WRONG result"


def _software(found: Findings) -> None:
    found.add("jax_kvpage", VERSION)
    found.add("python", platform.python_version())
    found.add("jax, jaxlib", f"{jax.__version__}, {jaxlib.__version__}")
    found.add("built against XLA FFI API", ".".join(map(str, _native.FFI_API_VERSION)))
    isa = _native.instruction_set()
    found.add("built: CPU kernels", f"{isa} here (JAX_KVPAGE_ISA chooses another)")
    architectures = ", ".join(_cuda.ARCHITECTURES.replace("-", " ").split(","))
    built = f"yes, for {architectures}, with the toolkit of CUDA {_release(_cuda.TOOLKIT)}"
    found.add("built: CUDA backend", built if _cuda.BUILT else "no (CPU only)")


def _machine(found: Findings) -> None:
    found.add("memory limit (machine and cgroup)", _mebibytes(_native.memory_limit_bytes()))
    found.add("memory available now", _mebibytes(_native.available_bytes()))
    found.add("mappings allowed (vm.max_map_count)", f"{_native.max_map_count():,}")
    found.add("mappings left for pools here", f"{_native.mappings_left():,}")


def _compare_with_toolkit(found: Findings, version: int) -> None:
    """Gives advice if the driver is older than the toolkit of the build."""
    if not _cuda.BUILT or version >= _cuda.TOOLKIT:
        return
    older = (
        f"The driver is for CUDA {_release(version)}, older than the toolkit of this build "
        f"({_release(_cuda.TOOLKIT)})"
    )
    build = f"build jax_kvpage with nvcc {_release(version)} or older (CUDACXX names it)"
    if version // 1000 < _cuda.TOOLKIT // 1000:
        found.advice.append(
            f"{older}, and does not run its kernels: update the driver, or {build}."
        )
    else:
        found.advice.append(
            f"{older}: it runs the machine code of this build but not its PTX, which GPUs need "
            f"that are newer than compute capability 9.0. For those update the driver, or {build}."
        )


def _driver(found: Findings) -> list[Any]:
    """Reports the driver and its GPUs; returns those that this package can use."""
    report = _native.cuda_report()
    version = report.driver_version
    if report.problem:
        found.add("CUDA driver", report.problem)
    else:
        found.add("CUDA driver", f"for CUDA {_release(version)}")
        _compare_with_toolkit(found, version)
    usable = []
    for gpu in report.devices:
        major, minor = gpu.compute_capability
        text = f"{gpu.name}, compute capability {major}.{minor}, {_mebibytes(gpu.total_bytes)}"
        if gpu.problem:
            text += f"; {gpu.problem}"
        elif not gpu.virtual_memory:
            text += "; no virtual memory management: it cannot hold a pool"
        elif gpu.compute_capability < _OLDEST_GPU:
            text += f"; too old: {'.'.join(map(str, _OLDEST_GPU))} or newer is needed"
        else:
            usable.append(gpu)
            text += f", blocks are multiples of {_mebibytes(gpu.granularity)}"
            text += f", {gpu.multiprocessors} multiprocessors"
        found.add(f"GPU {gpu.ordinal}", text)
    return usable


def _next_for_cuda(found: Findings, gpus: list[Any], devices: list[Any]) -> None:
    if gpus and not _cuda.BUILT:
        found.advice.append(f"To use the GPU, {_cuda.HOW_TO_BUILD}.")
    if gpus and not devices:
        found.advice.append(
            "The driver works but JAX sees no CUDA device: install jax[cuda12] or jax[cuda13], and "
            "look at JAX_PLATFORMS."
        )
    if gpus and "% of the GPU" in _cuda.preallocation():
        found.advice.append(
            f"JAX's allocator takes {_cuda.preallocation()}; a pool's blocks lie beside it: leave "
            "room with XLA_PYTHON_CLIENT_MEM_FRACTION=.4 or XLA_PYTHON_CLIENT_PREALLOCATE=false."
        )
    if _cuda.BUILT and not gpus:
        found.advice.append(
            "The CUDA backend was built; without a usable GPU, pools are on the CPU."
        )


def examine() -> Findings:
    """Inspects the build and the machine, and tries one token on CPU and on each CUDA device."""
    found = Findings()
    _software(found)
    devices = jax.devices()
    found.add("devices that JAX sees", ", ".join(map(str, devices)))
    _machine(found)
    gpus = _driver(found)
    if gpus:
        found.add("JAX's own allocator takes", _cuda.preallocation())
    answer = _try(jax.devices("cpu")[0])
    found.add("CPU backend", answer)
    if answer != _WORKS:
        found.broken.append("The CPU backend is broken here: please report the lines above.")
    on_cuda = [device for device in devices if platform_of(device) == "cuda"]
    for device in on_cuda if _cuda.BUILT else []:
        answer = _try(device)
        found.add(f"CUDA backend on {device}", answer)
        if answer != _WORKS:
            found.broken.append(f"The CUDA backend is broken on {device}: see the lines above.")
    _next_for_cuda(found, gpus, on_cuda)
    return found
