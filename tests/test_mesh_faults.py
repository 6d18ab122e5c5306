"""An op that fails on one device of a mesh leaves no other device waiting in a collective
(mesh_faults.py has the programs; if a device did wait, XLA would abort the process after 40 s)."""

from __future__ import annotations

import pytest
from covering import is_exhaustive
from mesh_rig import EIGHT_DEVICES
from subprocesses import run_python

# (replicas, devices per replica)
_SHAPES = [(2, 1), (4, 1), (2, 2), (4, 2)]
_ALL = [(1, 2), (1, 4), (1, 8), *_SHAPES]


def _shapes(step: str) -> list[tuple[int, int]]:
    return (
        _SHAPES if is_exhaustive() else [{"shard_map": (2, 2), "jit": (2, 1), "scan": (4, 1)}[step]]
    )


def _run(*calls: str) -> None:
    run_python("\n".join(["import mesh_faults", *calls]), env=EIGHT_DEVICES, timeout=150)


@pytest.mark.parametrize("step", ["shard_map", "jit", "scan"])
def test_a_replica_that_gets_a_free_slot(step: str) -> None:
    _run(*(f"mesh_faults.bad_slot{(*shape, step)}" for shape in _shapes(step)))


@pytest.mark.parametrize("step", ["shard_map", "jit", "scan"])
def test_a_device_that_has_less_room(step: str) -> None:
    shapes = _ALL if is_exhaustive() else [(2, 2) if step == "jit" else (1, 2)]
    _run(*(f"mesh_faults.less_room{(*shape, step)}" for shape in shapes))


def test_no_collectives_and_ops_outside_of_programs() -> None:
    _run(
        *(f"mesh_faults.no_collectives{shape}" for shape in [(1, 2), (2, 1), (2, 2)]),
        *(f"mesh_faults.outside_of_programs{shape}" for shape in [(1, 2), (2, 2)]),
    )
