"""Processes that are killed while they save, spill and swap: files on disk are complete or absent,
and other processes can continue with them.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import time

import numpy as np
from covering import num_cases
from kill_rig import LIMIT, WORK
from prefix_rig import PrefixRig, text
from spill_rig import fetched, rig_of, saved
from subprocesses import start_python

import jax_kvpage as kvp
from jax_kvpage.store import StoredFile, list_files


def _served(rig: PrefixRig, file: StoredFile) -> int:
    """Fetches the stored sequence of a file, and compares it with the contents for its tokens.

    Returns:
        The number of tokens served.
    """
    stored = rig.pool.stored_prefix(file.token_ids, file.namespace)
    assert fetched(rig, file.token_ids, namespace=file.namespace).tokens == stored
    slot, cached, rig.cache = rig.pool.acquire_prefix(
        rig.cache, file.token_ids, namespace=file.namespace
    )
    assert cached == min(stored, len(file.token_ids) - 1)
    rig.ids[slot] = file.token_ids[:cached]
    rig.check()
    rig.release(slot)
    rig.pool.evict()
    return cached


def test_killed_processes_leave_what_can_be_read(make_pool, tmp_path: pathlib.Path) -> None:
    """Processes are killed one after the other, while this process serves from the same files."""
    random = np.random.default_rng(0)
    served = 0
    temporaries: set[pathlib.Path] = set()
    code = "import kill_rig; kill_rig.main()"
    with (
        start_python(code, str(tmp_path), talk=True) as nursery,
        kvp.BlockStore(tmp_path, LIMIT) as store,
    ):
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        rigs = {layout: rig_of(make_pool, store, layout) for layout in ("fused", "per_layer")}
        kinds = itertools.cycle(itertools.product(rigs, WORK))
        assert nursery.stdout.readline() == "ready\n"
        for number in range(num_cases(6, 204)):
            layout, work = next(kinds)
            # Some are killed immediately, some after many writes.
            delay = random.exponential(0.02)
            print(work, layout, 1000 * number, delay, file=nursery.stdin, flush=True)
            assert nursery.stdout.readline() == "killed\n"
            files = list_files(tmp_path, verify=True)
            assert [file for file in files if file.problem is not None] == []
            before, temporaries = temporaries, set(tmp_path.glob(".writing-*"))
            if work == "swap":  # its files are unlinked before anything is written
                assert all(path.stat().st_size == 0 for path in temporaries - before)
            store.refresh()
            newest = sorted(files, key=lambda file: file.used)[-2:]
            served += sum(_served(rigs[layout], file) for file in newest)
        nursery.stdin.close()
        assert nursery.wait(60) == 0
        # This process can still save and read a sequence that no killed process can have stored.
        ids = text(100, 10**9)
        saved(rigs["fused"], ids)
        rigs["fused"].pool.evict()
        (file,) = (file for file in list_files(tmp_path) if file.token_ids == ids[:96])
        assert _served(rigs["fused"], file) == 95
        assert set(store.stats().missed) <= {"gone", "geometry"}
    assert served > 0 or number < 100  # a busy machine may kill a few before they have written
    # Their unfinished files are deleted when a store is opened, once their processes have surely
    # ended.
    for path in temporaries:
        os.utime(path, (time.time() - 120,) * 2)
    kvp.BlockStore(tmp_path).close()
    assert list(tmp_path.glob(".writing-*")) == []
