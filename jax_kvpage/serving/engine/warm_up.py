"""Compiles what the engine will run: the steps of all buckets, and the programs of pool calls.

The latter are compiled by making the calls on a few tokens, in a namespace that no request uses.
Their tables are padded to powers of two, so there are only a few.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

from jax_kvpage.cache import KVCache
from jax_kvpage.errors import OutOfBlocks
from jax_kvpage.pool import KVPool
from jax_kvpage.serving.engine.packing import Operands
from jax_kvpage.serving.engine.pool_memory import PoolMemory
from jax_kvpage.serving.engine.programs import Programs
from jax_kvpage.serving.engine.sampling import NUM_FLOATS, NUM_INTS

__all__ = ["warm_up"]

_NAMESPACE = "jax_kvpage.serving warm-up"


def warm_up(
    pool: KVPool,
    cache: KVCache,
    programs: Programs,
    num_rows: int,
    num_banned: int,
    progress: Callable[[int, int], None] | None,
) -> KVCache:
    """Compiles every program and returns the newest cache.

    Args:
        pool: a pool without live requests.
        cache: the newest cache.
        programs: programs of the engine.
        num_rows: maximum sequences of a replica at one time.
        num_banned: see `EngineConfig.max_stop_token_ids`.
        progress: called with the number of programs done and the total.
    """
    rig = _Rig(pool, cache, programs, num_rows, num_banned)
    # Programs of pool calls have parts of equal size for all replicas, as large as the largest
    # part. Calls on one replica thus compile the programs for all.
    with pool.on_replica(0):
        _run_all(rig, pool, programs, num_rows, progress)
    return rig.cache


def _run_all(
    rig: "_Rig",
    pool: KVPool,
    programs: Programs,
    num_rows: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Runs all jobs of `warm_up`."""
    sizes = _sizes(num_rows)
    widest = min(num_rows, programs.max_logprobs) // 2  # maximum beams of a request
    jobs: list[Callable[[], None]] = [
        functools.partial(rig.compile, *variant) for variant in programs.variants
    ]
    jobs += [rig.small_programs]
    jobs += [rig.prefixes] if rig.shares else []
    jobs += [rig.swaps] if pool.store is not None else []
    jobs += [functools.partial(rig.releases, n) for n in sizes]
    if rig.shares:
        jobs += [functools.partial(rig.forks, n) for n in sizes]
        jobs += [functools.partial(rig.beams, n) for n in _sizes(widest - 1) if widest > 1]
    for done, job in enumerate(jobs):
        if progress is not None:
            progress(done, len(jobs))
        try:
            job()
        except OutOfBlocks:  # then this call cannot succeed later either
            rig.release_all()
    if progress is not None:
        progress(len(jobs), len(jobs))
    rig.release_all()


def _sizes(most: int) -> list[int]:
    """Numbers of rows up to `most`, one for each power of two that they are padded to."""
    return sorted({min(1 << bit, most) for bit in range((most - 1).bit_length() + 1)})


