"""What host stores refuse on machines without a GPU."""

from __future__ import annotations

import pytest

import jax_kvpage as kvp
from jax_kvpage.host_store import HostPrefixStats, HostStoreStats


def test_a_store_alone() -> None:
    with kvp.HostStore("2MiB") as store:
        assert store.limit == 2**21
        assert repr(store) == "HostStore(2097152)"
        assert store.stats() == HostStoreStats(
            2**21, *(0,) * 4, 0.0, *(0,) * 3, "", *(0.0,) * 4, HostPrefixStats(*(0,) * 9, "")
        )
    store.close()
    with pytest.raises(kvp.PoolClosed, match="the store is closed"):
        store.stats()


@pytest.mark.parametrize("limit", [0, -1, "", "8 parsecs", None, 1.5, True])
def test_no_limit(limit: object) -> None:
    with pytest.raises(ValueError, match=r"HostStore: limit: wanted a positive number of bytes"):
        kvp.HostStore(limit)  # type: ignore[arg-type]


def test_a_pool_on_cpu_has_no_host_store() -> None:
    spec = kvp.CacheSpec(1, 1, 64, 2, 64)
    with kvp.HostStore("1MiB") as store:
        with pytest.raises(kvp.KVPageError, match=r"on a GPU only: use a BlockStore"):
            kvp.KVPool(spec, "1MiB", store=store)
        with kvp.KVPool(spec, "1MiB") as pool:
            for call in (pool.save_prefixes, pool.load_prefixes):
                with pytest.raises(ValueError, match="a HostStore has no files"):
                    call(store)  # type: ignore[arg-type]
