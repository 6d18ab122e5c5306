"""The server's metrics of the store below its pool."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("prometheus_client")
from openai_server.metrics import Metrics, Snapshot
from prefix_rig import text
from spill_rig import fetched, rig_of, saved

ENGINE = SimpleNamespace(stats=SimpleNamespace(running=0, waiting=0, preemptions=0))


def test_hits_by_tier(make_pool, store) -> None:
    rig = rig_of(make_pool, store)
    ids = text(100)
    saved(rig, ids)
    rig.acquire(ids[:32])  # found in memory
    rig.pool.evict()
    fetched(rig, ids)
    rig.acquire(ids)
    snapshot = Snapshot.of(ENGINE, rig.pool)
    stats = rig.pool.spill_stats()
    assert (snapshot.queries, snapshot.hits) == (232, stats.memory_hits + stats.store_hits)
    assert snapshot.store_hits == stats.store_hits > 0
    assert snapshot.store_queries == 232 - stats.memory_hits
    shown = Metrics("m").render(snapshot).decode()
    assert (
        f'external_prefix_cache_hits_total{{engine="0",model_name="m"}} {stats.store_hits}' in shown
    )


def test_without_a_store_there_are_none(make_pool) -> None:
    snapshot = Snapshot.of(ENGINE, rig_of(make_pool, None).pool)
    assert snapshot.store_hits is None
    assert b"external_prefix" not in Metrics("m").render(snapshot)
