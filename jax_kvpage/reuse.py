"""The host call that reuses computed segments at other positions."""

import functools
from collections.abc import Sequence
from typing import Any, overload

import jax
import numpy as np

from jax_kvpage import _native
from jax_kvpage._arrays import as_bool, host_ints
from jax_kvpage._edit_rows import edit_rows
from jax_kvpage._native_pool import NativePool
from jax_kvpage._queue import Queue
from jax_kvpage.cache import KVCache
from jax_kvpage.ops.copy_rotated import copy_rotated
from jax_kvpage.spec import CacheSpec

__all__ = ["ReuseCalls"]


@functools.cache
def _program(interleaved: bool) -> Any:
    def run(cache: KVCache, own: jax.Array, copies: jax.Array, inv_freq: jax.Array) -> KVCache:
        return copy_rotated(cache, own, copies, inv_freq, interleaved)

    return jax.jit(run)


def _frequencies(inv_freq: Any, spec: CacheSpec) -> np.ndarray:
    """Checks inv_freq and converts it to float32 [num_layers, pairs]."""
    array = np.asarray(inv_freq)
    most = spec.head_dim // 2
    shape = array.shape[:-1] in ((), (spec.num_layers,)) and array.ndim > 0
    if not shape or not np.issubdtype(array.dtype, np.floating) or array.shape[-1] > most:
        raise ValueError(
            f"reuse_segment: inv_freq: wanted floats [n] or [num_layers={spec.num_layers}, n] with "
            f"n at most head_dim / 2 = {most}, got {array.dtype}{list(array.shape)}"
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("reuse_segment: inv_freq: wanted finite numbers")
    return np.ascontiguousarray(np.broadcast_to(array, (spec.num_layers, array.shape[-1])))


class ReuseCalls:
    """The call of `KVPool` that copies keys and values of sequences to other positions.

    As in CacheBlend (Yao et al., 2024) and EPIC (Hu et al., 2024), texts that many requests quote,
    for example retrieved documents, are computed once and reused anywhere in a prompt.
    """

    spec: CacheSpec
    _native: NativePool
    _pool: Any
    _queue: Queue

    @overload
    def reuse_segment(
        self,
        cache: KVCache,
        slot: int,
        source: int,
        begin: int,
        count: int,
        *,
        inv_freq: Any,
        interleaved: bool = False,
    ) -> KVCache: ...

    @overload
    def reuse_segment(
        self,
        cache: KVCache,
        slot: Sequence[int],
        source: Sequence[int],
        begin: Sequence[int],
        count: Sequence[int],
        *,
        inv_freq: Any,
        interleaved: bool = False,
    ) -> KVCache: ...

    def reuse_segment(
        self,
        cache: KVCache,
        slot: Any,
        source: Any,
        begin: Any,
        count: Any,
        *,
        inv_freq: Any,
        interleaved: bool = False,
    ) -> KVCache:
        """Appends segments of other sequences, moved to new positions: an approximation.

        Tokens `begin` to `begin + count - 1` of `source` become the next `count` tokens of `slot`,
        in all layers, without running the model. Their positions are exact: keys are rotated by the
        distance (RoPE). Their contents are not what the model would have computed: each token has
        attended to the tokens before it in `source`, not to those before it in `slot`. To lower
        the error, run the first tokens of a segment through the model in place and reuse only the
        rest; `benchmarks/README.md` has figures. If the context before the segment differs, no
        reused token is exact.

        The result does not enter the prefix cache: tokens committed to this sequence from now on
        are never found by `acquire_prefix`, nor saved. The same holds for forks that contain such
        tokens. Tokens committed earlier are still found. Commit the ids of the segment after this
        call.

        Models: the angle of each pair of key elements must be the position times a constant. That
        holds for plain RoPE and for "linear", "llama3" and "yarn" scaling, whose factor on queries
        and keys does not matter here; with "dynamic" scaling it holds up to the trained length.
        ALiBi slopes are applied when keys are read, so use frequencies of 0 with ALiBi.

        Args:
            cache: the newest cache.
            slot: an occupied slot, or a list; each must have room mapped for `count` more tokens
                (`extend`).
            source: another occupied slot, or a list. It is not changed, and must not be released
                before the call.
            begin: first token to copy, or a list.
            count: number of tokens, or a list. They must be committed to `source`.
            inv_freq: floats [n] or [num_layers, n], n at most head_dim / 2: the angle between two
                neighbouring positions, for each pair of elements of a key. Zeros for layers without
                RoPE. Elements after the first 2n are copied unchanged (partial rotary embedding).
            interleaved: whether pair i is elements 2i and 2i + 1 (GPT-J), instead of i and i + n.

        Returns:
            The next cache, in which the slots are `count` tokens longer.

        Raises:
            ValueError: lists of different lengths, more tokens than are committed, a slot that does
                not exist or is named twice, a slot that is both target and source, a malformed
                inv_freq, a cache of another spec.
            KVPageError: a slot is not occupied, or the tokens were dropped (`drop_before`).
            DeviceFault: an earlier program failed on the device; nothing has changed.
            PoolClosed: the pool is closed.
            jax.errors.JaxRuntimeError: at run time: a stale cache, no room, tokens that are not
                written, or a slot with more committed tokens than its length. On CUDA, DeviceFault.
        """
        self._native.refuse_mesh("reuse_segment")
        self._queue.check_cache("reuse_segment", cache)
        named = {"slot": slot, "source": source, "begin": begin, "count": count}
        lists = {name: host_ints(f"reuse_segment: {name}", x)[0] for name, x in named.items()}
        if len({len(x) for x in lists.values()}) != 1:
            sizes = ", ".join(f"{len(x)} of {name}" for name, x in lists.items())
            raise ValueError(f"reuse_segment: wanted one number of each kind per copy, got {sizes}")
        frequencies = _frequencies(inv_freq, self.spec)
        program = _program(as_bool("reuse_segment: interleaved", interleaved))
        targets, sources, begins, counts = lists.values()
        copies = list(zip(sources, targets, begins, counts, strict=True))
        if not copies:
            return cache
        decision = _native.Decision()
        try:
            rows = self._native.call(self._pool.start_reuse, decision, copies)
            return self._queue.call(program, cache, edit_rows(rows, 5), frequencies)
        except BaseException:
            self._pool.undo(decision)
            raise
