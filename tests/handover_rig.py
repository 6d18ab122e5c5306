"""Sequences that are handed over to another process, and the process that receives them."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import pathlib
import socket
import struct
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from prefix_rig import spec_of
from store_rig import decode
from subprocesses import start_python
from swap_rig import SwapRig

import jax_kvpage as kvp

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class HandoverRig(SwapRig):
    """A rig whose sequences are handed over."""

    def begin_handover(self, ids: list[int], room: int | None = None) -> int:
        """Starts a sequence whose slot keeps its blocks in a separate file."""
        slot, self.cache = self.pool.acquire(self.cache, room or len(ids), handover=True)
        self.ids[slot] = []
        self.write(slot, ids)
        return slot

    def export(self, slot: int, **options: Any) -> kvp.Handover:
        return self.pool.export_blocks(slot, self.cache, **options)

    def take(self, received: Any, **options: Any) -> int:
        """Imports a sequence."""
        known = received if isinstance(received, kvp.Handover) else kvp.Handover(received)
        ids = [int(token) for token in known.token_ids]
        if known is not received:
            known.close()
        slot, self.cache = self.pool.import_blocks(self.cache, received, **options)
        assert slot not in self.ids
        self.ids[slot] = ids
        return slot


def serve(path: str) -> None:
    """Runs the receiving process: imports a sequence for each message and continues decoding it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        while True:
            message = connection.recv(1 << 16)
            if not message:
                return
            order = json.loads(message)
            handover = kvp.Handover.receive(connection)
            changes = order.get("changes", {})
            spec = spec_of(order["layout"], jnp.dtype(order["dtype"]), **changes)
            with kvp.KVPool(spec, "16MiB", poison=True) as pool:
                rig = HandoverRig(pool)
                slot = rig.take(handover)
                handover.close()
                received = pool.stats().received
                rig.check()
                bits = [decode(rig, slot, token).tobytes().hex() for token in order["tokens"]]
                rig.check()
                rig.audit()
                connection.send(json.dumps({"bits": bits, "received": received}).encode())
                if order.get("wait"):
                    connection.recv(1)


@contextlib.contextmanager
def receiver(folder: pathlib.Path) -> Iterator[tuple[Any, socket.socket]]:
    """Starts the receiving process; yields it and the connection to it."""
    path = str(folder / "handover.socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(180)
        process = start_python("import sys, handover_rig; handover_rig.serve(sys.argv[1])", path)
        connection = None
        try:
            connection, _ = listener.accept()
            connection.settimeout(180)
            yield process, connection
        finally:
            if connection is not None:
                connection.close()
            process.kill()
            process.communicate()


def send(connection: socket.socket, handover: kvp.Handover, **order: Any) -> dict[str, Any]:
    """Sends a sequence to the receiving process and returns the answer."""
    connection.send(json.dumps(order).encode())
    handover.send(connection)
    return json.loads(connection.recv(1 << 22))


# Memory files of pools on CPU, and of the fake driver, which has one for each exported handle.
_NAMES = ("/memfd:jax_kvpage", "/memfd:fake_driver_device")


def inode_of(handover: kvp.Handover) -> int:
    """Returns the inode of the file with the first blocks."""
    return os.fstat(handover.filenos()[:2][-1]).st_ino


def holders(inode: int) -> list[int]:
    """Returns the processes that hold a memory file, through a descriptor or a mapping."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit() and _has(name, inode))


def _has(process: str, inode: int) -> bool:
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{process}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                path = f"/proc/{process}/fd/{number}"
                ours = os.readlink(path).startswith(_NAMES)
                if ours and os.stat(path).st_ino == inode:
                    return True
        with open(f"/proc/{process}/maps") as maps:
            lines = (line.split() for line in maps if any(name in line for name in _NAMES))
            return any(fields[4] == str(inode) for fields in lines)
    return False


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 & -(crc & 1))
    return crc ^ 0xFFFFFFFF


# Numbers in the header, by offset (see cc/cache/handover_header.h).
FIELDS = {
    "version": (8, "<I"),
    "begin": (16, "<q"),
    "tokens": (24, "<q"),
    "blocks": (32, "<q"),
    "stride": (40, "<q"),
    "block_bytes": (48, "<q"),
    "ranges": (56, "<q"),
    "shape_bytes": (64, "<I"),
    "fingerprint_bytes": (68, "<I"),
}


def content_of(handover: kvp.Handover) -> bytearray:
    """Returns the contents of the file; on the fake driver, of all descriptors in turn."""
    content = bytearray()
    for fd in handover.filenos():
        content += os.pread(fd, os.fstat(fd).st_size, 0)
    return content


def sign(content: bytearray) -> bytearray:
    """Sets the checksum that the header should have."""
    tokens, shape, fingerprint = (
        struct.unpack_from(FIELDS[name][1], content, FIELDS[name][0])[0]
        for name in ("tokens", "shape_bytes", "fingerprint_bytes")
    )
    end = 72 + shape + fingerprint + 4 * max(tokens, 0)
    struct.pack_into("<I", content, 12, crc32c(bytes(content[16 : min(end, len(content))])))
    return content


def change(content: bytearray, **fields: int) -> bytearray:
    """Returns a copy with other numbers in the header and a matching checksum."""
    content = bytearray(content)
    for name, value in fields.items():
        place, kind = FIELDS[name]
        struct.pack_into(kind, content, place, value)
    return sign(content)


@contextlib.contextmanager
def memory_file(content: bytes, seals: int = SEALS, size: int | None = None) -> Iterator[int]:
    """Yields a descriptor of a memfd with these contents."""
    fd = os.memfd_create("forged", os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, len(content) if size is None else size)
        for begin in range(0, len(content), 1 << 20):
            os.pwrite(fd, content[begin : begin + (1 << 20)], begin)
        if seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


def fill(rig: HandoverRig, slot: int, tokens: int, value: float) -> None:
    """Appends tokens whose keys and values all have the same value."""
    spec, dtype = rig.pool.spec, rig.input_dtype
    rows = jnp.full((tokens, spec.num_kv_heads, spec.head_dim), value, dtype)
    batch = kvp.Batch(jnp.asarray([slot]), jnp.asarray([0, tokens]))
    for layer in range(spec.num_layers):
        rig.cache = kvp.append_kv(rig.cache, rows, rows, batch, layer=layer)
    rig.cache = kvp.advance(rig.cache, batch)
    rig.pool.check(rig.cache)


def pattern_of(value: float, dtype: Any) -> bytes:
    """Returns the bytes of eight neighbouring elements with this value."""
    return array.array("B", np.full(8, value, np.dtype(dtype)).tobytes()).tobytes()
