"""Sequences handed over between pools, and between processes, on one GPU."""

from __future__ import annotations

import pathlib
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from handover_rig import HandoverRig, fill
from prefix_rig import text
from store_rig import DTYPES, decode
from subprocesses import start_python

import jax_kvpage as kvp

pytestmark = pytest.mark.gpu


def _spec(layout: str, platform: str, dtype=jnp.float32, **changes) -> kvp.CacheSpec:
    options = {"max_slots": 4, "max_seq_len": 4096, **changes}
    return kvp.CacheSpec(2, 2, 64, dtype=dtype, layout=layout, **options).resolve(platform)


def _rigs(make_pool, count: int, spec: kvp.CacheSpec) -> list[HandoverRig]:
    capacity = max(16, 4096 // spec.block_tokens) * spec.num_ranges * spec.block_bytes
    return [HandoverRig(make_pool(spec, capacity)) for _ in range(count)]


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_goes_on_bit_for_bit(make_pool, platform: str, layout: str, dtype) -> None:
    spec = _spec(layout, platform, dtype)
    sender, receiver, alone = _rigs(make_pool, 3, spec)
    ids = text(spec.block_tokens + 70) if spec.block_tokens < 1000 else text(70)
    for owned in (True, False):
        slot = sender.begin_handover(ids) if owned else sender.begin(ids)
        with sender.export(slot) as sent:
            assert sent.bytes_copied == (0 if owned else sent.num_bytes)
            with kvp.Handover(sent.filenos()) as received:
                back = receiver.take(received)
        sender.release(slot)
        sender.pool.trim()  # the memory stays: the receiver holds it
        computed = alone.begin(ids)
        for token in (7, 8, 9):
            assert np.array_equal(decode(receiver, back, token), decode(alone, computed, token))
        receiver.check()
        receiver.audit()
        receiver.release(back)
        alone.release(computed)
    receiver.pool.trim()
    assert receiver.pool.stats().received == 0


def test_the_sender_may_read_what_it_has_sent_and_not_write_it(make_pool, platform: str) -> None:
    (rig,) = _rigs(make_pool, 1, _spec("fused", platform))
    slot = rig.begin_handover(text(70))
    sent = rig.export(slot)
    rig.check()
    with pytest.raises(
        (kvp.KVPageError, jax.errors.JaxRuntimeError), match="are shared with other slots"
    ):
        fill(rig, slot, 1, 4.0)
    rig.cache = rig.pool.cache()
    rig.cache = rig.pool.truncate(rig.cache, slot, 70)
    rig.pool.extend(slot, 80)
    decode(rig, slot, 3)
    rig.check()
    sent.close()


_RECEIVER = """
    import socket, sys
    import jax, jax.numpy as jnp
    import jax_kvpage as kvp

    spec = kvp.CacheSpec(2, 2, 64, 4, 4096, dtype=jnp.float32, layout="fused").resolve(sys.argv[2])
    with jax.default_device(jax.devices(sys.argv[2])[0]):
        capacity = max(16, 4096 // spec.block_tokens) * spec.block_bytes
        with kvp.KVPool(spec, capacity) as pool, socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET
        ) as connection:
            connection.connect(sys.argv[1])
            with kvp.Handover.receive(connection) as received:
                slot, cache = pool.import_blocks(pool.cache(), received)
            connection.send(b"imported")
            assert connection.recv(1) == b"x"  # the sender's pool is closed
            k, v = kvp.read_kv(cache, jnp.asarray([slot]), 1)
            length = int(cache.lengths[slot])
            assert bool((k[0, :length] == 3).all()) and bool((v[0, :length] == 3).all())
            connection.send(b"%d" % length)
"""


def test_another_process_has_it_after_the_senders_pool_is_closed(
    make_pool, platform: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    (rig,) = _rigs(make_pool, 1, _spec("fused", platform))
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(300)
        process = start_python(_RECEIVER, path, platform)
        try:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(300)
                slot, rig.cache = rig.pool.acquire(rig.cache, 3000, handover=True)
                fill(rig, slot, 3000, 3.0)
                rig.pool.commit(slot, [5] * 3000)
                with rig.export(slot) as sent:
                    assert sent.bytes_copied == 0
                    sent.send(connection)
                assert connection.recv(100) == b"imported"
                rig.pool.close()
                connection.send(b"x")
                assert connection.recv(100) == b"3000"
        finally:
            process.kill()
            process.communicate()
