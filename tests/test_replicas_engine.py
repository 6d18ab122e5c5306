"""`serving.Engine` over pools with replicas (replica_engine.py has the programs)."""

from __future__ import annotations

import pytest
from covering import is_exhaustive
from mesh_rig import EIGHT_DEVICES
from subprocesses import run_python


@pytest.mark.parametrize(
    "programs",
    [
        "outputs pressure prefixes cancellations failures faults refusals",
        *(["explicit", "local placing siblings guesses"] if is_exhaustive() else []),
    ],
)
def test_the_engine_over_replicas(programs: str) -> None:
    run_python(
        f"import replica_engine; replica_engine.run(*{programs.split()!r})",
        env=EIGHT_DEVICES,
        timeout=600,
    )


def test_nothing_is_compiled_after_warm_up() -> None:
    run_python("import replica_engine; replica_engine.compiled()", env=EIGHT_DEVICES, timeout=360)
