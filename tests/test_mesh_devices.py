"""Pools over several GPUs, tested without GPUs (mesh_devices.py has the programs): host calls on
pools with mirrors, each on a different device of the fake driver.

cc/tests/joint_devices_test.cc covers mapping by programs, joint_kernels_test.cc the CUDA kernels.
"""

from __future__ import annotations

import pytest
from covering import is_exhaustive
from mesh_rig import EIGHT_DEVICES
from subprocesses import run_python

_FAKE = {**EIGHT_DEVICES, "JAX_KVPAGE_FAKE_DRIVER": "1"}


@pytest.mark.fake_driver
@pytest.mark.parametrize("size", [2, 4])
def test_a_driver_call_that_fails_on_one_device_has_happened_on_none(size: int) -> None:
    codes = (2, 999) if is_exhaustive() else (999 if size == 2 else 2,)
    run_python(
        f"import mesh_devices\nfor code in {codes!r}: mesh_devices.sweep({size}, code)",
        env=EIGHT_DEVICES,
        timeout=600,
    )


@pytest.mark.fake_driver
def test_faults_and_torn_generations() -> None:
    run_python(
        "import mesh_devices; mesh_devices.faults(); mesh_devices.torn_generations()",
        env=EIGHT_DEVICES,
    )


@pytest.mark.fake_driver
def test_capacities_and_lowering() -> None:
    run_python(
        "import mesh_devices; mesh_devices.capacities(); mesh_devices.lowered_for_cuda(4)",
        env=EIGHT_DEVICES,
    )


@pytest.mark.fake_driver
@pytest.mark.parametrize("size", [2, 4])
def test_host_calls_over_fake_devices(size: int) -> None:
    """Each device's blocks come from a separate fake device; programs run on CPU."""
    run_python(
        f"""
        import gc
        import mesh_host
        from jax_kvpage import _native
        mesh_host.verbs({size})
        mesh_host.prefixes({size})
        mesh_host.failures({size})
        gc.collect()
        counts, violation = _native.fake_driver.report()
        assert not any(counts.values()), (counts, violation)
        """,
        env=_FAKE,
    )
