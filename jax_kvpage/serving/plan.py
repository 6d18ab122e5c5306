"""The plan of a step: memory changes, and the tokens that each sequence runs."""

import dataclasses

import numpy as np

from jax_kvpage.serving.request import Sequence, SequenceGroup

__all__ = ["Admission", "Fork", "StepPlan"]

_NONE = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class Admission:
    """A sequence that gets a slot.

    Attributes:
        sequence: the sequence; it already has a row.
        num_tokens: tokens to map room for.
        num_cached: leading tokens that are in the prefix cache; the rest run in this plan and later
            ones.
    """

    sequence: Sequence
    num_tokens: int
    num_cached: int


@dataclasses.dataclass(frozen=True, slots=True)
class Fork:
    """Siblings that share the prompt of another sequence.

    Attributes:
        parent: the sequence that computed the prompt, in an earlier plan.
        children: sequences that get slots.
        num_tokens: shared tokens.
        room: tokens to map room for, for each child.
    """

    parent: Sequence
    children: tuple[Sequence, ...]
    num_tokens: int
    room: tuple[int, ...]


@dataclasses.dataclass(slots=True)
class StepPlan:
    """One step. Carry it out in the order of the attributes, then ask for the next plan.

    Row i of the batch is a sequence that runs `counts[i]` tokens starting at position `begins[i]`.
    The first `num_decodes` rows are decoding sequences, sorted by row, which run their newest token
    and their drafts. The others run parts of prompts, or of tokens lost in a preemption.

    Attributes:
        step: number of the plan.
        finished: groups that ended since the previous plan.
        preempted: groups that lose their memory now and go back to the queue.
        swap: preempted groups to swap out before their rows are released, so that their tokens are
            kept.
        release: rows whose slots are released, including those of preempted groups.
        forks: siblings that share a prompt.
        admissions: sequences that get new slots.
        extend_rows: int32[e]: rows that need more room.
        extend_tokens: int32[e]: total tokens that each of these rows must have room for.
        rows: int32[s]: row of each running sequence.
        begins: int32[s]: tokens computed before.
        counts: int32[s]: tokens to run.
        samples: bool[s]: whether a token is sampled after the last one.
        sequences: the sequence in each of `rows`.
        num_decodes: how many of `rows` decode.
        ending: positions in `rows` whose sampled token is the last because the limit is reached.
        num_stalled: sequences that wait for blocks in this step and keep their memory.
        free_blocks: free blocks that the plan could use; 0 if it needed none.
    """

    step: int
    finished: tuple[SequenceGroup, ...]
    preempted: tuple[SequenceGroup, ...]
    swap: tuple[SequenceGroup, ...]
    release: tuple[int, ...]
    forks: tuple[Fork, ...]
    admissions: tuple[Admission, ...]
    extend_rows: np.ndarray
    extend_tokens: np.ndarray
    rows: np.ndarray
    begins: np.ndarray
    counts: np.ndarray
    samples: np.ndarray
    sequences: tuple[Sequence, ...]
    num_decodes: int
    ending: tuple[int, ...]
    num_stalled: int
    free_blocks: int

    @property
    def num_tokens(self) -> int:
        """Tokens that the step runs."""
        return int(self.counts.sum())

    def again(self) -> "StepPlan":
        """Returns the plan of the next step, in which the same sequences decode one more token.

        All sequences must decode, and nothing may have ended or need memory since.
        """
        return StepPlan(
            step=self.step + 1,
            finished=(),
            preempted=(),
            swap=(),
            release=(),
            forks=(),
            admissions=(),
            extend_rows=_NONE,
            extend_tokens=_NONE,
            rows=self.rows,
            begins=self.begins + 1,
            counts=self.counts,
            samples=self.samples,
            sequences=self.sequences,
            num_decodes=self.num_decodes,
            ending=(),
            num_stalled=0,
            free_blocks=0,
        )

    @property
    def is_empty(self) -> bool:
        """Whether no sequence runs.

        If requests are unfinished, released blocks are still draining: wait for the device before
        asking for the next plan.
        """
        return not self.sequences
