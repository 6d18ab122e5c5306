"""Everything that depends on the platform, the JAX version or the FFI ABI.

The rest of the package uses only JAX's public API; differences between the supported versions are
handled here.
"""

import importlib
import math
import pathlib
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

__all__ = [
    "KeyValueStore",
    "default_device",
    "gathered",
    "guards_transfers",
    "is_ready",
    "is_tracing",
    "load_native",
    "manual_axes",
    "matmul_precision",
    "no_mesh",
    "num_partitions",
    "placed_as",
    "platform_of",
    "result_aval",
]


def check_platform(platform: str = sys.platform) -> None:
    """Raises on systems without memfd.

    Raises:
        ImportError: not Linux.
    """
    if not platform.startswith("linux"):
        raise ImportError(
            f"jax_kvpage runs on Linux only, this is {platform!r}: its cache is mapped with memfd "
            "and mmap (MAP_FIXED). On Windows use WSL 2, on macOS a Linux virtual machine or "
            "container."
        )


def running_ffi_api() -> tuple[int, int] | None:
    """The version of the XLA FFI API that the installed jaxlib implements.

    jaxlib has no function for this, so it is read from the headers.

    Returns:
        (major, minor), or None when jaxlib was installed without its headers.
    """
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    versions = dict(re.findall(r"#define\s+XLA_FFI_API_(MAJOR|MINOR)\s+(\d+)", text))
    if len(versions) != 2:
        return None
    return int(versions["MAJOR"]), int(versions["MINOR"])


def check_ffi_api(built: tuple[int, int], running: tuple[int, int] | None) -> None:
    """Compares the FFI API version of the build with that of the running jaxlib.

    XLA loads handlers with the same major version and a minor version not newer than its own. A
    newer handler would fail only when the first backend starts, and would break all of JAX.

    Raises:
        ImportError: handlers of this build cannot be loaded by the running jaxlib.
    """
    if running is None or (built[0] == running[0] and built[1] <= running[1]):
        return
    raise ImportError(
        f"jax_kvpage was built against XLA FFI API {built[0]}.{built[1]}, but the installed jaxlib "
        f"{jax.lib.__version__} implements {running[0]}.{running[1]}: a build serves jaxlibs of "
        "the same major version that are not older than the one it was built with. Reinstall "
        "jax_kvpage in this environment (pip install --force-reinstall --no-deps .), "
        "or upgrade jax and jaxlib."
    )


def load_native() -> ModuleType:
    """Imports the compiled module after checking that it is compatible.

    Raises:
        ImportError: not Linux, not built, or built for another FFI API.
    """
    check_platform()
    try:
        native = importlib.import_module("jax_kvpage._native")
    except ModuleNotFoundError as error:
        if error.name != "jax_kvpage._native":
            raise
        raise ImportError(
            "jax_kvpage's compiled module is missing: install the package (pip install . in a "
            "checkout, which needs a C++17 compiler) instead of importing the source folder."
        ) from error
    check_ffi_api(tuple(native.FFI_API_VERSION), running_ffi_api())
    return native


def result_aval(operands: Sequence[Any], shape: Sequence[int], dtype: Any) -> Any:
    """Abstract value of a result that may depend on every operand.

    Under `shard_map` a result varies over all mesh axes that any operand varies over. A fresh
    abstract value would claim that it varies over none: scans would refuse it as a carry, and
    `out_specs=P()` would accept it silently. The axes are only available from the operands'
    abstract values, whose `manual_axis_type` has no documented constructor; hence this shim.

    Args:
        operands: abstract values of the operands.
        shape: shape of the result.
        dtype: dtype of the result.
    """
    widest = max(operands, key=lambda aval: len(aval.manual_axis_type.varying))
    axes = frozenset().union(*(aval.manual_axis_type.varying for aval in operands))
    sharding = widest.sharding
    return widest.update(
        shape=tuple(shape),
        dtype=jax.numpy.dtype(dtype),
        weak_type=False,
        sharding=NamedSharding(sharding.mesh, PartitionSpec(*[None] * len(shape))),
        manual_axis_type=widest.manual_axis_type.update(varying=axes),
    )


def gathered(array: Any, kept: PartitionSpec | None = None) -> Any:
    """Gathers an array whose type says that it is sharded (explicit mesh axes).

    With `kept`, it is resharded to that spec instead. XLA does the same around a custom call; most
    functions of jax.numpy refuse sharded operands.
    """
    sharding = jax.typeof(array).sharding
    if all(part is None for part in sharding.spec):
        return array
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, kept or PartitionSpec()))


