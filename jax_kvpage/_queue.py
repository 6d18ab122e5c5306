"""Host verbs: the host decides, queues a program, and undoes the decision if that fails.

A verb such as `acquire` decides in C++ immediately; the cache value follows when the queued program
has run. All verbs queue the same op, `edit_slots`, each with its own list of edits and copies.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpage import _native
from jax_kvpage._cache_checks import FIELDS, arrays_of, check_array, check_devices, check_newest
from jax_kvpage._compat import guards_transfers, is_ready, is_tracing, no_mesh
from jax_kvpage._edit_rows import edit_rows, unshared_tokens
from jax_kvpage._native import Code
from jax_kvpage._native_pool import NativePool
from jax_kvpage.cache import KVCache
from jax_kvpage.errors import shortened, wait_for
from jax_kvpage.ops.edit_slots import VACATE, edit_slots

__all__ = ["WAIT_SLICE", "PrefixRequest", "Queue"]

# Seconds between checks while waiting, for Ctrl-C and for programs that failed.
WAIT_SLICE = 0.1


@functools.cache
def _program(verb: str, marked: bool) -> Any:
    """The compiled program of a verb; `marked` adds a result that shows when it has run."""

    def run(cache: KVCache, own: jax.Array, edits: jax.Array, copies: jax.Array) -> Any:
        cache = edit_slots(cache, own, edits, copies, verb)
        # Not the epoch itself, because the cache may be donated to the next program.
        return cache, cache.epoch + jnp.uint32(0) if marked else None

    return jax.jit(run)


@functools.cache
def _marker() -> Any:
    """A trivial program to wait for."""
    return jax.jit(lambda x: x + 1)


class PrefixRequest(NamedTuple):
    """Arguments of `acquire_prefix`, in the order of the compiled function."""

    ids: list[np.ndarray]
    num_tokens: list[int]
    space: str
    whole: bool
    unit: int
    least: int


class Queue:
    """The programs that `KVPool` queues on its device.

    Attributes:
        waits: the number of claims that waited for slots to drain.
    """

    def __init__(self, native: NativePool) -> None:
        self._native = native
        self._own = self.put(np.asarray([native.pool.id, 0], np.int32))
        self._no_copies = self.put(edit_rows([], 4))
        # For each released slot, an array that its release program computes.
        self._releases: dict[int, jax.Array] = {}
        self.waits = 0

    def put(self, array: np.ndarray) -> jax.Array:
        """Copies an array to the pool's device."""
        return jax.device_put(array, self._native.placement)

    def first_cache(self, generation: Any) -> KVCache:
        """The first cache of a generation.

        Args:
            generation: the result of `new_generation` of the native pool.
        """
        number, epoch, lengths = generation
        return KVCache(
            handle=self.put(np.asarray([self._native.pool.id, number], np.int32)),
            epoch=self.put(np.asarray([epoch], np.uint32)),
            lengths=self.put(np.asarray(lengths, np.int32)),
            spec=self._native.spec,
        )

    def check_cache(self, op: str, cache: KVCache) -> None:
        """Raises a ValueError unless a host call can use this cache."""
        check_newest(op, cache, self._native)
        # Must happen before the pool decides, so not when the edits are queued.
        self._check_arrays(op, cache)

    def _check_arrays(self, op: str, cache: KVCache) -> None:
        """Raises a ValueError for arrays of another shape or on another device."""
        shapes = ((2,), (1,), (cache.spec.max_slots,))
        for name, array, shape in zip(FIELDS, arrays_of(cache), shapes, strict=True):
            check_array(op, name, array, shape)
            check_devices(op, name, array, self._native.device)

    def claim(self, op: str, attempt: Callable[[], _native.Claim], wait: bool = False) -> Any:
        """Asks the pool for slots or blocks.

        Args:
            op: the call's name.
            attempt: tries once to claim everything; all or nothing.
            wait: whether to wait for released slots to drain and try again.

        Returns:
            The successful claim.
        """
        waited = False
        while True:
            claim = self._native.call(attempt)
            if claim.ok:
                if self._native.mirrored:
                    self._native.warn()
                return claim
            if claim.code is not Code.RESOURCE_EXHAUSTED or not wait or claim.draining == 0:
                raise self._native.failed_claim(op, claim)
            self.waits += not waited
            waited = True
            self._check_drains(op, claim)
            self._native.call(self._native.pool.wait_for_drain, WAIT_SLICE)

    def _check_drains(self, op: str, claim: _native.Claim) -> None:
        """Raises if no draining slot can become free while the caller waits."""
        if self._native.pool.swap_writes() > 0:
            return
        done = {slot: marker for slot, marker in self._releases.items() if is_ready(marker)}
        held, failed = [], []
        for row in self._native.call(self._native.pool.rows):
            if not row.draining:
                continue
            marker = done.get(row.slot)
            # If the marker is unchanged, the slot was not released again before the rows were read.
            ran = marker is not None and self._releases.get(row.slot) is marker
            if row.views:
                held.append(row.slot)
            elif ran and not row.vacated:
                failed.append(row.slot)
            else:
                return
        for slot in failed:
            wait_for(done[slot])  # raises the error of its program, on CPU
        if held or failed:
            raise self._native.failed_claim(op, claim, held, failed)

    # A signal handler may raise after any call, including one that has changed the pool. It cannot
    # raise between the end of `acquire` or `release` and the caller, where nothing is called.

    def acquire(
        self, cache: KVCache, num_tokens: list[int], wait: bool, handover: bool = False
    ) -> tuple[list[int], KVCache]:
        """Occupies a slot for each entry; all or none. Undone if anything raises."""
        if handover:
            self._native.refuse_mesh("acquire: handover")
        decision, pool = self._native.decision(), self._native.pool
        ask = pool.acquire_handover if handover else pool.acquire
        try:
            attempt = functools.partial(ask, decision, num_tokens)
            slots = self.claim("acquire", attempt, wait).slots
            cache = self.run("acquire", cache, decision.edits)
            return slots, cache
        except BaseException:
            self._native.pool.undo(decision)
            raise

    def release(self, cache: KVCache, slots: Sequence[int]) -> KVCache:
        """Vacates slots. Undone if anything raises before the program is queued."""
        decision = self._native.decision()
        try:
            for slot in slots:
                self.forget_release(slot)
            edits = [(VACATE, slot, 0, -1) for slot in slots]
            self._native.call(self._native.pool.start_edits, decision, "release", edits)
            return self.run("release", cache, decision.edits)
        except BaseException:
            self._native.pool.undo(decision)
            raise

    def fork(
        self,
        verb: str,
        cache: KVCache,
        requests: Sequence[tuple[int, int]],
        released: Sequence[int],
        arrange: Callable[[list[int]], list[int]] = list,
    ) -> tuple[list[int], KVCache]:
        """Forks (donor, tokens) and vacates slots; all or none. Undone if anything raises.

        `arrange` turns the new slots into the call's result.
        """
        decision = self._native.decision()
        try:
            for slot in released:
                self.forget_release(slot)
            attempt = functools.partial(self._native.pool.fork, decision, verb, requests, released)
            claim = self.claim(verb, attempt)
            slots = arrange(claim.slots)
            copies = unshared_tokens([donor for donor, _ in requests], claim)
            cache = self.run(verb, cache, decision.edits, copies)
            return slots, cache
        except BaseException:
            self._native.pool.undo(decision)
            raise

    def acquire_prefix(self, cache: KVCache, request: PrefixRequest) -> tuple[Any, KVCache]:
        """Occupies slots with the cached prefix of each request; all or none. Undone on errors.

        Returns:
            The claim (slots, tokens, leaders) and the next cache.
        """
        verb = "acquire_prefix"
        decision = self._native.decision()
        try:
            attempt = functools.partial(self._native.pool.acquire_prefix, decision, *request)
            claim = self.claim(verb, attempt)
            copies = unshared_tokens(claim.sources, claim)
            return claim, self.run(verb, cache, decision.edits, copies)
        except BaseException:
            self._native.pool.undo(decision)
            raise

    def truncate(self, cache: KVCache, slots: Sequence[int], num_tokens: Sequence[int]) -> KVCache:
        """Truncates slots; all or none. Undone if anything raises."""
        decision = self._native.decision()
        try:
            attempt = functools.partial(self._native.pool.truncate, decision, slots, num_tokens)
            self.claim("truncate", attempt)
            return self.run("truncate", cache, decision.edits)
        except BaseException:
            self._native.pool.undo(decision)
            raise

    def drop_before(
        self,
        cache: KVCache,
        slots: Sequence[int],
        num_tokens: Sequence[int],
        stamp: tuple[int, int],
    ) -> KVCache:
        """Drops the beginnings of slots; all or none. Undone if anything raises, except that on
        CUDA what has been unmapped stays dropped.

        Args:
            cache: the newest cache, checked.
            slots: occupied slots.
            num_tokens: for each slot, the first token to keep.
            stamp: on CUDA, the cache's generation and epoch, which are checked before anything is
                unmapped.

        Returns:
            The next cache.
        """
        decision = self._native.decision()
        try:
            self._native.call(self._native.pool.drop_before, decision, slots, num_tokens, *stamp)
            return self.run("drop_before", cache, decision.edits)
        except BaseException:
            self._native.pool.undo(decision)
            raise

    def forget_release(self, slot: int) -> None:
        """Drops a slot's old marker: `_releases` has only the marker of its latest release."""
        self._releases.pop(slot, None)

    def released(self, slot: int) -> jax.Array | None:
        """The marker of the program that releases a slot if it has run or failed, else None."""
        marker = self._releases.get(slot)
        return marker if marker is not None and is_ready(marker) else None

    def run(
        self,
        verb: str,
        cache: KVCache,
        edits: Sequence[tuple[int, int, int, int]],
        copies: Sequence[tuple[int, int, int, int]] = (),
    ) -> KVCache:
        """Queues the program for a decision of the host.

        Args:
            verb: name of the call.
            cache: the newest cache, checked.
            edits: (opcode, slot, length, donor) for each slot of the decision. The caller undoes
                the decision if this raises.
            copies: (source, target, first token, number of tokens).

        Returns:
            The next cache.
        """
        if not edits and not copies:
            return cache
        vacated = [slot for opcode, slot, *_ in edits if opcode == VACATE]
        program = _program(verb, bool(vacated) or self._marks(edits))
        cache, marker = self.call(program, cache, *self._rows(edits, copies))
        if marker is not None:
            self._releases.update(dict.fromkeys(vacated, marker))
            self._note(marker)
        return cache

    def _rows(self, edits: Sequence[Any], copies: Sequence[Any]) -> tuple[Any, Any]:
        """The arguments of a decision's program."""
        return edit_rows(edits, 4), edit_rows(copies, 4) if copies else self._no_copies

    def call(self, program: Any, cache: KVCache, *arrays: Any) -> Any:
        """Calls a program of (cache, handle of this pool, *arrays) on the pool's device."""
        try:
            # Pass NumPy arrays as they are: jit copies them to the device faster than device_put.
            if guards_transfers():
                arrays = tuple(map(self.put, arrays))
            with no_mesh():  # a mesh set by the caller must not spread this over devices
                return program(cache, self._own, *arrays)
        except Exception as error:
            short = shortened(error)
            if short is not error:
                raise short from None
            raise

    def _marks(self, edits: Sequence[tuple[int, int, int, int]]) -> bool:
        """Whether to keep a marker for a program that releases nothing."""
        del edits
        return False

    def _note(self, marker: jax.Array) -> None:
        """Called with the marker of a queued program."""

    def quiesce(self) -> None:
        """Waits for running programs that must not be refused half-way; here there are none."""

    def restart(self) -> None:
        """Forgets programs of older generations."""
        self._releases.clear()

    def wait_for(self, cache: KVCache) -> None:
        """Waits for the program that returned a cache; raises its error."""
        wait_for((cache.epoch, cache.lengths))

    def settle(self) -> None:
        """Waits until all programs queued on the device have run."""
        if is_tracing():
            return
        with no_mesh():
            wait_for(_marker()(self.put(np.zeros((), np.int32))))
