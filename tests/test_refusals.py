"""Error messages: what the system forbids, what it is short of, and prefixes that JAX repeats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from subprocesses import run_python

import jax_kvpage as kvp
from jax_kvpage import errors

# Installs a seccomp filter that makes the named system calls fail, as a container's profile does.
_DENY = """
    import ctypes, errno, os, platform, struct, sys

    def deny(error, *names):
        numbers = {
            "x86_64": {"memfd_create": 319, "fallocate": 285},
            "aarch64": {"memfd_create": 279, "fallocate": 47},
        }[platform.machine()]
        steps = [(0x20, 0, 0, 0)]  # load the number of the call
        for name in names:
            steps += [(0x15, 0, 1, numbers[name]), (0x06, 0, 0, 0x00050000 | error)]
        steps.append((0x06, 0, 0, 0x7FFF0000))  # allow all others
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))

        class Program(ctypes.Structure):
            _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
        program = Program(len(steps), ctypes.addressof(code))
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, ctypes.addressof(program), 0, 0) == 0, ctypes.get_errno()

    import jax, jax.numpy as jnp
    import jax_kvpage as kvp

    error, call = getattr(errno, sys.argv[1]), sys.argv[2]
    spec = kvp.CacheSpec(2, 2, 64, 4, 256, dtype=jnp.float32)
"""


_ACQUIRE_DENIED = (
    _DENY
    + """
    pool = kvp.KVPool(spec, "16MiB")
    cache = pool.cache()
    deny(error, call)
    try:
        pool.acquire(cache, 100)
    except Exception as caught:
        error = caught
    """
)


def _assert_says(call: str, code: str) -> str:
    return f"""
    assert isinstance(error, kvp.KVPageError), repr(error)
    assert not isinstance(error, kvp.OutOfBlocks), repr(error)
    text = str(error)
    assert "{call}" in text and "failed: " + os.strerror(errno.{code}) in text, text
    assert "the system does not allow this call" in text and "seccomp" in text, text
    assert "release a request" not in text and "0 bytes" not in text.split(":")[1], text
    """


@pytest.mark.parametrize("code", ["EPERM", "ENOSYS"])
def test_a_forbidden_memfd_create(code: str) -> None:
    run_python(
        _DENY
        + """
    deny(error, call)
    try:
        kvp.KVPool(spec, "16MiB")
    except Exception as caught:
        error = caught
    """
        + _assert_says("KVPool: memfd_create", code),
        code,
        "memfd_create",
    )


@pytest.mark.parametrize("code", ["EPERM", "ENOSYS"])
def test_a_forbidden_fallocate(code: str) -> None:
    run_python(
        _ACQUIRE_DENIED
        + _assert_says("fallocate", code)
        + """
    assert pool.stats().slots_occupied == 0
    pool.close()
    """,
        code,
        "fallocate",
    )


def test_short_memory_does_not_ask_for_a_larger_pool() -> None:
    run_python(
        _ACQUIRE_DENIED
        + """
    assert isinstance(error, kvp.OutOfBlocks), repr(error)
    text = str(error)
    assert "fallocate of" in text and "release a request" in text, text
    assert "make the pool smaller with resize()" in text and "take more" not in text, text
    """,
        "ENOSPC",
        "fallocate",
    )


def test_no_more_files() -> None:
    run_python(
        """
        import os, resource
        import jax, jax.numpy as jnp
        import jax_kvpage as kvp

        spec = kvp.CacheSpec(2, 2, 64, 4, 256, dtype=jnp.float32)
        jax.devices()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        try:
            kvp.KVPool(spec, "16MiB")
        except kvp.KVPageError as error:
            text = str(error)
        assert "memfd_create failed: Too many open files" in text and "ulimit -n" in text, text
        """
    )


def test_the_prefix_of_nested_dispatch_is_not_repeated(make_pool) -> None:
    """Each program dispatched with results of a failed program adds the prefix once more."""
    pool = make_pool(kvp.CacheSpec(2, 2, 64, 4, 256, dtype=jnp.float32))
    slot, cache = pool.acquire(pool.cache(), 1)
    slots = np.asarray([slot], np.int32)

    @jax.jit
    def busy(x: jax.Array, times: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, y: jnp.tanh(y @ y), x)

    @jax.jit
    def step(cache: kvp.KVCache, x: jax.Array) -> kvp.KVCache:
        batch = kvp.Batch.decode(slots)
        x = jnp.ones((1, 2, 64)) + 0 * x[0, 0]
        for layer in range(2):
            cache = kvp.append_kv(cache, x, x, batch, layer=layer)
        return kvp.advance(cache, batch)

    x = busy(jnp.ones((300, 300)), 1)
    for _ in range(64):
        cache = jax.block_until_ready(step(cache, x))
    for times in (200, 1000, 5000, 25000):
        try:
            x = busy(jnp.ones((300, 300)), times)  # the steps queue behind this program
            for _ in range(10):
                cache = step(cache, x)
            break
        except ValueError:  # it finished too early, so the first failing step raised at once
            cache = pool.cache()
    for call in (lambda: pool.check(cache), lambda: pool.slot_table(cache)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="64 mapped") as caught:
            call()
        assert str(caught.value).count("Error dispatching computation: ") <= 1
    with pytest.raises(jax.errors.JaxRuntimeError) as raw:
        jax.block_until_ready(cache)
    # Errors that the package did not raise are left unchanged.
    assert str(raw.value).count("Error dispatching computation: ") > 1


def test_only_repeats_are_taken_out() -> None:
    prefix = "Error dispatching computation: "
    for before, after in (
        ("INTERNAL: " + 15 * prefix + "x", "INTERNAL: " + prefix + "x"),
        ("INTERNAL: " + prefix + "x", "INTERNAL: " + prefix + "x"),
        ("x", "x"),
    ):
        for kind in (ValueError, jax.errors.JaxRuntimeError):
            error = kind(before)
            shortened = errors.shortened(error)
            assert str(shortened) == after
            assert type(shortened) is kind
            assert (shortened is error) == (before == after)
