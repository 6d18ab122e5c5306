"""Helpers for tests of stores and of the pools above them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from prefix_rig import LAYERS, PrefixRig, contents

import jax_kvpage as kvp

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn]


def soon(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Returns whether a condition becomes true within some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def decode(rig: PrefixRig, slot: int, token: int) -> NDArray[np.uint32]:
    """Runs a decode step over everything in the slot; returns the bits of the attention output."""
    ids = rig.ids[slot]
    rows = jnp.asarray(contents([*ids, token], len(ids)), rig.input_dtype)
    q = jax.random.normal(jax.random.key(len(ids)), (LAYERS, 1, 4, rows.shape[-1]), rows.dtype)
    batch = kvp.Batch(jnp.asarray([slot]), jnp.asarray([0, 1]))
    rig.pool.extend(slot, len(ids) + 1)
    outs, cache = [], rig.cache
    for layer in range(LAYERS):
        out, cache = kvp.update_and_attend(
            q[layer], rows[0, layer], rows[1, layer], cache, batch, layer=layer
        )
        outs.append(out.astype(jnp.float32))
    rig.cache = kvp.advance(cache, batch)
    rig.pool.commit(slot, [token])
    rig.ids[slot] = [*ids, token]
    return np.asarray(jnp.stack(outs)).view(np.uint32)


@contextlib.contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Another thread repeats some work meanwhile; its exceptions are raised here."""
    failures: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            while not ended.is_set():
                work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failures:
        raise failures[0]
