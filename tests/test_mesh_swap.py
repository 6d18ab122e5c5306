"""Swapping on pools over a mesh (mesh_swap.py and mesh_swap_faults.py have the programs)."""

from __future__ import annotations

import pathlib

import pytest
from covering import is_exhaustive
from mesh_rig import EIGHT_DEVICES
from subprocesses import run_python


def _run(path: pathlib.Path, *calls: str) -> None:
    """Runs programs in one process with eight devices; PATH is a separate directory for the
    test.
    """
    code = "\n".join(["import mesh_swap, mesh_swap_faults", *calls]).replace(
        "PATH", repr(str(path))
    )
    run_python(code, env=EIGHT_DEVICES, timeout=360)


@pytest.mark.parametrize("size", [2, 4])
def test_a_sequence_leaves_all_devices_or_none(size: int, tmp_path: pathlib.Path) -> None:
    steps = 600 if is_exhaustive() else 100
    layouts = ["fused", "per_layer"] if is_exhaustive() else ["fused" if size == 4 else "per_layer"]
    _run(
        tmp_path,
        *(f"mesh_swap.verbs({size}, PATH, {layout!r})" for layout in layouts),
        f"mesh_swap_faults.failures({size}, PATH)",
        f"mesh_swap_faults.limits({size}, PATH)",
        f"mesh_swap.churn({size}, PATH, {steps})",
    )


def test_on_replicas_and_refusals(tmp_path: pathlib.Path) -> None:
    shapes = [(2, 1), (2, 2), (4, 2)] if is_exhaustive() else [(2, 2)]
    steps = 400 if is_exhaustive() else 100
    _run(
        tmp_path,
        *(f"mesh_swap.on_replicas({r}, {p}, PATH, {steps})" for r, p in shapes),
        "mesh_swap_faults.refusals(PATH)",
    )


@pytest.mark.parametrize("size", [2, 4] if is_exhaustive() else [2])
def test_the_engine_preempts_by_swapping(size: int, tmp_path: pathlib.Path) -> None:
    _run(tmp_path, f"mesh_swap.engine({size}, PATH)")
