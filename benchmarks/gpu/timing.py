"""Times device work with the host clock, over queues long enough to make errors negligible.

A sample queues whole cycles (each over all copies of a case, so that nothing is still in the cache
in the next cycle) for about 20 ms, and waits once at the end: the 20 microseconds of the wait are
then a thousandth. Launch costs are included where the device becomes idle, as in a program.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Ready", "copy_bandwidth", "measure"]

_SAMPLE_SECONDS = 0.02
_FEWEST_SAMPLES = 5


@dataclasses.dataclass
class Ready:
    """A case that is set up.

    Attributes:
        run: queues a number of cycles over all copies.
        wait: waits until all queued work is done.
        output: returns the result for the first copy, float32 `[tokens, q_heads, dim]`.
        calls: number of attention calls in a cycle, and of copies.
        close: frees all memory.
        notes: additional facts about this setup.
    """

    run: Callable[[int], None]
    wait: Callable[[], None]
    output: Callable[[], np.ndarray]
    calls: int
    close: Callable[[], None] = lambda: None
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


def _sample(run: Callable[[int], None], wait: Callable[[], None], cycles: int) -> float:
    begin = time.perf_counter()
    run(cycles)
    wait()
    return time.perf_counter() - begin


def measure(
    run: Callable[[int], None], wait: Callable[[], None], calls: int, seconds: float
) -> dict[str, Any]:
    """Measures seconds per call.

    Args:
        run: queues a number of cycles.
        wait: waits for them.
        calls: number of calls in a cycle.
        seconds: time to spend on samples, after warming up.

    Returns:
        The median over samples, their quartiles, the fastest one, and the number of samples.
    """
    _sample(run, wait, 2)  # compiles, loads, creates handles
    once = max(_sample(run, wait, 1), 1e-6)
    cycles = max(1, round(_SAMPLE_SECONDS / once))
    deadline = time.perf_counter() + seconds
    samples: list[float] = []
    while len(samples) < _FEWEST_SAMPLES or time.perf_counter() < deadline:
        samples.append(_sample(run, wait, cycles) / (cycles * calls))
    low, median, high = statistics.quantiles(samples, n=4)
    return {
        "seconds": median,
        "seconds_low": low,
        "seconds_high": high,
        "seconds_best": min(samples),
        "samples": len(samples),
        "cycles": cycles,
    }


def copy_bandwidth(
    run: Callable[[int], None], wait: Callable[[], None], num_bytes: int, seconds: float = 0.3
) -> float:
    """Bytes read plus written per second by a copy of `num_bytes` (each way) on the device."""
    return 2 * num_bytes / measure(run, wait, 1, seconds)["seconds"]
