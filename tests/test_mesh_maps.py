"""Programs that map their own memory over a mesh (mesh_maps.py has them)."""

from __future__ import annotations

import pytest
from mesh_rig import EIGHT_DEVICES
from subprocesses import run_python


@pytest.mark.parametrize("size", [2, 4, 8])
def test_decode_loops_are_those_of_one_device(size: int) -> None:
    kind = "Explicit" if size == 4 else "Auto"
    run_python(
        f"""
        import mesh_maps
        mesh_maps.decode_loops({kind!r}, {size}, 4)
        mesh_maps.decode_loops({kind!r}, {size}, 16)
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


@pytest.mark.parametrize("size", [2, 8])
def test_host_calls_meanwhile(size: int) -> None:
    run_python(f"import mesh_maps; mesh_maps.churn({size}, 200)", env=EIGHT_DEVICES)


@pytest.mark.fake_driver
@pytest.mark.parametrize("size", [2, 4])
def test_a_mapping_that_fails_on_one_device_has_happened_on_none(size: int) -> None:
    run_python(
        f"import mesh_maps; mesh_maps.driver_faults({size})",
        env={**EIGHT_DEVICES, "JAX_KVPAGE_FAKE_DRIVER": "1"},
    )
