"""Checks the store that a new pool is given."""

from typing import Any

from jax_kvpage._cuda import Place
from jax_kvpage.errors import KVPageError
from jax_kvpage.host_store import HostStore
from jax_kvpage.spilling import as_share
from jax_kvpage.store import BlockStore

__all__ = ["check_store"]


def check_store(store: Any, place: Place, write_ahead: Any) -> float:
    """Checks the store of a new pool; returns the share of the capacity to write ahead.

    Raises:
        ValueError: not a store, or an invalid share.
        KVPageError: a store for another platform.
        PoolClosed: the store is closed.
    """
    ahead = as_share("KVPool: write_ahead", 0.25 if write_ahead is None else write_ahead)
    if store is None:
        if write_ahead is not None:
            raise ValueError("KVPool: write_ahead: give a store too, to which blocks are written")
        return ahead
    if not isinstance(store, (BlockStore, HostStore)):
        raise ValueError(f"KVPool: store: wanted a BlockStore, a HostStore or None, got {store!r}")
    if isinstance(store, BlockStore) and place.backend != "cpu":
        raise KVPageError(
            "KVPool: store: a BlockStore works with pools on CPU only: use a HostStore for a pool "
            "on a GPU, or none"
        )
    if isinstance(store, HostStore) and place.backend == "cpu":
        raise KVPageError(
            "KVPool: store: a HostStore works with pools on a GPU only: use a BlockStore for a "
            "pool on CPU, or none"
        )
    store.stats()
    return ahead
