"""Reads tensors of safetensors files at the speed of the disk, without a second copy in memory.

A tensor is read into its final place in memory, or converted in pieces of a megabyte. The file is
read and not mapped: mapped pages would count as memory of the process until they are dropped, and
the process would die with SIGBUS if another program truncated the file.
"""

import json
import os
import pathlib
from types import TracebackType

import jax.numpy as jnp
import numpy as np

__all__ = ["TensorFile", "aligned_empty"]

_PIECE_BYTES = 2**20
_ALIGNMENT = 64  # JAX on CPU uses a NumPy array with this alignment without a copy
_DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": jnp.dtype("bfloat16")}


class TensorFile:
    """A safetensors file that `safetensors.safe_open` has accepted, as a context manager."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)
        size = int.from_bytes(self._file.read(8), "little")
        self._header = json.loads(self._file.read(size))
        self._begin = 8 + size

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def read_into(self, name: str, target: np.ndarray) -> None:
        """Reads the tensor `name` into a contiguous array of its shape, converting it to the
        array's type. Threads may call it at the same time.

        Raises:
          OSError: The file ends early, or cannot be read.
        """
        entry = self._header[name]
        stored = _DTYPES[entry["dtype"]]
        offset = self._begin + entry["data_offsets"][0]
        flat = target.reshape(-1)
        if stored == target.dtype:
            self._read_bytes(flat, offset)
            return
        buffer = np.empty(min(flat.size, _PIECE_BYTES // stored.itemsize), stored)
        for begin in range(0, flat.size, max(1, buffer.size)):
            piece = buffer[: flat.size - begin]
            self._read_bytes(piece, offset)
            offset += piece.nbytes
            _convert(piece, flat[begin : begin + piece.size])

    def _read_bytes(self, target: np.ndarray, offset: int) -> None:
        view = memoryview(target.view(np.uint8))
        while view:
            count = os.preadv(self._file.fileno(), [view], offset)
            if count == 0:
                raise OSError(f"{self._path} ends before its tensors do")
            view, offset = view[count:], offset + count


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array that JAX on CPU can use without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _convert(values: np.ndarray, target: np.ndarray) -> None:
    if values.dtype == _DTYPES["BF16"] and target.dtype == np.float32:
        # A bfloat16 is the upper half of a float32; NumPy's conversion takes ten times as long.
        wide = target.view(np.uint32)
        wide[:] = values.view(np.uint16)
        wide <<= 16
    else:
        target[:] = values
