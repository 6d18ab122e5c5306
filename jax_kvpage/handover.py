"""Host calls that hand a sequence over to another process on the same machine.

One process prefills, another decodes: prefill/decode disaggregation, as in DistServe (Zhong et al.,
OSDI 2024) and Splitwise (Patel et al., ISCA 2024), but over shared memory instead of a network.
"""

import functools
import socket
from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np

from jax_kvpage._arrays import as_bool, host_int
from jax_kvpage._closing import Closing
from jax_kvpage._descriptors import (
    check_socket,
    close_all,
    receive_descriptors,
    send_descriptors,
)
from jax_kvpage._native import Decision
from jax_kvpage._native import Handover as NativeHandover
from jax_kvpage._native_pool import NativePool, checked
from jax_kvpage._queue import Queue
from jax_kvpage._values import as_text
from jax_kvpage.cache import KVCache
from jax_kvpage.errors import wait_for

__all__ = ["Handover", "HandoverCalls"]


class HasFileno(Protocol):
    """An object with a file descriptor, such as an open file."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


# An open file, or its descriptor.
Descriptor = int | HasFileno


class Handover(Closing):
    """A sequence in separate memory that can be sent to another process on the same machine.

    On CPU it is a file (a memfd) with the blocks of this sequence and a header with its token ids,
    and nothing else. It is sealed: nobody can write, shrink or grow it any more. On a GPU, the file
    has only the header, and each block is a shareable handle of the driver with a descriptor of its
    own. The descriptors are sent through a Unix socket::

        with pool.export_blocks(slot, cache) as sent:
            sent.send(connection)

        with Handover.receive(connection) as received:
            slot, cache = pool.import_blocks(cache, received)

    It is closed by `close`, at the end of a `with` block, or when it is garbage-collected. The
    memory is freed when no process has its descriptors or blocks any more. Until then it is charged
    (in cgroups, too) to the process that created it.

    The CUDA driver has no seals: whoever receives a handle could write to the memory. The ops of
    this package never do, in the receiver or in the sender, but hand over only to processes that
    you trust.
    """

    def __init__(self, descriptor: Descriptor | Sequence[Descriptor]) -> None:
        """Checks and opens descriptors received from another process.

        Args:
            descriptor: the descriptor of the file, or an object that has one; for a sequence in GPU
                memory a list of all descriptors, as in `filenos`. They are duplicated; the caller
                must close the originals.

        Raises:
            ValueError: not a file made by `export_blocks`: the message says what is wrong (another
                kind of file, missing seals, a damaged header, missing descriptors).
            KVPageError: too many open descriptors in this process (`ulimit -n`).
        """
        several: Sequence[Any] = (
            descriptor if isinstance(descriptor, list | tuple) else [descriptor]
        )
        self._native = checked(NativeHandover.receive, [_number(fd) for fd in several])

    @classmethod
    def receive(cls, connection: socket.socket) -> Self:
        """Waits for and receives what `send` sends at the other end of a Unix socket.

        Args:
            connection: a connected Unix socket that preserves order (SOCK_STREAM or
                SOCK_SEQPACKET), blocking or with a timeout. Nothing after the handover is read.

        Raises:
            ValueError: not a Unix socket; something else was sent; or as for `Handover(...)`.
            ConnectionError: the sender closed the connection too early.
            OSError: the socket failed, or this process has too many open descriptors
                (`ulimit -n`).
        """
        check_socket("Handover.receive", connection)
        descriptors = receive_descriptors(connection)
        try:
            return cls(descriptors)
        finally:
            close_all(descriptors)

    @classmethod
    def _of(cls, native: NativeHandover) -> Self:
        made = cls.__new__(cls)
        made._native = native
        return made

    def _open(self) -> NativeHandover:
        if self._native.closed:
            raise ValueError("the handover is closed")
        return self._native

    def send(self, connection: socket.socket) -> None:
        """Sends the sequence through a Unix socket; the other end calls `receive`.

        The kernel passes at most 253 descriptors in a message, so this may send several.

        Args:
            connection: a connected Unix socket that preserves order (SOCK_STREAM or
                SOCK_SEQPACKET), blocking or with a timeout.

        Raises:
            ValueError: not a Unix socket, or the handover is closed.
            OSError: the socket failed.
        """
        check_socket("Handover.send", connection)
        send_descriptors(connection, self._open().filenos())

    def fileno(self) -> int:
        """The descriptor of the file, for `socket.send_fds`; it is closed with this object.

        On CPU this is all that has to be sent. On a GPU the file has only the header.
        """
        return self._open().filenos()[0]

    def filenos(self) -> list[int]:
        """All descriptors: the file's, and on a GPU one for each block. They are closed with this
        object.
        """
        return self._open().filenos()

    @property
    def num_tokens(self) -> int:
        """The number of tokens."""
        return self._open().num_tokens

    @property
    def token_ids(self) -> np.ndarray:
        """The token ids, int32[num_tokens]."""
        return np.asarray(self._open().token_ids, np.int32)

    @property
    def num_bytes(self) -> int:
        """Bytes of its blocks, including the unused part of the last ones."""
        return self._open().num_bytes

    @property
    def bytes_copied(self) -> int:
        """Bytes of blocks that `export_blocks` copied: all of them, or 0."""
        return self._open().copied

    @property
    def fingerprint(self) -> str:
        """The sender's fingerprint of the model."""
        return self._open().fingerprint

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._native.closed

    def close(self) -> None:
        """Closes the descriptors. Blocks that a pool has imported stay. Safe to call again."""
        self._native.close()

    def __repr__(self) -> str:
        what = "closed" if self.closed else f"{self.num_tokens} tokens, {self.num_bytes} bytes"
        return f"<Handover {what}>"


