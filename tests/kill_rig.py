"""Processes that save, spill and swap until they are killed, for test_store_kills.py."""

from __future__ import annotations

import os
import signal
import sys
import time

from prefix_rig import PrefixRig, text
from spill_rig import rig_of
from swap_rig import SwapRig, swap_rig

import jax_kvpage as kvp

LENGTH = 320  # tokens of a sequence: 640 KiB
LIMIT = 6 << 20  # bytes of the store, few enough that it evicts too


def _save(store: kvp.BlockStore, layout: str, seed: int, ready: int) -> None:
    rig = rig_of(kvp.KVPool, store, layout, blocks=128)
    texts = [text(LENGTH, seed + i) for i in range(4)]
    for ids in texts:
        rig.release(rig.acquire(ids)[0])
    os.write(ready, b".")
    for ids in texts:
        rig.pool.save_prefixes(None, ids)
    while True:  # another namespace, so other files
        seed += 1
        rig.release(rig.acquire(texts[0], namespace=str(seed))[0])
        rig.pool.save_prefixes(None, texts[0], str(seed))


def _spill(store: kvp.BlockStore, layout: str, seed: int, ready: int) -> None:
    rig: PrefixRig = rig_of(kvp.KVPool, store, layout, blocks=48, write_ahead=1)
    slots = [rig.acquire(text(LENGTH, seed + i))[0] for i in range(2)]
    os.write(ready, b".")
    rig.release(*slots)
    while True:
        seed += 1
        rig.release(rig.acquire(text(LENGTH, seed))[0])


def _swap(store: kvp.BlockStore, layout: str, seed: int, ready: int) -> None:
    rig: SwapRig = swap_rig(kvp.KVPool, store, layout, blocks=64)
    slots = [rig.begin(text(LENGTH, seed + i)) for i in range(2)]
    os.write(ready, b".")
    while True:
        swapped = [rig.swap_out(slot, to_disk=False) for slot in slots]
        slots = [rig.swap_in(each) for each in swapped]


WORK = {"save": _save, "spill": _spill, "swap": _swap}


def kill_one(path: str, layout: str, work: str, seed: int, delay: float) -> str:
    """Forks a process that works on a store, and kills it `delay` seconds after it has started.

    This process imports what the child needs, and starts no threads.

    Returns:
        How the child ended, as text: "killed" if nothing went wrong before.
    """
    listen, ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store = kvp.BlockStore(path, LIMIT)
            WORK[work](store, layout, seed, ready)
        except BaseException as error:
            print(f"{work}: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    os.close(ready)
    begun = os.read(listen, 1)
    os.close(listen)
    if begun:
        time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return "killed" if begun and killed else f"exit status {status}"


def main() -> None:
    """Starts a process for each line of standard input: its work, its pool's layout, a seed, and
    the seconds until it is killed.
    """
    print("ready", flush=True)
    for line in sys.stdin:
        work, layout, seed, delay = line.split()
        print(kill_one(sys.argv[1], layout, work, int(seed), float(delay)), flush=True)
