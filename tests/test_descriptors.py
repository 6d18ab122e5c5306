"""Sending handovers and descriptors through Unix sockets: order, batches, and invalid messages."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator

import pytest
from handover_rig import HandoverRig
from prefix_rig import spec_of, text

import jax_kvpage as kvp
from jax_kvpage._descriptors import close_all, receive_descriptors, send_descriptors

KINDS = [socket.SOCK_STREAM, socket.SOCK_SEQPACKET]


@pytest.fixture(params=KINDS, ids=["stream", "seqpacket"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yields both ends of a connection; afterwards no descriptor may be left open."""
    before = len(os.listdir("/proc/self/fd"))
    one, other = socket.socketpair(socket.AF_UNIX, request.param)
    for end in (one, other):
        end.settimeout(20)
    with one, other:
        yield one, other
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("count", [1, 253, 254, 600])
def test_descriptors_arrive_in_order(pair, count: int) -> None:
    one, other = pair
    files = [os.memfd_create(str(i)) for i in range(3)]
    sent = [files[i % 3] for i in range(count)]
    send_descriptors(one, sent)
    one.send(b"behind it")
    received = receive_descriptors(other)
    assert [os.fstat(fd).st_ino for fd in received] == [os.fstat(fd).st_ino for fd in sent]
    assert not any(os.get_inheritable(fd) for fd in received)
    assert other.recv(100) == b"behind it"
    close_all(received + files)


def test_a_handover_arrives_whole(pair, make_pool) -> None:
    one, other = pair
    sender, receiver = (HandoverRig(make_pool(spec_of("fused"))) for _ in range(2))
    sent = [sender.export(sender.begin(text(n))) for n in (40, 50)]
    for handover in sent:
        handover.send(one)
    one.send(b"x")
    for handover in sent:
        with kvp.Handover.receive(other) as received:
            assert list(received.token_ids) == list(handover.token_ids)
            assert received.fileno() == received.filenos()[0] != handover.fileno()
            receiver.take(received)
        handover.close()
        with pytest.raises(ValueError, match="closed"):
            handover.send(one)
    receiver.check()
    assert other.recv(10) == b"x"
    for rig in (sender, receiver):
        rig.pool.close()


def test_what_is_no_handover_is_refused(pair) -> None:
    one, other = pair
    one.send(b"sixteen bytes...")
    with pytest.raises(ValueError, match=r"is not what Handover\.send sends"):
        kvp.Handover.receive(other)
    file = os.memfd_create("not sealed", os.MFD_ALLOW_SEALING)
    send_descriptors(one, [file])
    with pytest.raises(ValueError, match="lacks seals"):
        kvp.Handover.receive(other)
    # More or fewer descriptors than the frame says.
    frame = b"KVPAGEFD" + (2).to_bytes(4, "little") + (2).to_bytes(4, "little")
    socket.send_fds(one, [frame], [file])
    with pytest.raises(ValueError, match="is not what Handover"):
        kvp.Handover.receive(other)
    socket.send_fds(one, [frame], [file] * 3)
    with pytest.raises(ValueError, match="is not what Handover"):
        kvp.Handover.receive(other)
    socket.send_fds(one, [frame[:8] + b"\xff" * 4 + frame[12:]], [file] * 2)
    with pytest.raises(ValueError, match="is not what Handover"):
        kvp.Handover.receive(other)
    os.close(file)


def test_a_sender_that_ends_early(pair) -> None:
    one, other = pair
    file = os.memfd_create("file")
    frame = b"KVPAGEFD" + (5).to_bytes(4, "little") + (2).to_bytes(4, "little")
    socket.send_fds(one, [frame], [file] * 2)
    os.close(file)
    one.close()
    with pytest.raises(ConnectionError, match="after 2 descriptors"):
        kvp.Handover.receive(other)


def test_a_receiver_without_descriptors_left(pair) -> None:
    one, other = pair
    file = os.memfd_create("file")
    send_descriptors(one, [file] * 200)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(file)  # the lowest free number
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 20, hard))
    try:
        with pytest.raises(OSError, match="ulimit -n"):
            kvp.Handover.receive(other)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    os.close(file)


def test_what_cannot_carry_descriptors_is_refused(make_pool) -> None:
    rig = HandoverRig(make_pool(spec_of("fused")))
    with rig.export(rig.begin(text(20))) as sent, socket.socket(socket.AF_INET) as internet:
        for wrong in (internet, 3, None):
            with pytest.raises(ValueError, match="wanted a Unix socket"):
                sent.send(wrong)
            with pytest.raises(ValueError, match="wanted a Unix socket"):
                kvp.Handover.receive(wrong)
        with pytest.raises(ValueError, match=r"0 blocks in memory of a device.*and 1 came"):
            kvp.Handover([sent.fileno(), sent.fileno()])
        with pytest.raises(ValueError, match="no descriptor"):
            kvp.Handover([])
        with kvp.Handover([sent.fileno()]) as same:
            assert same.num_tokens == 20
