"""Forks siblings from the sequence that computed their prompt."""

from collections.abc import Callable

from jax_kvpage.serving.builder import StepBuilder
from jax_kvpage.serving.request import Sequence
from jax_kvpage.serving.rows import Rows
from jax_kvpage.serving.running import RunningSet

__all__ = ["fork_ready"]


def fork_ready(
    rows: Rows, running: RunningSet, step: StepBuilder, end: Callable[[Sequence, str], None]
) -> None:
    """Forks siblings whose prompt an earlier plan computed; groups that lack room are blocked.

    Args:
        rows: per-row arrays.
        running: running groups.
        step: the plan to add the forks to.
        end: called to end siblings that have nothing left to compute.
    """
    usable, slots = step.usable, step.slots + running.promised_slots
    for group in list(running.forking):
        donor, shared = group.donor, group.request.num_shared_tokens
        if donor is None or rows.computed[donor.row] < shared:
            continue
        for child in list(group.unforked):
            if max(child.num_tokens, shared + 1) >= group.limit:
                end(child, group.limit_reason)
        if not group.unforked:
            continue
        blocks = int(rows.promised[group.index])
        if blocks > usable or len(group.unforked) > slots:
            step.blocked.append(group)
            continue
        usable -= blocks
        slots -= len(group.unforked)
        step.forks.append(running.fork(group))
