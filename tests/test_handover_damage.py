"""import_blocks refuses files that are unsealed, damaged, forged, or from a different kind of
pool.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
import socket
import struct

import jax.numpy as jnp
import pytest
from handover_rig import SEALS, HandoverRig, change, content_of, memory_file, sign
from prefix_rig import spec_of, text

import jax_kvpage as kvp

FUTURE_WRITE = 0x0010  # F_SEAL_FUTURE_WRITE: the sender's existing mappings stay writable


@pytest.fixture
def rigs(make_pool, layout: str) -> tuple[HandoverRig, HandoverRig]:
    return HandoverRig(make_pool(spec_of(layout))), HandoverRig(make_pool(spec_of(layout)))


def refuses(rig: HandoverRig, fd: int, words: str, **options: object) -> None:
    """Asserts that a descriptor is refused with this message, and that nothing has changed."""
    before, descriptors = rig.pool.stats(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match=words):
        rig.pool.import_blocks(rig.cache, fd, **options)
    after = rig.pool.stats()
    assert (after.mapped, after.received, after.imported) == (before.mapped, 0, 0)
    assert after.free == before.free
    assert len(os.listdir("/proc/self/fd")) == descriptors
    rig.audit()


def test_a_file_that_its_sender_could_still_change_is_refused(rigs) -> None:
    sender, rig = rigs
    with sender.export(sender.begin(text(70))) as sent:
        assert fcntl.fcntl(sent.fileno(), fcntl.F_GET_SEALS) & SEALS == SEALS
        content = content_of(sent)
        with pytest.raises(PermissionError):
            os.pwrite(sent.fileno(), b"x", 0)
        with pytest.raises(PermissionError):
            os.truncate(sent.fileno(), 0)
    names = {
        fcntl.F_SEAL_WRITE: "F_SEAL_WRITE",
        fcntl.F_SEAL_SHRINK: "F_SEAL_SHRINK",
        fcntl.F_SEAL_GROW: "F_SEAL_GROW",
        fcntl.F_SEAL_SEAL: "F_SEAL_SEAL",
    }
    for seal, name in names.items():
        with memory_file(content, SEALS & ~seal) as fd:
            refuses(rig, fd, rf"lacks seals \({name}\)")
    with memory_file(content, 0) as fd:
        refuses(rig, fd, "F_SEAL_WRITE, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_SEAL")
    with memory_file(content, SEALS & ~fcntl.F_SEAL_WRITE | FUTURE_WRITE) as fd:
        refuses(rig, fd, r"lacks seals \(F_SEAL_WRITE\)")
    with memory_file(content) as fd:
        rig.take(fd)
        rig.check()


def test_what_is_no_memfd_is_refused(rigs, tmp_path: pathlib.Path) -> None:
    sender, rig = rigs
    content = content_of(sender.export(sender.begin(text(70))))
    path = tmp_path / "file"
    path.write_bytes(content)
    with path.open("r+b") as file:
        refuses(rig, file.fileno(), "cannot be sealed|lacks seals")
    read, write = os.pipe()
    refuses(rig, read, "a socket, a pipe")
    os.close(read)
    os.close(write)
    refuses(rig, read, "is not open in this process")
    with socket.socket(socket.AF_UNIX) as endpoint:
        refuses(rig, endpoint, "a socket, a pipe")
    folder = os.open(tmp_path, os.O_RDONLY)
    refuses(rig, folder, "or a directory")
    os.close(folder)
    for wrong in (-1, 1 << 40, True, "3", None):
        with pytest.raises(ValueError, match="descriptor"):
            rig.pool.import_blocks(rig.cache, wrong)


def test_a_damaged_header_is_refused(rigs) -> None:
    sender, rig = rigs
    good = content_of(sender.export(sender.begin(text(70)), fingerprint="model"))
    assert sign(bytearray(good)) == good
    for place in (0, 7):
        bad = bytearray(good)
        bad[place] ^= 1
        with memory_file(bad) as fd:
            refuses(rig, fd, "does not begin with KVPAGEHO")
    for place in (12, 30, 40, 64 + 8 + 3, 64 + 8 + 130):
        bad = bytearray(good)
        bad[place] ^= 64
        with memory_file(bad) as fd:
            refuses(rig, fd, "damaged")
    with memory_file(change(good, version=2)) as fd:
        refuses(rig, fd, "format version 2, this jax_kvpage reads 1")
    for short in (0, 11, 71, 100, 4096, len(good) - 4096, len(good) - 1):
        with memory_file(good[:short]) as fd:
            refuses(rig, fd, "damaged")
    with memory_file(good, size=len(good) + 4096) as fd:
        refuses(rig, fd, "damaged")


# All of these have a valid checksum: the sender is malicious.
_FORGED = [
    {"tokens": 0},
    {"tokens": -1},
    {"tokens": 1 << 40},
    {"tokens": 200},
    {"blocks": 0},
    {"blocks": 4},
    {"blocks": 1 << 30},
    {"stride": 1},
    {"stride": 1 << 31},
    {"stride": (1 << 63) - 1},
    {"begin": 0},
    {"begin": 100},
    {"begin": -4096},
    {"begin": 1 << 62},
    {"block_bytes": 0},
    {"block_bytes": 1},
    {"block_bytes": -(1 << 62)},
    {"block_bytes": 1 << 62},
    {"ranges": 0},
    {"ranges": 1 << 31},
    {"ranges": 1 << 62},
    {"shape_bytes": 0xFFFFFFFF},
    {"fingerprint_bytes": 0xFFFFFFFF},
    {"fingerprint_bytes": 5},
]


def test_a_forged_header_is_refused(rigs) -> None:
    sender, rig = rigs
    good = content_of(sender.export(sender.begin(text(70))))
    for fields in _FORGED:
        with memory_file(change(good, **fields)) as fd:
            refuses(rig, fd, "damaged|another spec|fingerprint")


def test_blocks_without_memory_are_refused(rigs) -> None:
    sender, rig = rigs
    sent = sender.export(sender.begin(text(70)))
    good = content_of(sent)
    begin = struct.unpack_from("<q", good, 16)[0]
    with memory_file(good[:begin], size=len(good)) as fd:
        refuses(rig, fd, "has no memory")
    with memory_file(good[: len(good) - 4096], size=len(good)) as fd:
        refuses(rig, fd, "has no memory")
    # A header that claims to be very long, in a file of that length with almost no memory.
    with memory_file(change(good, tokens=(1 << 31) - 1)[:4096], size=1 << 40) as fd:
        refuses(rig, fd, "has no memory")


def test_a_sequence_of_another_spec_or_model_is_refused(make_pool, layout) -> None:
    sender = HandoverRig(make_pool(spec_of(layout)))
    sent = sender.export(sender.begin(text(70)), fingerprint="llama 1")
    other = "per_layer" if layout == "fused" else "fused"
    for spec in (
        spec_of(other),
        spec_of(layout, jnp.int8),
        spec_of(layout, jnp.bfloat16),
        spec_of(layout, block_tokens=32),
        kvp.CacheSpec(3, 2, 64, 4, 512, dtype=jnp.float32, layout=layout, block_tokens=16),
        kvp.CacheSpec(2, 4, 64, 4, 512, dtype=jnp.float32, layout=layout, block_tokens=16),
        kvp.CacheSpec(2, 2, 128, 4, 512, dtype=jnp.float32, layout=layout, block_tokens=16),
    ):
        rig = HandoverRig(make_pool(spec))
        refuses(rig, sent.fileno(), "a pool with another spec", fingerprint="llama 1")
    small = HandoverRig(make_pool(spec_of(layout, max_seq_len=64)))
    refuses(small, sent.fileno(), "70 tokens, .* max_seq_len is 64", fingerprint="llama 1")
    fits = HandoverRig(make_pool(spec_of(layout, max_seq_len=80, max_slots=2)))
    refuses(fits, sent.fileno(), "fingerprint 'llama 1', wanted ''")
    fits.take(sent, fingerprint="llama 1")
    fits.check()


def test_what_a_pool_has_no_room_for_is_refused(make_pool, layout) -> None:
    sender = HandoverRig(make_pool(spec_of(layout)))
    sent = sender.export(sender.begin(text(70)))
    spec = spec_of(layout, max_slots=2).resolve("cpu")
    logical = spec.block_bytes * (1 if layout == "fused" else 4)
    rig = HandoverRig(make_pool(spec, 8 * logical))
    held = rig.begin(text(60))
    before = rig.pool.stats()
    with pytest.raises(kvp.OutOfBlocks):
        rig.take(sent)
    assert rig.pool.stats().free == before.free
    rig.audit()
    rig.check()
    rig.release(held)
    first, rig.cache = rig.pool.acquire(rig.cache, 0)
    second, rig.cache = rig.pool.acquire(rig.cache, 0)
    with pytest.raises(kvp.OutOfSlots):
        rig.take(sent)
    rig.cache = rig.pool.release(rig.cache, [first, second])
    rig.take(sent, wait=True)
    rig.check()
    rig.audit()


def test_what_cannot_be_exported_is_said(make_pool, layout) -> None:
    rig = HandoverRig(make_pool(spec_of(layout)))
    with pytest.raises(kvp.KVPageError, match="is free"):
        rig.export(0)
    with pytest.raises(ValueError, match="slot"):
        rig.export(99)
    slot = rig.begin(text(70))
    with pytest.raises(ValueError, match="at most 1024"):
        rig.export(slot, fingerprint="x" * 1025)
    with pytest.raises(ValueError, match="fingerprint: wanted a str"):
        rig.export(slot, fingerprint=3)
    rig.drop(slot, 32)
    with pytest.raises(kvp.KVPageError, match="dropped its tokens below 32"):
        rig.export(slot)
    empty, rig.cache = rig.pool.acquire(rig.cache, 32, handover=True)
    with pytest.raises(kvp.KVPageError, match="no committed tokens"):
        rig.export(empty)
    rig.pool.commit(empty, [1, 2])
    with pytest.raises(kvp.KVPageError, match="2 tokens are committed, 0 are written"):
        rig.export(empty)
    with pytest.raises(ValueError, match="num_tokens is 1000"):
        rig.pool.acquire(rig.cache, [5, 1000], handover=True)
    slots = rig.pool.spec.max_slots
    with pytest.raises(kvp.OutOfSlots, match=f"{slots} slots wanted, {slots - 2} free"):
        rig.pool.acquire(rig.cache, [1] * slots, handover=True)
    sent = rig.export(rig.begin(text(5)))
    sent.close()
    sent.close()
    with pytest.raises(ValueError, match="closed"):
        rig.take(sent)
    with pytest.raises(ValueError, match="closed"):
        sent.fileno()
    rig.audit()
