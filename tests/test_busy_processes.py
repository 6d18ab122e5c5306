"""A process that forks or exits while its threads are inside calls on a pool."""

from __future__ import annotations

import pytest
from subprocesses import run_python

_POOL = """
    import os, signal, sys, threading, time, warnings
    import jax.numpy as jnp
    import jax_kvpage as kvp

    warnings.simplefilter("ignore")  # jax's own, about os.fork and its threads
    spec = kvp.CacheSpec(2, 2, 64, 4, 256, dtype=jnp.float32)
    pool = kvp.KVPool(spec, "8MiB")
    slot, cache = pool.acquire(pool.cache(), 256)
"""


def test_a_fork_beside_busy_threads_hangs_in_no_call() -> None:
    done = run_python(
        _POOL
        + """
    stop = threading.Event()

    def work():
        while not stop.is_set():
            pool.extend(slot, 256)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    hung = 0
    for _ in range(300):
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # ends a child that waits for a lock
            for call in (pool.stats, pool.trim, lambda: pool.extend(slot, 9)):
                try:
                    call()
                    os._exit(2)
                except kvp.PoolClosed as error:
                    if "forked" not in str(error):
                        os._exit(3)
            assert not pool.closed
            pool.close()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        hung += os.WIFSIGNALED(status)
        assert hung or status == 0, status
        if hung:
            break
    stop.set()
    for thread in threads:
        thread.join()
    assert not hung
    pool.close()
    print("parent fine")
        """,
        timeout=240,
    )
    assert "parent fine" in done.stdout


@pytest.mark.parametrize("call", ["stats", "trim", "slot_table"])
def test_exit_beside_a_daemon_thread_in_a_call(call: str) -> None:
    """Python ends a thread that returns from C++ after the interpreter has been finalized."""
    code = (
        _POOL
        + """
    def work():
        call = getattr(pool, sys.argv[1])
        while True:
            call()

    for _ in range(4):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.05)
    print("leaving")
        """
    )
    for _ in range(3):
        done = run_python(code, call, timeout=60)
        assert "leaving" in done.stdout
        assert "terminate" not in done.stderr
        assert "Fatal" not in done.stderr
