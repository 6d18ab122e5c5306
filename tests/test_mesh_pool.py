"""Host calls on a pool over a mesh (mesh_host.py has the programs)."""

from __future__ import annotations

import pytest
from mesh_rig import EIGHT_DEVICES
from subprocesses import run_python


@pytest.mark.parametrize("size", [2, 4, 8])
def test_verbs_and_prefixes(size: int) -> None:
    run_python(
        f"""
        import mesh_host
        mesh_host.verbs({size})
        mesh_host.prefixes({size})
        mesh_host.churn({size}, 300)
        """,
        env=EIGHT_DEVICES,
    )


@pytest.mark.parametrize("size", [2, 4])
def test_a_call_that_fails_on_one_device_has_happened_on_none(size: int) -> None:
    run_python(f"import mesh_host; mesh_host.failures({size})", env=EIGHT_DEVICES)


def test_memory_failed_programs_and_refusals() -> None:
    run_python(
        """
        import mesh_host
        mesh_host.memory()
        mesh_host.out_of_blocks()
        mesh_host.failed_programs()
        mesh_host.disagreement()
        mesh_host.refusals()
        """,
        env=EIGHT_DEVICES,
    )


@pytest.mark.parametrize("size", [2, 4])
def test_a_new_generation_waits_for_steps_whose_devices_sum(size: int) -> None:
    run_python(
        f"import mesh_waits; mesh_waits.generations_beside_steps({size}, 200)",
        env=EIGHT_DEVICES,
    )


@pytest.mark.parametrize("size", [2, 4])
def test_decisions_wait_for_releases_on_all_devices(size: int) -> None:
    run_python(
        f"import mesh_waits; mesh_waits.releases_on_a_late_device({size})", env=EIGHT_DEVICES
    )
