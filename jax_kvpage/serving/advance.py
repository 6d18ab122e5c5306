"""Counts the tokens of a plan as computed, and undoes that for groups that memory refused."""

import dataclasses
from collections.abc import Collection

import numpy as np

from jax_kvpage.serving.plan import StepPlan
from jax_kvpage.serving.request import Sequence, SequenceGroup
from jax_kvpage.serving.rows import Rows
from jax_kvpage.serving.running import RunningSet

__all__ = ["advance", "start_from", "take_back", "without"]


def advance(rows: Rows, running: RunningSet, plan: StepPlan) -> StepPlan:
    """Counts the tokens that a plan runs, and those that it samples.

    Returns:
        The plan, with `ending` set to the positions of sequences that reach their limit.
    """
    decodes = plan.rows[: plan.num_decodes]
    rows.computed[decodes] += 1
    rows.known[decodes] += 1
    ending: list[int] = (rows.known[decodes] >= rows.limit[decodes]).nonzero()[0].tolist()
    for position in range(plan.num_decodes, len(plan.rows)):
        sequence, row = plan.sequences[position], plan.rows[position]
        rows.computed[row] += plan.counts[position]
        running.advanced(sequence)
        if plan.samples[position]:
            rows.known[row] += 1
            running.prefilled(sequence)
            if rows.known[row] >= rows.limit[row]:
                ending.append(position)
        elif sequence.group.request.lockstep and rows.computed[row] == rows.known[row] - 1:
            running.prefilled(sequence)
    if not ending:
        return plan
    for position in ending:
        rows.set_decoding(int(plan.rows[position]), False)
    return dataclasses.replace(plan, ending=tuple(ending))


def start_from(
    rows: Rows, running: RunningSet, plan: StepPlan, sequence: Sequence, num_cached: int
) -> StepPlan:
    """Starts an admitted sequence from an earlier token; it runs as many tokens as planned.

    Because it has more to compute than was planned, it does not sample.

    Returns:
        The changed plan.
    """
    begins, samples = plan.begins.copy(), plan.samples.copy()
    position = plan.sequences.index(sequence) if sequence in plan.sequences else -1
    rows.computed[sequence.row] = num_cached
    if position >= 0:
        rows.computed[sequence.row] += plan.counts[position]
        rows.known[sequence.row] -= samples[position]
        begins[position], samples[position] = num_cached, False
    if sequence not in running.prefilling:
        running.unprefilled(sequence)
    running.caches(sequence.group, num_cached)
    return dataclasses.replace(
        plan,
        admissions=tuple(
            dataclasses.replace(a, num_cached=num_cached) if a.sequence is sequence else a
            for a in plan.admissions
        ),
        begins=begins,
        samples=samples,
        ending=tuple(place for place in plan.ending if place != position),
    )


def take_back(
    rows: Rows, running: RunningSet, plan: StepPlan, groups: Collection[SequenceGroup]
) -> list[SequenceGroup]:
    """Undoes what a plan did for some groups.

    Returns:
        The groups that the plan had admitted; they wait again.
    """
    for position, sequence in enumerate(plan.sequences):
        if sequence.group not in groups:
            continue
        row = sequence.row
        rows.computed[row] = plan.begins[position]
        rows.known[row] -= plan.samples[position]
        if position < plan.num_decodes:
            rows.set_decoding(row, not sequence.finish_reason)
        elif sequence not in running.prefilling:
            running.unprefilled(sequence)
    for fork in plan.forks:
        if fork.parent.group in groups:
            running.unfork(fork)
    started = [a.sequence.group for a in plan.admissions if a.sequence.group in groups]
    for group in started:
        running.unstart(group)
    return started


def without(
    plan: StepPlan, groups: Collection[SequenceGroup], refused: Collection[Sequence]
) -> StepPlan:
    """Returns a plan without some groups.

    Args:
        plan: the full plan.
        groups: groups that do not run.
        refused: sequences that did not get their memory. Others in the same groups may have got
            theirs.
    """
    kept = [i for i, sequence in enumerate(plan.sequences) if sequence.group not in groups]
    place = {old: new for new, old in enumerate(kept)}
    rows = {sequence.row for sequence in refused}
    extended = np.asarray([row not in rows for row in plan.extend_rows.tolist()], bool)
    return dataclasses.replace(
        plan,
        forks=tuple(fork for fork in plan.forks if fork.parent.group not in groups),
        admissions=tuple(a for a in plan.admissions if a.sequence.group not in groups),
        extend_rows=plan.extend_rows[extended],
        extend_tokens=plan.extend_tokens[extended],
        rows=plan.rows[kept],
        begins=plan.begins[kept],
        counts=plan.counts[kept],
        samples=plan.samples[kept],
        sequences=tuple(plan.sequences[i] for i in kept),
        num_decodes=sum(i < plan.num_decodes for i in kept),
        ending=tuple(place[i] for i in plan.ending if i in place),
    )
