"""Sends and receives any number of file descriptors through a Unix socket.

The kernel passes at most 253 descriptors in one message (SCM_MAX_FD, see unix(7)). Each message
here is a frame of 16 bytes: a magic number, the total number of descriptors, and the number in
this message.
"""

import array
import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

__all__ = ["check_socket", "close_all", "receive_descriptors", "send_descriptors"]

_MOST = 253  # descriptors in one message
_FRAME = struct.Struct("<8sII")
_MAGIC = b"KVPAGEFD"
_LIMIT = 1 << 20  # descriptors in total: more than a process may have open
_PATIENCE = 60.0  # seconds


def check_socket(op: str, connection: socket.socket) -> None:
    """Raises a ValueError unless the connection is a Unix socket."""
    if not isinstance(connection, socket.socket) or connection.family != socket.AF_UNIX:
        raise ValueError(f"{op}: connection: wanted a Unix socket (AF_UNIX), got {connection!r}")


def send_descriptors(connection: socket.socket, descriptors: Sequence[int]) -> None:
    """Sends descriptors; the receiver calls `receive_descriptors`.

    Args:
        connection: a connected Unix socket that preserves order (SOCK_STREAM, SOCK_SEQPACKET),
            blocking or with a timeout.
        descriptors: at least one; they stay open.

    Raises:
        OSError: the socket failed.
    """
    for begin in range(0, len(descriptors), _MOST):
        some = array.array("i", descriptors[begin : begin + _MOST])
        frame = _FRAME.pack(_MAGIC, len(descriptors), len(some))
        _send(connection, frame, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, some)])


def _send(connection: socket.socket, frame: bytes, ancillary: list[Any]) -> None:
    until = time.monotonic() + (connection.gettimeout() or _PATIENCE)
    while True:
        try:
            sent = connection.sendmsg([frame], ancillary)
        except OSError as error:
            # Descriptors in flight count against the limit on open descriptors.
            if error.errno != errno.ETOOMANYREFS or time.monotonic() > until:
                raise
            time.sleep(0.001)
            continue
        frame, ancillary = frame[sent:], []
        if not frame:
            return


def receive_descriptors(connection: socket.socket) -> list[int]:
    """Receives what `send_descriptors` sends, and not a byte more.

    Returns:
        The descriptors, in order. The caller must close them.

    Raises:
        ConnectionError: the sender closed the connection too early.
        ValueError: something else was sent.
        OSError: the socket failed, or this process cannot open more descriptors.
    """
    received: list[int] = []
    try:
        total = 0
        while not total or len(received) < total:
            before = len(received)
            magic, said, count = _FRAME.unpack(_receive(connection, received))
            total = total or said
            fits = 0 < count <= _MOST and count == len(received) - before
            if magic != _MAGIC or said != total or not fits or not len(received) <= total <= _LIMIT:
                raise ValueError(
                    "the data on the connection is not what Handover.send sends: both ends "
                    "must send and receive in the same order"
                )
    except BaseException:
        close_all(received)
        raise
    return received


def _receive(connection: socket.socket, received: list[int]) -> bytes:
    """Receives the next frame and appends its descriptors to `received`."""
    frame = b""
    room = socket.CMSG_SPACE(_MOST * array.array("i").itemsize)
    while len(frame) < _FRAME.size:
        wanted = _FRAME.size - len(frame)
        part, ancillary, flags, _ = connection.recvmsg(wanted, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                some = array.array("i")
                some.frombytes(data[: len(data) - len(data) % some.itemsize])
                received += some
        if flags & socket.MSG_CTRUNC:
            raise OSError(
                errno.EMFILE,
                f"{os.strerror(errno.EMFILE)}: some of the descriptors that were sent are lost: a "
                "sequence in a GPU's memory needs one for each block; `ulimit -n` shows and raises "
                "how many this process may have open",
            )
        if not part:
            raise ConnectionError(
                f"the sender has closed the connection after {len(received)} descriptors of a "
                "handover"
            )
        frame += part
    return frame


def close_all(descriptors: Sequence[int]) -> None:
    """Closes descriptors; errors are ignored."""
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)
