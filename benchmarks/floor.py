"""The read floor: how fast all cores together can read as many bytes as an attention call reads.

The memory bandwidth of a shared machine drifts by a factor of two within an hour, so speeds are
only meaningful as fractions of a floor measured in the same process, just before and just after.
`floor.cc` is compiled for this machine on first use.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pathlib
import statistics
import subprocess
import tempfile

__all__ = ["Floor", "build"]

# A process that starts others compiles once and passes the library to them in this variable.
LIBRARY_VARIABLE = "KVPAGE_BENCH_FLOOR"
_SOURCE = pathlib.Path(__file__).with_name("floor.cc")
_LOOPS = 3
_BUFFER_BYTES = 256 * 2**20


def build(folder: str) -> str:
    """Compiles the read loops into `folder`; returns the library's path.

    Raises:
        RuntimeError: no C++ compiler, or it failed.
    """
    library = os.path.join(folder, "floor.so")
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    try:
        subprocess.run(
            [*command, str(_SOURCE), "-o", library], check=True, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise RuntimeError(f"the floor needs a C++ compiler: {compiler} was not found") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{compiler} could not compile {_SOURCE}:\n{error.stderr}") from error
    return library


class Floor:
    """Measures the floor with a buffer on huge pages.

    Args:
        threads: number of reading threads; all cores by default.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or len(os.sched_getaffinity(0))
        path = os.environ.get(LIBRARY_VARIABLE)
        if path:
            self._library = ctypes.CDLL(path)
        else:
            with tempfile.TemporaryDirectory() as folder:
                self._library = ctypes.CDLL(build(folder))
        self._library.read_passes.restype = ctypes.c_uint64
        # Anonymous memory, aligned to pages; the loops prefetch beyond the end of their shares.
        self._memory = mmap.mmap(-1, _BUFFER_BYTES + 4 * 2**20)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        ones = b"\1" * 2**20
        for at in range(0, len(self._memory), 2**20):
            self._memory[at : at + 2**20] = ones
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def _passes(self, loop: int, total: int, piece: int, passes: int) -> float:
        seconds = (ctypes.c_double * passes)()
        self._library.read_passes(
            ctypes.c_void_p(self._address),
            ctypes.c_size_t(total),
            ctypes.c_size_t(piece),
            self._threads,
            loop,
            passes,
            seconds,
        )
        return statistics.median(seconds)

    def measure(self, piece_bytes: int, passes: int = 5) -> float:
        """Bytes per second of the fastest of three loops.

        Args:
            piece_bytes: bytes that one call reads; threads synchronise after each piece.
            passes: number of passes over a buffer far larger than the caches; the median is used.
        """
        piece = min(max(piece_bytes // 4096, 1) * 4096, _BUFFER_BYTES)
        total = _BUFFER_BYTES // piece * piece
        return max(total / self._passes(loop, total, piece, passes) for loop in range(_LOOPS))


def main() -> None:
    """Prints the floor for a few sizes."""
    floor = Floor()
    for megabytes in (1, 3, 12, 50, 200):
        speed = floor.measure(megabytes * 2**20) / 1e9
        print(f"pieces of {megabytes:>4} MiB: {speed:6.1f} GB/s")


if __name__ == "__main__":
    main()
