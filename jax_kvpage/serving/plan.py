"""The plan of a step: changes of memory, and the tokens that each sequence runs."""

import dataclasses

import numpy as np

from jax_kvpage.serving.request import Sequence, SequenceGroup

__all__ = ["Admission", "Fork", "StepPlan"]


@dataclasses.dataclass(frozen=True, slots=True)
class Admission:
    """A sequence that gets a slot.

    Attributes:
        sequence: it has its row already.
        num_tokens: room to map.
        num_cached: its first tokens that are in the prefix cache; the others run in this plan and
            later ones.
    """

    sequence: Sequence
    num_tokens: int
    num_cached: int


@dataclasses.dataclass(frozen=True, slots=True)
class Fork:
    """Siblings that start with the prompt of another sequence.

    Attributes:
        parent: the sequence that computed the prompt, in an earlier plan.
        children: sequences that get slots.
        num_tokens: tokens that they share.
        room: tokens to map room for, for each child.
    """

    parent: Sequence
    children: tuple[Sequence, ...]
    num_tokens: int
    room: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Carry it out in the order of the attributes, then ask for the next.

    Row i of the batch is a sequence that runs `counts[i]` tokens from position `begins[i]` on. The
    first `num_decodes` rows are sequences that run their newest token, and their drafts; they are
    sorted by row. The others run parts of prompts, or of tokens lost in a preemption.

    Attributes:
        step: number of the plan.
        finished: groups that ended since the previous plan.
        preempted: groups that lose their memory now and return to the queue.
        swap: those of them that are swapped out before their rows are released, so that their
            tokens are kept.
        release: rows whose slots are released, those of preempted groups included.
        forks: slots that share a prompt.
        admissions: new slots.
        extend_rows: int32[e]: rows that need more room.
        extend_tokens: int32[e]: for each, tokens to have room for in all.
        rows: int32[s]: row of each sequence that runs.
        begins: int32[s]: tokens that are computed before.
        counts: int32[s]: tokens to run.
        samples: bool[s]: whether a token is sampled after the last of them.
        sequences: the sequence in each of `rows`.
        num_decodes: how many of them decode.
        ending: positions in `rows` whose token is the last: the limit is reached.
        num_stalled: sequences that wait in this step, with their memory, for blocks.
        free_blocks: blocks that were free when the plan was made; 0 if it needs none.
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

    @property
    def is_empty(self) -> bool:
        """Whether no sequence runs.

        With unfinished requests left, released blocks are still draining: wait for the device
        before the next plan.
        """
        return not self.sequences