class _Rig:
    """Slots of a pool with which calls are tried."""

    def __init__(
        self, pool: KVPool, cache: KVCache, programs: Programs, num_rows: int, num_banned: int
    ) -> None:
        self._pool = pool
        self._programs = programs
        self._num_rows = num_rows
        self._all_rows = num_rows * pool.replicas
        self._num_fields = NUM_FLOATS + NUM_INTS + num_banned
        self._state = programs.initial_state(pool.spec.max_seq_len, pool.placement)
        self._slots: list[int] = []
        self.shares = PoolMemory(pool).shares
        self.cache = cache

    def compile(self, shape: tuple[int, int], num_guesses: int, scores: bool) -> None:
        """Compiles the step of a bucket."""
        self._programs.compile(shape, num_guesses, self.cache, self._state, scores)

    def small_programs(self) -> None:
        """Compiles the programs that change the sampler state and lengths."""
        self._state = self._programs.set_history(self._state, 0, [0])
        none = np.zeros(0, np.int32)
        self.cache = self._programs.set_lengths(self.cache, none, none)

    def prefixes(self) -> None:
        """Acquires slots that find nothing, full blocks, and a copied token."""
        ids = self._prompt()
        for prompt in (ids, [*ids[:-1], 2], [*ids, 1]):
            slot, found, self.cache = self._pool.acquire_prefix(
                self.cache, prompt[: self._pool.spec.max_seq_len], namespace=_NAMESPACE
            )
            self._slots.append(slot)
            self._write(slot, prompt[found : self._pool.spec.max_seq_len])
            jax.block_until_ready(self.cache)
        self.release_all()

    def swaps(self) -> None:
        """Swaps a sequence out and in."""
        ids = self._prompt()
        slot, self.cache = self._pool.acquire(self.cache, len(ids), wait=True)
        self._slots.append(slot)
        self._write(slot, ids)
        swapped, self.cache = self._pool.swap_out(self.cache, slot)
        self._slots = []
        slot, self.cache = self._pool.swap_in(self.cache, swapped, wait=True)
        self._slots.append(slot)
        self.release_all()

    def releases(self, n: int) -> None:
        """Releases several slots at once."""
        for _ in range(n):
            slot, self.cache = self._pool.acquire(self.cache, 0, wait=True)
            self._slots.append(slot)
        self.release_all()

    def forks(self, n: int) -> None:
        """Forks several siblings, with full blocks only and with a copied token."""
        if n >= self._num_rows:
            n = self._num_rows - 1
        if not n:
            return
        ids = self._prompt()
        donor, self.cache = self._pool.acquire(self.cache, len(ids), wait=True)
        self._slots.append(donor)
        self._write(donor, ids)
        for num_tokens in (len(ids) - 1, len(ids)):
            slots, self.cache = self._pool.fork(self.cache, donor, n, num_tokens)
            self.cache = self._pool.release(self.cache, slots)
            jax.block_until_ready(self.cache)
        self.release_all()

    def beams(self, n: int) -> None:
        """Replaces several beams by forks: at a block boundary, and after it with a copied token.

        Also covers beams whose slots were released before.
        """
        ids = self._prompt()
        for prompt in {len(ids): ids, len(ids) - 1: ids[:-1]}.values():
            donor, self.cache = self._pool.acquire(self.cache, len(prompt), wait=True)
            self._slots.append(donor)
            self._write(donor, prompt)
            beams, self.cache = self._pool.reorder(self.cache, [donor], [0] * (n + 1))
            self._slots = list(beams)
            beams, self.cache = self._pool.reorder(self.cache, beams, [0] * (n + 1))
            self._slots = list(beams)
            self.release_all()

    def release_all(self) -> None:
        """Releases all slots and waits."""
        slots, self._slots = self._slots, []
        if slots:
            self.cache = self._pool.release(self.cache, slots)
        jax.block_until_ready(self.cache)

    def _prompt(self) -> list[int]:
        """A prompt of one block and one token, or of the maximum length if that is less."""
        size = self._pool.spec.block_tokens
        assert size is not None
        return [0] * min(size + 1, self._pool.spec.max_seq_len)

    def _write(self, slot: int, ids: list[int]) -> None:
        """Runs tokens and commits them."""
        most = self._programs.shapes[-1][0]
        for begin in range(0, len(ids), most):
            part = np.asarray(ids[begin : begin + most], np.int32)
            step = Operands(
                part,
                np.asarray([len(part)], np.int32),
                np.asarray([slot], np.int32),
                np.asarray([self._all_rows], np.int32),
                np.zeros(1, np.int32),
                np.zeros((self._num_fields, 1), np.int32),
            )
            packed = self._programs.pack(step)
            self.cache, self._state, _ = self._programs.run(packed, 0, self.cache, self._state)
        self._pool.commit(slot, ids)
