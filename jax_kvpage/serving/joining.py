"""Joins the step plans of several replicas into one plan."""

from collections.abc import Sequence

import numpy as np

from jax_kvpage.serving.plan import StepPlan

__all__ = ["joined"]


def joined(plans: Sequence[StepPlan], first_rows: Sequence[int]) -> StepPlan:
    """Returns one plan, with row indices across all replicas.

    As in the plan of one replica, decoding sequences come first, sorted by row.

    Args:
        plans: plan of each replica, all of the same step.
        first_rows: index of row 0 of each replica among all rows.
    """
    decodes = [(plan, range(plan.num_decodes)) for plan in plans]
    parts = [(plan, range(plan.num_decodes, len(plan.sequences))) for plan in plans]
    order = [*decodes, *parts]
    ending, begin = [], 0
    for plan, positions in order:
        ending += [begin + i - positions.start for i in plan.ending if i in positions]
        begin += len(positions)

    def column(name: str) -> np.ndarray:
        arrays = [getattr(plan, name)[own.start : own.stop] for plan, own in order]
        return np.concatenate(arrays)

    counts = [len(positions) for _, positions in order]
    shifts = np.repeat([*first_rows, *first_rows], counts).astype(np.int32)
    grown = [plan.extend_rows + first for plan, first in zip(plans, first_rows, strict=True)]
    return StepPlan(
        step=plans[0].step,
        finished=tuple(group for plan in plans for group in plan.finished),
        preempted=tuple(group for plan in plans for group in plan.preempted),
        swap=tuple(group for plan in plans for group in plan.swap),
        release=tuple(
            row + first
            for plan, first in zip(plans, first_rows, strict=True)
            for row in plan.release
        ),
        forks=tuple(fork for plan in plans for fork in plan.forks),
        admissions=tuple(admission for plan in plans for admission in plan.admissions),
        extend_rows=np.concatenate(grown).astype(np.int32),
        extend_tokens=np.concatenate([plan.extend_tokens for plan in plans]),
        rows=column("rows") + shifts,
        begins=column("begins"),
        counts=column("counts"),
        samples=column("samples"),
        sequences=tuple(plan.sequences[i] for plan, positions in order for i in positions),
        num_decodes=sum(plan.num_decodes for plan in plans),
        ending=tuple(ending),
        num_stalled=sum(plan.num_stalled for plan in plans),
        free_blocks=sum(plan.free_blocks for plan in plans),
    )
