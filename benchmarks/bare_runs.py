"""The system calls behind an alias, without a pool: what `sharing.py` compares forks with."""

from __future__ import annotations

import ctypes
import itertools
import os
import pathlib
import subprocess

import numpy as np

import jax_kvpage as kvp

__all__ = ["Runs", "bare_calls"]

_SOURCE = pathlib.Path(__file__).with_suffix(".cc")


def bare_calls(folder: str) -> ctypes.CDLL:
    """Compiles bare_runs.cc for this machine and loads it."""
    library = os.path.join(folder, "bare_runs.so")
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", str(_SOURCE), "-o", library]
    subprocess.run(command, check=True)
    calls = ctypes.CDLL(library)
    calls.map_runs.restype = calls.copy_bytes.restype = ctypes.c_double
    calls.reserve_range.restype = ctypes.c_void_p
    return calls


class Runs:
    """The first `count` blocks of each range of a slot, as runs of a file of bare blocks."""

    def __init__(self, calls: ctypes.CDLL, pool: kvp.KVPool, slot: int, count: int) -> None:
        size, runs = pool.spec.block_bytes, []
        for index, blocks in enumerate(pool.block_map(slot)):
            at = index * (count + 1)  # in a pool, a hole follows the blocks of each range
            numbers = [number for number, _ in blocks[:count]]
            for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
                members = [number for _, number in run]
                runs.append((members[0] * size, len(members) * size, at * size))
                at += len(members)
        columns = np.asarray(runs, np.int64).T.copy()
        self._offsets, self._lengths, self._places = (
            column.ctypes.data_as(ctypes.c_void_p) for column in columns
        )
        self._calls, self._columns = calls, columns
        self.count = len(runs)
        self._file_bytes = ctypes.c_int64(int((columns[0] + columns[1]).max()))
        self._fd = calls.make_blocks(
            self._offsets, self._lengths, ctypes.c_int64(self.count), self._file_bytes
        )
        if self._fd < 0:
            raise OSError("no memory for the bare blocks")
        reserved = int((columns[1] + columns[2]).max()) + size
        self._range_bytes = ctypes.c_int64(reserved)
        self._range = ctypes.c_void_p(calls.reserve_range(self._range_bytes))
        if not self._range:
            raise OSError(f"no address space for {reserved} bytes")

    def map(self, populate: bool, count: int) -> float:
        """Makes the first `count` bare mmap calls; returns CPU seconds."""
        seconds = self._calls.map_runs(
            self._range,
            self._fd,
            self._offsets,
            self._lengths,
            self._places,
            ctypes.c_int64(count),
            ctypes.c_bool(populate),
        )
        if seconds < 0:
            raise OSError("a bare mmap call failed")
        return seconds

    def unmap(self) -> None:
        """Undoes `map`."""
        if self._calls.empty_range(self._range, self._range_bytes):
            raise OSError("unmapping the bare runs failed")

    def populate(self) -> float:
        """CPU seconds of the calls with page table entries, which are undone."""
        seconds = self.map(populate=True, count=self.count)
        self.unmap()
        return seconds

    def close(self) -> None:
        """Frees the file and the addresses."""
        self._calls.free_range(self._range, self._range_bytes)
        self._calls.free_blocks(self._fd)
