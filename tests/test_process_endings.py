"""Processes that diverge, or die (process_endings.py has the programs)."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from covering import num_cases
from process_rig import END_WITHIN, ended, run_processes, started


def test_calls_that_differ_are_found_and_named() -> None:
    run_processes("import process_endings as p; p.divergence()")


@pytest.mark.exhaustive  # waits for time limits
def test_absent_and_interrupted_processes() -> None:
    run_processes("import process_endings as p; p.absence(); p.interrupts()", timeout=3)


def _killed(case: int) -> None:
    rng = random.Random(case)
    victim = case % 2
    with started("import process_endings as p; p.work()", timeout=600) as processes:
        for process in processes:
            assert process.stdout is not None
            while (line := process.stdout.readline()) and "working" not in line:
                pass
        time.sleep(rng.uniform(0, 1.5))
        processes[victim].kill()
        begin = time.monotonic()
        found = ended(processes, END_WITHIN)[1 - victim]
        print(f"process {1 - victim}: {found.status} after {time.monotonic() - begin:.1f} s")
    assert found.status != 0
    # JAX's message, or whichever collective or call on the pool reported it first.
    assert "another task died" in found.err or "Traceback" in found.err, found


@pytest.mark.exhaustive  # waits for time limits
def test_when_a_process_is_killed_the_others_end() -> None:
    # In parallel, since the survivors mostly wait.
    with ThreadPoolExecutor(2) as executor:
        list(executor.map(_killed, range(num_cases(2, 20))))
