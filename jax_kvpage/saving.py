"""Host calls that move prefixes between a pool and a store."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from jax_kvpage._arrays import token_ids_of
from jax_kvpage._native_pool import NativePool
from jax_kvpage.host_store import HostStore
from jax_kvpage.prefix import namespace_key
from jax_kvpage.sharding.over_axis import AxisSharding
from jax_kvpage.store import BlockStore

__all__ = ["LoadedPrefixes", "SavedPrefixes", "SavingCalls"]


class SavedPrefixes(NamedTuple):
    """What `save_prefixes` did.

    Attributes:
        tokens: how many of the tokens to save the store has now. A prefix shared by several
            sequences counts once.
        written: how many of these it did not have before.
    """

    tokens: int
    written: int


class LoadedPrefixes(NamedTuple):
    """What `load_prefixes` did, in tokens.

    Attributes:
        tokens: loaded; `acquire_prefix` finds them from now on.
        present: already in the pool's memory. Tokens in two files count here the second time.
        no_room: not loaded because no blocks were free.
        lost: not loaded because a file was damaged or gone, or the tokens before them are missing.
    """

    tokens: int
    present: int
    no_room: int
    lost: int


class SavingCalls:
    """The calls of `KVPool` that save and load prefixes."""

    _native: NativePool
    _pool: Any
    store: BlockStore | HostStore | None
    sharding: AxisSharding | None

    def save_prefixes(
        self,
        store: BlockStore | str | os.PathLike[str] | None = None,
        token_ids: Any = None,
        namespace: str | None = None,
        *,
        fingerprint: str | None = None,
    ) -> SavedPrefixes:
        """Writes prefixes that are in memory to a store, for other pools and processes.

        Saves full blocks of tokens that were committed and whose keys and values programs have
        written; `pool.check(cache)` waits for programs in flight. Blocks already in the store are
        not written again. Other threads may use the pool meanwhile. On CPU only.

        Args:
            store: an open store; or the path of a directory, without a limit. None: the pool's
                store.
            token_ids: the ids of one sequence, or a list of several; their prefixes in memory are
                saved. None: everything that `acquire_prefix` could find, in all namespaces.
            namespace: the namespace of the sequences, as for `acquire_prefix`.
            fingerprint: with a path, the fingerprint for `BlockStore`.

        Returns:
            How many tokens are stored now, and how many of them were written.

        Raises:
            ValueError: ids that do not fit int32, a namespace without token_ids, a fingerprint
                together with an open store, no store given although the pool has none.
            OutOfBlocks: the disk is full, or the store has reached its limit.
            KVPageError: another write error, or the pool is on a GPU.
            DeviceFault: an earlier program failed on the device.
            PoolClosed: the pool or the store is closed.
        """
        space = namespace_key("save_prefixes", namespace)
        ids: list[np.ndarray] = []
        if token_ids is not None:
            ids, _ = token_ids_of("save_prefixes: token_ids", token_ids)
        elif namespace is not None:
            raise ValueError(
                "save_prefixes: namespace: also pass the token_ids to which it applies"
            )
        with _opened("save_prefixes", store, self, fingerprint) as opened:
            saved = self._native.call(
                self._pool.save_prefixes, opened, space, ids, token_ids is None
            )
        return SavedPrefixes(saved.tokens, saved.written)

    def load_prefixes(
        self,
        store: BlockStore | str | os.PathLike[str] | None = None,
        *,
        fingerprint: str | None = None,
    ) -> LoadedPrefixes:
        """Reads all prefixes that a store has for this pool, so that `acquire_prefix` finds them.

        Files of caches with other layers, heads, storage type, layout or block size, or with
        another fingerprint, are ignored. Only free blocks are filled: nothing is evicted. Loaded
        prefixes may be evicted later like any others. Other threads may use the pool meanwhile. On
        CPU only.

        Args:
            store: an open store, or the path of a directory. None: the pool's store.
            fingerprint: with a path, the fingerprint for `BlockStore`.

        Returns:
            How many tokens were loaded, and how many were not and why.

        Raises:
            ValueError: a fingerprint together with an open store, no store given although the pool
                has none.
            KVPageError: the directory cannot be read, or the pool is on a GPU.
            DeviceFault: an earlier program failed on the device.
            PoolClosed: the pool or the store is closed.
        """
        with _opened("load_prefixes", store, self, fingerprint) as opened:
            loaded = self._native.call(self._pool.load_prefixes, opened)
        return LoadedPrefixes(loaded.tokens, loaded.present, loaded.no_room, loaded.lost)


@contextmanager
def _opened(call: str, store: Any, pool: SavingCalls, fingerprint: str | None) -> Iterator[Any]:
    """Yields the compiled store; closes it at the end if it was given as a path."""
    if pool.sharding is not None:
        raise ValueError(
            f"{call}: a pool over a mesh keeps no prefixes in a store so far, only swapped "
            "sequences: save and load them with a pool on one device"
        )
    if store is None:
        if pool.store is None:
            raise ValueError(f"{call}: store: give one, or make the pool with KVPool(store=...)")
        store = pool.store
    if isinstance(store, HostStore):
        raise ValueError(f"{call}: store: a HostStore has no files: give a BlockStore or a path")
    if isinstance(store, BlockStore):
        if fingerprint is not None:
            raise ValueError(f"{call}: fingerprint: the store has one, {store.fingerprint!r}")
        yield store.native
        return
    if not isinstance(store, (str, os.PathLike)):
        raise ValueError(f"{call}: store: wanted a BlockStore or a path, got {store!r}")
    with BlockStore(store, None, "" if fingerprint is None else fingerprint) as opened:
        yield opened.native
