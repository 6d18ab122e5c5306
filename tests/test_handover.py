"""Handing sequences over to another process: what it decodes, what it can see, and what is left
behind.
"""

from __future__ import annotations

import os
import pathlib
import resource
import signal
import socket
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handover_rig import (
    HandoverRig,
    content_of,
    fill,
    holders,
    inode_of,
    pattern_of,
    receiver,
    send,
)
from prefix_rig import BLOCK, spec_of, text
from store_rig import DTYPES, decode, soon
from subprocesses import start_python

import jax_kvpage as kvp

TOKENS = [7, 8, 9]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A connection to a process that decodes what it is sent."""
    with receiver(tmp_path_factory.mktemp("handover")) as (_, connection):
        yield connection


def pair(make_pool, layout: str, dtype=jnp.float32, **changes) -> tuple[HandoverRig, HandoverRig]:
    spec = spec_of(layout, dtype, **changes)
    return HandoverRig(make_pool(spec)), HandoverRig(make_pool(spec))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_another_process_decodes_the_bits_of_one(decoder, make_pool, layout, dtype) -> None:
    rig = HandoverRig(make_pool(spec_of(layout, dtype), poison=True))
    cases = [(70, False), (70, True)]
    if dtype == jnp.float32:  # lengths without a partial block, and with nothing else
        cases += [(64, True), (9, False), (9, True)]
    for length, owned in cases:
        ids = text(length)
        slot = rig.begin_handover(ids) if owned else rig.begin(ids)
        with rig.export(slot) as sent:
            order = {"layout": layout, "dtype": jnp.dtype(dtype).name, "tokens": TOKENS}
            answer = send(decoder, sent, **order)
            assert sent.bytes_copied == (0 if owned else sent.num_bytes)
        logical = rig.pool.spec.block_bytes * (1 if layout == "fused" else 4)
        assert answer["received"] == length // BLOCK * logical
        rig.release(slot)
        alone = rig.begin(ids)
        want = [decode(rig, alone, token).tobytes().hex() for token in TOKENS]
        assert answer["bits"] == want
        rig.release(alone)
    rig.audit()


def test_more_blocks_than_one_message_has_descriptors_for(decoder, make_pool) -> None:
    changes = {"max_seq_len": 2048}
    rig = HandoverRig(make_pool(spec_of("per_layer", **changes)))
    ids = text(1100)
    slot = rig.begin_handover(ids)
    with rig.export(slot) as sent:
        assert len(sent.filenos()) in (1, 1 + 4 * 69)
        order = {"layout": "per_layer", "dtype": "float32", "tokens": TOKENS[:1]}
        answer = send(decoder, sent, changes=changes, **order)
    rig.release(slot)
    alone = rig.begin(ids)
    assert answer["bits"] == [decode(rig, alone, TOKENS[0]).tobytes().hex()]


def test_8k_tokens_are_copied_once_or_not_at_all(make_pool, layout) -> None:
    # On the fake driver each (small) block takes descriptors.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    spec = spec_of(layout, max_seq_len=8192)
    sender = HandoverRig(make_pool(spec, "64MiB"))
    other = HandoverRig(make_pool(spec, "64MiB"))
    for owned in (False, True):
        slot, sender.cache = sender.pool.acquire(sender.cache, 8192, handover=owned)
        fill(sender, slot, 8192, 3.0)
        sender.pool.commit(slot, [5] * 8192)
        before = sender.pool.stats()
        with sender.export(slot) as sent:
            back, other.cache = other.pool.import_blocks(other.cache, sent)
            assert sent.num_bytes == spec.token_bytes * 8192
            copied = sender.pool.stats().bytes_copied_out - before.bytes_copied_out
            assert copied == (0 if owned else sent.num_bytes)
        stats = other.pool.stats()
        assert stats.received == spec.token_bytes * 8192
        assert stats.bytes_copied_in == 0
        assert stats.physical == 0
        k, v = kvp.read_kv(other.cache, jnp.asarray([back]), 1)
        assert bool((k[0, :8192] == 3).all())
        assert bool((v[0, :8192] == 3).all())
        other.cache = other.pool.release(other.cache, back)
        sender.cache = sender.pool.release(sender.cache, slot)
        other.pool.check(other.cache)
        other.pool.trim()
        assert other.pool.stats().received == 0


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_byte_of_another_request_is_in_the_file(make_pool, layout, dtype, owned) -> None:
    rig = HandoverRig(make_pool(spec_of(layout, dtype, max_slots=3)))
    for value in (123.0, 321.0):  # memory of earlier requests, and of a live one
        slots, rig.cache = rig.pool.acquire(rig.cache, [256, 256])
        for slot in slots:
            fill(rig, slot, 256, value)
        if value == 123.0:
            rig.cache = rig.pool.release(rig.cache, slots)
            rig.pool.check(rig.cache)
        else:
            rig.cache = rig.pool.release(rig.cache, slots[0])
            rig.pool.check(rig.cache)
    slot = rig.begin_handover(text(69), 200) if owned else rig.begin(text(69))
    rig.pool.extend(slot, 100)
    fill(rig, slot, 1, 55.0)
    rig.pool.commit(slot, [1])
    fill(rig, slot, 3, 77.0)  # not committed, so not final
    if owned:
        with pytest.raises(kvp.KVPageError, match="73 tokens, of which 70 are committed"):
            rig.export(slot)
        rig.cache = kvp.set_lengths(rig.cache, jnp.asarray([slot]), jnp.asarray([70]))
    with rig.export(slot) as sent:
        content = bytes(content_of(sent))
        assert pattern_of(55.0, dtype) in content
        for value in (123.0, 321.0, 77.0):
            assert pattern_of(value, dtype) not in content
        # Nor is there any other memory: the gaps between the ranges are holes.
        physical = sum(os.fstat(fd).st_blocks * 512 for fd in sent.filenos())
        assert physical <= sent.num_bytes + 2 * 4096
    rig.audit()


def test_a_sequence_outlives_its_sender(make_pool, tmp_path: pathlib.Path) -> None:
    layout = "per_layer"
    sender = """
        import socket, sys, time
        import jax.numpy as jnp
        import jax_kvpage as kvp
        from handover_rig import HandoverRig
        from prefix_rig import spec_of, text

        pool = kvp.KVPool(spec_of(sys.argv[1]), "16MiB")
        rig = HandoverRig(pool)
        sent = rig.export(rig.begin_handover(text(100)))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(sys.argv[2])
            sent.send(connection)
            time.sleep(600)
    """
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(180)
        process = start_python(sender, layout, path)
        try:
            connection, _ = listener.accept()
            with connection:
                received = kvp.Handover.receive(connection)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    inode = inode_of(received)
    assert holders(inode) == [os.getpid()]
    rig = HandoverRig(make_pool(spec_of(layout), poison=True))
    slot = rig.take(received)
    received.close()
    rig.check()
    decode(rig, slot, 3)
    rig.check()
    assert holders(inode) == [os.getpid()]
    rig.release(slot)
    rig.pool.trim()
    assert soon(lambda: holders(inode) == [])
    rig.audit()


def test_a_receiver_that_is_killed_leaves_nothing(make_pool, tmp_path: pathlib.Path) -> None:
    layout = "fused"
    rig = HandoverRig(make_pool(spec_of(layout)))
    with receiver(tmp_path) as (process, connection):
        slot = rig.begin_handover(text(100))
        sent = rig.export(slot)
        inode = inode_of(sent)
        send(connection, sent, layout=layout, dtype="float32", tokens=[1], wait=True)
        assert holders(inode) == sorted([os.getpid(), process.pid])
        sent.close()
        rig.release(slot)
        rig.pool.trim()
        assert holders(inode) == [process.pid]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert holders(inode) == []
    rig.audit()
    assert rig.pool.stats().free == rig.pool.stats().capacity


def test_a_sealed_slot_goes_on_with_a_copy_of_its_last_block(make_pool, layout) -> None:
    sender, other = pair(make_pool, layout)
    slot = sender.begin_handover(text(70), 120)
    fork = sender.fork(slot)
    sent = sender.export(slot)
    before = bytes(content_of(sent))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="tokens below 80 are shared with other slots or processes"
    ):
        fill(sender, slot, 1, 4.0)
    sender.cache = sender.pool.cache()
    sender.check()
    sender.cache = sender.pool.truncate(sender.cache, slot, 70)
    there = other.take(sent)
    bits = [decode(rig, at, 5) for rig, at in ((sender, slot), (sender, fork), (other, there))]
    assert (bits[0] == bits[1]).all()
    assert (bits[0] == bits[2]).all()
    for rig in (sender, other):
        rig.check()
        rig.audit()
    # A second export copies, because the blocks are no longer all in one file.
    with sender.export(slot) as again:
        assert again.bytes_copied == again.num_bytes
        assert other.ids[other.take(again)] == sender.ids[slot]
    other.check()
    assert bytes(content_of(sent)) == before


def test_an_imported_sequence_is_one_as_any_other(make_pool, layout, store) -> None:
    spec = spec_of(layout)
    sender = HandoverRig(make_pool(spec))
    rig = HandoverRig(make_pool(spec, poison=True, store=store))
    sent = sender.export(sender.begin(text(75)))
    before = bytes(content_of(sent))
    slot = rig.take(sent)
    fork = rig.fork(slot)
    rig.cache = rig.pool.truncate(rig.cache, slot, 40)  # into a full block: makes a private copy
    rig.ids[slot] = rig.ids[slot][:40]
    decode(rig, slot, 1)
    decode(rig, fork, 2)
    rig.check()
    swapped = rig.swap_out(slot, to_disk=False)
    rig.check()
    slot = rig.swap_in(swapped)
    rig.check()
    rig.release(fork)
    # The only slot left that maps the blocks, but it still must not write them.
    rig.cache = rig.pool.truncate(rig.cache, slot, 5)
    rig.ids[slot] = rig.ids[slot][:5]
    decode(rig, slot, 3)
    rig.check()
    rig.audit()
    again = rig.take(sent)
    rig.pool.relocate()
    rig.pool.trim()
    rig.check()
    rig.drop(again, 32)
    rig.check()
    rig.write(again, [6])
    rig.check()
    rig.cache = rig.pool.cache()
    rig.check()
    rig.release(slot, again)
    rig.pool.trim()
    assert rig.audit().received == 0
    assert rig.pool.stats().free == rig.pool.stats().capacity
    assert bytes(content_of(sent)) == before
    sender.check()


def test_a_slot_that_is_the_last_owner_of_a_sealed_block_copies_it(make_pool, layout) -> None:
    sender = HandoverRig(make_pool(spec_of(layout)))
    slot = sender.begin_handover(text(70), 120)
    fork = sender.fork(slot)
    sent = sender.export(slot)
    before = bytes(content_of(sent))
    sender.release(slot)
    sender.cache = sender.pool.truncate(sender.cache, fork, 33)
    sender.ids[fork] = sender.ids[fork][:33]
    decode(sender, fork, 9)
    sender.check()
    sender.audit()
    assert bytes(content_of(sent)) == before


def test_requests_beside_handover_slots_get_their_blocks(make_pool, layout) -> None:
    ranges = 1 if layout == "fused" else 4
    spec = spec_of(layout).resolve("cpu")
    rig = HandoverRig(make_pool(spec, spec.block_bytes * 12 * ranges))
    for _ in range(3):
        first = rig.begin_handover(text(60), 100)
        second = rig.begin(text(70))
        with pytest.raises(kvp.OutOfBlocks):
            rig.begin_handover(text(60), 150)
        rig.check()
        rig.release(first)
        third = rig.begin(text(90, 1))  # takes blocks that the first had
        rig.release(second, third)
        fourth = rig.begin_handover(text(150, 2))  # takes parked blocks
        rig.check()
        rig.export(fourth).close()
        rig.release(fourth)
        rig.audit()


def test_a_view_of_an_imported_slot_shows_it(make_pool) -> None:
    sender, other = pair(make_pool, "per_layer")
    sent = sender.export(sender.begin(text(40)))
    slot = other.take(sent)
    got = [np.array(view)[:40] for view in other.pool.view(1, slot)]
    k, v = kvp.read_kv(sender.cache, jnp.asarray([next(iter(sender.ids))]), 1)
    np.testing.assert_array_equal(got[0], np.asarray(k)[0, :40])
    np.testing.assert_array_equal(got[1], np.asarray(v)[0, :40])
    other.release(slot)
    assert not any(np.asarray(view).any() for view in other.pool.view(1))
