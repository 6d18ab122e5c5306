"""A storage tier below memory: files of KV blocks, shared by pools and processes."""

import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import NamedTuple

from jax_kvpage import _native
from jax_kvpage._capacity import bytes_of
from jax_kvpage._closing import Closing
from jax_kvpage._native_pool import checked
from jax_kvpage._values import as_text, host_float, is_text
from jax_kvpage.errors import KVPageError

__all__ = ["BlockStore", "StoreStats", "StoredFile", "list_files", "prune"]

_NO_LIMIT = 2**63 - 1


class StoreStats(NamedTuple):
    """The contents of a store, and statistics since it was opened.

    Attributes:
        files: block files in the directory.
        bytes: their total size.
        bytes_swapped: bytes of keys and values of swapped sequences, in unnamed files.
        limit: the most bytes that all of these may use; None: no limit.
        bytes_written: bytes of keys and values written.
        bytes_read: bytes of keys and values read and checked.
        failed_writes: runs of blocks that could not be written.
        files_evicted: files removed because of the limit.
        bytes_evicted: their total size.
        refused: files that this store cannot use, by reason: "damaged", "truncated", "version",
            "fingerprint" (of another model), "unreadable".
        missed: reads and look-ups that failed, by reason: those above, "gone" (removed by another
            process), "geometry" (stored for another cache), "closed".
        last_error: the last error of a write, a listing or an eviction; "" if there was none.
        swap_out_seconds_median: the median over the latest 512 sequences swapped out, from the
            release of the slot until the file is on disk; 0: none yet.
        swap_out_seconds_p95: the 95th percentile of the same.
        swap_in_seconds_median: the median of reads back, from `prefetch` or `swap_in`.
        swap_in_seconds_p95: the 95th percentile of the same.
        read_bytes_per_second: rate of the latest reads, including waiting; 0: none yet.
    """

    files: int
    bytes: int
    bytes_swapped: int
    limit: int | None
    bytes_written: int
    bytes_read: int
    failed_writes: int
    files_evicted: int
    bytes_evicted: int
    refused: Mapping[str, int]
    missed: Mapping[str, int]
    last_error: str
    swap_out_seconds_median: float
    swap_out_seconds_p95: float
    swap_in_seconds_median: float
    swap_in_seconds_p95: float
    read_bytes_per_second: float


class StoredFile(NamedTuple):
    """One block file.

    Attributes:
        name: its name in the directory.
        bytes: its size.
        used: when it was written or last read, in seconds of Unix time.
        problem: why it is unusable ("damaged", "truncated", "version", "unreadable"), or None if no
            problem was found. If there is one, the attributes below are empty.
        fingerprint: the model's fingerprint.
        namespace: as for `KVPool.acquire_prefix`.
        layout: the layout of its blocks, and the cache shape that it is for.
        token_ids: the sequence's token ids, from its beginning to the end of the last block.
        first_token: the position in the sequence of the first token in the file.
    """

    name: str
    bytes: int
    used: float
    problem: str | None
    fingerprint: str
    namespace: str | None
    layout: str
    token_ids: list[int]
    first_token: int


