"""Host calls that hand a sequence over to another process of this machine.

One process prefills, another decodes: prefill/decode disaggregation, after DistServe (Zhong et al.,
OSDI 2024) and Splitwise (Patel et al., ISCA 2024), here over shared memory instead of a network.
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
from jax_kvpage.cache import KVCache
from jax_kvpage.errors import wait_for

__all__ = ["Handover", "HandoverCalls"]


class HasFileno(Protocol):
    """An open file, or something else with a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


# What stands for a file that is open.
Descriptor = int | HasFileno


class Handover(Closing):
    """A sequence in memory of its own, to be sent to another process of this machine.

    On CPU it is a file (a memfd) with the blocks of this sequence and a header with its token ids,
    and nothing else. It is sealed: nobody can write, shrink or grow it any more. On a GPU the file
    has the header, and each block comes as a shareable handle of the driver, a descriptor more. All
    of them go through a Unix socket::

        with pool.export_blocks(slot, cache) as sent:
            sent.send(connection)

        with Handover.receive(connection) as received:
            slot, cache = pool.import_blocks(cache, received)

    It is closed by `close`, at the end of a `with` block, or when it is collected. The memory goes
    back to the system when no process has the descriptors or blocks of it any more. Until then it
    is accounted (in cgroups, too) to the process that made it.

    The driver of a GPU has no seals: who receives a handle could write the memory. Here programs
    are kept from it, in the receiver and in the sender; hand over to processes that you trust.
    """

    def __init__(self, descriptor: Descriptor | Sequence[Descriptor]) -> None:
        """Checks and takes over what another process has sent.

        Args:
            descriptor: of the file, or an object that has one; for a sequence in a GPU's memory a
                list of all, as in `filenos`. They are duplicated and stay the caller's: close them.

        Raises:
            ValueError: no file that `export_blocks` has made: the message says what is wrong
                (another kind of file, missing seals, a damaged header, missing descriptors).
            KVPageError: the process may not have so many descriptors open (`ulimit -n`).
        """
        several: Sequence[Any] = (
            descriptor if isinstance(descriptor, list | tuple) else [descriptor]
        )
        self._native = checked(NativeHandover.receive, [_number(fd) for fd in several])

    @classmethod
    def receive(cls, connection: socket.socket) -> Self:
        """Receives what `send` sends at the other end of a Unix socket, and waits for it.

        Args:
            connection: a connected Unix socket that keeps order (SOCK_STREAM or SOCK_SEQPACKET),
                blocking or with a timeout. No byte behind the handover is read.

        Raises:
            ValueError: no Unix socket; something else was sent; or as for `Handover(descriptors)`.
            ConnectionError: the sender has closed the connection before the end.
            OSError: of the socket; or this process may not have so many descriptors open
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
        """Sends it through a Unix socket, in as many messages as its descriptors take.

        The kernel passes at most 253 descriptors with a message. The other end calls `receive`.

        Args:
            connection: a connected Unix socket that keeps order (SOCK_STREAM or SOCK_SEQPACKET),
                blocking or with a timeout.

        Raises:
            ValueError: no Unix socket; the handover is closed.
            OSError: of the socket.
        """
        check_socket("Handover.send", connection)
        send_descriptors(connection, self._open().filenos())

    def fileno(self) -> int:
        """The descriptor of the file, for `socket.send_fds`; it is closed with this object.

        It is all there is to send of a sequence on CPU. On a GPU it has the header only.
        """
        return self._open().filenos()[0]

    def filenos(self) -> list[int]:
        """All descriptors: the file's, and on a GPU one for each block. They are closed with this
        object.
        """
        return self._open().filenos()

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
        """Gives the descriptors up. Blocks that a pool has of it stay. Safe to call again."""
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
        """Takes a slot's committed tokens out, for another process to decode on.

        Blocks of a slot that was acquired with `handover=True` are in a file of their own already
        (on a GPU each has an allocation of its own): it is sealed, and nothing is copied. From then
        on the slot's blocks can only be read; it has given up the room behind its tokens, and
        programs that append to its last partial block are refused. `truncate` to its length makes a
        private copy of that block, `extend` maps new room, and the sequence goes on; usually it is
        released. If the slot's blocks are not all in its file (it has shared some, and written them
        again), or a view of it is alive, they are copied.

        Blocks of any other slot are copied once, and nothing changes for the slot.

        What other transports send (`jax.experimental.transfer`, NIXL, a network) can be had with
        `read_kv` as arrays, and put into a slot with `append_kv`; `memory_ranges` says where it is.

        Args:
            slot: an occupied slot.
            cache: the newest cache: the call waits for the program that made it. None: the
                committed tokens are known to be written.
            fingerprint: names the model and its weights, at most 1024 bytes of UTF-8;
                `import_blocks` wants the same.

        Returns:
            What there is to send.

        Raises:
            OutOfBlocks: the system has no memory for a copy.
            KVPageError: the slot is not occupied, has no committed tokens or some that are not
                written, has dropped its beginning (`drop_before`), or, with `handover=True`, has
                written more than is committed; a GPU whose memory cannot be shared, as in some
                containers; too few descriptors left (`ulimit -n`). Nothing has changed.
            DeviceFault: an earlier program failed on the device.
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
        handover: Handover | Descriptor | Sequence[Descriptor],
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
        block_tokens; and their memory is in the same place: on CPU, or on one GPU. What was
        received is checked: its seals, its size, its header, its shape and its fingerprint. The
        values are not: hand over between processes that trust each other's results.

        Args:
            cache: the newest cache.
            handover: a `Handover`; or what was received with `socket.recv_fds`: a descriptor, an
                object that has one, or on a GPU a list of them. It stays the caller's: close it.
            fingerprint: what the sender must have said of the model.
            wait: wait for slots and blocks that drain.

        Returns:
            (slot, cache). The slot's length is the number of tokens, which are committed
            (`Handover.token_ids`); `extend` makes room for more.

        Raises:
            OutOfBlocks: not enough blocks left in the capacity; nothing has changed.
            OutOfSlots: no free slot; nothing has changed.
            ValueError: no file that `export_blocks` has made and sealed, a damaged one, one of
                another shape or fingerprint, a sequence on another device, descriptors of something
                else, a cache of another spec, a pool over a mesh.
            KVPageError: too few memory mappings left (vm.max_map_count).
            DeviceFault: an earlier program failed on the device.
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


def _number(descriptor: Any) -> int:
    fd = descriptor.fileno() if hasattr(descriptor, "fileno") else descriptor
    return host_int("Handover: descriptor", fd, low=0)


def _check_fingerprint(op: str, fingerprint: Any) -> None:
    if not isinstance(fingerprint, str):
        raise ValueError(f"{op}: fingerprint: wanted a str, got {fingerprint!r}")
