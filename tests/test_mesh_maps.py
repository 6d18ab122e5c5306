"""Programs that map their own memory over a mesh (mesh_maps.py has them)."""

from __future__ import annotations

import pytest
from covering import is_exhaustive, num_cases
from mesh_rig import EIGHT_DEVICES
from subprocesses import run_python


@pytest.mark.parametrize("size", [2, 4, 8])
def test_decode_loops_are_those_of_one_device(size: int) -> None:
    kinds = ("Auto", "Explicit") if is_exhaustive() else ("Explicit" if size == 4 else "Auto",)
    blocks = (4, 16) if is_exhaustive() else (4,)  # 4 blocks run out during the loop
    run_python(
        f"""
        import mesh_maps
        for kind in {kinds!r}:
            for blocks in {blocks!r}:
                mesh_maps.decode_loops(kind, {size}, blocks)
        """,
        env=EIGHT_DEVICES,
    )


def test_calls_and_failures() -> None:
    run_python(
        """
        import mesh_maps
        mesh_maps.eager_and_types("Auto")
        mesh_maps.eager_and_types("Explicit")
        mesh_maps.one_device_short(2)
        mesh_maps.one_device_short(8)
        mesh_maps.failed_programs()
        """,
        env=EIGHT_DEVICES,
    )


def test_host_calls_meanwhile() -> None:
    run_python(
        f"""
        import mesh_maps
        for size in (2, 8):
            mesh_maps.churn(size, {num_cases(150, 1500)})
        """,
        env=EIGHT_DEVICES,
    )


@pytest.mark.fake_driver
def test_a_mapping_that_fails_on_one_device_has_happened_on_none() -> None:
    run_python(
        "import mesh_maps; mesh_maps.driver_faults(2); mesh_maps.driver_faults(4)",
        env={**EIGHT_DEVICES, "JAX_KVPAGE_FAKE_DRIVER": "1"},
    )
