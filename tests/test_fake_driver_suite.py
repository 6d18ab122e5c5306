"""The pool's tests, run again with CUDA memory management on the fake driver.

Each file runs in a separate process with JAX_KVPAGE_FAKE_DRIVER=1: slots and blocks come from
driver calls, and programs run on CPU. conftest.py fails the run if anything is left alive in the
driver at the end, or if one of its rules was broken.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
from subprocesses import run_python

pytestmark = pytest.mark.fake_driver

_TESTS = pathlib.Path(__file__).resolve().parent

_VIEWS = "zero-copy views of device memory are refused (test_views_are_refused)"
_NOT_SEEN = "strace does not see driver calls"

# Tests of each file that do not apply, and why. test_poison.py is left out entirely: it looks for
# the pool's memory file, but the fake driver keeps one file for all pools.
_LEFT_OUT: dict[str, dict[str, str]] = {
    "test_addressing.py": {},
    "test_pool.py": {},
    "test_pool_capacity.py": {},
    "test_debug_mode.py": {},
    "test_pool_state_machine.py": {},
    "test_safety.py": {},
    "test_prefix.py": {},
    "test_prefix_state_machine.py": {},
    "test_reuse_prefix.py": {},
    "test_drop_before.py": {"test_views_show_zeros": _VIEWS},
    "test_drop_before_prefixes.py": {},
    "test_sharing.py": {"test_views_of_shared_slots": _VIEWS},
    "test_sharing_state_machine.py": {},
    "test_truncate.py": {},
    "test_stale.py": {},
    "test_failure_recovery.py": {},
    "test_threads_fork_exit.py": {"test_exit_with_programs_in_flight[view]": _VIEWS},
    "test_memory.py": {
        "test_physical_follows_use[per_layer]": _VIEWS,
        "test_temporaries_do_not_grow": "compiles programs, and opens no pool",
    },
    "test_bit_identity.py": {},
    "test_handover.py": {
        "test_a_view_of_an_imported_slot_shows_it": _VIEWS,
        "test_an_imported_sequence_is_one_as_any_other": "a BlockStore is for pools on CPU",
    },
    "test_system_calls.py": {
        "test_strace_agrees": _NOT_SEEN,
        "test_strace_sees_nothing_of_what_was_cached": _NOT_SEEN,
    },
}


@pytest.mark.parametrize("file", _LEFT_OUT)
def test_file(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    left_out = [f"--deselect=tests/{file}::{name}" for name in _LEFT_OUT[file]]
    done = subprocess.run(
        [*command, f"--rootdir={_TESTS.parent}", str(_TESTS / file), *left_out],
        env={
            **os.environ,
            "JAX_KVPAGE_FAKE_DRIVER": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONSAFEPATH": "1",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


def test_a_leak_is_noticed(tmp_path: pathlib.Path) -> None:
    """A control: a run that leaves a pool open fails."""
    (tmp_path / "conftest.py").write_text((_TESTS / "conftest.py").read_text())
    (tmp_path / "test_leak.py").write_text(
        "import jax_kvpage as kvp\n"
        "kept = []\n"
        "def test_leak():\n"
        "    kept.append(kvp.KVPool(kvp.CacheSpec(1, 1, 64, 2, 64), '1MiB'))\n"
    )
    code = (
        "import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[1]]))"
    )
    with pytest.raises(AssertionError, match=r"fake driver.*1 reservations"):
        run_python(code, str(tmp_path), env={"JAX_KVPAGE_FAKE_DRIVER": "1"})


def test_views_are_refused() -> None:
    run_python(
        """
        import jax_kvpage as kvp
        spec = kvp.CacheSpec(1, 1, 64, 2, 64, layout="per_layer")
        with kvp.KVPool(spec, "1MiB") as pool:
            try:
                pool.view(0)
            except ValueError as error:
                assert "device memory" in str(error) and "paged_attention" in str(error)
            else:
                raise SystemExit("a view of device memory")
        """,
        env={"JAX_KVPAGE_FAKE_DRIVER": "1"},
    )


_LIFE = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    import jax_kvpage as kvp
    from harness import Rig
    from jax_kvpage import _native

    _native.fake_driver.configure(2 << 20, 256 << 20)
    spec = kvp.CacheSpec(2, 2, 64, 4, 4096, dtype=jnp.bfloat16, layout=sys.argv[1])
    pool = kvp.KVPool(spec, "64MiB", poison=True)
    assert pool.spec == spec.resolve("cuda"), pool.spec
    assert pool.spec.block_bytes == 2 << 20
    rig = Rig(pool, group=2, max_tokens=700, max_sequences=4)
    slots = rig.acquire_scattered([1500, 40])
    rig.write({slots[0]: 1400, slots[1]: 30})
    out, _, want, _ = rig.step([(slots[0], 5), (slots[1], 1)])
    np.testing.assert_allclose(out, want, atol=0.02)
    rig.release(slots[0])
    rig.check_lengths()
    again = rig.acquire(1500)
    calls = pool.stats().system_calls
    rig.write({again: 1200})
    out, _, want, _ = rig.step([(again, 1)])
    np.testing.assert_allclose(out, want, atol=0.02)
    assert pool.stats().system_calls == calls, "a step made a driver call"
    pool.trim()
    pool.close()
    del rig, pool
    import gc
    gc.collect()
    report, violation = _native.fake_driver.report()
    assert not any(report.values()), (report, violation)
"""


@pytest.mark.parametrize("layout", ["fused", "per_layer"])
def test_cudas_own_block_sizes(layout: str) -> None:
    """Blocks of 2 MiB, as a spec is resolved for CUDA, on a driver with that granularity."""
    run_python(_LIFE, layout, env={"JAX_KVPAGE_FAKE_DRIVER": "cuda"})
