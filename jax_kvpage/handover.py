"""Host calls that hand a sequence over to another process of this machine.

One process prefills, another decodes: prefill/decode disaggregation, after DistServe (Zhong et al.,
OSDI 2024) and Splitwise (Patel et al., ISCA 2024), here over shared memory instead of a network.
"""

import functools
from typing import Any, Protocol, Self

import numpy as np

from jax_kvpage._arrays import as_bool, host_int
from jax_kvpage._closing import Closing
from jax_kvpage._native import Decision
from jax_kvpage._native import Handover as NativeHandover
from jax_kvpage._native_pool import NativePool, checked
from jax_kvpage._queue import Queue
from jax_kvpage.cache import KVCache
from jax_kvpage.errors import wait_for

__all__ = ["Handover", "HandoverCalls"]


class HasFileno(Protocol):
    """An open file, or something else with a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


class Handover(Closing):
    """A sequence in a sealed memory file, to be sent to another process.

    The file (a memfd) has the blocks of this sequence and a header with its token ids, and nothing
    else. It is sealed: nobody can write, shrink or grow it any more. Its descriptor goes through a
    Unix socket::

        with pool.export_blocks(slot, cache) as sent:
            socket.send_fds(connection, [b"kv"], [sent.fileno()])

    It is closed by `close`, at the end of a `with` block, or when it is collected. The memory goes
    back to the system when no process has the descriptor or blocks of it any more. Until then it
    is accounted (in cgroups, too) to the process that made it.
    """

    def __init__(self, descriptor: int | HasFileno) -> None:
        """Checks and takes over what another process has sent.

        Args:
            descriptor: of the file, or an object that has one. It is duplicated and stays the
                caller's: close it.

        Raises:
            ValueError: no file that `export_blocks` has made: the message says what is wrong
                (another kind of file, missing seals, a damaged header).
        """
        fd = descriptor.fileno() if hasattr(descriptor, "fileno") else descriptor
        number = host_int("Handover: descriptor", fd, low=0)
        self._native = checked(NativeHandover.receive, number)

    @classmethod
    def _of(cls, native: NativeHandover) -> Self:
        made = cls.__new__(cls)
        made._native = native
        return made

    def _open(self) -> NativeHandover:
        if self._native.closed:
            raise ValueError("the handover is closed")
        return self._native

    def fileno(self) -> int:
        """The descriptor of the file, for `socket.send_fds`; it is closed with this object."""
        return self._open().fileno()

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        return self._open().num_tokens

    @property
    def token_ids(self) -> np.ndarray:
        """The ids of its tokens, int32[num_tokens]."""
        return np.asarray(self._open().token_ids, np.int32)

    @property
    def num_bytes(self) -> int:
        """Bytes of its blocks, with the padding of the last ones."""
        return self._open().num_bytes

    @property
    def bytes_copied(self) -> int:
        """Bytes of blocks that `export_blocks` has copied for it: all of them, or 0."""
        return self._open().copied

    @property
    def fingerprint(self) -> str:
        """What the sender says of the model."""
        return self._open().fingerprint

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._native.closed

    def close(self) -> None:
        """Gives the descriptor up. Blocks that a pool has of the file stay. Safe to call again."""
        self._native.close()

    def __repr__(self) -> str:
        what = "closed" if self.closed else f"{self.num_tokens} tokens, {self.num_bytes} bytes"
        return f"<Handover {what}>"


class HandoverCalls:
    """The part of `KVPool` that hands sequences over."""

    _native: NativePool
    _pool: Any
    _queue: Queue

    def export_blocks(
        self, slot: int, cache: KVCache | None = None, *, fingerprint: str = ""
    ) -> Handover:
        """Makes a memory file of a slot's committed tokens, for another process to decode on.

        Blocks of a slot that was acquired with `handover=True` are in such a file already: it is
        sealed, and nothing is copied. From then on the slot's blocks can only be read; it has
        given up the room behind its tokens, and programs that append to its last partial block
        are refused. `truncate` to its length makes a private copy of that block, `extend` maps new
        room, and the sequence goes on; usually it is released. If the slot's blocks are not all in
        its file (it has shared some, and written them again), or a view of it is alive, they are
        copied.

        Blocks of any other slot are copied once, into a new file, and nothing changes for the slot.

        On CPU only. What other transports send (`jax.experimental.transfer`, NIXL, a network) can
        be had with `read_kv` as arrays, and put into a slot with `append_kv`.

        Args:
            slot: an occupied slot.
            cache: the newest cache: the call waits for the program that made it. None: the
                committed tokens are known to be written.
            fingerprint: names the model and its weights, at most 1024 bytes of UTF-8;
                `import_blocks` wants the same.

        Returns:
            The file, sealed.

        Raises:
            OutOfBlocks: the system has no memory for a copy.
            KVPageError: the slot is not occupied, has no committed tokens or some that are not
                written, has dropped its beginning (`drop_before`), or, with `handover=True`, has
                written more than is committed; a pool on a GPU. Nothing has changed.
            ValueError: a slot that does not exist, a cache of another spec, a pool over a mesh.
            PoolClosed: the pool is closed.
        """
        self._native.refuse_mesh("export_blocks")
        slot = host_int("export_blocks: slot", slot)
        _check_fingerprint("export_blocks", fingerprint)
        if cache is not None:
            self._queue.check_cache("export_blocks", cache)
            wait_for((cache.epoch, cache.lengths))
        return Handover._of(self._native.call(self._pool.export_blocks, slot, fingerprint))

    def import_blocks(
        self,
        cache: KVCache,
        handover: Handover | int | HasFileno,
        *,
        fingerprint: str = "",
        wait: bool = False,
    ) -> tuple[int, KVCache]:
        """Occupies a slot with a sequence that another process has handed over.

        Whole blocks are mapped read-only, without copying, as blocks that slots share are; the
        tokens of the last, partial block are copied, so that decoding goes on behind them, bit for
        bit as in the sender. The slot can be forked, truncated, swapped and released as any other.
        It is not in the prefix cache. The blocks count in the capacity; their memory is the
        sender's (`stats().received`), and stays when the sender ends.

        Both pools have the same shape: layers, heads, head_dim, storage type, layout and
        block_tokens. What was received is checked: its seals, its size, its header, its shape and
        its fingerprint. The values are not: hand over between processes that trust each other's
        results.

        Args:
            cache: the newest cache.
            handover: a descriptor that was received (`socket.recv_fds`), an object that has one, or
                a `Handover`. It stays the caller's: close it.
            fingerprint: what the sender must have said of the model.
            wait: wait for slots and blocks that drain.

        Returns:
            (slot, cache). The slot's length is the number of tokens, which are committed
            (`Handover.token_ids`); `extend` makes room for more.

        Raises:
            OutOfBlocks: not enough blocks left in the capacity; nothing has changed.
            OutOfSlots: no free slot; nothing has changed.
            ValueError: no file that `export_blocks` has made and sealed, a damaged one, one of
                another shape or fingerprint, a cache of another spec, a pool over a mesh.
            KVPageError: a pool on a GPU; too few memory mappings left (vm.max_map_count).
            PoolClosed: the pool is closed.
        """
        self._native.refuse_mesh("import_blocks")
        self._queue.check_cache("import_blocks", cache)
        _check_fingerprint("import_blocks", fingerprint)
        wait = as_bool("import_blocks: wait", wait)
        received = handover if isinstance(handover, Handover) else Handover(handover)
        native = received._open()
        decision = Decision()
        try:
            attempt = functools.partial(self._pool.import_blocks, decision, native, fingerprint)
            claim = self._queue.claim("import_blocks", attempt, wait)
            cache = self._queue.run("import_blocks", cache, decision.edits)
            return claim.slots[0], cache
        except BaseException:
            self._pool.undo(decision)
            raise
        finally:
            if received is not handover:
                received.close()


def _check_fingerprint(op: str, fingerprint: Any) -> None:
    if not isinstance(fingerprint, str):
        raise ValueError(f"{op}: fingerprint: wanted a str, got {fingerprint!r}")