class HandoverCalls:
    """The calls of `KVPool` that hand sequences over."""

    _native: NativePool
    _pool: Any
    _queue: Queue

    def export_blocks(
        self, slot: int, cache: KVCache | None = None, *, fingerprint: str = ""
    ) -> Handover:
        """Exports a slot's committed tokens, so that another process can continue to decode them.

        A slot that was acquired with `handover=True` has its blocks in a separate file already (on
        a GPU, each block is a separate allocation): the file is sealed, and nothing is copied.
        Afterwards the slot's blocks are read-only, the room after its tokens is unmapped, and
        programs that append to its last partial block are refused. Usually the slot is released
        then. To continue in it, `truncate` it to its length, which makes a private copy of that
        block, and map new room with `extend`. If not all of the slot's blocks are in its file
        (because some were shared and then written again), or if it has a live view, the blocks are
        copied.

        The blocks of any other slot are copied once, and the slot does not change.

        For other transports (`jax.experimental.transfer`, NIXL, a network), `read_kv` returns a
        sequence as arrays and `append_kv` writes them to a slot; `memory_ranges` gives addresses.

        Args:
            slot: an occupied slot.
            cache: the newest cache: the call waits for the program that returned it. None if the
                committed tokens are known to be written.
            fingerprint: identifies the model and its weights, at most 1024 bytes of UTF-8;
                `import_blocks` must get the same.

        Returns:
            The sequence, ready to be sent.

        Raises:
            OutOfBlocks: the system has no memory for a copy.
            KVPageError: the slot is not occupied, has no committed tokens or some that are not
                written, has dropped its beginning (`drop_before`), or, with `handover=True`, has
                written more than is committed; the GPU's memory cannot be shared, as in some
                containers; too many open descriptors (`ulimit -n`). Nothing has changed.
            DeviceFault: an earlier program failed on the device.
            ValueError: a slot that does not exist, a cache of another spec, a pool over a mesh.
            PoolClosed: the pool is closed.
        """
        self._native.refuse_mesh("export_blocks")
        slot = host_int("export_blocks: slot", slot)
        as_text("export_blocks: fingerprint", fingerprint)
        if cache is not None:
            self._queue.check_cache("export_blocks", cache)
            wait_for((cache.epoch, cache.lengths))
        return Handover._of(self._native.call(self._pool.export_blocks, slot, fingerprint))

    def import_blocks(
        self,
        cache: KVCache,
        handover: Handover | Descriptor | Sequence[Descriptor],
        *,
        fingerprint: str = "",
        wait: bool = False,
    ) -> tuple[int, KVCache]:
        """Occupies a slot with a sequence that another process has handed over.

        Full blocks are mapped read-only without copying, like blocks shared by slots; the tokens of
        a last, partial block are copied, so that decoding can continue after them, bit for bit as
        in the sender. The slot can be forked, truncated, swapped and released like any other. It is
        not in the prefix cache. The blocks count against the capacity, but their memory belongs to
        the sender (`stats().received`); it stays when the sender exits.

        Both pools must have the same layers, heads, head_dim, storage type, layout and
        block_tokens, and be in the same memory: on CPU, or on one GPU. The seals, size, header,
        shape and fingerprint are checked; the values are not, so hand over only between processes
        that trust each other.

        Args:
            cache: the newest cache.
            handover: a `Handover`; or what `socket.recv_fds` returned: a descriptor, an object that
                has one, or on a GPU a list of them. The caller must close it.
            fingerprint: must match the sender's.
            wait: wait for draining slots and blocks if there is too little otherwise.

        Returns:
            (slot, cache). The slot's length is the number of tokens, which are committed
            (`Handover.token_ids`); `extend` makes room for more.

        Raises:
            OutOfBlocks: not enough blocks left in the capacity; nothing has changed.
            OutOfSlots: no free slot; nothing has changed.
            ValueError: a file that was not made and sealed by `export_blocks`, is damaged or has
                another shape or fingerprint; a sequence on another device; other descriptors; a
                cache of another spec; a pool over a mesh.
            KVPageError: too few memory mappings left (vm.max_map_count).
            DeviceFault: an earlier program failed on the device.
            PoolClosed: the pool is closed.
        """
        self._native.refuse_mesh("import_blocks")
        self._queue.check_cache("import_blocks", cache)
        as_text("import_blocks: fingerprint", fingerprint)
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


def _number(descriptor: Any) -> int:
    fd = descriptor.fileno() if hasattr(descriptor, "fileno") else descriptor
    return host_int("Handover: descriptor", fd, low=0)