def manual_axes() -> frozenset[str]:
    """The mesh axes over which the traced code runs once per shard: those of `shard_map`."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def placed_as(array: Any, mesh: Any, spec: PartitionSpec) -> Any:
    """Reshards an array over a mesh with explicit axes.

    `jax.shard_map` demands this for explicit axes; for automatic axes it reshards by itself.
    """
    if AxisType.Explicit not in mesh.axis_types:
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, spec))


def num_partitions(ctx: Any) -> int:
    """The number of devices over which the compiler partitions the code being lowered.

    It is 1 inside a `shard_map` over all axes of the mesh, where each device has its own call.

    Args:
        ctx: `jax.interpreters.mlir.LoweringRuleContext`. The number of devices and the mesh are in
            its `axis_context`, neither kind of which JAX documents; hence this shim.
    """
    axes = ctx.module_context.axis_context
    if hasattr(axes, "num_devices"):
        return int(axes.num_devices)
    sizes = axes.mesh.shape.items()
    return math.prod(size for name, size in sizes if name not in axes.manual_axes)


def no_mesh() -> Any:
    """A context in which no mesh is set, for programs that always run on one device.

    Raises:
        ValueError: JAX is tracing.
    """
    return jax.set_mesh(None)


def is_tracing() -> bool:
    """Whether the caller runs inside jit or another transformation.

    JAX has no public function for this, but refuses to change the mesh while tracing.
    """
    try:
        with no_mesh():
            return False
    except ValueError:
        return True


def guards_transfers() -> bool:
    """Whether `jax.transfer_guard` logs or refuses implicit transfers to the device."""
    level = getattr(jax.config, "jax_transfer_guard_host_to_device", None)
    level = level or getattr(jax.config, "jax_transfer_guard", None)
    return level not in (None, "allow")


def default_device() -> jax.Device:
    """The device that JAX would run a program on now (`jax.default_device`, or the first)."""
    device: Any = getattr(jax.config, "jax_default_device", None)
    if device is None:
        return jax.local_devices()[0]  # jax.devices()[0] may belong to another process
    return jax.local_devices(backend=device)[0] if isinstance(device, str) else device


def matmul_precision() -> str | None:
    """The current `jax.default_matmul_precision`, which the type stubs of JAX's config omit."""
    precision: str | None = getattr(jax.config, "jax_default_matmul_precision", None)
    return precision


def platform_of(device: Any) -> str:
    """The lowering platform of programs for a device: "cpu", "cuda", "rocm", "tpu".

    `Device.platform` is "gpu" for both CUDA and ROCm.
    """
    if device.platform != "gpu":
        return str(device.platform)
    try:
        return "cuda" if device in jax.devices("cuda") else "rocm"
    except RuntimeError:  # no such backend in this process
        return "rocm"


def is_ready(array: Any) -> bool:
    """Whether an array has been computed; the declared type of JAX's arrays lacks the method."""
    return bool(array.is_ready())


class KeyValueStore:
    """The key-value store of JAX's coordination service, shared by all processes.

    JAX has no public name for the client that `jax.distributed.initialize` creates; hence this
    shim, the only use of a private module.

    Raises:
        ValueError: `jax.distributed.initialize` was not called, or this JAX keeps the client
            elsewhere.
    """

    def __init__(self) -> None:
        try:
            client = importlib.import_module("jax._src.distributed").global_state.client
        except (ImportError, AttributeError) as error:
            raise ValueError(
                "the devices belong to several processes, which this version of JAX "
                f"({jax.__version__}) gives no way to exchange decisions: make a pool over the "
                "devices of one process"
            ) from error
        if client is None:
            raise ValueError(
                "the devices belong to several processes, but jax.distributed.initialize was not "
                "called in this one"
            )
        self._client: Any = client

    def put(self, key: str, text: str) -> None:
        """Sets a key; no process may have set it before."""
        self._client.key_value_set(key, text)

    def get(self, key: str, seconds: float) -> str | None:
        """Waits for the value of a key; returns None if no process sets it in time."""
        try:
            return str(self._client.blocking_key_value_get(key, max(int(seconds * 1000), 1)))
        except jax.errors.JaxRuntimeError as error:
            if str(error).startswith("DEADLINE_EXCEEDED"):
                return None
            raise

    def delete(self, folder: str) -> None:
        """Deletes all keys in a folder."""
        self._client.key_value_delete(folder)