class BlockStore(Closing):
    """Blocks of keys and values in the files of a directory.

    Each file is a safetensors container with some consecutive blocks of one sequence. Files are
    written atomically, and blocks are checked when they are read: damaged ones, and those of
    another model or cache shape, count as not stored. Several stores, also in several processes,
    may share a directory: each finds the files of the others within about a second. A store works
    only in the process that opened it, not in its forks, and is a context manager.

    Args:
        path: the directory, created if it is missing, accessible to its user only.
        limit: the most that all files there may use, in bytes or as text ("8GiB"): the least
            recently used files are removed, but never a prefix before its continuations. Processes
            that write at the same time may exceed it by the files that they are writing; each
            counts only its own swapped sequences. None: no limit.
        fingerprint: identifies the model of these keys and values: anything that changes with its
            weights, for example a checksum. Files with another fingerprint are not used.

    Raises:
        ValueError: an invalid path or limit, or a fingerprint that is not a str.
        KVPageError: the directory cannot be created or read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        limit: int | str | None = "8GiB",
        fingerprint: str = "",
    ) -> None:
        text = os.fspath(path) if isinstance(path, os.PathLike) else path
        if not is_text(text) or "\0" in text:
            raise ValueError(f"BlockStore: path: wanted the path of a directory, got {path!r}")
        self._path = pathlib.Path(path)
        self._limit = None if limit is None else bytes_of("BlockStore: limit", limit)
        self._fingerprint = as_text("BlockStore: fingerprint", fingerprint)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KVPageError(f"BlockStore: cannot create {self._path.parent}: {error}") from error
        most = _NO_LIMIT if self._limit is None else self._limit
        self.native: _native.Store = checked(_native.Store, str(self._path), most, fingerprint)

    @property
    def path(self) -> pathlib.Path:
        """The directory."""
        return self._path

    @property
    def limit(self) -> int | None:
        """The most bytes that its files may use; None: no limit."""
        return self._limit

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint."""
        return self._fingerprint

    def stats(self) -> StoreStats:
        """The contents of the store, and statistics.

        Raises:
            PoolClosed: the store is closed, or belongs to a parent process.
        """
        numbers = checked(self.native.numbers)
        return StoreStats(
            files=numbers.files,
            bytes=numbers.bytes,
            bytes_swapped=numbers.bytes_swapped,
            limit=self._limit,
            bytes_written=numbers.bytes_written,
            bytes_read=numbers.bytes_read,
            failed_writes=numbers.failed_writes,
            files_evicted=numbers.files_evicted,
            bytes_evicted=numbers.bytes_evicted,
            refused=numbers.refused,
            missed=numbers.missed,
            last_error=numbers.last_error,
            swap_out_seconds_median=numbers.swap_out_seconds_median,
            swap_out_seconds_p95=numbers.swap_out_seconds_p95,
            swap_in_seconds_median=numbers.swap_in_seconds_median,
            swap_in_seconds_p95=numbers.swap_in_seconds_p95,
            read_bytes_per_second=numbers.read_bytes_per_second,
        )

    def refresh(self) -> None:
        """Looks for files of other processes now.

        Raises:
            KVPageError: the directory cannot be read.
            PoolClosed: the store is closed, or belongs to a parent process.
        """
        checked(self.native.refresh)

    def close(self) -> None:
        """Ends its threads; its files stay. Safe to call again."""
        self.native.close()

    def __repr__(self) -> str:
        return f"BlockStore({str(self._path)!r}, {self._limit}, {self._fingerprint!r})"


def list_files(path: str | os.PathLike[str], *, verify: bool = False) -> list[StoredFile]:
    """Lists the block files in a directory, of all models and caches, sorted by name.

    Args:
        path: the directory of a store.
        verify: whether to read and check the blocks too, instead of only the headers.

    Raises:
        KVPageError: the directory cannot be read.
    """
    return [_file(found) for found in checked(_native.store_files, os.fspath(path), verify)]


def prune(
    path: str | os.PathLike[str],
    *,
    limit: int | str | None = None,
    older_than: float | None = None,
) -> list[str]:
    """Removes block files from a directory.

    Args:
        path: the directory of a store.
        limit: the most that the files may use afterwards, in bytes or as text: the least recently
            used are removed first, but never a prefix before its continuations. 0: removes all.
        older_than: also removes files that were not used for this many seconds.

    Returns:
        The names of the files that were removed.

    Raises:
        ValueError: an invalid limit or age.
        KVPageError: the directory cannot be read, or another process is evicting from it.
    """
    most = _NO_LIMIT
    if limit is not None:
        most = 0 if limit == 0 and not isinstance(limit, bool) else bytes_of("prune: limit", limit)
    used_before = 0.0
    if older_than is not None:
        wanted = "at least 0 seconds"
        used_before = time.time() - host_float("prune: older_than", older_than, 0, math.inf, wanted)
    removed: list[str] = checked(_native.store_prune, os.fspath(path), most, used_before)
    return removed


def _file(found: _native.StoreFile) -> StoredFile:
    sound = found.problem == "none"
    return StoredFile(
        found.name,
        found.bytes,
        found.used,
        None if sound else found.problem,
        found.fingerprint,
        # The inverse of `namespace_key`: None is "", and any other namespace begins with "=".
        found.space[1:] if found.space else None,
        found.layout,
        found.tokens,
        found.first_block * found.block_tokens,
    )
