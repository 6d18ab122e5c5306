"""A store below memory: files of KV blocks that pools and processes share."""

import os
import pathlib
import time
from collections.abc import Mapping
from typing import NamedTuple

from jax_kvpage import _native
from jax_kvpage._capacity import bytes_of
from jax_kvpage._closing import Closing
from jax_kvpage._native_pool import checked

__all__ = ["BlockStore", "StoreStats", "StoredFile", "list_files", "prune"]

_NO_LIMIT = 2**63 - 1


class StoreStats(NamedTuple):
    """What a store holds, and what it has done since it was opened.

    Attributes:
        files: block files in the directory.
        bytes: their sizes.
        bytes_swapped: keys and values of swapped sequences, in files without names.
        limit: the most that all of these may take; None: no limit.
        bytes_written: keys and values written.
        bytes_read: keys and values read and checked.
        failed_writes: runs of blocks that could not be written.
        files_evicted: files removed to keep the limit.
        bytes_evicted: their sizes.
        refused: files that hold nothing for this store, by reason: "damaged", "truncated",
            "version", "fingerprint" (of another model), "unreadable".
        missed: reads and look-ups that came to nothing, by reason: those above, "gone" (removed by
            another process), "geometry" (stored for another cache), "closed".
        last_error: of a write, a listing or an eviction; "" if there was none.
        swap_out_seconds_median: the median time of the latest 512 sequences that were swapped out,
            from the release of their slot to the file being on disk; 0: none yet.
        swap_out_seconds_p95: how long 95 in 100 of these took at most.
        swap_in_seconds_median: the same of reads back, from `prefetch` or `swap_in`.
        swap_in_seconds_p95: the same.
        read_bytes_per_second: of the latest reads, waiting included; 0: none yet.
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
        name: in its directory.
        bytes: its size.
        used: when it was written or last read, seconds since the epoch.
        problem: why it is of no use ("damaged", "truncated", "version", "unreadable"); None: it is
            sound, as far as it was checked. The attributes that follow are empty with a problem.
        fingerprint: the model's.
        namespace: as for `KVPool.acquire_prefix`.
        layout: how its blocks are laid out, and for what cache.
        token_ids: of the sequence, from its beginning to the end of the file's last block.
        first_token: where the file's first block begins in the sequence.
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

    Each file is a safetensors container with some consecutive blocks of one sequence. It is
    written whole or not at all, and its blocks are checked as they are read: what is damaged, of
    another model or of another cache counts as not stored. Several stores, of several processes,
    may share a directory: files of the others are found within about a second. A store works in
    the process that opened it, not in its forks, and is a context manager.

    Args:
        path: the directory, made if it is missing, for its user alone.
        limit: the most that all files there may take, in bytes or as text ("8GiB"): those that were
            used least recently are removed, but no prefix before what continues it. Processes that
            write at one time may pass it by the files that they are writing; each counts its own
            swapped sequences only. None: no limit.
        fingerprint: names the model whose keys and values these are: anything that changes when
            its weights do, a checksum for instance. Files with another one are not used.

    Raises:
        ValueError: a limit that is none, a fingerprint that is no text.
        KVPageError: the directory cannot be made or read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        limit: int | str | None = "8GiB",
        fingerprint: str = "",
    ) -> None:
        self._path = pathlib.Path(path)
        self._limit = None if limit is None else bytes_of("BlockStore: limit", limit)
        if not isinstance(fingerprint, str):
            raise ValueError(f"BlockStore: fingerprint: wanted a str, got {fingerprint!r}")
        self._fingerprint = fingerprint
        self._path.parent.mkdir(parents=True, exist_ok=True)
        most = _NO_LIMIT if self._limit is None else self._limit
        self.native: _native.Store = checked(_native.Store, str(self._path), most, fingerprint)

    @property
    def path(self) -> pathlib.Path:
        """The directory."""
        return self._path

    @property
    def limit(self) -> int | None:
        """The most bytes that its files may take; None: no limit."""
        return self._limit

    @property
    def fingerprint(self) -> str:
        """The model's."""
        return self._fingerprint

    def stats(self) -> StoreStats:
        """What the store holds and has done.

        Raises:
            PoolClosed: the store is closed, or belongs to a parent process.
        """
        numbers = checked(self.native.numbers)
        return StoreStats(
            numbers.files,
            numbers.bytes,
            numbers.bytes_swapped,
            self._limit,
            numbers.bytes_written,
            numbers.bytes_read,
            numbers.failed_writes,
            numbers.files_evicted,
            numbers.bytes_evicted,
            numbers.refused,
            numbers.missed,
            numbers.last_error,
            numbers.swap_out_seconds_median,
            numbers.swap_out_seconds_p95,
            numbers.swap_in_seconds_median,
            numbers.swap_in_seconds_p95,
            numbers.read_bytes_per_second,
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
    """The block files in a directory, of all models and caches, by name.

    Args:
        path: the directory of a store.
        verify: whether blocks are read and checked too, not headers only.

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
        limit: the most that the files may take afterwards, in bytes or as text: the least
            recently used go first, but no prefix before what continues it. 0: all go.
        older_than: files that were not used for so many seconds go in any case.

    Returns:
        The names of the files that were removed.

    Raises:
        ValueError: a limit or an age that is none.
        KVPageError: the directory cannot be read, or another process is evicting from it.
    """
    most = _NO_LIMIT
    if limit is not None:
        most = 0 if limit == 0 and not isinstance(limit, bool) else bytes_of("prune: limit", limit)
    used_before = 0.0
    if older_than is not None:
        if isinstance(older_than, bool) or not isinstance(older_than, (int, float)):
            raise ValueError(f"prune: older_than: wanted seconds, got {older_than!r}")
        if not older_than >= 0:
            raise ValueError(f"prune: older_than: wanted at least 0 seconds, got {older_than}")
        used_before = time.time() - older_than
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
        # A pool's namespace None is "", and any other begins with "=".
        found.space[1:] if found.space else None,
        found.layout,
        found.tokens,
        found.first_block * found.block_tokens,
    )
