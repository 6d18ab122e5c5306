"""Pools whose slots are split over a mesh axis (replica_*.py have the programs)."""

from __future__ import annotations

import pytest
from covering import is_exhaustive
from mesh_rig import EIGHT_DEVICES
from subprocesses import run_python


def _run(*calls: str) -> None:
    """Runs programs in one process with eight devices."""
    modules = sorted({call.split(".")[0] for call in calls})
    run_python("\n".join([f"import {', '.join(modules)}", *calls]), env=EIGHT_DEVICES, timeout=360)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (4, 2)])
def test_host_calls_by_slots_of_the_whole_pool(shape: tuple[int, int]) -> None:
    steps = 400 if is_exhaustive() else 75
    _run(
        *(f"replica_host.{name}{shape}" for name in ("verbs", "prefixes", "out_of_blocks")),
        f"replica_host.memory{shape}",
        f"replica_host.churn{(*shape, steps)}",
    )


@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (4, 2)] if is_exhaustive() else [(2, 2)])
def test_a_call_or_program_that_fails_on_one_replica(shape: tuple[int, int]) -> None:
    _run(
        f"replica_faults.failures{shape}",
        f"replica_faults.broken_promises{shape}",
        f"replica_faults.failed_programs{shape}",
    )


def test_ops_refusals_and_blocks_that_programs_map() -> None:
    attention = [(2, 1, 4, "Auto"), (2, 4, 2, "Auto"), (2, 2, 4, "Explicit")]
    steps = [(2, 2, "Auto"), (2, 1, "Explicit")]
    if is_exhaustive():
        attention += [(4, 1, 4, "Auto"), (8, 1, 2, "Auto"), (4, 2, 1, "Explicit")]
        steps += [(4, 2, "Auto"), (8, 1, "Auto"), (4, 2, "Explicit")]
    _run(
        *(f"replica_attention.plain_jit{case}" for case in attention),
        *(f"replica_attention.in_shard_map{case}" for case in steps),
        *(f"replica_attention.mapped_in_programs{shape}" for shape in ((8, 1), (2, 2))),
        *(f"replica_attention.grown_under_jit{shape}" for shape in ((2, 1), (2, 2), (4, 2))),
        "replica_attention.refused_batches()",
        "replica_faults.refusals()",
    )
